"""Real servers on loopback that speak the two wire formats of teachers, and misbehave as a test scripts it.

    with OpenAi() as server:                                  # or Gemini(); both in wire_formats.py
        server.script(rate_limited(1), explains, about="a red fox")     # for requests with this text, in this order
        server.always(broken_json, about="a blue door")
        ...                                                   # call server.base_url with the key server.key
        assert [request.images for request in server.requests] == ...

A server checks each request as the provider does: an unknown key, an unknown model, an unknown field or a schema that the
provider does not take is an error by itself. What is not scripted is answered by `server.default`, which explains.
"""

import hashlib
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.command_line import KEY
from tests.extract.teaching.loopback import LoopbackServer, Reply

MODEL = "teacher-1"
FALLBACK = "teacher-2"
ITEM_ID = re.compile(r"\bid(?:[\"']?\s*[:=]|\s+is:?)\s*[\"'`]?([\w.-]*\w)", re.IGNORECASE)
"""Where the text of a request gives the id that the answer shall echo, for example `id: 3f2a`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it arrived; `server.requests` holds them in this order."""

    number: int
    at: float
    """`time.monotonic()` of the arrival, in seconds."""
    method: str
    path: str
    """With the query."""
    headers: Mapping[str, str]
    """Names in lower case."""
    raw: bytes
    body: Any = None
    """The JSON value of the body; None if it is none."""
    model: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    """Role (system, user, assistant) and text of each message."""
    images: tuple[bytes, ...] = ()
    schema: dict[str, Any] | None = None
    """The schema that the answer must have."""

    @property
    def text(self) -> str:
        """The texts of all turns."""
        return "\n".join(text for _, text in self.turns)

    @property
    def item_id(self) -> str | None:
        """The id that the request gives its item."""
        found = ITEM_ID.search(self.text)
        return found[1] if found else None


Behaviour = Callable[["Provider", Request], Reply]


@dataclass(frozen=True, kw_only=True)
class _Script:
    about: str
    path: str | None
    queue: deque[Behaviour] = field(default_factory=deque)
    forever: Behaviour | None = None

    def fits(self, request: Request) -> bool:
        if self.path is None:
            return bool(request.model) and self.about in request.text
        return not request.model and self.path in f"{request.method} {request.path}"


def explanation(request: Request, name: str) -> str:
    """The text that a server answers under the key `name`: it differs by text and image of the request."""
    digest = hashlib.sha256(request.text.encode() + b"".join(request.images)).hexdigest()[:12]
    return f"The {name.removesuffix('_explanation')} of this image, seen as {digest}, has details worth a sentence."


def answer_of(request: Request) -> dict[str, str]:
    """The JSON object that `explains` answers: every key of the schema, ids echoed."""
    names = list((request.schema or {"properties": {"text": {}}})["properties"])
    ids = {name: request.item_id or "" for name in names if name == "id" or name.endswith("_id")}
    return {name: explanation(request, name) for name in names} | ids


def tokens_of(request: Request, text: str) -> tuple[int, int]:
    """Tokens in and out that the server counts."""
    return 20 + len(request.text) // 4 + 258 * len(request.images), 1 + len(text) // 4


def explains(server: "Provider", request: Request) -> Reply:
    """A good answer: JSON by the request's schema, or one sentence without a schema."""
    answer = answer_of(request)
    return server.answer(request, json.dumps(answer) if request.schema else answer["text"])


def says(text: str | Callable[[Request], str], *, cut: bool = False) -> Behaviour:
    """The answer `text`, or what `text` makes of the request; `cut` at the limit of tokens."""
    return lambda server, request: server.answer(request, text if isinstance(text, str) else text(request), cut=cut)


def rate_limited(retry_after: str | float | None = None) -> Behaviour:
    """429, with Retry-After in seconds or as an HTTP date if given; Gemini has RetryInfo in the body instead."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return lambda server, _: server.error(429, "rate_limit_exceeded", "Too many requests.", headers)


def fails(status: int) -> Behaviour:
    """An error of the server itself: 500, 502, 503."""
    return lambda server, _: server.error(status, "server_error", "The server had an error.")


def wrong_key(server: "Provider", _: Request) -> Reply:
    """How this provider refuses a key: OpenAI with 401, Gemini with 400 and API_KEY_INVALID."""
    return server.refuse_key()


def unknown_model(server: "Provider", request: Request) -> Reply:
    """404."""
    return server.error(404, "model_not_found", f"The model `{request.model}` does not exist.")


def bad_image(server: "Provider", _: Request) -> Reply:
    """400."""
    return server.error(400, "invalid_image", "Unable to process input image.")


def truncated(server: "Provider", request: Request) -> Reply:
    """A good answer of which only the first half is sent."""
    body = explains(server, request).body
    half = len(body) // 2
    return Reply(body=body[:half], missing=len(body) - half)


def no_json(_server: "Provider", _request: Request) -> Reply:
    """200 with a body that is no JSON, as a proxy in between writes it."""
    return Reply(body=b"<html>Bad gateway</html>", headers={"Content-Type": "text/html"})


def dies(_server: "Provider", _request: Request) -> Reply:
    """The server goes away in the middle of this request; `server.start()` brings it back at the same address."""
    return Reply(dies=True)


def loses(then: Behaviour = explains) -> Behaviour:
    """The server does its work, but the connection breaks before the reply of `then` is sent."""

    def working(server: "Provider", request: Request) -> Reply:
        then(server, request)
        return Reply(lost=True)

    return working


def slow(then: Behaviour = explains) -> Behaviour:
    """The reply of `then`, once the test calls `server.release()`."""

    def waiting(server: "Provider", request: Request) -> Reply:
        reply = then(server, request)
        return Reply(status=reply.status, body=reply.body, headers=reply.headers, waits=True)

    return waiting


broken_json = says(lambda request: json.dumps(answer_of(request))[:-7])
"""The model's text breaks off within its JSON."""
wrong_schema = says(lambda _: json.dumps({"verdict": "a fine picture"}))
"""The model's text is JSON of another schema."""


def refuses(kind: str) -> Behaviour:
    """A refusal: `kind` is one of the server's `REFUSALS`."""
    return lambda server, request: server.refusal(request, kind)


class Provider:
    """A server of one wire format, running inside a `with` block."""

    API: str
    ROOT: str
    """What follows the host in the base URL."""
    REFUSALS: tuple[str, ...]
    """Kinds of refusal that `refuses` takes."""

    def __init__(self, *, key: str = KEY, models: tuple[str, ...] = (MODEL, FALLBACK)) -> None:
        self.key, self.models = key, models
        self.default: Behaviour = explains
        self.requests: list[Request] = []
        self.faults: list[BaseException] = []
        """Errors of the server's own code: a test has found a fault of this module."""
        self.most_at_once = 0
        """The largest number of requests that were in work at the same time."""
        self._scripts: list[_Script] = []
        self._changed = threading.Condition()
        self._released = threading.Event()
        self._busy = 0
        self._port = 0
        self._http: LoopbackServer | None = None

    @property
    def base_url(self) -> str:
        """What `--base-url` takes."""
        return f"http://127.0.0.1:{self._port}{self.ROOT}"

    def script(self, *behaviours: Behaviour, about: str = "", path: str | None = None) -> None:
        """Answer the next requests whose text has `about` so, one each; then as scripted later, or as `default`.

        With `path`, the next requests of another kind, such as uploads, whose path has it.
        """
        self._scripts.append(_Script(about=about, path=path, queue=deque(behaviours)))

    def always(self, behaviour: Behaviour, about: str = "", path: str | None = None) -> None:
        """Answer every such request so, after what was scripted before."""
        self._scripts.append(_Script(about=about, path=path, forever=behaviour))

    def calm(self) -> None:
        """Forget all scripts."""
        self._scripts.clear()

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Wait until no request is in work, such as after the client was killed."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._busy == 0, seconds)

    def release(self) -> None:
        """Let the replies of `slow` go, now and later."""
        self._released.set()

    def wait_for(self, requests: int, seconds: float = 30.0) -> None:
        """Wait until `requests` requests have arrived."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.requests) >= requests, seconds), len(self.requests)

    def about(self, text: str) -> list[Request]:
        """The requests whose text has `text`."""
        return [request for request in self.requests if text in request.text]

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._http = LoopbackServer(self, self._port)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection."""
        http, self._http = self._http, None
        if http is not None:
            http.shutdown()
            http.server_close()
            http.close_connections()

    def __enter__(self) -> "Provider":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self.stop()
        assert self.faults == []

    def serve(self, method: str, path: str, headers: Mapping[str, str], raw: bytes) -> Reply:
        """The reply to one request, which is logged first."""
        with self._changed:
            about = {"number": len(self.requests), "at": time.monotonic(), "method": method, "path": path}
            request = self.parse(Request(headers=headers, raw=raw, **about))
            self.requests.append(request)
            self._busy += 1
            self.most_at_once = max(self.most_at_once, self._busy)
            behaviour = self.scripted(request) or (self.default if request.model else self.__class__.route)
            self._changed.notify_all()
        try:
            act = self.chat if request.model else lambda one, behaves: behaves(self, one)
            reply = self.refuse_key() if self.key_of(request) != self.key else act(request, behaviour)
            if reply.waits:
                assert self._released.wait(60)
            return reply
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def scripted(self, request: Request) -> Behaviour | None:
        """The behaviour that a test has set for `request`, which uses it up."""
        for script in self._scripts:
            if script.fits(request) and (script.queue or script.forever):
                return script.queue.popleft() if script.queue else script.forever
        return None

    def chat(self, request: Request, behaviour: Behaviour) -> Reply:
        """The reply to a request to a model: its faults first, as at the provider."""
        if request.model not in self.models:
            return unknown_model(self, request)
        fault = self.fault(request)
        return self.error(400, "invalid_request", fault) if fault else behaviour(self, request)

    def parse(self, request: Request) -> Request:
        """`request` with the parts that its wire format has."""
        raise NotImplementedError

    def key_of(self, request: Request) -> str | None:
        """The key that `request` brings."""
        raise NotImplementedError

    def route(self, request: Request) -> Reply:
        """The reply to a request that asks no model, by its path."""
        raise NotImplementedError

    def fault(self, request: Request) -> str | None:
        """What the provider does not take in `request`."""
        raise NotImplementedError

    def answer(self, request: Request, text: str, *, cut: bool = False) -> Reply:
        """The model's answer `text`, complete or `cut` at the limit of tokens."""
        raise NotImplementedError

    def refusal(self, request: Request, kind: str) -> Reply:
        """The refusal `kind`, one of REFUSALS."""
        raise NotImplementedError

    def error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Reply:
        """An error in the provider's form."""
        raise NotImplementedError

    def refuse_key(self) -> Reply:
        """How the provider refuses a key."""
        raise NotImplementedError
