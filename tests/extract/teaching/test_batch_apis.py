"""The batch endpoints of both providers, against real servers on loopback."""

import json

import pytest

from agiqa.errors import RemoteError
from agiqa.extract.teaching.answers import answer_schema, read_answer
from agiqa.extract.teaching.apis import api_of
from agiqa.extract.teaching.batch_apis import batch_api_of, read_results
from agiqa.extract.teaching.chats import ChatRequest, Fault, Picture, Reply, Turn
from agiqa.extract.teaching.client import Client, ClientSettings, Key
from tests.extract.teaching import providers
from tests.extract.teaching.batch_providers import BATCH_PROVIDERS
from tests.extract.teaching.providers import KEY, MODEL, answer_of, bad_image, fails, loses, refuses

PICTURE = Picture(content=b"\x89PNG, and the rest", mime="image/png", size=(64, 64))
QUICK = ClientSettings(timeout=20.0, first_wait=0.01, patience=5.0)


def request(name):
    turn = Turn(role="user", text=f"Explain. The id: {name}", picture=PICTURE)
    return ChatRequest(turns=(turn,), schema=answer_schema(["quality"]))


@pytest.fixture(params=BATCH_PROVIDERS)
def server(request):
    with BATCH_PROVIDERS[request.param]() as running:
        yield running


@pytest.fixture
def api(server):
    key = Key(variable="K", value=KEY)
    with Client(api_of(server.API, server.base_url), MODEL, key=key, settings=QUICK) as client:
        yield batch_api_of(client)


def write(api, path, names):
    wire = api._client.api
    lines = [api.line(name, wire.body(MODEL, request(name))) for name in names]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_batch_from_file_to_results(server, api, tmp_path):
    server.script(refuses(server.REFUSALS[0]), about="id: b2")
    server.script(bad_image, about="id: c3")
    path = write(api, tmp_path / "requests.jsonl", ["a1", "b2", "c3"])
    file = api.upload(path)
    assert server.store.files[file] == path.read_bytes()
    created = api.status(api.create(file, "tag-1").json)
    assert created.state == "open"
    assert [one.images for one in server.paid] == [(PICTURE.content,)] * 3
    assert api.look(created.id).state == "open"
    ended = api.look(created.id)
    assert (ended.state, ended.finished) == ("ended", 3)
    results = [one for name in ended.files for one in read_results(api, api.download(name))]
    replies = {one.key: one.reply for one in results}
    assert isinstance(replies["a1"], Reply)
    assert json.loads(replies["a1"].text) == answer_of(server.paid[0])
    assert read_answer(replies["a1"].text, ["quality"]).id == "a1"
    assert isinstance(replies["b2"], Reply)
    assert replies["b2"].refusal is not None
    assert isinstance(replies["c3"], Fault)
    assert (replies["c3"].kind, "input image" in replies["c3"].reason) == ("item", True)


def test_a_batch_is_found_by_its_tag_on_any_page_of_the_list(server, api, tmp_path):
    server.page = 2
    file = api.upload(write(api, tmp_path / "requests.jsonl", ["a1"]))
    made = {tag: api.status(api.create(file, tag).json).id for tag in ("t0", "t1", "t2", "t3", "t4")}
    found = {tag: api.find(tag).id for tag in made}
    assert found == made
    assert len(set(made.values())) == 5
    assert api.find("another") is None


def test_a_creation_whose_answer_is_lost_is_not_sent_again(server, api, tmp_path):
    file = api.upload(write(api, tmp_path / "requests.jsonl", ["a1"]))
    path = "batches" if server.API == "openai" else ":batchGenerateContent"
    server.script(loses(type(server).route), fails(500), path=f"POST /{server.ROOT.strip('/')}")
    sent = api.create(file, "tag-1")
    assert sent.fault.kind == "again"
    assert api.create(file, "tag-2").fault.kind == "again"
    posts = [one for one in server.requests if one.method == "POST" and path in one.path]
    assert len(posts) == 2
    assert len(server.paid) == 1
    assert api.find("tag-1").state == "open"
    assert api.find("tag-2") is None


def test_uploads_and_downloads_are_tried_again(server, api, tmp_path):
    server.script(fails(500), loses(type(server).route), fails(503), path="files")
    path = write(api, tmp_path / "requests.jsonl", ["a1", "b2"])
    file = api.upload(path)
    assert server.store.files[file] == path.read_bytes()
    created = api.status(api.create(file, "tag-1").json)
    server.finish()
    results = api.look(created.id).files
    server.script(fails(500), path="GET /v1/files" if server.API == "openai" else "GET /download")
    assert len(read_results(api, api.download(results[0]))) == 2


@pytest.mark.parametrize(("end", "state"), [("expired", "ended"), ("cancelled", "ended"), ("failed", "failed")])
def test_how_batches_end(server, api, tmp_path, end, state):
    server.end = end
    file = api.upload(write(api, tmp_path / "requests.jsonl", ["a1"]))
    created = api.status(api.create(file, "tag-1").json)
    server.finish()
    status = api.look(created.id)
    assert (status.state, status.word) == (state, end)
    assert bool(status.files) is (state == "ended")
    assert bool(status.problem) is (state == "failed")


def test_requests_that_expired_were_not_worked_on(server, api):
    if server.API == "openai":
        error = {"code": "batch_expired", "message": "This request expired."}
        line = {"id": "x", "custom_id": "a1", "response": None, "error": error}
    else:
        line = {"key": "a1", "error": {"code": 1, "message": "Cancelled."}}
    assert api.result(line).reply is None
    assert read_results(api, b'{"half a line\n' + json.dumps(line).encode() + b"\n[]\n{}\n")[0].key == "a1"


def test_a_file_never_goes_to_another_server(tmp_path):
    with BATCH_PROVIDERS["gemini"]() as server:
        elsewhere = {"x-goog-upload-url": "http://127.0.0.9/upload/session/s0"}
        server.script(lambda *_: providers.Reply(headers=elsewhere), path="POST /upload")
        with Client(api_of("gemini", server.base_url), MODEL, key=Key(variable="K", value=KEY)) as client:
            api = batch_api_of(client)
            with pytest.raises(RemoteError, match="which is not below"):
                api.upload(write(api, tmp_path / "requests.jsonl", ["a1"]))
