"""Batches from the questions to the journal, against loopback servers of both providers."""

import json

import pytest

from agiqa.errors import DataError, RemoteError, SettingsConflict
from agiqa.extract.teaching.answers import KEYS
from agiqa.extract.teaching.apis import api_of
from agiqa.extract.teaching.batch_apis import _KINDS as KINDS
from agiqa.extract.teaching.batch_records import records_path, refuse_open_batches
from agiqa.extract.teaching.batch_steps import BatchSettings
from agiqa.extract.teaching.client import ClientSettings, Key
from agiqa.extract.teaching.questions import QuestionSettings
from agiqa.extract.teaching.teacher import TeacherModel
from tests.extract.small_sets import write_set
from tests.extract.teaching.batch_providers import BATCH_PROVIDERS, swapped
from tests.extract.teaching.batch_runs import DONE, PRICE, Taught
from tests.extract.teaching.providers import (
    FALLBACK,
    MODEL,
    answer_of,
    bad_image,
    broken_json,
    fails,
    refuses,
    says,
    tokens_of,
)


@pytest.fixture(params=BATCH_PROVIDERS)
def server(request):
    with BATCH_PROVIDERS[request.param]() as running:
        yield running


def test_all_items_in_one_batch(taught, server):
    result, outcome = taught.run()
    assert {name: line["explanations"] for name, line in taught.lines().items()} == taught.expected()
    assert len(server.store.batches) == 1
    assert sorted(request.item_id for request in server.paid) == sorted(line["id"] for line in taught.lines().values())
    assert (result.asked, result.missing, outcome.as_dict()) == (
        8,
        0,
        {"open": [], "not_worked_on": [], "misplaced": 0},
    )
    tokens = [tokens_of(one, json.dumps(answer_of(one))) for one in server.paid]
    cost = sum(given * 1.0 + made * 4.0 for given, made in tokens) / 1e6
    assert result.cost == pytest.approx(cost, abs=1e-6)
    assert {line["batch"] for line in taught.lines().values()} == {
        "batch-0" if server.API == "openai" else "batches/batch-0"
    }
    assert taught.files() == DONE
    before = len(server.requests)
    assert taught.run()[0].asked == 0
    assert len(server.requests) == before


@pytest.mark.parametrize("deliver", [lambda lines: lines[::-1], swapped], ids=["out of order", "swapped keys"])
def test_answers_find_their_images_whatever_the_keys(taught, server, deliver):
    server.deliver = deliver
    _, outcome = taught.run()
    assert {name: line["explanations"] for name, line in taught.lines().items()} == taught.expected()
    assert outcome.misplaced == (8 if deliver is swapped else 0)
    assert len(server.paid) == 8


def test_refusals_among_swapped_keys_are_asked_again(taught, server):
    server.deliver = swapped
    refused = server.paid
    server.script(refuses(server.REFUSALS[0]), about="a picture 1")
    taught.run()
    assert {line["status"] for line in taught.lines().values()} == {"ok"}
    assert {name: line["explanations"] for name, line in taught.lines().items()} == taught.expected()
    assert len(refused) == 9


def test_what_a_batch_leaves_is_kept_and_the_rest_asked_in_the_next_run(taught, server):
    server.end = "expired"
    server.deliver = lambda lines: lines[:5]
    result, outcome = taught.run()
    assert (result.asked, result.missing, len(outcome.left)) == (5, 3, 3)
    assert taught.files() == DONE
    server.deliver = list
    result, _ = taught.run()
    assert (result.asked, result.missing) == (3, 0)
    assert len(server.paid) == 8 + 3
    assert {name: line["explanations"] for name, line in taught.lines().items()} == taught.expected()


def test_lines_with_errors_refusals_and_broken_answers(taught, server):
    taught.fallback = True
    server.script(refuses(server.REFUSALS[0]), about="a picture 0")
    server.script(bad_image, about="a picture 1")
    server.script(broken_json, about="a picture 2")
    server.script(broken_json, broken_json, broken_json, broken_json, about="a picture 3")
    taught.run()
    lines = taught.lines()
    assert [lines[f"{number:03d}.png"]["status"] for number in range(8)] == [
        *["ok"] * 2,
        "failed",
        "ok",
        *["ok"] * 2,
        *["failed"] * 2,
    ]
    assert lines["000.png"]["model"] == FALLBACK
    assert [one["model"] for one in lines["000.png"]["refusals"]] == [MODEL]
    assert "input image" in lines["002.png"]["reason"]
    assert [lines[name]["attempts"] for name in ("000.png", "004.png", "006.png", "001.png")] == [2, 2, 2, 1]
    assert lines["006.png"]["explanations"] == {}
    assert {request.model for request in server.paid} == {MODEL, FALLBACK}
    first, second = [
        tokens_of(one, json.dumps(answer_of(one))[: None if number else -7])
        for number, one in enumerate(server.about_image(taught.folder / "images" / "004.png"))
    ]
    cost = (first[0] + second[0] + 4.0 * (first[1] + second[1])) / 1e6
    assert lines["004.png"]["cost_usd"] == pytest.approx(cost, abs=1e-8)


def test_limits_make_several_batches(taught, server):
    taught.run(BatchSettings(interval=0.01, most_requests=3))
    assert [len(batch.lines) for batch in server.store.batches.values()] == [3, 3, 2]
    assert {name: line["explanations"] for name, line in taught.lines().items()} == taught.expected()


def test_the_size_of_files_makes_several_batches_and_refuses_what_fits_into_none(taught, server, monkeypatch):
    taught.run(BatchSettings(interval=0.01, most_requests=1))
    sizes = [
        len(content) for name, content in server.store.files.items() if b"contents" in content or b"messages" in content
    ]
    monkeypatch.setattr(KINDS[server.API], "most_bytes", 3 * max(sizes))
    taught.out.unlink()
    server.store.batches.clear()
    taught.run()
    assert [len(batch.lines) for batch in server.store.batches.values()] == [3, 3, 2]
    taught.out.unlink()
    monkeypatch.setattr(KINDS[server.API], "most_bytes", max(sizes) - 1)
    with pytest.raises(DataError, match=r"item '.*\.png': a request of \d+ bytes, of which a batch takes"):
        taught.run()


def test_a_run_that_was_killed_after_writing_its_lines_writes_them_once(taught, server):
    server.polls = None
    taught.run(BatchSettings(interval=0.01, wait=False))
    records = records_path(taught.out)
    as_killed = records.read_bytes()
    server.finish()
    taught.run()
    lines = taught.out.read_bytes()
    records.write_bytes(as_killed)
    result, outcome = taught.run()
    assert (result.asked, outcome.left, taught.out.read_bytes()) == (0, set(), lines)
    assert taught.files() == DONE
    assert len(server.paid) == 8


def test_what_a_kill_left_of_a_closed_batch_is_removed(taught, server):
    """The run was killed after it had forgotten its last batch, and before it removed the files."""
    server.polls = None
    taught.run(BatchSettings(interval=0.01, wait=False))
    records = json.loads(records_path(taught.out).read_text())
    server.finish()
    taught.run()
    tag = records["batches"][0]["tag"]
    records_path(taught.out).write_text(json.dumps(records | {"batches": []}))
    for left in (f"teacher.{tag}.results.jsonl", "teacher.batch-requests.jsonl"):
        (taught.out.parent / left).write_text("{}\n")
    assert taught.run()[0].asked == 0
    assert taught.files() == DONE
    assert len(server.paid) == 8


def test_teacher_and_fallback_may_be_of_two_providers(folder, tmp_path):
    with BATCH_PROVIDERS["gemini"]() as server, BATCH_PROVIDERS["openai"](key="another-key") as other:
        taught = Taught(server, folder, tmp_path / "teacher.jsonl")
        api = api_of("openai", other.base_url)
        taught.others = [TeacherModel(api=api, model=FALLBACK, key=Key(variable="L", value="another-key"), price=PRICE)]
        server.script(refuses("prompt"), refuses("SAFETY"), about="a picture 3")
        taught.run()
        lines = taught.lines()
        assert [line["api"] for _, line in sorted(lines.items())] == [*["gemini"] * 6, *["openai"] * 2]
        assert [one["reason"] for one in lines["007.png"]["refusals"]] == ["SAFETY"]
        server.paid += other.paid
        answered = [request for request in server.paid if request.model == FALLBACK or "picture 3" not in request.text]
        server.paid[:] = answered
        assert {name: line["explanations"] for name, line in lines.items()} == taught.expected()


def test_batches_never_exceed_the_budget_and_learn_what_answers_cost(server, tmp_path):
    """The answers are much longer than the usual 750 tokens, as those of a model that thinks."""
    taught = Taught(server, write_set(tmp_path / "set", 60, images=True), tmp_path / "teacher.jsonl")
    long = {KEYS["quality"]: "A word. " * 1000}
    server.default = says(lambda request: json.dumps(answer_of(request) | long))
    one = PRICE.output * len(json.dumps(long)) / 4 / 1e6
    result, outcome = taught.run(budget=30 * one)
    sizes = [len(batch.lines) for batch in server.store.batches.values()]
    assert sum(line["cost_usd"] for line in taught.lines().values()) <= 30 * one
    assert sizes[0] < 10  # of 8192 tokens each, the most that an answer can have
    assert 20 <= result.asked == sum(sizes) < 60
    assert outcome.unaffordable
    assert result.stopped == "budget"
    result, outcome = taught.run(budget=100.0)
    assert (result.missing, result.stopped, len(server.paid)) == (0, None, 60)
    assert len(server.store.batches) == len(sizes) + 1


def test_without_waiting_a_second_run_fetches_the_answers(taught, server):
    server.polls = None
    result, outcome = taught.run(BatchSettings(interval=0.01, wait=False))
    assert (result.asked, len(outcome.open), len(server.paid)) == (0, 1, 8)
    assert records_path(taught.out).exists()
    with pytest.raises(SettingsConflict, match="Go on with --batch"):
        refuse_open_batches(taught.out)
    assert taught.run(BatchSettings(interval=0.01, wait=False))[1].open == outcome.open
    server.finish()
    result, outcome = taught.run(BatchSettings(interval=0.01, wait=False))
    assert (result.asked, outcome.open, len(server.paid)) == (8, [], 8)
    refuse_open_batches(taught.out)


def test_failed_items_that_are_in_a_batch_get_its_answers(taught, server):
    server.script(bad_image, bad_image, about="a picture 2")
    taught.run()
    assert [line["status"] for _, line in sorted(taught.lines().items())].count("failed") == 2
    server.polls = None
    leaving = BatchSettings(interval=0.01, wait=False)
    taught.run(leaving, retry_failed=True)
    assert len(server.paid) == 8 + 2
    server.finish()
    result, _ = taught.run()
    assert (result.asked, len(server.paid)) == (2, 10)
    assert {line["status"] for line in taught.lines().values()} == {"ok"}


def test_tries_that_nothing_continues_are_forgotten(taught, server):
    server.script(broken_json, about="a picture 3")
    server.polls = None
    taught.run(BatchSettings(interval=0.01, wait=False))
    server.finish()
    upload = "POST /upload" if server.API == "gemini" else "POST /v1/files"
    server.always(fails(500), path=upload)
    with pytest.raises(RemoteError):
        taught.run(client=ClientSettings(timeout=5.0, tries=1, patience=0.0))
    assert len(taught.lines()) == 7
    server.calm()
    records = json.loads(records_path(taught.out).read_text())
    assert [len(tries) for tries in records["tries"].values()] == [1]
    taught.fallback = True  # other settings, and no batch is open
    result, _ = taught.run()
    assert (result.missing, result.asked) == (0, 1)
    assert taught.files() == DONE


def test_open_batches_keep_their_settings_and_items(taught, server, tmp_path):
    server.polls = None
    taught.run(BatchSettings(interval=0.01, wait=False))
    with pytest.raises(SettingsConflict, match="blind differs"):
        taught.run(question=QuestionSettings(aspects=("quality",), blind=True))
    taught.fallback = True
    with pytest.raises(SettingsConflict, match="models differs"):
        taught.run()
    taught.fallback = False
    whole, taught.folder = taught.folder, write_set(tmp_path / "other", 8, images=True, seed=1)
    with pytest.raises(SettingsConflict, match=r"has a batch with '000\.png', which has another image or text now"):
        taught.run()
    taught.folder = whole
    path = records_path(taught.out)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DataError, match="restore it, or remove it"):
        taught.run()


def test_an_answer_with_a_foreign_id_is_nobodys(taught, server):
    def lies(request):
        return json.dumps(answer_of(request) | {"id": "0123456789abcdef"})

    server.script(says(lies), says(lies), about="a picture 0")
    taught.run(retries=0)
    lines = taught.lines()
    assert [lines[f"{number:03d}.png"]["status"] for number in range(8)] == [*["failed"] * 2, *["ok"] * 6]
    assert "which no request of the batch has" in lines["000.png"]["reason"]
