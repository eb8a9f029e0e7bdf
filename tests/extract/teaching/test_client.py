"""The client against real servers: what it tries again, what it reports, when it gives up, and that no key gets out."""

import json
import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from agiqa.errors import ConfigError, RemoteError
from agiqa.extract.teaching.answers import answer_schema
from agiqa.extract.teaching.apis import api_of
from agiqa.extract.teaching.chats import ChatRequest, Fault, Picture, Reply, Turn
from agiqa.extract.teaching.client import HIDDEN, Client, ClientSettings, Key, MinuteLimits, key_for
from agiqa.store.sharing.transfers import Halted
from tests.extract.teaching.loopback import Reply as Answer
from tests.extract.teaching.providers import (
    KEY,
    MODEL,
    bad_image,
    dies,
    explains,
    fails,
    loses,
    no_json,
    rate_limited,
    refuses,
    says,
    slow,
    truncated,
    unknown_model,
    wrong_key,
)
from tests.extract.teaching.wire_formats import PROVIDERS

QUICK = ClientSettings(tries=3, first_wait=0.01, patience=0.0, timeout=5.0)
PNG = b"\x89PNG not decoded by the server"


def client_of(server, settings=QUICK, *, key=KEY, model=MODEL, halt=None):
    api = api_of(server.API, server.base_url)
    return Client(
        api, model, key=None if key is None else Key(variable="A_KEY", value=key), settings=settings, halt=halt
    )


def request_about(text, picture=None):
    own = Turn(role="user", text=f"id: abc\n{text}", picture=picture)
    return ChatRequest(turns=(own,), schema=answer_schema(["quality"]), max_tokens=50, temperature=0.5, seed=3)


def test_a_chat_with_an_image_arrives_whole_and_the_answer_comes_back(server):
    picture = Picture(content=PNG, mime="image/png", size=(40, 32))
    turns = (
        Turn(role="user", text="What is this?", picture=picture),
        Turn(role="assistant", text="A fox."),
        Turn(role="user", text="Rate it."),
    )
    with client_of(server) as client:
        answered = client.ask(ChatRequest(turns=turns, max_tokens=7))
    (request,) = server.requests
    assert request.turns == (("user", "What is this?"), ("assistant", "A fox."), ("user", "Rate it."))
    assert request.images == (PNG,)
    reply = answered.reply
    assert isinstance(reply, Reply)
    assert reply.text.startswith("The text of this image")
    assert (reply.refusal, reply.cut, reply.finish_reason.lower()) == (None, False, "stop")
    assert (reply.input_tokens, reply.output_tokens) == (20 + len(request.text) // 4 + 258, 1 + len(reply.text) // 4)
    assert (answered.attempts, answered.lost) == (1, 0)


@pytest.mark.parametrize(
    ("behaviour", "lost"),
    [(rate_limited(), 0), (fails(500), 0), (fails(503), 0), (truncated, 1), (no_json, 1), (loses(), 1)],
    ids=["429", "500", "503", "truncated", "no JSON", "no answer"],
)
def test_what_passes_is_tried_again(server, behaviour, lost):
    server.script(behaviour, behaviour)
    with client_of(server) as client:
        answered = client.ask(request_about("x"))
    assert isinstance(answered.reply, Reply)
    assert (answered.attempts, answered.lost, len(server.requests)) == (3, 2 * lost, 3)


@pytest.mark.parametrize("asked", ["0.3", "date"])
def test_the_client_waits_as_long_as_the_server_asks(server, asked):
    if asked == "date" and server.API == "gemini":
        pytest.skip("Gemini names the wait in the body of the answer, in seconds")
    until = datetime.now(UTC) + timedelta(seconds=2)
    server.script(rate_limited(format_datetime(until, usegmt=True) if asked == "date" else asked))
    with client_of(server, ClientSettings(first_wait=1e-6)) as client:
        client.ask(request_about("x"))
    first, second = (request.at for request in server.requests)
    assert second - first >= (0.3 if asked == "0.3" else 0.9)  # dates have whole seconds


def test_a_wait_longer_than_the_patience_ends_the_run(server):
    server.script(rate_limited(7200))
    with client_of(server) as client, pytest.raises(RemoteError, match="asks to wait for 7200 seconds") as caught:
        client.ask(request_about("x"))
    assert caught.value.retry_after == 7200
    assert len(server.requests) == 1


def test_an_answer_that_does_not_come_is_lost(server):
    server.script(slow(), slow())
    settings = ClientSettings(timeout=0.2, tries=3, first_wait=0.01)
    with client_of(server, settings) as client:
        answered = client.ask(request_about("x"))
    assert isinstance(answered.reply, Reply)
    assert (answered.attempts, answered.lost) == (3, 2)


def test_an_answer_that_drips_for_ever_is_lost(server, monkeypatch):
    """As white space that keeps the connection open, while nobody works on the answer."""
    monkeypatch.setattr("agiqa.extract.teaching.client._SLOWEST", 0.02)
    server.script(lambda *_: Answer(body=b" " * 1000, drips=0.01))
    settings = ClientSettings(timeout=5.0, tries=3, first_wait=0.01)
    with client_of(server, settings) as client:
        answered = client.ask(request_about("x"))
    assert isinstance(answered.reply, Reply)
    assert (answered.attempts, answered.lost) == (2, 1)


def test_a_request_that_always_fails_is_reported_if_others_succeed(server):
    server.script(fails(500), fails(500), slow(fails(500)), about="cursed")
    found = []
    with client_of(server, ClientSettings(tries=3, first_wait=0.01)) as client:
        asking = threading.Thread(target=lambda: found.append(client.ask(request_about("cursed"))))
        asking.start()
        server.wait_for(3)
        assert isinstance(client.ask(request_about("blessed")).reply, Reply)
        server.release()
        asking.join()
    assert isinstance(found[0].reply, Fault)
    assert found[0].reply.kind == "unserved"
    assert "3 times" in found[0].reply.reason


def test_a_request_that_a_reachable_server_never_serves_is_reported_after_a_while(server):
    server.always(fails(500))
    with client_of(server) as client:
        reply = client.ask(request_about("x")).reply
    assert isinstance(reply, Fault)
    assert (reply.kind, len(server.requests)) == ("unserved", 3)


def test_a_server_that_is_gone_ends_the_run(server):
    server.script(explains, dies)
    with client_of(server) as client:
        client.ask(request_about("x"))
        with pytest.raises(RemoteError, match="no connection"):
            client.ask(request_about("x"))


def test_a_server_that_limits_for_ever_ends_the_run(server):
    server.always(rate_limited())
    with client_of(server) as client, pytest.raises(RemoteError, match="Too many requests"):
        client.ask(request_about("x"))
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [(wrong_key, "Check the key in the environment variable A_KEY"), (unknown_model, f"the model, '{MODEL}'")],
    ids=["key", "model"],
)
def test_what_no_request_can_mend_ends_the_run_at_once(server, behaviour, said):
    server.always(behaviour)
    with client_of(server) as client, pytest.raises(RemoteError, match=said) as caught:
        client.ask(request_about("x"))
    assert caught.value.refused
    assert len(server.requests) == 1


def test_a_missing_key_is_named(server):
    with client_of(server, key=None) as client, pytest.raises(RemoteError, match="environment variable that holds"):
        client.ask(request_about("x"))


def test_a_spent_account_is_not_waited_for():
    with PROVIDERS["openai"]() as server:
        server.always(lambda one, _: one.error(429, "insufficient_quota", "You exceeded your current quota."))
        with client_of(server) as client, pytest.raises(RemoteError, match=r"quota.*account"):
            client.ask(request_about("x"))
        assert len(server.requests) == 1


def test_a_rejected_image_is_the_fault_of_its_item(server):
    server.always(bad_image)
    with client_of(server) as client:
        reply = client.ask(request_about("x")).reply
    assert isinstance(reply, Fault)
    assert (reply.kind, reply.reason) == ("item", "Unable to process input image. (HTTP status 400)")


@pytest.mark.parametrize(("api", "kind"), [(api, kind) for api in PROVIDERS for kind in PROVIDERS[api].REFUSALS])
def test_every_refusal_is_one(api, kind):
    with PROVIDERS[api]() as server, client_of(server) as client:
        server.script(refuses(kind))
        reply = client.ask(request_about("x")).reply
    if isinstance(reply, Fault):
        assert reply.kind == "refused"
        assert reply.reason.startswith("content_filter: ")
    else:
        assert reply.refusal
        assert reply.text == ""


def test_thoughts_are_no_part_of_the_answer_but_cost_tokens():
    parts = [{"text": "let me see", "thought": True}, {"text": "A "}, {"text": "fox."}]
    usage = {"promptTokenCount": 5, "candidatesTokenCount": 2, "thoughtsTokenCount": 40}
    answer = {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}], "usageMetadata": usage}
    reply = api_of("gemini").read(answer)
    assert (reply.text, reply.output_tokens) == ("A fox.", 42)


@pytest.mark.parametrize("api", PROVIDERS)
@pytest.mark.parametrize("answer", [[], {"message": "hello"}, "x", 3])
def test_json_of_another_format_is_told(api, answer):
    with pytest.raises(RemoteError, match="does not speak"):
        api_of(api).read(answer)


def test_the_key_is_in_no_answer_and_no_message(server, caplog):
    """Even if the server repeats it in an answer, an error or a header."""
    caplog.set_level(logging.DEBUG)
    server.script(says(f"my key is {KEY}"), lambda one, _: one.error(400, "x", f"bad key {KEY}"))
    server.always(lambda one, _: one.error(404, "x", f"no model for {KEY}"))
    with client_of(server) as client:
        assert client.ask(request_about("x")).reply.text == f"my key is {HIDDEN}"
        assert HIDDEN in client.ask(request_about("x")).reply.reason
        with pytest.raises(RemoteError, match="no model for") as caught:
            client.ask(request_about("x"))
    assert KEY not in f"{caught.value} {caplog.text} {Key(variable='A_KEY', value=KEY)!r}"
    assert all(KEY not in request.path for request in server.requests)


def test_halt_ends_a_wait(server):
    server.always(rate_limited(1000))
    halt = threading.Event()
    with client_of(server, ClientSettings(), halt=halt) as client:
        timer = threading.Timer(0.05, halt.set)
        timer.start()
        with pytest.raises(Halted):
            client.ask(request_about("x"))
        with pytest.raises(Halted):
            client.ask(request_about("x"))
        timer.join()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://there/v1", "http://[::1", "http://.../v1", f"http://{'a' * 70}.org/v1"]
)
def test_what_is_no_url_of_a_server_is_told(url):
    with pytest.raises(ConfigError, match="not the URL of a server"), Client(api_of("openai", url), MODEL) as client:
        client.ask(request_about("x"))


def test_an_error_that_comes_as_a_success_is_one():
    """As routers of several providers send it."""

    def late(status):
        body = {"error": {"message": "Provider returned error", "code": status}}
        return lambda *_: Answer(body=json.dumps(body).encode())

    with PROVIDERS["openai"]() as server, client_of(server) as client:
        server.script(late(502), late("overloaded"))
        answered = client.ask(request_about("x"))
        assert isinstance(answered.reply, Reply)
        assert (answered.attempts, answered.lost) == (3, 0)
        server.script(late(400))
        assert client.ask(request_about("x")).reply.kind == "item"


def test_halves_of_characters_and_mad_numbers_of_the_server_harm_nothing():
    usage = {"prompt_tokens": 10**400, "completion_tokens": 5}
    answer = {"choices": [{"message": {"content": "a \ud83d"}, "finish_reason": "\ud83d"}], "usage": usage}
    reply = api_of("openai").read(answer)
    assert (reply.text, reply.finish_reason, reply.input_tokens, reply.output_tokens) == ("a ?", "?", None, 5)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (None, "max_completion_tokens"),
        ("https://eu.api.openai.com/v1", "max_completion_tokens"),
        ("https://me.openai.azure.com/openai/v1/", "max_completion_tokens"),
        ("https://not-openai.com/v1", "max_tokens"),
        ("http://localhost:8000/v1", "max_tokens"),
    ],
)
def test_the_limit_on_tokens_has_the_name_that_the_server_knows(url, name):
    body = api_of("openai", url).body(MODEL, request_about("x"))
    assert {key: value for key, value in body.items() if "tokens" in key} == {name: 50}


def test_a_prompt_that_openai_flags_is_refused_and_not_rejected():
    error = {"error": {"message": "Your prompt was flagged.", "code": "invalid_prompt"}}
    assert api_of("openai").fault(400, error).kind == "refused"


@pytest.mark.parametrize("limits", [(3, None), (None, 30)])
def test_limits_hold_in_every_window(limits):
    """7 requests of 10 tokens, at most 3 in any window."""
    window, tested = 0.15, MinuteLimits(*limits, window=0.15)
    before, after = [], []
    while len(after) < 7:
        now = time.monotonic()
        wait = tested.wait_for(10)
        if wait == 0:
            before.append(now)
            after.append(time.monotonic())
        time.sleep(wait)
    assert all(later - earlier >= window for earlier, later in zip(before, after[3:], strict=False))


@pytest.mark.parametrize("limit", [{"requests_per_minute": 2}, {"tokens_per_minute": 25}], ids=str)
def test_the_client_keeps_to_its_limits(server, limit):
    halt = threading.Event()
    with client_of(server, ClientSettings(**limit), halt=halt) as client:
        for _ in range(2):
            client.ask(request_about("x"), tokens=10)
        timer = threading.Timer(0.1, halt.set)
        timer.start()
        with pytest.raises(Halted):
            client.ask(request_about("x"), tokens=10)
        timer.join()
    assert len(server.requests) == 2


def test_a_request_beyond_the_limit_goes_alone():
    limits = MinuteLimits(None, 100, window=0.05)
    assert limits.wait_for(1000) == 0
    assert limits.wait_for(1) > 0


@pytest.mark.parametrize("url", ["https://me:secret@there/v1", "https://there/v1?key=secret"])
def test_no_key_in_a_url(url):
    with pytest.raises(ConfigError, match="The base URL of there holds") as caught:
        api_of("openai", url)
    assert "secret" not in str(caught.value)


def test_a_server_that_was_never_there_is_told_soon(server):
    server.stop()
    settings = ClientSettings(tries=100, first_wait=0.01)
    with client_of(server, settings) as client, pytest.raises(RemoteError, match="no connection"):
        client.ask(request_about("x"))


def test_a_long_complaint_of_the_server_is_cut(server):
    server.always(lambda one, _: one.error(400, "x", "data " * 10_000))
    with client_of(server) as client:
        assert len(client.ask(request_about("x")).reply.reason) < 600


def test_where_the_key_comes_from(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    assert key_for(api_of("openai"), None) == Key(variable="OPENAI_API_KEY", value=KEY)
    assert key_for(api_of("openai", "http://localhost:1/v1"), None) is None  # the key of one server is not for another
    assert key_for(api_of("openai", "http://localhost:1/v1"), "OPENAI_API_KEY").value == KEY
    with pytest.raises(ConfigError, match="GEMINI_API_KEY has none"):
        key_for(api_of("gemini"), None)
    monkeypatch.setenv("GEMINI_API_KEY", "two words")
    with pytest.raises(ConfigError, match="no spaces") as caught:
        key_for(api_of("gemini"), None)
    assert "two words" not in str(caught.value)
