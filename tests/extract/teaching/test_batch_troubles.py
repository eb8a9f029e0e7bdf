"""Providers that refuse, fail, lose answers or have no room: batches wait, go on, or say why they cannot."""

import pytest

from agiqa.errors import RemoteError
from agiqa.extract.teaching.batch_records import records_path
from agiqa.extract.teaching.batch_steps import BatchSettings
from agiqa.extract.teaching.client import ClientSettings
from tests.extract.small_sets import write_set
from tests.extract.teaching.batch_providers import BATCH_PROVIDERS
from tests.extract.teaching.batch_runs import Taught
from tests.extract.teaching.providers import (
    KEY,
    Reply,
    bad_image,
    fails,
    loses,
    rate_limited,
)


@pytest.fixture(params=BATCH_PROVIDERS)
def server(request):
    with BATCH_PROVIDERS[request.param]() as running:
        yield running


def test_a_full_queue_makes_batches_smaller_and_holds_them_back(folder, tmp_path):
    with BATCH_PROVIDERS["openai"]() as server:
        taught = Taught(server, folder, tmp_path / "teacher.jsonl")
        server.capacity = 5
        taught.run()
        assert [len(batch.lines) for batch in server.store.batches.values()] == [0, 4, 4]
        assert len(server.paid) == 8
        assert {name: line["explanations"] for name, line in taught.lines().items()} == taught.expected()


def test_a_queue_that_others_fill_is_given_up_after_a_while(folder, tmp_path):
    with BATCH_PROVIDERS["openai"]() as server:
        taught = Taught(server, folder, tmp_path / "teacher.jsonl")
        server.capacity = 0
        with pytest.raises(RemoteError, match=r"no batch could be created for .*Enqueued token limit"):
            taught.run(client=ClientSettings(timeout=20.0, patience=0.1))
        assert server.paid == []
        server.capacity = 8
        taught.run()
        assert len(taught.lines()) == len(server.paid) == 8


def test_a_provider_that_takes_no_batch_now_is_asked_again(taught, server):
    path = "POST /v1/batches" if server.API == "openai" else ":batchGenerateContent"
    server.script(rate_limited(), rate_limited(0.01), fails(503), path=path)
    taught.run()
    assert len(server.store.batches) == 1
    assert len(taught.lines()) == len(server.paid) == 8
    server.always(rate_limited(), path=path)
    taught.out.unlink()
    with pytest.raises(RemoteError, match="no batch could be created for"):
        taught.run(client=ClientSettings(timeout=20.0, patience=0.1))
    assert len(server.paid) == 8


@pytest.mark.parametrize("behaviour", [fails(500), loses()], ids=["500", "no answer"])
def test_an_upload_that_fails_for_good_ends_the_run_and_the_next_goes_on(taught, server, behaviour):
    server.always(behaviour, path="POST /upload" if server.API == "gemini" else "POST /v1/files")
    with pytest.raises(RemoteError):
        taught.run(client=ClientSettings(timeout=5.0, tries=2, first_wait=0.01, patience=0.0))
    assert server.paid == []
    server.calm()
    taught.run()
    assert len(server.paid) == len(taught.lines()) == 8


def test_a_creation_whose_answer_is_lost_is_not_paid_twice(taught, server):
    path = "POST /v1/batches" if server.API == "openai" else ":batchGenerateContent"
    nameless = says_nothing_of(server)
    server.script(loses(type(server).route), fails(500), nameless, path=path)
    taught.run(BatchSettings(interval=0.01, most_requests=4))
    assert [len(batch.lines) for batch in server.store.batches.values()] == [4, 4]
    assert len(server.paid) == len(taught.lines()) == 8


def says_nothing_of(server):
    """The batch is created, and the answer does not name it."""

    def creates(one, request):
        type(server).route(one, request)
        return Reply(body=b"{}")

    return creates


def test_a_damaged_download_loses_no_answer(taught, server):
    """Such as the page of a proxy, or a file that is cut off."""
    whole = server.results
    server.results = lambda batch: whole(batch)[:-20] + b"\n" if server.API == "gemini" else whole(batch)
    if server.API == "openai":
        server.script(lambda *_: Reply(body=b"<html>Log in</html>"), path="/content")
    with pytest.raises(RemoteError, match=r"no JSON\. Run the same command again"):
        taught.run()
    assert taught.out.read_text() == ""
    server.results = whole
    result, _ = taught.run()
    assert (result.asked, len(server.paid)) == (8, 8)


def test_results_that_are_named_late_are_waited_for(taught, server):
    held = server.deliver = lambda _lines: []
    seen, shown = [], server._shown

    def late(batch, *, ended=False):
        answer = shown(batch, ended=ended)
        if ended and server.deliver is held:
            for about in (answer, answer.get("metadata") or {}):
                about.pop("response", None)
                about.pop("output", None)
            seen.append(batch)
            server.deliver = list if len(seen) == 2 else held
        return answer

    server._shown = late
    result, outcome = taught.run()
    assert (result.asked, outcome.left, len(server.paid), len(seen)) == (8, set(), 8, 2)
    server._shown, server.deliver = late, held
    taught.out.unlink()
    seen += [None] * 3
    with pytest.raises(RemoteError, match="names no file of its results"):
        taught.run(client=ClientSettings(timeout=20.0, patience=0.05))
    assert records_path(taught.out).exists()


def test_a_batch_that_fails_as_a_whole_says_why(taught, server):
    server.end = "failed"
    if server.API == "openai":
        server.problem = {"code": "invalid_json_line", "message": "Line 1 is no JSON.", "line": 1}
    with pytest.raises(RemoteError, match=r"no request was worked on: (Line 1 is no JSON|The input file is invalid)"):
        taught.run()
    assert not records_path(taught.out).exists()
    server.end = "completed"
    taught.run()
    assert len(taught.lines()) == 8


def test_a_provider_that_rejects_every_request_is_no_fault_of_the_items(server, tmp_path):
    folder = write_set(tmp_path / "set", 10, images=True)
    taught = Taught(server, folder, tmp_path / "teacher.jsonl")
    server.always(lambda one, _: one.error(400, "invalid_request", "Unsupported parameter."))
    with pytest.raises(RemoteError, match=r"rejects every request, the last one so: .*Unsupported parameter"):
        taught.run()
    assert not taught.out.exists() or taught.out.read_text() == ""
    assert not records_path(taught.out).exists()


def test_a_provider_that_rejects_all_of_few_items_is_not_their_fault_either(taught, server):
    server.always(bad_image)
    with pytest.raises(RemoteError, match="rejects every request"):
        taught.run()
    assert taught.out.read_text() == ""
    server.calm()
    server.script(bad_image)
    result, _ = taught.run(BatchSettings(interval=0.01, most_requests=1))
    assert (result.missing, result.as_dict()["failed"]) == (0, 1)


def test_a_wrong_key_stops_at_once_and_is_in_no_file(taught, server):
    server.key = "another"
    with pytest.raises(RemoteError, match="environment variable K"):
        taught.run()
    assert len(server.requests) == 1
    assert server.paid == []
    server.key = KEY
    server.polls = None
    taught.run(BatchSettings(interval=0.01, wait=False))
    assert KEY.encode() not in b"".join(path.read_bytes() for path in taught.out.parent.iterdir() if path.is_file())
