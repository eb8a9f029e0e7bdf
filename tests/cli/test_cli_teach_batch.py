"""`agiqa teach --batch` as a process: killed at each step, at random moments and by Ctrl-C, it pays for nothing twice."""

import json
import random

import pytest

from tests.command_line import KEY, KEY_VARIABLE
from tests.extract.small_sets import write_set
from tests.extract.teaching.batch_providers import BATCH_PROVIDERS
from tests.extract.teaching.providers import MODEL, answer_of, tokens_of

ITEMS = 4


@pytest.fixture(params=BATCH_PROVIDERS)
def server(request):
    with BATCH_PROVIDERS[request.param]() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), ITEMS, images=True)


def teach(server, folder, out, *more):
    where = ["--api", server.API, "--teacher", MODEL, "--base-url", server.base_url, "--key-env", KEY_VARIABLE]
    return ["teach", folder, out, *where, "--batch", "--poll", "0.03", "--patience", "0.1", *more]


def check(server, folder, out):
    """Every item is explained as the server explained its image, and was paid for once."""
    images = {path.read_bytes(): path.name for path in (folder / "images").iterdir()}
    answers = {images[request.images[0]]: answer_of(request)["quality_explanation"] for request in server.paid}
    lines = {line["name"]: line["explanations"]["quality"] for line in map(json.loads, out.read_text().splitlines())}
    assert lines == answers
    assert len(server.paid) == len(lines) == ITEMS
    assert not [path.name for path in out.parent.iterdir() if "batch" in path.name or "results" in path.name]


def test_a_run_to_its_end_and_what_it_says(agiqa, server, folder, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text(f'servers: [{{url: "", batch: 0.5, models: {{{MODEL}: {{input: 2.0, output: 8.0}}}}}}]')
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "teacher.jsonl"
    command = teach(server, folder, out, "--prices", prices, "--batch-requests", 3)
    plan = agiqa(*command, "--dry-run", "--json").json
    assert plan["batches"] == {"open": 0, "requests_in_work": 0, "to_create": 2}
    assert plan["price"] == {"input": 1.0, "output": 4.0}
    assert (server.requests, list(out.parent.iterdir())) == ([], [])
    told = agiqa(*command, "--json")
    result = told.json
    assert (result["explained"], result["missing"]) == (ITEMS, 0)
    assert result["batches"] == {"open": [], "not_worked_on": [], "misplaced": 0}
    tokens = [tokens_of(request, json.dumps(answer_of(request))) for request in server.paid]
    assert result["cost_usd"] == pytest.approx(sum(given + 4.0 * made for given, made in tokens) / 1e6, abs=1e-6)
    assert plan["cost_usd"] > result["cost_usd"]
    check(server, folder, out)
    assert " of about 0.0" in told.err.replace("\r", "")
    assert len(server.store.batches) == 2
    written = b"".join(path.read_bytes() for path in out.parent.iterdir()) + told.out.encode() + told.err.encode()
    assert KEY.encode() not in written


def test_ctrl_c_while_waiting_leaves_the_batch_to_the_next_run(agiqa, server, folder, tmp_path):
    server.polls = None
    out = tmp_path / "teacher.jsonl"
    stopped = agiqa.interrupted(*teach(server, folder, out), after="created")
    assert stopped.code == 130
    assert "run the same command again to fetch the answers" in stopped.err
    alone = [argument for argument in teach(server, folder, out) if argument != "--batch"]
    assert "open batches. Go on with --batch" in agiqa(*alone).err
    told = agiqa(*teach(server, folder, out, "--no-wait"))
    assert (told.code, "open batches" in told.out) == (0, True)
    server.finish()
    assert agiqa(*teach(server, folder, out, "--no-wait", "--json")).json["asked"] == ITEMS
    check(server, folder, out)


def test_killed_at_the_first_request_then_at_the_second_and_so_on(agiqa, server, folder, tmp_path):
    out, kills = tmp_path / "teacher.jsonl", 0
    server.polls = None
    command = teach(server, folder, out, "--batch-requests", 1)
    for number in range(1, 10):
        enough = len(server.requests) + number
        killed = agiqa.killed(*command, when=lambda enough=enough: len(server.requests) >= enough)
        server.wait_until_idle()
        kills += killed.code == -9
        if number == 5:
            server.finish()
        if killed.code == 0:
            break
    assert kills >= 5
    assert agiqa(*command).code == 0
    check(server, folder, out)


def test_killed_at_random_moments(agiqa, server, folder, tmp_path):
    out, rng, kills = tmp_path / "teacher.jsonl", random.Random(0), 0
    server.polls = None
    command = teach(server, folder, out, "--batch-requests", 1)
    for number in range(9):
        seen = len(server.requests)
        killed = agiqa.killed(*command, when=lambda seen=seen: len(server.requests) > seen, delay=rng.uniform(0.0, 0.1))
        kills += killed.code == -9
        server.wait_until_idle()
        if number == 4:
            server.finish()
    assert kills >= 5
    assert agiqa(*command).code == 0
    check(server, folder, out)
