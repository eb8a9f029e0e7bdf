"""Whole runs of a teacher against real servers: what is written, asked again, given to the fallback, and paid."""

import json
from dataclasses import replace

import pytest

from agiqa.errors import BusyStore, ConfigError, DataError, RemoteError, SettingsConflict
from agiqa.extract import load_data_set
from agiqa.extract.data.journals import Journal
from agiqa.extract.teaching.apis import api_of
from agiqa.extract.teaching.asking import TeacherModel
from agiqa.extract.teaching.client import ClientSettings, Key
from agiqa.extract.teaching.explanations import KEYS
from agiqa.extract.teaching.lesson import Lesson, Splits, TeachingSettings
from agiqa.extract.teaching.questions import QuestionSettings
from agiqa.extract.teaching.tables import Price
from agiqa.extract.teaching.teaching import run_teaching
from tests.extract.small_sets import write_set
from tests.extract.teaching.providers import (
    FALLBACK,
    KEY,
    MODEL,
    answer_of,
    bad_image,
    broken_json,
    dies,
    explains,
    explanation,
    fails,
    refuses,
    says,
    slow,
    truncated,
    unknown_model,
    wrong_key,
    wrong_schema,
)
from tests.extract.teaching.wire_formats import PROVIDERS

ITEMS = 12
QUICK = ClientSettings(tries=3, first_wait=0.01, patience=0.0, timeout=10.0)
PRICE = Price(input=100.0, output=1000.0)
"""High, so that small requests cost visible sums."""
QUALITY = QuestionSettings(aspects=("quality",), max_tokens=100)
SETTINGS = TeachingSettings(question=QUALITY, client=QUICK, jobs=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Items whose prompts differ: `a picture 0`, ..."""
    folder = write_set(tmp_path_factory.mktemp("set"), ITEMS, images=True)
    table = (folder / "data.csv").read_text().splitlines()
    cells = [line.split(",") for line in table]
    lines = [",".join([row[0], f"picture-{number}-", *row[2:]]) for number, row in enumerate(cells[1:])]
    (folder / "data.csv").write_text("\n".join([table[0], *lines]) + "\n")
    return load_data_set(folder, variant="no_id", images=True)


@pytest.fixture(params=PROVIDERS)
def server(request):
    with PROVIDERS[request.param]() as running:
        yield running


@pytest.fixture
def openai():
    with PROVIDERS["openai"]() as running:
        yield running


def teacher(server, model=MODEL, price=None):
    return TeacherModel(
        api=api_of(server.API, server.base_url), model=model, key=Key(variable="A_KEY", value=server.key), price=price
    )


def run(data, out, *models, splits=None, **changes):
    rule = Splits(of=splits or {item.name: item.split for item in data.items}, rule={"by": "table"})
    return run_teaching(data, out, models, replace(SETTINGS, **changes), splits=rule)


def lines_of(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["name"]: line for line in lines}


def prompt_of(number):
    return f"picture-{number}-"


def name_of(number):
    return f"{number:03d}.png"


def test_every_item_gets_its_own_answer_and_what_the_journal_says_of_it(server, data, tmp_path):
    out = tmp_path / "teacher.jsonl"
    result = run(data, out, teacher(server, price=PRICE)).as_dict()
    assert (result["items"], result["explained"], result["asked"]) == (ITEMS, ITEMS, ITEMS)
    assert server.most_at_once <= 4
    lines = lines_of(out)
    for item in data.items:
        (request,) = server.about(item.prompt)
        assert request.images == (item.image.read_bytes(),)
        line = lines[item.name]
        assert line["explanations"] == {"quality": explanation(request, "quality_explanation")}
        assert line["id"] == request.item_id
        assert (line["status"], line["attempts"], line["model"], line["api"]) == ("ok", 1, MODEL, server.API)
        assert line["served_model"].startswith(f"{MODEL}-")
        tokens = line["tokens"]
        assert tokens["input"] == 20 + len(request.text) // 4 + 258
        assert tokens["output"] == 1 + len(line["raw"]) // 4
        assert line["cost_usd"] == pytest.approx((100 * tokens["input"] + 1000 * tokens["output"]) / 1e6)
    assert result["cost_usd"] == pytest.approx(sum(line["cost_usd"] for line in lines.values()))
    provenance = json.loads((tmp_path / "teacher.provenance.json").read_text())
    assert provenance["teacher"] == {"api": server.API, "model": MODEL}
    assert "{scores}" in provenance["question"]["text"]
    assert provenance["prices"] == {MODEL: {"input": 100.0, "output": 1000.0}}


@pytest.mark.parametrize("behaviour", [broken_json, wrong_schema, says("I like it."), truncated, fails(500)])
def test_a_broken_answer_is_asked_for_again(server, data, tmp_path, behaviour):
    server.script(behaviour, behaviour, about=prompt_of(3))
    result = run(data, tmp_path / "t.jsonl", teacher(server)).as_dict()
    assert result["explained"] == ITEMS
    assert len(server.about(prompt_of(3))) == 3
    assert lines_of(tmp_path / "t.jsonl")[name_of(3)]["attempts"] == 3


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (broken_json, "no whole JSON object"),
        (wrong_schema, "id: Field required"),
        (says("{I like it}"), "Invalid JSON"),
        (says(lambda request: json.dumps(answer_of(request) | {"id": "another"})), "the id 'another'"),
        (says(lambda request: json.dumps(answer_of(request))[:40], cut=True), "cut off after 100 tokens"),
        (says(lambda request: json.dumps(answer_of(request) | {"quality_explanation": "MOS"})), "gives away"),
    ],
)
def test_what_stays_broken_is_kept_as_failed_with_its_text(openai, data, tmp_path, behaviour, reason):
    openai.always(behaviour, about=prompt_of(5))
    out = tmp_path / "t.jsonl"
    result = run(data, out, teacher(openai, price=PRICE)).as_dict()
    assert (result["explained"], result["failed"]) == (ITEMS - 1, 1)
    assert len(openai.about(prompt_of(5))) == 3
    line = lines_of(out)[name_of(5)]
    assert (line["status"], line["explanations"]) == ("failed", {})
    assert reason in line["reason"]
    assert line["raw"]
    one = next(other for other in lines_of(out).values() if other["status"] == "ok")
    assert line["cost_usd"] > 1.5 * one["cost_usd"]  # all three answers are paid for
    assert name_of(5) not in (tmp_path / "t.quality.jsonl").read_text()


@pytest.mark.parametrize(("api", "kind"), [(api, kind) for api in PROVIDERS for kind in PROVIDERS[api].REFUSALS])
def test_a_refusal_goes_to_the_fallback(api, kind, data, tmp_path):
    with PROVIDERS[api]() as server, PROVIDERS["openai"]() as other:
        server.always(refuses(kind), about=prompt_of(2))
        out = tmp_path / "t.jsonl"
        result = run(data, out, teacher(server), teacher(other, FALLBACK)).as_dict()
        assert result["explained"] == ITEMS
        assert [request.model for request in other.requests] == [FALLBACK]
        assert len(server.about(prompt_of(2))) == 1
    line = lines_of(out)[name_of(2)]
    assert (line["status"], line["model"], line["api"]) == ("ok", FALLBACK, "openai")
    (refusal,) = line["refusals"]
    assert refusal["model"] == MODEL
    assert refusal["reason"]


def test_a_refusal_of_all_is_kept_and_asked_again_only_on_request(server, data, tmp_path):
    kind = server.REFUSALS[0]
    server.always(refuses(kind), about=prompt_of(2))
    out = tmp_path / "t.jsonl"
    first = run(data, out, teacher(server), teacher(server, FALLBACK)).as_dict()
    assert (first["explained"], first["refused"]) == (ITEMS - 1, 1)
    line = lines_of(out)[name_of(2)]
    assert [refusal["model"] for refusal in line["refusals"]] == [MODEL, FALLBACK]
    assert "PROHIBITED" in line["reason"]
    count = len(server.requests)
    run(data, out, teacher(server))
    assert len(server.requests) == count
    server.calm()
    again = run(data, out, teacher(server), retry_failed=True).as_dict()
    assert len(server.requests) == count + 1
    assert (again["asked"], again["explained"], again["refused"]) == (1, ITEMS, 0)


def test_a_rejected_image_fails_alone(server, data, tmp_path):
    server.always(bad_image, about=prompt_of(0))
    result = run(data, tmp_path / "t.jsonl", teacher(server, price=PRICE), jobs=1).as_dict()
    assert (result["explained"], result["failed"]) == (ITEMS - 1, 1)
    line = lines_of(tmp_path / "t.jsonl")[name_of(0)]
    assert "Unable to process input image" in line["reason"]
    assert line["cost_usd"] == 0.0
    assert len(server.about(prompt_of(0))) == 1


def test_an_item_that_the_server_never_serves_fails_alone(server, data, tmp_path):
    server.always(fails(500), about=prompt_of(ITEMS - 1))
    result = run(data, tmp_path / "t.jsonl", teacher(server), jobs=1).as_dict()
    assert (result["explained"], result["failed"]) == (ITEMS - 1, 1)
    assert lines_of(tmp_path / "t.jsonl")[name_of(ITEMS - 1)]["fault"] == "unserved"


@pytest.mark.parametrize("behaviour", [bad_image, fails(500)], ids=["400", "500"])
def test_a_server_that_serves_nobody_stops_the_run_and_blames_no_item(server, data, tmp_path, behaviour):
    server.always(behaviour)
    out = tmp_path / "t.jsonl"
    with pytest.raises(RemoteError, match="served none of the last 10 requests"):
        run(data, out, teacher(server), jobs=2)
    assert out.read_text() == ""
    server.calm()
    assert run(data, out, teacher(server)).as_dict()["explained"] == ITEMS


@pytest.mark.parametrize("behaviour", [wrong_key, unknown_model], ids=["key", "model"])
def test_a_wrong_key_or_model_stops_at_once_with_nothing_spent(server, data, tmp_path, behaviour):
    server.always(behaviour)
    with pytest.raises(RemoteError, match="Check the"):
        run(data, tmp_path / "t.jsonl", teacher(server, price=PRICE))
    assert len(server.requests) <= 4  # one per thread
    assert (tmp_path / "t.jsonl").read_text() == ""


def test_a_server_that_dies_in_the_middle_costs_nothing_twice(server, data, tmp_path):
    server.script(dies, about=prompt_of(6))
    out = tmp_path / "t.jsonl"
    with pytest.raises(RemoteError, match="no connection"):
        run(data, out, teacher(server))
    done = lines_of(out)
    assert len(done) < ITEMS
    conversations = tmp_path / "t.quality.jsonl"
    assert sorted(json.loads(line)["id"] for line in conversations.read_text().splitlines()) == sorted(done)
    count = len(server.requests)
    server.start()
    result = run(data, out, teacher(server)).as_dict()
    assert (result["asked"], result["explained"]) == (ITEMS - len(done), ITEMS)
    assert len(server.requests) == count + ITEMS - len(done)
    assert {name: line for name, line in lines_of(out).items() if name in done} == done


def test_the_budget_is_never_exceeded_and_a_larger_one_goes_on(server, data, tmp_path):
    out = tmp_path / "t.jsonl"
    result = run(data, out, teacher(server, price=PRICE), budget=0.7).as_dict()
    assert result["stopped"] == "budget"
    assert 0 < result["explained"] < ITEMS
    assert result["explained"] == len(server.requests)  # also what was in flight is there
    most = (100 * 1.5 * 1000 + 1000 * 100) / 1e6
    assert 0.7 - most < result["total_cost_usd"] <= 0.7
    more = run(data, out, teacher(server, price=PRICE), budget=0.7).as_dict()
    assert (more["asked"], more["stopped"]) == (0, "budget")
    rest = run(data, out, teacher(server, price=PRICE), budget=100.0).as_dict()
    assert (rest["explained"], rest["stopped"], len(server.requests)) == (ITEMS, None, ITEMS)


def test_a_budget_needs_prices(openai, data, tmp_path):
    with pytest.raises(ConfigError, match=r"price of teacher-1.*--prices: `servers: \[\{url: "):
        run(data, tmp_path / "t.jsonl", teacher(openai), budget=1.0)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_cost_is_null(openai, data, tmp_path):
    result = run(data, tmp_path / "t.jsonl", teacher(openai)).as_dict()
    assert (result["cost_usd"], result["total_cost_usd"]) == (None, None)
    assert {line["cost_usd"] for line in lines_of(tmp_path / "t.jsonl").values()} == {None}


def test_a_second_run_sends_nothing(server, data, tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(server))
    before = out.read_bytes()
    result = run(data, out, teacher(server)).as_dict()
    assert (result["asked"], result["explained"], len(server.requests)) == (0, ITEMS, ITEMS)
    assert out.read_bytes() == before
    assert f"resume: {ITEMS} of {ITEMS} items are done already" in capsys.readouterr().err


def test_a_torn_line_is_asked_about_again(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(openai))
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])
    assert run(data, out, teacher(openai)).as_dict()["asked"] == 1
    assert len(lines_of(out)) == ITEMS


@pytest.mark.parametrize(
    ("changes", "model", "said"),
    [
        ({"question": replace(QUALITY, blind=True)}, MODEL, "blind was False, and is True now"),
        ({"question": replace(QUALITY, max_tokens=5)}, MODEL, "max_tokens was 100"),
        ({}, FALLBACK, "teacher.model was 'teacher-1'"),
    ],
)
def test_a_journal_of_other_settings_is_refused(openai, data, tmp_path, changes, model, said):
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(openai))
    with pytest.raises(SettingsConflict, match=said):
        run(data, out, teacher(openai, model), **changes)
    assert len(openai.requests) == ITEMS


def test_a_journal_of_other_items_is_refused(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(openai))
    fewer = replace(data, items=data.items[1:])
    with pytest.raises(SettingsConflict, match=r"explains '000\.png', which is not in this data set"):
        run(fewer, out, teacher(openai))
    changed = replace(data, items=(replace(data.items[0], prompt="other"), *data.items[1:]))
    with pytest.raises(SettingsConflict, match=r"'000\.png', which has another image or prompt now"):
        run(changed, out, teacher(openai))
    out.write_text("{}\n")
    with pytest.raises(DataError, match="line 1 is no line of `agiqa teach`"):
        run(data, out, teacher(openai))


def test_two_runs_do_not_write_to_one_journal(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    lesson = Lesson(data, out, [teacher(openai)], SETTINGS, Splits(of={}, rule={}))
    with lesson.journal.writing(), pytest.raises(BusyStore, match="Another run is writing"):
        run(data, out, teacher(openai), splits={})
    assert openai.requests == []


def test_a_dry_run_sends_and_writes_nothing(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    lesson = Lesson(data, out, [teacher(openai, price=PRICE)], SETTINGS, Splits(of={}, rule={}))
    estimate = lesson.dry_run()
    assert (openai.requests, list(tmp_path.iterdir())) == ([], [])
    sent, received = estimate["tokens"]["input"], estimate["tokens"]["output"]
    assert (estimate["requests"], received) == (ITEMS, ITEMS * 750)
    assert estimate["cost_usd"] == pytest.approx((100 * sent + 1000 * received) / 1e6)
    run(data, out, teacher(openai))
    real = sum(line["tokens"]["input"] for line in lines_of(out).values())
    assert 0.5 * real < sent < 2 * real


def test_an_estimate_learns_from_the_journal(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    openai.always(refuses("refusal"), about=prompt_of(1))
    run(data, out, teacher(openai))
    settings = replace(SETTINGS, retry_failed=True)
    rule = Splits(of={}, rule={"by": "table"})
    estimate = Lesson(data, out, [teacher(openai)], settings, rule).dry_run()
    usual = [line["tokens"]["output"] for line in lines_of(out).values() if line["status"] == "ok"]
    assert (estimate["requests"], estimate["cost_usd"]) == (1, None)
    assert estimate["tokens"]["output"] == round(sum(usual) / len(usual))


def test_the_progress_tells_what_is_spent_and_expected(openai, data, tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    result = run(data, out, teacher(openai, price=PRICE)).as_dict()
    spent = f"{result['cost_usd']:.2f}"
    assert f"teach: {ITEMS}/{ITEMS} items in" in capsys.readouterr().err.replace(
        f", {spent} of about {spent} USD", " $"
    )
    run(data, out, teacher(openai))
    assert "price of teacher-1 is not known" not in capsys.readouterr().err  # nothing was left to ask


def test_the_key_is_in_no_file(server, data, tmp_path):
    server.script(says(f"key: {KEY}"), about=prompt_of(1))
    server.script(lambda one, _: one.error(400, "x", f"bad key {KEY}"), about=prompt_of(2))
    run(data, tmp_path / "t.jsonl", teacher(server), teacher(server, FALLBACK))
    assert len(list(tmp_path.iterdir())) == 3
    for path in tmp_path.iterdir():
        assert KEY not in path.read_text()


def test_the_answers_of_aspects_are_not_mixed_up(openai, tmp_path):
    folder = write_set(tmp_path / "set", 4, images=True)
    rows = [line.split(",") for line in (folder / "data.csv").read_text().splitlines()]
    rows = [[*row, "mos_align" if number == 0 else str(number)] for number, row in enumerate(rows)]
    (folder / "data.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    loaded = load_data_set(folder, variant="no_id", images=True)
    both = TeachingSettings(question=QuestionSettings(aspects=("quality", "correspondence")), client=QUICK)
    run_teaching(loaded, tmp_path / "t.jsonl", [teacher(openai)], both, splits=Splits(of={}, rule={}))
    for line in lines_of(tmp_path / "t.jsonl").values():
        for aspect, text in line["explanations"].items():
            assert text.startswith(f"The {KEYS[aspect].removesuffix('_explanation')} of this image")
    assert sorted(path.name for path in tmp_path.glob("t.*.jsonl")) == ["t.correspondence.jsonl", "t.quality.jsonl"]


def test_a_slow_answer_holds_up_no_other(openai, data, tmp_path):
    openai.script(slow(), about=prompt_of(0))
    seen = []
    openai.always(
        lambda one, request: (seen.append(request), one.release(), explains(one, request))[2], about=prompt_of(11)
    )
    assert run(data, tmp_path / "t.jsonl", teacher(openai)).as_dict()["explained"] == ITEMS
    assert len(seen) == 1


def test_a_journal_remembers_the_last_line_of_an_item(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", {"a": 1}, command="agiqa x", verb="has")
    with journal.writing():
        journal.append([{"name": "n", "item_sha256": "0", "value": 1}])
        journal.append([{"name": "n", "item_sha256": "0", "value": 2}])
    again = Journal(tmp_path / "j.jsonl", {"a": 1}, command="agiqa x", verb="has")
    assert [line["value"] for line in again.lines.values()] == [2]
