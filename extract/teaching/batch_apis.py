"""The batch endpoints of both providers: a file of requests, a batch made of it, files of results.

OpenAI: `/files` and `/batches`, at most 50,000 requests and 200 MB per batch. Gemini: resumable uploads,
`:batchGenerateContent`, `/batches` and downloads, at most 2 GB. Both let 24 hours pass and cost half.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

from agiqa.errors import RemoteError
from agiqa.extract.teaching.apis import Api, Json, parse_json
from agiqa.extract.teaching.chats import Fault, Reply
from agiqa.extract.teaching.client import Client, Sent

_BLOCK = 1 << 20
_MARK = "agiqa"
"""The key of a batch's tag in OpenAI's metadata."""


@dataclass(frozen=True, kw_only=True)
class BatchStatus:
    """A batch as the provider tells of it."""

    id: str
    """Empty if the provider named none."""
    state: Literal["open", "ended", "failed"]
    """ended: there may be results, of all requests or of some; failed: the provider worked on none."""
    word: str
    """The provider's own word."""
    files: tuple[str, ...] = ()
    """Files of results."""
    is_complete: bool = False
    """Whether the provider says that it has worked on all requests, so that there are results."""
    finished: int | None = None
    """Requests that are done; None if unknown."""
    problem: str = ""
    """Why it failed."""
    queue_is_full: bool = False
    """It failed because too much is waiting: it can be created again once another batch has ended."""


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """One line of the results."""

    key: str
    """The id of the request, as the provider has it. Providers have swapped them: see `joining.py`."""
    reply: Reply | Fault | None
    """None: the provider did not work on this request, because the batch expired or was cancelled."""


class BatchApi(Protocol):
    """The batch endpoints of one provider."""

    most_requests: int
    most_bytes: int
    """Of a file of requests."""

    def line(self, key: str, body: Json) -> Json:
        """The line of a request in the file; `body` is that of the same request outside of batches."""
        ...

    def upload(self, path: Path) -> str:
        """The provider's id of the uploaded file of requests."""
        ...

    def create(self, file: str, tag: str) -> Sent:
        """Try once to create a batch of the uploaded `file`, to be found again by `tag`."""
        ...

    def find(self, tag: str) -> BatchStatus | None:
        """The batch with this `tag`, if there is one that has not failed."""
        ...

    def look(self, batch: str) -> BatchStatus:
        """The batch with this id."""
        ...

    def status(self, answer: object) -> BatchStatus:
        """The batch in the JSON of an answer."""
        ...

    def download(self, file: str) -> bytes:
        """A file of results."""
        ...

    def result(self, line: object) -> BatchResult | None:
        """The result in a line of such a file; None if it names no request."""
        ...


def batch_api_of(client: Client) -> BatchApi:
    """The batch endpoints of the server that `client` speaks to."""
    return _KINDS[client.api.name](client)


def batch_limits(api: Api) -> tuple[int, int]:
    """The most requests, and the most bytes, of a file of requests."""
    kind = _KINDS[api.name]
    return kind.most_requests, kind.most_bytes


class _OpenAI:
    most_requests, most_bytes = 50_000, 200_000_000
    ENDED: Mapping[str, Literal["ended", "failed"]] = {
        "completed": "ended",
        "expired": "ended",
        "cancelled": "ended",
        "failed": "failed",
    }
    UNDONE = ("batch_expired", "batch_cancelled")
    """Codes of lines whose request was not worked on."""
    FULL = "token_limit_exceeded"

    def __init__(self, client: Client) -> None:
        self._client = client
        self._root = client.api.base_url

    def line(self, key: str, body: Json) -> Json:
        return {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}

    def upload(self, path: Path) -> str:
        with path.open("rb") as file:
            files = {"file": (path.name, file, "application/jsonl")}
            sent = self._client.send("POST", f"{self._root}/files", data={"purpose": "batch"}, files=files)
        return _name(sent, "id", f"uploading {path.name}")

    def create(self, file: str, tag: str) -> Sent:
        body = {
            "input_file_id": file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {_MARK: tag},
        }
        return self._client.send("POST", f"{self._root}/batches", once=True, json=body)

    def find(self, tag: str) -> BatchStatus | None:
        after: Json = {}
        while True:
            page = _answer(self._client.send("GET", f"{self._root}/batches", params={"limit": 100, **after}), _LISTING)
            batches = _objects(page.get("data"))
            for batch in batches:
                if _object(batch.get("metadata")).get(_MARK) == tag and self.status(batch).state != "failed":
                    return self.status(batch)
            if not (page.get("has_more") and batches):
                return None
            after = {"after": batches[-1].get("id")}

    def look(self, batch: str) -> BatchStatus:
        return self.status(_answer(self._client.send("GET", f"{self._root}/batches/{batch}"), f"asking for {batch}"))

    def status(self, answer: object) -> BatchStatus:
        batch = _object(answer)
        word, files = str(batch.get("status")), [batch.get("output_file_id"), batch.get("error_file_id")]
        problems = _objects(_object(batch.get("errors")).get("data"))
        counts = _object(batch.get("request_counts"))
        done = [counts.get("completed"), counts.get("failed")]
        return BatchStatus(
            id=str(batch.get("id") or ""),
            state=self.ENDED.get(word, "open"),
            word=word,
            files=tuple(file for file in files if isinstance(file, str) and file),
            is_complete=word == "completed",
            finished=sum(cast("list[int]", done)) if all(isinstance(one, int) for one in done) else None,
            problem="; ".join(str(one.get("message")) for one in problems[:3]),
            queue_is_full=any(one.get("code") == self.FULL for one in problems),
        )

    def download(self, file: str) -> bytes:
        sent = self._client.send("GET", f"{self._root}/files/{file}/content", wants_json=False)
        return _content(sent, f"downloading {file}")

    def result(self, line: object) -> BatchResult | None:
        whole = _object(line)
        key, error, response = whole.get("custom_id"), _object(whole.get("error")), _object(whole.get("response"))
        if not isinstance(key, str):
            return None
        if error.get("code") in self.UNDONE:
            return BatchResult(key=key, reply=None)
        status, api = response.get("status_code"), self._client.api
        if not isinstance(status, int):
            return BatchResult(key=key, reply=Fault(kind="again", reason=str(error.get("message") or "no answer")))
        return BatchResult(key=key, reply=_reply(api, status, response.get("body")))


class _Gemini:
    most_requests, most_bytes = 50_000, 2_000_000_000  # no limit on requests is known, and OpenAI's keeps files handy
    ENDED: Mapping[str, Literal["ended", "failed"]] = {
        "SUCCEEDED": "ended",
        "EXPIRED": "ended",
        "CANCELLED": "ended",
        "FAILED": "failed",
    }
    HTTP: Mapping[int, int] = {3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 11: 400, 13: 500, 14: 503, 16: 401}
    """The HTTP status of a gRPC code, by which lines of results report errors."""
    CANCELLED = 1
    """The gRPC code of a request that was not worked on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._base = client.api.base_url
        self._root, _, self._version = self._base.rpartition("/")

    def line(self, key: str, body: Json) -> Json:
        return {"key": key, "request": body}

    def upload(self, path: Path) -> str:
        size, kind, doing = str(path.stat().st_size), "application/jsonl", f"uploading {path.name}"
        start = {
            "X-Goog-Upload-Protocol": "resumable",
            "X-Goog-Upload-Command": "start",
            "X-Goog-Upload-Header-Content-Length": size,
            "X-Goog-Upload-Header-Content-Type": kind,
        }
        about, url = {"file": {"displayName": path.name}}, f"{self._root}/upload/{self._version}/files"
        started = self._client.send("POST", url, headers=start, json=about, wants_json=False)
        _content(started, doing)
        session = started.headers.get("x-goog-upload-url", "")
        if not session.startswith(f"{self._root}/"):  # the key goes with the file
            message = (
                f"{doing}: the server names {session or 'no URL'!r} for the upload, which is not below {self._root}."
            )
            raise RemoteError(message)
        send = {"X-Goog-Upload-Offset": "0", "X-Goog-Upload-Command": "upload, finalize", "Content-Length": size}
        sent = self._client.send("POST", session, headers={"Content-Type": kind, **send}, content=_Blocks(path))
        return _name(sent, "name", doing, within="file")

    def create(self, file: str, tag: str) -> Sent:
        model = self._client.model.removeprefix("models/")
        batch = {"batch": {"displayName": tag, "inputConfig": {"fileName": file}}}
        return self._client.send("POST", f"{self._base}/models/{model}:batchGenerateContent", once=True, json=batch)

    def find(self, tag: str) -> BatchStatus | None:
        more: Json = {}
        while True:
            page = _answer(
                self._client.send("GET", f"{self._base}/batches", params={"pageSize": 100, **more}), _LISTING
            )
            for batch in _objects(page.get("operations")):
                if _object(batch.get("metadata")).get("displayName") == tag and self.status(batch).state != "failed":
                    return self.status(batch)
            if not page.get("nextPageToken"):
                return None
            more = {"pageToken": page["nextPageToken"]}

    def look(self, batch: str) -> BatchStatus:
        return self.status(_answer(self._client.send("GET", f"{self._base}/{batch}"), f"asking for {batch}"))

    def status(self, answer: object) -> BatchStatus:
        batch = _object(answer)
        about, response = _object(batch.get("metadata")), _object(batch.get("response"))
        word = str(about.get("state", "")).rpartition("STATE_")[2]
        file = response.get("responsesFile") or _object(about.get("output")).get("responsesFile")
        counts = _object(about.get("batchStats"))
        done = [counts.get("successfulRequestCount"), counts.get("failedRequestCount")]  # int64: texts in JSON
        return BatchStatus(
            id=str(batch.get("name") or ""),
            state=self.ENDED.get(word, "open"),
            word=word.lower(),
            files=(file,) if isinstance(file, str) and file else (),
            is_complete=word == "SUCCEEDED",
            finished=sum(int(one) for one in done if one) if any(done) else None,
            problem=str(_object(batch.get("error")).get("message") or ""),
        )

    def download(self, file: str) -> bytes:
        url = f"{self._root}/download/{self._version}/{file}:download"
        return _content(self._client.send("GET", url, params={"alt": "media"}, wants_json=False), f"downloading {file}")

    def result(self, line: object) -> BatchResult | None:
        whole = _object(line)
        key, error = whole.get("key"), _object(whole.get("error") or whole.get("status"))
        if not isinstance(key, str):
            return None
        if error:
            code = error.get("code")
            if code == self.CANCELLED:
                return BatchResult(key=key, reply=None)
            status = self.HTTP.get(code, code) if isinstance(code, int) else 500
            return BatchResult(key=key, reply=_reply(self._client.api, max(status, 400), {"error": error}))
        return BatchResult(key=key, reply=_reply(self._client.api, 200, whole.get("response")))


_KINDS: Mapping[str, type[_OpenAI] | type[_Gemini]] = {"openai": _OpenAI, "gemini": _Gemini}
_LISTING = "listing the batches"


@dataclass(frozen=True)
class _Blocks:
    """The bytes of a file, from the start for each attempt."""

    path: Path

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block


def read_results(api: BatchApi, content: bytes) -> list[BatchResult]:
    """The results in a downloaded file; lines that name no request are left out."""
    found = [api.result(parse_json(line)) for line in content.splitlines()]
    return [result for result in found if result is not None]


def _reply(api: Api, status: int, body: object) -> Reply | Fault:
    if status >= 300:
        fault = api.fault(status, body)
        return fault if fault.kind in ("item", "refused") else Fault(kind="again", reason=fault.reason)
    try:
        return api.read(body)
    except RemoteError as error:
        return Fault(kind="again", reason=str(error))


def _content(sent: Sent, doing: str) -> bytes:
    if sent.fault is not None:
        message = f"{doing}: {sent.fault.reason}"
        raise RemoteError(message)
    return sent.content


def _answer(sent: Sent, doing: str) -> Json:
    _content(sent, doing)
    return _object(sent.json)


def _name(sent: Sent, key: str, doing: str, *, within: str | None = None) -> str:
    answer = _answer(sent, doing)
    name = (_object(answer.get(within)) if within else answer).get(key)
    if not isinstance(name, str) or not name:
        message = f"{doing}: the answer names no file. Does this server have batches?"
        raise RemoteError(message)
    return name


def _object(value: object) -> Json:
    return cast("Json", value) if isinstance(value, dict) else {}


def _objects(value: object) -> list[Json]:
    return [_object(one) for one in cast("list[object]", value)] if isinstance(value, list) else []
