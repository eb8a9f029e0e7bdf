"""`agiqa teach` from the command line: both providers, resuming after kills, splits, and what is refused."""

import json
import os
import random
import signal
from collections import Counter

import pytest

from tests.cli.refusals import misuse, refuse
from tests.command_line import KEY, KEY_VARIABLE
from tests.extract.small_sets import read_table, write_set, write_table
from tests.extract.teaching.providers import MODEL, explains, rate_limited, refuses, slow, wrong_key
from tests.extract.teaching.wire_formats import PROVIDERS

ITEMS, KILLED_ITEMS = 8, 80


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), ITEMS, images=True)


@pytest.fixture
def server():
    with PROVIDERS["openai"]() as running:
        yield running


@pytest.fixture
def teach(agiqa):
    """Calls `agiqa teach` with a key that the servers know."""
    yield lambda data, out, server, *options: agiqa(*arguments(data, out, server), *options)
    agiqa.environment = {}


def arguments(data, out, server):
    own = ("--api", server.API, "--base-url", server.base_url, "--teacher", MODEL, "--key-env", KEY_VARIABLE)
    return ("teach", data, out, *own)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("api", PROVIDERS)
def test_a_whole_data_set_and_nothing_more_the_second_time(teach, data, tmp_path, api):
    out = tmp_path / "teacher.jsonl"
    with PROVIDERS[api]() as server:
        first = teach(data, out, server, "--json")
        again = teach(data, out, server)
        assert len(server.requests) == ITEMS
    result = first.json
    assert (result["items"], result["explained"], result["missing"], result["cost_usd"]) == (ITEMS, ITEMS, 0, None)
    assert "price of teacher-1 is not known" in first.err
    assert f"resume: {ITEMS} of {ITEMS} items are done already" in again.err
    assert "explained      8" in again.out
    assert "counted_usd    unknown" in again.out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "teacher.jsonl",
        "teacher.provenance.json",
        "teacher.quality.jsonl",
    ]
    for text in (first.out, first.err, again.out, again.err, *(path.read_text() for path in tmp_path.iterdir())):
        assert KEY not in text


def test_features_of_the_conversations(teach, agiqa, data, server, tiny_text_checkpoint, tmp_path):
    out = tmp_path / "teacher.jsonl"
    teach(data, out, server, "--json").json  # noqa: B018  # asserts success
    talks = tmp_path / "teacher.quality.jsonl"
    told = agiqa(
        "extract", data, tmp_path / "s.agiqa", "--model", tiny_text_checkpoint, "--conversations", talks, "--json"
    )
    assert told.json["items"] == ITEMS
    assert "read the text of a teacher that knew their MOS" in told.err
    labels = ("--labels", data / "data.csv")
    refuse(agiqa("words", out, *labels), "is the journal of `agiqa teach`", "such as teacher.quality.jsonl")
    words = agiqa("words", talks, *labels, "--json").json
    assert (words["n"], words["accuracy"]) == (ITEMS, 1.0)


def test_sigkill_at_20_random_moments_loses_nothing_and_pays_for_nothing_twice(teach, agiqa, server, tmp_path):
    """By the server's own log: once the answer about an item was in the journal, no request about it arrives."""
    data, out, dice = write_set(tmp_path / "set", KILLED_ITEMS, images=True), tmp_path / "t.jsonl", random.Random(0)
    kills = 0
    while kills < 20:
        start, journalled = len(server.requests), lines_of_whole(out)
        new = start + dice.randint(1, 3)
        options = ("--jobs", 2, "--json")
        outcome = agiqa.killed(
            *arguments(data, out, server),
            *options,
            when=lambda new=new: len(server.requests) >= new,
            delay=dice.choice([0.0, 0.002, 0.01]),
        )
        asked = {request.item_id for request in server.requests[start:]}
        assert not asked & {line["id"] for line in journalled}
        assert {line["name"] for line in journalled} <= {line["name"] for line in lines_of_whole(out)}
        kills += outcome.code == -signal.SIGKILL
        if outcome.code == 0:
            break
    assert kills == 20
    result = teach(data, out, server, "--json").json
    assert (result["explained"], result["missing"]) == (KILLED_ITEMS, 0)
    assert len(server.requests) <= KILLED_ITEMS + 2 * kills  # what was in flight, of two jobs
    lines = lines_of(out)
    assert Counter(line["name"] for line in lines) == dict.fromkeys((row["name"] for row in read_table(data)), 1)
    for line in lines:
        *_, last = (request for request in server.requests if request.item_id == line["id"])
        assert json.loads(line["raw"])["id"] == last.item_id
    assert len(lines_of(tmp_path / "t.quality.jsonl")) == KILLED_ITEMS


def lines_of_whole(path):
    """The lines of a file whose last one may be cut off."""
    content = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in content.split("\n")[:-1]]


def test_ctrl_c_keeps_the_answers_that_are_on_their_way(teach, agiqa, data, server, tmp_path):
    server.always(slow(explains))
    out = tmp_path / "t.jsonl"
    outcome = agiqa.interrupted(
        *arguments(data, out, server),
        *("--jobs", 3),
        when=lambda: len(server.requests) == 3,
        then=lambda _, error: "stopping: waiting for the answers" in error and server.release(),
    )
    assert outcome.code == 130
    assert "run the same command again to resume" in outcome.err
    assert len(server.requests) == 3
    assert {line["id"] for line in lines_of(out)} == {request.item_id for request in server.requests}
    assert len(lines_of(tmp_path / "t.quality.jsonl")) == 3
    assert teach(data, out, server, "--json").json["asked"] == ITEMS - 3


def test_a_second_ctrl_c_does_not_wait(teach, agiqa, data, server, tmp_path):
    server.script(explains)
    server.always(slow(explains))
    again = []

    def press(process, error):
        if "Ctrl-C again drops them" in error and not again:
            again.append(process)
            os.killpg(process, signal.SIGINT)

    out = tmp_path / "t.jsonl"
    outcome = agiqa.interrupted(
        *arguments(data, out, server), *("--jobs", 2), when=lambda: len(server.requests) == 3, then=press
    )
    assert outcome.code == 130
    assert len(again) == 1
    assert len(lines_of(out)) == len(lines_of(tmp_path / "t.quality.jsonl")) == 1


def test_drawn_splits_never_share_a_prompt(teach, server, tmp_path):
    rows = [
        [row["name"], row["prompt"], row["mos_quality"]]
        for row in read_table(write_set(tmp_path / "a", 24, images=True))
    ]
    data = write_table(tmp_path / "b", rows, ["name", "prompt", "mos_quality"])
    (data / "images").symlink_to(tmp_path / "a" / "images")
    drawn = []
    for seed in (0, 0, 1):
        out = tmp_path / f"t{len(drawn)}.jsonl"
        assert teach(data, out, server, "--seed", seed).code == 0
        entries = lines_of(out.with_suffix(".quality.jsonl"))
        splits = {entry["prompt"]: set() for entry in entries}
        for entry in entries:
            splits[entry["prompt"]].add(entry["split"])
        assert all(len(parts) == 1 for parts in splits.values())
        drawn.append([entry["split"] for entry in entries])
    assert drawn[0] == drawn[1] != drawn[2]
    assert 3 <= drawn[0].count("test") <= 7
    assert 1 <= drawn[0].count("val") <= 4
    refuse(teach(data, tmp_path / "t0.jsonl", server, "--seed", 5), "splits.seed was 0, and is 5 now")


def test_the_splits_of_the_table_are_kept(teach, data, server, tmp_path):
    out = tmp_path / "t.jsonl"
    assert teach(data, out, server).code == 0
    table = {row["name"]: row["split"] for row in read_table(data)}
    assert {entry["id"]: entry["split"] for entry in lines_of(tmp_path / "t.quality.jsonl")} == table
    refuse(teach(data, tmp_path / "u.jsonl", server, "--split", "prompts"), "DATA has splits")


def test_a_dry_run_needs_no_key_and_sends_nothing(agiqa, data, tmp_path):
    out = tmp_path / "t.jsonl"
    outcome = agiqa("teach", data, out, "--api", "gemini", "--teacher", "gemini-2.5-flash", "--dry-run", "--json")
    estimate = outcome.json
    sent, received = estimate["tokens"]["input"], estimate["tokens"]["output"]
    assert received == 750 * ITEMS
    assert 1120 * ITEMS < sent < 2500 * ITEMS
    assert estimate["cost_usd"] == pytest.approx((0.3 * sent + 2.5 * received) / 1e6, abs=1e-4)
    shown = agiqa("teach", data, out, "--api", "openai", "--teacher", "my-model", "--dry-run")
    assert "cost      unknown" in shown.out
    assert list(tmp_path.iterdir()) == []


def test_a_budget_stops_the_run(teach, data, server, tmp_path):
    prices, out = tmp_path / "prices.yaml", tmp_path / "t.jsonl"
    prices.write_text(f'servers: [{{url: "{server.base_url}/", models: {{{MODEL}: {{input: 0, output: 1000}}}}}}]')
    options = ("--prices", prices, "--max-new-tokens", 100, "--jobs", 2)
    stopped = teach(data, out, server, *options, "--budget", 0.22, "--json")
    assert stopped.code == 1
    result = json.loads(stopped.out)
    assert result["stopped"] == "budget"
    assert 0.12 < result["counted_usd"] <= 0.22
    missing = ITEMS - len(server.requests)
    assert result["missing"] == missing > 0
    assert f"The budget of 0.22 USD allows no further request: {missing} of {ITEMS} items" in stopped.err
    assert teach(data, out, server, *options, "--budget", 10, "--json").json["missing"] == 0


def test_a_fallback_of_another_provider(teach, agiqa, data, server, tmp_path):
    server.always(refuses("content_filter"))
    with PROVIDERS["gemini"]() as other:
        other.key = "another-key-for-the-fallback"
        agiqa.environment |= {"OTHER_KEY": other.key}
        fallback = ("--fallback", "teacher-2", "--fallback-api", "gemini", "--fallback-base-url", other.base_url)
        out = tmp_path / "t.jsonl"
        told = teach(data, out, server, *fallback, "--fallback-key-env", "OTHER_KEY", "--json")
        assert told.json["explained"] == ITEMS
        assert {request.model for request in other.requests} == {"teacher-2"}
    assert {line["model"] for line in lines_of(out)} == {"teacher-2"}
    for text in (told.out, told.err, *(path.read_text() for path in tmp_path.iterdir())):
        assert KEY not in text
        assert other.key not in text


def test_a_server_without_a_key(teach, agiqa, data, server, tmp_path):
    """As a local vLLM or Ollama: no key goes to it, not even the one of the provider."""
    server.key = None
    agiqa.environment |= {"OPENAI_API_KEY": "sk-of-another-server"}
    own = ("--api", "openai", "--base-url", server.base_url, "--teacher", MODEL, "--json")
    assert agiqa("teach", data, tmp_path / "t.jsonl", *own).json["explained"] == ITEMS
    assert all("authorization" not in request.headers for request in server.requests)


def test_aspects_blindness_and_words_of_ones_own(teach, server, tmp_path):
    rows = [[row["name"], row["prompt"]] for row in read_table(write_set(tmp_path / "a", ITEMS, images=True))]
    data = write_table(tmp_path / "b", rows, ["name", "prompt"])
    (data / "images").symlink_to(tmp_path / "a" / "images")
    out = tmp_path / "t.jsonl"
    refuse(teach(data, out, server), "8 problems", "000.png: no MOS of quality and correspondence", "--blind")
    assert server.requests == []
    wording = tmp_path / "own.yaml"
    asks = "About {prompt} {tasks} {id} {example}"
    tasks = "{quality: q, correspondence: c, authenticity: a}"
    wording.write_text(
        f"known: '{{low}} {{high}} {{scores}} {asks}'\nblind: '{asks}'\ntasks: {tasks}\nexample: {tasks}\n"
    )
    options = ("--blind", "--aspect", "authenticity", "--wording", wording, "--no-schema", "--split", "table")
    server.default = lambda one, request: one.answer(
        request, json.dumps({"id": request.text.split()[-4].strip('",'), "authenticity_explanation": "fine"})
    )
    result = teach(data, out, server, *options, "--json").json
    assert result["explained"] == ITEMS
    assert all(request.schema is None for request in server.requests)
    assert server.requests[0].text.startswith("About a picture ")
    entry = lines_of(tmp_path / "t.authenticity.jsonl")[0]
    assert (len(entry["conversations"]), entry["text_author"]) == (3, "teacher-blind")


def test_what_is_refused(teach, agiqa, data, server, tmp_path):
    out = tmp_path / "t.jsonl"
    own = ("--api", "openai", "--teacher", MODEL)
    refuse(agiqa("teach", data, tmp_path / "t.json", *own), "ends in .jsonl")
    agiqa.environment |= {"OPENAI_API_KEY": ""}
    refuse(agiqa("teach", data, out, *own), "needs a key", "OPENAI_API_KEY")
    refuse(teach(data, out, server, "--budget", 1), "--budget needs the price of teacher-1", "--prices")
    refuse(teach(data, out, server, "--mos-range", 0, 1), "outside 0 to 1")
    misuse(teach(data, out, server, "--api", "opnai"), "Did you mean 'openai'")
    misuse(teach(data, out, server, "--aspect", "beauty"), "No aspect is called 'beauty'")
    assert server.requests == []
    server.script(*[wrong_key] * 8)
    refuse(teach(data, out, server), "Check the key in the environment variable", KEY_VARIABLE)
    assert len(server.requests) <= 8
    refuse(teach(data, out, server, "--teacher", "teacher-9"), "does not exist", "Check the name of the model")
    assert lines_of(out) == []


def test_waits_are_told(teach, data, server, tmp_path):
    server.script(rate_limited(1))
    outcome = teach(data, tmp_path / "t.jsonl", server, "--jobs", 1)
    assert outcome.code == 0
    assert "teacher-1: Too many requests. (HTTP status 429); trying again in 1 s" in outcome.err
