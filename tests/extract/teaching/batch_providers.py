"""The batch endpoints of both providers on loopback: files, batches, results.

A batch is worked on when it is created: each line is a request like any other, answered as `script` and `always` say.
`server.paid` lists them, so that a test sees whether an item was paid twice. The batch ends after `server.polls` polls, or
when the test calls `server.finish()`; `server.deliver` changes the lines of its results.
"""

import email
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from tests.extract.teaching.providers import Provider, Reply, Request
from tests.extract.teaching.wire_formats import Gemini, OpenAi, json_reply

Lines = list[dict[str, Any]]


def swapped(lines: Lines) -> Lines:
    """Each result under the key of the next one."""
    name = "custom_id" if "custom_id" in lines[0] else "key"
    return [{**line, name: lines[(number + 1) % len(lines)][name]} for number, line in enumerate(lines)]


@dataclass(kw_only=True)
class Batch:
    """A batch as the server keeps it."""

    id: str
    tag: str | None
    file: str
    model: str
    lines: Lines
    """Results in the order of the requests."""
    failed: bool = False
    ended: bool = False
    polls: int = 0
    """How often a client asked for its state."""


@dataclass
class _Store:
    """Files and batches of a server."""

    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    sessions: dict[str, str] = field(default_factory=dict)


class BatchProvider(Provider):
    """What both providers have in common."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.store = _Store()
        self.paid: list[Request] = []
        """The requests within batches, in the order in which they were worked on."""
        self.polls: int | None = 1
        """Polls that find a batch at work before it ends; None: until `finish`."""
        self.end = "completed"
        """How batches end: completed, expired, cancelled or failed."""
        self.deliver: Callable[[Lines], Lines] = list
        self.capacity = 10**9
        """Requests that may wait at a time; a batch that makes them more fails (as at OpenAI, later than created)."""
        self.page = 100
        """Batches per page of the list."""
        self._work = threading.Lock()

    def finish(self) -> None:
        """End all batches, also later ones, at their next poll."""
        self.polls = 0

    def about_image(self, path: Path) -> list[Request]:
        """The requests within batches about the image in the file at `path`."""
        return [request for request in self.paid if request.images == (path.read_bytes(),)]

    def body_of(self, line: dict[str, Any], request: Request) -> Request:
        """The request in a `line` of a batch file."""
        raise NotImplementedError

    def result(self, line: dict[str, Any], reply: Reply) -> dict[str, Any]:
        """The line of the results."""
        raise NotImplementedError

    def create(self, request: Request, file: str, tag: str | None, model: str) -> Batch:
        """Work on every line of `file`."""
        with self._work:
            batch = Batch(id=f"batch-{len(self.store.batches)}", tag=tag, file=file, model=model, lines=[])
            waiting = sum(len(one.lines) for one in self.store.batches.values() if not one.ended)
            self.store.batches[batch.id] = batch
            texts = self.store.files[file].decode().splitlines()
            batch.failed = self.end == "failed" or waiting + len(texts) > self.capacity
            for text in [] if batch.failed else texts:
                line = json.loads(text)
                one = self.body_of(line, replace(request, model=model))
                self.paid.append(one)
                batch.lines.append(self.result(line, self.chat(one, self.scripted(one) or self.default)))
            return batch

    def poll(self, batch: Batch) -> bool:
        """Whether `batch` has ended, and its results are a file."""
        batch.polls += 1
        batch.ended = self.polls is not None and batch.polls > self.polls
        return batch.ended

    def results(self, batch: Batch) -> bytes:
        """The file of results, as `deliver` has it."""
        return "".join(json.dumps(line) + "\n" for line in self.deliver(batch.lines)).encode()


class BatchOpenAi(BatchProvider, OpenAi):
    """`/v1/files` and `/v1/batches`. Lines with an error are in a file of their own."""

    problem: Mapping[str, Any] = {
        "code": "token_limit_exceeded",
        "message": "Enqueued token limit reached.",
        "line": None,
    }
    """Of a batch that fails."""

    def body_of(self, line: dict[str, Any], request: Request) -> Request:
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert len(line["custom_id"]) <= 64
        return self.parsed(request, line["body"])

    def result(self, line: dict[str, Any], reply: Reply) -> dict[str, Any]:
        response = {"status_code": reply.status, "request_id": "req", "body": json.loads(reply.body)}
        return {"id": "batch_req", "custom_id": line["custom_id"], "response": response, "error": None}

    def route(self, request: Request) -> Reply:
        path, _, query = request.path.partition("?")
        match request.method, *path.split("/")[2:]:
            case "POST", "files":
                return self._upload(request)
            case "GET", "files", file, "content" if file in self.store.files:
                return Reply(body=self.store.files[file], headers={"Content-Type": "application/octet-stream"})
            case "POST", "batches":
                return self._create(request)
            case "GET", "batches":
                return self._list(query)
            case "GET", "batches", name if name in self.store.batches:
                batch = self.store.batches[name]
                return json_reply(self._shown(batch, ended=self.poll(batch)))
        return super().route(request)

    def _upload(self, request: Request) -> Reply:
        kind = f"Content-Type: {request.headers['content-type']}\n\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part
            for part in email.message_from_bytes(kind + request.raw).walk()
        }
        assert parts["purpose"].get_payload() == "batch"
        name = f"file-{len(self.store.files)}"
        self.store.files[name] = parts["file"].get_payload(decode=True)
        return json_reply({"id": name, "object": "file", "purpose": "batch", "bytes": len(self.store.files[name])})

    def _create(self, request: Request) -> Reply:
        body = json.loads(request.raw)
        assert body["completion_window"] == "24h"
        assert body["endpoint"] == "/v1/chat/completions"
        if body["input_file_id"] not in self.store.files:
            return self.error(400, "invalid_request", "No such File object.")
        first = json.loads(self.store.files[body["input_file_id"]].partition(b"\n")[0])
        tag = json.dumps(body.get("metadata"))
        return json_reply(self._shown(self.create(request, body["input_file_id"], tag, first["body"]["model"])))

    def _list(self, query: str) -> Reply:
        newest = [*self.store.batches.values()][::-1]
        after = re.search(r"after=([\w-]+)", query)
        if after:
            newest = newest[[batch.id for batch in newest].index(after[1]) + 1 :]
        page = [self._shown(batch) for batch in newest[: self.page]]
        last = page[-1]["id"] if page else None
        return json_reply({"object": "list", "data": page, "last_id": last, "has_more": len(newest) > self.page})

    def _shown(self, batch: Batch, *, ended: bool = False) -> dict[str, Any]:
        shown = {
            "id": batch.id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "errors": None,
            "input_file_id": batch.file,
            "status": "in_progress" if not ended else "failed" if batch.failed else self.end,
            "output_file_id": None,
            "error_file_id": None,
            "metadata": json.loads(batch.tag or "null"),
            "request_counts": {"total": len(batch.lines), "completed": len(batch.lines) if ended else 0, "failed": 0},
        }
        if not ended:
            return shown
        if batch.failed:
            return shown | {"errors": {"object": "list", "data": [self.problem]}}
        lines = [json.loads(text) for text in self.results(batch).splitlines()]
        for name, good in (("output", True), ("error", False)):
            chosen = [
                line for line in lines if (line["error"] is None and line["response"]["status_code"] == 200) is good
            ]
            if chosen:
                shown[f"{name}_file_id"] = f"{name}-of-{batch.id}"
                content = "".join(json.dumps(line) + "\n" for line in chosen)
                self.store.files[f"{name}-of-{batch.id}"] = content.encode()
        return shown


class BatchGemini(BatchProvider, Gemini):
    """`/upload/v1beta/files`, `:batchGenerateContent`, `/v1beta/batches` and `/download/v1beta/files`."""

    STATES: ClassVar = {"completed": "SUCCEEDED", "expired": "EXPIRED", "cancelled": "CANCELLED", "failed": "FAILED"}

    def body_of(self, line: dict[str, Any], request: Request) -> Request:
        assert line.keys() == {"key", "request"}
        return self.parsed(request, request.model, line["request"])

    def result(self, line: dict[str, Any], reply: Reply) -> dict[str, Any]:
        body = json.loads(reply.body)
        if reply.status == 200:
            return {"key": line["key"], "response": body}
        return {"key": line["key"], "error": {"code": 3, "message": body["error"]["message"]}}

    def key_of(self, request: Request) -> str | None:
        return self.key if request.path.startswith("/upload/session/") else super().key_of(request)

    def route(self, request: Request) -> Reply:
        path, _, query = request.path.partition("?")
        match request.method, *path.split("/")[1:]:
            case "POST", "upload", "v1beta", "files":
                return self._start(request)
            case "POST", "upload", "session", session if session in self.store.sessions:
                return self._upload(request, self.store.sessions[session])
            case "POST", "v1beta", "models", name if name.endswith(":batchGenerateContent"):
                return self._create(request, name.partition(":")[0])
            case "GET", "v1beta", "batches":
                return self._list(query)
            case "GET", "v1beta", "batches", name if name in self.store.batches:
                batch = self.store.batches[name]
                return json_reply(self._shown(batch, ended=self.poll(batch)))
            case "GET", "download", "v1beta", "files", name if name.endswith(":download") and query == "alt=media":
                return Reply(body=self.store.files[f"files/{name.removesuffix(':download')}"])
        return super().route(request)

    def _start(self, request: Request) -> Reply:
        headers = request.headers
        assert headers["x-goog-upload-protocol"] == "resumable"
        assert headers["x-goog-upload-command"] == "start"
        name = f"files/{len(self.store.files)}-{len(self.store.sessions)}"
        session = f"s{len(self.store.sessions)}"
        self.store.sessions[session] = name
        return Reply(headers={"x-goog-upload-url": f"http://{headers['host']}/upload/session/{session}"})

    def _upload(self, request: Request, name: str) -> Reply:
        assert request.headers["x-goog-upload-command"] == "upload, finalize"
        assert request.headers["x-goog-upload-offset"] == "0"
        self.store.files[name] = request.raw
        return json_reply({"file": {"name": name, "sizeBytes": str(len(request.raw)), "state": "ACTIVE"}})

    def _create(self, request: Request, model: str) -> Reply:
        if model not in self.models:
            return self.error(404, "not_found", f"models/{model} is not found.")
        batch = json.loads(request.raw)["batch"]
        file = batch["inputConfig"]["fileName"]
        if file not in self.store.files:
            return self.error(404, "not_found", f"{file} is not found.")
        return json_reply(self._shown(self.create(request, file, batch["displayName"], model)))

    def _list(self, query: str) -> Reply:
        newest = [*self.store.batches.values()][::-1]
        token = re.search(r"pageToken=(\d+)", query)
        start = int(token[1]) if token else 0
        page = {"operations": [self._shown(batch) for batch in newest[start : start + self.page]]}
        more = len(newest) > start + self.page
        return json_reply(page | ({"nextPageToken": str(start + self.page)} if more else {}))

    def _shown(self, batch: Batch, *, ended: bool = False) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "model": f"models/{batch.model}",
            "displayName": batch.tag,
            "inputConfig": {"fileName": batch.file},
            "state": f"BATCH_STATE_{'RUNNING' if not ended else self.STATES['failed' if batch.failed else self.end]}",
            "batchStats": {"requestCount": str(len(batch.lines))}
            | ({"successfulRequestCount": str(len(batch.lines))} if ended else {}),
        }
        shown: dict[str, Any] = {"name": f"batches/{batch.id}", "metadata": metadata}
        if ended and batch.failed:
            return shown | {"done": True, "error": {"code": 3, "message": "The input file is invalid."}}
        if ended:
            file = {"responsesFile": f"files/results-of-{batch.id}"}
            self.store.files[file["responsesFile"]] = self.results(batch)
            metadata["output"] = file
            shown |= {"done": True, "response": {"@type": "GenerateContentBatchOutput", **file}}
        return shown


BATCH_PROVIDERS: dict[str, type[BatchProvider]] = {"openai": BatchOpenAi, "gemini": BatchGemini}
