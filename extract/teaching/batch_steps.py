"""A batch on its way: its file of requests is written and uploaded, the batch created, looked after, and its results fetched.

Each step is recorded before the next one begins, so that a killed run goes on from there. Creating is the step that costs
money and cannot be repeated: after a kill or a lost answer the provider's list of batches is searched for the tag first.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

from agiqa.errors import DataError, RemoteError
from agiqa.extract.teaching.batch_apis import BatchResult, BatchStatus, batch_api_of, read_results
from agiqa.extract.teaching.batch_records import BatchRecord, BatchRecords, Requested, new_record
from agiqa.extract.teaching.client import Client
from agiqa.extract.teaching.questions import Question
from agiqa.progress import say
from agiqa.store.disk.files import naming, telling_disk_errors, write_bytes_atomically


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How batches are made and waited for."""

    most_requests: int | None = None
    """Requests of one batch; None for the provider's limit. Accounts may have limits on what waits at one time."""
    interval: float = 60.0
    """Seconds between two looks at the batches."""
    settle: float = 60.0
    """Seconds after a creation without an answer until a batch that the provider does not list does not exist."""
    wait: bool = True
    """Whether to wait for the results."""


class BatchSteps:
    """Takes the batches of one model on."""

    def __init__(self, client: Client, records: BatchRecords, settings: BatchSettings) -> None:
        """`client` speaks to the model's server."""
        self._client = client
        self._api = batch_api_of(client)
        self._records = records
        self._settings = settings
        self._failing: float | None = None
        """Since when no batch can be created, by time.monotonic."""

    def write(self, asked: Iterable[tuple[Question, float]]) -> BatchRecord | None:
        """Write the first of the requests `asked`, with the most that each can cost, as far as one file may go.

        Returns the new record; None if there are none.
        """
        requests, most = dict[str, Requested](), min(self._api.most_requests, self._settings.most_requests or 10**9)
        path, size = self._records.requests_path, 0
        doing = f"writing {path}"
        with telling_disk_errors(doing, "nothing has been sent"), naming(path), path.open("wb") as file:
            for question, reserve in asked:
                body = self._client.api.body(self._client.model, question.request())
                line = json.dumps(self._api.line(question.id, body)).encode() + b"\n"
                if len(line) > self._api.most_bytes:
                    message = (
                        f"{question}: the request has {len(line)} bytes, too many for a batch. Use a smaller image."
                    )
                    raise DataError(message)
                if size + len(line) > self._api.most_bytes or len(requests) == most:
                    break
                size += file.write(line)
                requests[question.id] = Requested(name=question.item.name, key=question.key, reserve_usd=reserve)
        return self._records.save(new_record(self._client.model, requests)) if requests else None

    def send(self, record: BatchRecord) -> BatchRecord:
        """Upload the requests of `record` and create the batch, if that is not done and the provider takes it now.

        Raises RemoteError when the provider refuses, or takes none for longer than the client's patience.
        """
        if record.step == "written":
            say(f"uploading {len(record.requests)} requests")
            record = self._records.save(record.at("uploaded", file=self._api.upload(self._records.requests_path)))
            self._records.requests_path.unlink(missing_ok=True)
        if record.step in ("uploaded", "creating"):
            status = self._create(record)
            if status is not None:
                record = self._records.save(record.at("created", batch=status.id))
                say(f"batch {status.id}: created, {len(record.requests)} requests")
        return next((one for one in self._records.batches if one.tag == record.tag), record)

    def fetch(self, record: BatchRecord) -> BatchRecord:
        """Download the results of `record`, once the batch has ended; unchanged before.

        Raises RemoteError for a batch that failed as a whole; its record is gone then.
        """
        if record.step != "created":
            return record
        status = self._api.look(str(record.batch))
        if status.state == "failed":
            if status.queue_is_full:
                self._fail(status.problem)
                return self._records.save(record.at("uploaded", batch=None))
            self._records.close(record)
            message = f"batch {status.id} failed, and no request was worked on: {status.problem or status.word}."
            raise RemoteError(message)
        if status.state == "ended":
            pieces = [self._api.download(name) for name in status.files]
            write_bytes_atomically(self._records.results_path(record), (piece + b"\n" for piece in pieces))
            return self._records.save(record.at("downloaded", word=status.word))
        return record

    def results(self, record: BatchRecord) -> list[BatchResult]:
        """The downloaded results of `record`."""
        return read_results(self._api, self._records.results_path(record).read_bytes())

    def _create(self, record: BatchRecord) -> BatchStatus | None:
        """The batch of `record`: found by its tag if an earlier attempt may have made it, else created.

        None if the provider takes none now, or an earlier attempt may still be on its way.
        """
        if record.step == "creating":
            found = self._api.find(record.tag)
            if found is not None or time.time() < record.since + self._settings.settle:
                return found
        record = self._records.save(record.at("creating"))
        try:
            sent = self._api.create(str(record.file), record.tag)
        except RemoteError as error:
            if error.refused:
                self._records.close(record)
            raise
        if sent.fault is None:
            self._failing = None
            return self._api.status(sent.json)
        if sent.fault.kind not in ("busy", "again"):
            self._records.close(record)
            message = f"creating a batch: {sent.fault.reason}."
            raise RemoteError(message)
        self._fail(sent.fault.reason)
        return None

    def _fail(self, reason: str) -> None:
        """Say that no batch can be created now; raise RemoteError when that lasts too long."""
        now = time.monotonic()
        if self._failing is None:
            self._failing = now
            say(f"no batch can be created now: {reason}; trying again every {self._settings.interval:g} s")
        elif now - self._failing > self._client.settings.patience:
            message = f"no batch could be created for {now - self._failing:.0f} seconds: {reason}."
            raise RemoteError(message)
