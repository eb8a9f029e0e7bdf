"""The steps of a batch: its requests are written and uploaded, it is created and looked at, its results are fetched.

Each step is recorded before the next one begins, so that a killed run goes on from there. Creating costs money and must
not be repeated: after a kill or a lost answer, the provider's list of batches is first searched for the tag.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agiqa.errors import DataError, RemoteError
from agiqa.extract.teaching.apis import parse_json
from agiqa.extract.teaching.batch_apis import BatchResult, BatchStatus, batch_api_of, read_results
from agiqa.extract.teaching.batch_records import BatchRecord, BatchRecords, Requested, new_record
from agiqa.extract.teaching.chats import ChatRequest
from agiqa.extract.teaching.client import Client
from agiqa.extract.teaching.questions import Question
from agiqa.progress import Advance, say
from agiqa.store.disk.files import naming, telling_disk_errors, write_bytes_atomically


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How batches are made and waited for."""

    most_requests: int | None = None
    """Requests of one batch; None for the provider's limit. Accounts may have limits on what waits at one time."""
    interval: float = 60.0
    """Seconds between two looks at the batches, and after a creation without an answer until one that the provider does
    not list does not exist."""
    wait: bool = True
    """Whether to wait for the results."""


class BatchSteps:
    """Takes the batches of one model on."""

    def __init__(self, client: Client, records: BatchRecords, settings: BatchSettings, advance: Advance) -> None:
        """`client` speaks to the model's server; `advance` hears how many requests are done in addition."""
        self._client = client
        self._api = batch_api_of(client)
        self._records = records
        self._settings = settings
        self._most = min(self._api.most_requests, settings.most_requests or self._api.most_requests)
        self._advance = advance
        self._finished = dict[str, int]()
        """By tag, the requests that `advance` has heard of."""
        self._nameless = dict[str, float]()
        """By tag, since when a batch is complete without files of results, by time.monotonic."""
        self._failing: float | None = None
        """Since when no batch can be created, by time.monotonic."""
        self._queue_is_full = False
        """Whether no further batch is created until another ends."""

    def write(self, questions: Iterable[Question], reserve: Callable[[ChatRequest], float | None]) -> bool:
        """Write the requests of the first `questions` to a file and record them, as far as one batch may go.

        `reserve` gives the most USD that a request can cost, and None to end the file before it. False for no request.
        """
        requests, path, size = dict[str, Requested](), self._records.requests_path, 0
        most_bytes = self._api.most_bytes
        with telling_disk_errors(f"writing {path}", "nothing has been sent"), naming(path), path.open("wb") as file:
            for question in questions:
                request = question.request()
                body = self._client.api.body(self._client.model, request)
                line = json.dumps(self._api.line(question.id, body)).encode() + b"\n"
                if len(line) > most_bytes:
                    message = f"{question}: a request of {len(line)} bytes, of which a batch takes {most_bytes}."
                    raise DataError(message)
                full = size + len(line) > most_bytes or len(requests) >= self._most
                usd = None if full else reserve(request)
                if usd is None:
                    break
                size += file.write(line)
                requests[question.id] = Requested(name=question.item.name, key=question.key, reserve_usd=usd)
            file.flush()
            os.fsync(file.fileno())
        if requests:
            self._records.save(new_record(self._client.model, requests))
        else:
            path.unlink()
        return bool(requests)

    def send(self, record: BatchRecord) -> None:
        """Upload the requests of `record` and create the batch, if that is not done and the provider takes it now.

        Raises RemoteError when the provider refuses, or takes none for longer than the client's patience.
        """
        lacks_file = record.step == "written" and not self._records.requests_path.exists()
        if lacks_file or (record.step in ("written", "uploaded") and len(record.requests) > self._most):
            self._records.close(record)  # no batch of it is at work: new files will have its requests
            return
        if record.step == "written":
            say(f"uploading {len(record.requests)} requests")
            try:
                file = self._api.upload(self._records.requests_path)
            except RemoteError as error:
                error.add_note("If this server has no batches, leave --batch out.")
                raise
            record = self._records.save(record.at("uploaded", file=file))
            self._records.requests_path.unlink(missing_ok=True)
        if record.step in ("uploaded", "creating") and not (self._queue_is_full and self._others(record)):
            status = self._create(record)
            if status is not None:
                record = self._records.save(record.at("created", batch=status.id))
                say(f"batch {status.id}: created, {len(record.requests)} requests")

    def fetch(self, record: BatchRecord) -> bool:
        """Download the results of `record`, once the batch has ended. Whether they are on the disk.

        Raises RemoteError for a batch that failed as a whole; its record is gone then.
        """
        if record.step != "created":
            return record.step == "downloaded"
        try:
            status = self._api.look(str(record.batch))
            self._count(record, status.finished or 0)
            if status.state == "ended" and not status.files and status.is_complete:
                return self._wait_for_files(record)
            pieces = [self._download(name) for name in status.files] if status.state == "ended" else []
        except RemoteError as error:
            error.add_note(f"To give open batches up, remove {self._records.path}.")
            raise
        if status.state == "failed" and status.queue_is_full:
            self._make_way(record, status)
        elif status.state == "failed":
            self._records.close(record)
            reason = (status.problem or status.word).rstrip(".")
            message = f"batch {status.id} failed, and no request was worked on: {reason}."
            raise RemoteError(message)
        elif status.state == "ended":
            self._queue_is_full, self._failing = False, None
            write_bytes_atomically(self._records.results_path(record), (piece + b"\n" for piece in pieces))
            self._count(record, len(record.requests))
            self._records.save(record.at("downloaded", word=status.word))
        return status.state == "ended"

    def _wait_for_files(self, record: BatchRecord) -> bool:
        """Providers may name the results of a batch some time after its end. Returns False, as `fetch`.

        Raises RemoteError after the client's patience.
        """
        first = self._nameless.setdefault(record.tag, time.monotonic())
        if time.monotonic() - first > self._client.settings.patience:
            message = f"batch {record.batch} is complete, but the provider names no file of its results."
            raise RemoteError(message)
        return False

    def _download(self, name: str) -> bytes:
        """A file of results. Raises RemoteError unless each line is JSON, since no answer may get lost with it."""
        content = self._api.download(name)
        wrong = [line for line in content.splitlines() if line.strip() and parse_json(line) is None]
        if wrong:
            message = f"downloading {name}: it is damaged, as {wrong[0][:80]!r} is no JSON. Run the same command again."
            raise RemoteError(message)
        return content

    def results(self, record: BatchRecord) -> list[BatchResult]:
        """The downloaded results of `record`."""
        return read_results(self._api, self._records.results_path(record).read_bytes())

    def _count(self, record: BatchRecord, finished: int) -> None:
        known = self._finished.get(record.tag, 0)
        if finished > known:
            self._finished[record.tag] = finished
            self._advance(finished - known)

    def _create(self, record: BatchRecord) -> BatchStatus | None:
        """The batch of `record`: found by its tag if an earlier attempt may have made it, else created.

        None if the provider takes none now, or an earlier attempt may still be on its way.
        """
        if record.step == "creating":
            found = self._api.find(record.tag)
            if found is not None or time.time() < record.since + self._settings.interval:
                return found
        record = self._records.save(record.at("creating"))
        try:
            sent = self._api.create(str(record.file), record.tag)
        except RemoteError as error:
            if error.refused:
                self._records.close(record)
            raise
        status = self._api.status(sent.json)
        if sent.fault is None and status.id:
            self._failing = self._failing if self._queue_is_full else None
            return status
        if sent.fault is not None and sent.fault.kind not in ("busy", "again"):
            self._records.close(record)
            message = f"creating a batch: {sent.fault.reason}."
            raise RemoteError(message)
        self._fail(record, "the answer names no batch" if sent.fault is None else sent.fault.reason)
        return None

    def _make_way(self, record: BatchRecord, status: BatchStatus) -> None:
        """After a batch for which the queue is too full: wait until another ends, or else make smaller ones."""
        self._queue_is_full = True
        reason, size = status.problem or "the queue is full", len(record.requests)
        if self._others(record) or size == 1:
            self._records.save(record.at("uploaded", batch=None))
            self._fail(record, reason)
        else:
            self._records.close(record)
            self._most = size // 2
            say(f"{reason.rstrip('.')}; trying batches of {self._most} requests")

    def _others(self, record: BatchRecord) -> bool:
        """Whether other batches are at work."""
        return any(one.step == "created" and one.tag != record.tag for one in self._records.batches)

    def _fail(self, record: BatchRecord, reason: str) -> None:
        """Say that no batch can be created now; raise RemoteError when that lasts while no other is at work."""
        now = time.monotonic()
        if self._failing is None or self._others(record):
            if self._failing is None:
                say(f"no further batch can be created now: {reason}")
            self._failing = now
        elif now - self._failing > self._client.settings.patience:
            message = f"no batch could be created for {now - self._failing:.0f} seconds: {reason}."
            raise RemoteError(message)
