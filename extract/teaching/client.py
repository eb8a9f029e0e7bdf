"""A client of chat servers for long runs alone: it waits, tries again, keeps to limits, and knows when to stop.

Threads share one client. Statuses 408, 425, 429 and 5xx, time-outs and broken connections are tried again after a wait
that the server names, or else doubles. The key goes into request headers only: it is replaced in everything that a
server sends back, so that no answer or error message can carry it into a file.
"""

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import httpx2

from agiqa.errors import ConfigError, RemoteError, first_line
from agiqa.extract.teaching.apis import Api, parse_json
from agiqa.extract.teaching.chats import ChatRequest, Fault, Reply
from agiqa.progress import say
from agiqa.store.sharing.transfers import Halted, seconds_asked
from agiqa.version import agiqa_version

HIDDEN = "[key]"
"""What stands for the key in texts of servers."""

_CONNECTING = 4
"""Tries to connect to a server that has never served a request."""
_LONGEST_REASON = 500
"""Characters of what a server says about an error: some repeat the whole request."""
_QUIET_SECONDS = 15.0
"""Between two lines about waiting."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """The secret that a server knows its user by."""

    variable: str
    """The environment variable that holds it."""
    value: str = field(repr=False)


def key_for(api: Api, variable: str | None) -> Key | None:
    """The key in the environment variable `variable`; by default in the provider's own one, for the provider alone.

    No key goes to another server unless the user names its variable. Raises ConfigError for a variable without a key.
    """
    name = variable or (api.KEY_VARIABLE if api.base_url == api.HOME else None)
    if name is None:
        return None
    value = os.environ.get(name, "").strip()
    if not value:
        message = f"{api.base_url} needs a key, and the environment variable {name} has none. Set it: export {name}=..."
        raise ConfigError(message)
    if not (value.isascii() and value.isprintable() and " " not in value):
        message = f"The environment variable {name} holds no key: a key has no spaces and only ASCII characters."
        raise ConfigError(message)
    return Key(variable=name, value=value)


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """How patient a client is, and the limits that it keeps to."""

    timeout: float = 300.0
    """Seconds without a byte of an answer after which it counts as lost."""
    tries: int = 8
    """Failures of one request after which it counts as unserved, if others are served meanwhile, or none ever was."""
    first_wait: float = 1.0
    """Seconds after a first failure, doubled after each further one, and shortened by up to half at random."""
    longest_wait: float = 60.0
    """Seconds, the most that doubling comes to."""
    patience: float = 1800.0
    """Seconds for which a request is tried while a server that has served others serves none."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The end of a request: an answer, or a fault about this request alone."""

    content: bytes
    """Body of the answer, without the key."""
    headers: Mapping[str, str]
    """Of the answer, names in lower case."""
    json: object
    """The body as JSON; None if it is none."""
    fault: Fault | None
    status: int = 0
    """HTTP status; 0 without an answer."""
    attempts: int = 1
    lost: int = 0
    """Attempts whose answer was lost on its way: the provider may have billed them."""
    seconds: float = 0.0
    """From the first attempt to the answer, waits included."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A reply to a chat request, or the reason why there is none."""

    reply: Reply | Fault
    attempts: int
    lost: int
    """As in Sent."""
    seconds: float


class MinuteLimits:
    """Requests and tokens per minute, over a window that slides."""

    def __init__(self, requests: int | None, tokens: int | None, *, window: float = 60.0) -> None:
        """`window` is the minute, in seconds. None is no limit."""
        self._most = (requests, tokens)
        self._window = window
        self._sent: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def wait_for(self, tokens: int) -> float:
        """Seconds until a request of `tokens` may go; 0 counts it as sent now. One beyond the limit goes alone."""
        with self._lock:
            now = time.monotonic()
            while self._sent and self._sent[0][0] <= now - self._window:
                self._sent.popleft()
            if not self._sent or self._fits(len(self._sent) + 1, tokens + sum(one for _, one in self._sent)):
                self._sent.append((now, tokens))
                return 0.0
            return max(self._sent[0][0] + self._window - now, 0.001)

    def _fits(self, *counts: int) -> bool:
        return all(most is None or count <= most for count, most in zip(counts, self._most, strict=True))


class Client:
    """Sends requests to one model of one server; any number of threads may use it at the same time."""

    def __init__(
        self,
        api: Api,
        model: str,
        *,
        key: "Key | None" = None,
        settings: ClientSettings | None = None,
        halt: threading.Event | None = None,
    ) -> None:
        """`halt` ends all waits with Halted."""
        self.api = api
        self.model = model
        self.settings = settings or ClientSettings()
        self.halt = halt or threading.Event()
        self._key = key
        self._limits = MinuteLimits(self.settings.requests_per_minute, self.settings.tokens_per_minute)
        self._served: float | None = None
        """When the server last served a request, by time.monotonic."""
        self._closed_until = self._told = 0.0
        self._http = httpx2.Client(
            timeout=httpx2.Timeout(self.settings.timeout, connect=min(30.0, self.settings.timeout), pool=None),
            limits=httpx2.Limits(max_connections=None),
            headers={"User-Agent": f"agiqa/{agiqa_version()}"},
        )

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections."""
        self._http.close()

    def ask(self, request: ChatRequest, *, tokens: int = 0, may_repeat: Callable[[], bool] = lambda: True) -> Answered:
        """The server's reply to `request`, of about `tokens` tokens, or the fault about this request alone.

        `may_repeat` decides whether a request is sent again whose answer was lost: the provider may bill both. Raises
        RemoteError when no request can succeed: a wrong key, an unknown model, a server that is gone.
        """
        sent = self.send(
            "POST",
            self.api.url(self.model),
            json=self.api.body(self.model, request),
            tokens=tokens,
            may_repeat=may_repeat,
        )
        try:
            reply = sent.fault or self.api.read(sent.json)
        except RemoteError as error:
            reply = Fault(kind="item", reason=str(error))
        return Answered(reply=reply, attempts=sent.attempts, lost=sent.lost, seconds=sent.seconds)

    def send(
        self,
        method: str,
        url: str,
        *,
        tokens: int = 0,
        tries: int | None = None,
        once: bool = False,
        may_repeat: Callable[[], bool] = lambda: True,
        wants_json: bool = True,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> Sent:
        """The answer to an HTTP request; `body` holds httpx2's `json`, `content`, `data`, `files` or `params`.

        An answer that should be JSON and is none counts as lost. With `once`, what can be tried again is not: for a
        request that must not arrive twice. `may_repeat` as in `ask`. Raises as `ask`, and Halted after `halt`.
        """
        started, lost, attempts = time.monotonic(), 0, 0
        while True:
            self._wait_for_turn(tokens)
            attempts += 1
            sent = self._once(method, url, headers, body)
            if wants_json and sent.fault is None and sent.json is None:
                sent = _lost(
                    "a web page" if sent.content.lstrip()[:1] == b"<" else "an answer that is cut off, or no JSON"
                )
            lost += sent.lost
            if sent.fault is not None and sent.fault.kind == "fatal":
                raise self._final(url, sent.fault)
            if sent.fault is None or sent.fault.kind not in ("busy", "again"):
                self._served = time.monotonic()
            elif not (once or (sent.lost and not may_repeat())):
                fault = self._after_failure(url, sent.fault, attempts, self._most_tries(sent, tries), started)
                if fault is None:
                    continue
                sent = replace(sent, fault=fault)
            return replace(sent, attempts=attempts, lost=lost, seconds=time.monotonic() - started)

    def _once(self, method: str, url: str, headers: Mapping[str, str] | None, body: Mapping[str, Any]) -> Sent:
        """One attempt."""
        try:
            response = self._http.request(method, url, headers={**self._key_headers(), **(headers or {})}, **body)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
            message = f"{url}: not the URL of a server ({first_line(error)}). It should begin with http:// or https://."
            raise ConfigError(message) from error
        except httpx2.TransportError as error:
            if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
                reason = f"no connection ({self._without_key(first_line(error))})"
                return Sent(content=b"", headers={}, json=None, fault=Fault(kind="busy", reason=reason))
            what = "no answer in time" if isinstance(error, httpx2.TimeoutException) else first_line(error)
            return _lost(self._without_key(what))
        except httpx2.DecodingError as error:
            return _lost(f"a damaged answer ({self._without_key(first_line(error))})")
        content = response.content if self._key is None else _without(self._key, response.content)
        found, answer = {name.lower(): value for name, value in response.headers.items()}, parse_json(content)
        status = response.status_code
        if status < 300 and url == self.api.url(self.model):
            status = self.api.error_status(answer) or status
        fault = self._fault(status, answer, found) if status >= 300 else None
        return Sent(content=content, headers=found, json=answer, fault=fault, status=status)

    def _fault(self, status: int, answer: object, headers: Mapping[str, str]) -> Fault:
        """The fault with the wait that the server asks for in a header or in the body, and a reason for people."""
        fault = self.api.fault(status, answer)
        asked = [seconds for seconds in (seconds_asked(headers.get("retry-after", "")), fault.wait or 0.0) if seconds]
        said = fault.reason[:_LONGEST_REASON]
        reason = said if str(status) in said else f"{said} (HTTP status {status})"
        if status in (401, 403) or fault.kind == "fatal":
            reason = f"{reason}. {self._advice(status)}"
        return Fault(kind=fault.kind, reason=reason, wait=max(asked) if asked else None)

    def _advice(self, status: int) -> str:
        if status in (400, 401, 403) and self._key is None:
            return "Name the environment variable that holds the key"
        if status in (400, 401, 403) and self._key is not None:
            return f"Check the key in the environment variable {self._key.variable}"
        if status == 404:
            return f"Check the name of the model, {self.model!r}, and the base URL"
        return "Check the account of the provider" if status in (402, 429) else "Check the base URL"

    def _most_tries(self, sent: Sent, tries: int | None) -> int:
        most = tries or self.settings.tries
        is_unconnected = not sent.status and sent.fault is not None and sent.fault.kind == "busy"
        return min(most, _CONNECTING) if is_unconnected and self._served is None else most

    def _after_failure(self, url: str, fault: Fault, attempts: int, tries: int, started: float) -> Fault | None:
        """Wait for the next attempt, and return None; or the fault to report. Raises RemoteError to end the run."""
        now, served = time.monotonic(), self._served
        if attempts >= tries:
            is_over = served is None or now - max(served, started) >= self.settings.patience
            if fault.kind == "again" and (is_over or (served is not None and served > started)):
                return Fault(kind="unserved", reason=f"{fault.reason}, {attempts} times")
            if is_over:
                raise self._final(url, fault)
        doubled = self.settings.first_wait * 2.0 ** min(attempts - 1, 30)
        seconds = min(doubled, self.settings.longest_wait) * random.uniform(0.5, 1.0)
        if fault.wait is not None:
            if fault.wait > self.settings.patience:
                raise self._final(url, fault)
            seconds = fault.wait * random.uniform(1.0, 1.1)
            if fault.kind == "busy":
                self._closed_until = max(self._closed_until, now + fault.wait)
        if seconds >= 1.0 and now - self._told >= _QUIET_SECONDS:
            self._told = now
            say(f"{self.model}: {fault.reason}; trying again in {seconds:.0f} s")
        self._sleep(seconds)
        return None

    def _wait_for_turn(self, tokens: int) -> None:
        """Wait while the server has closed its door to all, and for the limits per minute."""
        while (seconds := self._closed_until - time.monotonic()) > 0:
            self._sleep(seconds)
        while (seconds := self._limits.wait_for(tokens)) > 0:
            self._sleep(seconds)
        if self.halt.is_set():
            raise Halted

    def _sleep(self, seconds: float) -> None:
        if self.halt.wait(seconds):
            raise Halted

    def _final(self, url: str, fault: Fault) -> RemoteError:
        wait = "" if fault.wait is None else f"; it asks to wait for {fault.wait:.0f} seconds"
        error = RemoteError(f"{url}: {fault.reason}{wait}.")
        error.refused = fault.kind == "fatal"
        error.retry_after = fault.wait or 0.0
        return error

    def _without_key(self, text: str) -> str:
        return text if self._key is None else _without(self._key, text.encode()).decode()

    def _key_headers(self) -> dict[str, str]:
        return {} if self._key is None else self.api.headers(self._key.value)


def _lost(reason: str) -> Sent:
    """An answer that did not arrive, or not whole."""
    return Sent(content=b"", headers={}, json=None, fault=Fault(kind="again", reason=reason), lost=1)


def _without(key: Key, content: bytes) -> bytes:
    return content.replace(key.value.encode(), HIDDEN.encode())
