"""`NAME.batches.json` beside the journal: each batch with the step that it has reached, written before the next step.

A killed run goes on from there. Between `creating` and `created` the provider may have a batch whose id nobody knows:
its tag, which is recorded before, finds it again.
"""

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from agiqa.errors import DataError, SettingsConflict
from agiqa.extract.teaching.chats import Fault, Reply
from agiqa.store.disk.files import telling_disk_errors, write_text_atomically

_TAG = "agiqa-"

Step = Literal["written", "uploaded", "creating", "created", "downloaded"]
"""What is done: the file of requests is on the disk; the provider has it; the batch is perhaps made; its id is known;
its results are on the disk."""


_IDLE = ("written", "uploaded")
"""Steps at which no batch is at work."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Requested(_Strict):
    """A request of a batch."""

    name: str
    """Of the item."""
    key: str
    """SHA-256 of what the item's answer depends on."""
    reserve_usd: float
    """The most that it can cost."""


class Tried(_Strict):
    """A request whose outcome is not the last word about its item."""

    model: str
    reply: Reply | Fault
    cost: float | None
    counted: float | None
    seconds: float


class BatchRecord(_Strict):
    """A batch that is not joined to the journal yet."""

    tag: str
    """What the provider finds it by."""
    model: str
    requests: dict[str, Requested]
    """By the id that the answer repeats."""
    step: Step = "written"
    since: float
    """Time of the step, in seconds since 1970."""
    file: str | None = None
    """The provider's id of the file of requests."""
    batch: str | None = None
    """The provider's id of the batch."""
    created: float | None = None
    """Time when the batch was created, in seconds since 1970."""
    word: str | None = None
    """How the batch ended, in the provider's word."""

    def at(self, step: Step, **changes: str | None) -> "BatchRecord":
        """The record after `step`, which is done now."""
        now = time.time()
        created = {"created": now} if step == "created" else {}
        return self.model_copy(update={"step": step, "since": now, **created, **changes})

    @property
    def reserve_usd(self) -> float:
        """The most that it can cost."""
        return sum(one.reserve_usd for one in self.requests.values())


class _Content(_Strict):
    format: Literal["agiqa.batches"] = "agiqa.batches"
    version: Literal[1] = 1
    settings: dict[str, Any]
    batches: tuple[BatchRecord, ...] = ()
    tries: dict[str, tuple[Tried, ...]] = {}


def new_record(model: str, requests: Mapping[str, Requested]) -> BatchRecord:
    """The record of requests whose file is on the disk."""
    return BatchRecord(tag=f"{_TAG}{uuid4().hex}", model=model, requests=dict(requests), since=time.time())


class BatchRecords:
    """The file of records. Use it while the journal is locked."""

    def __init__(self, journal: Path, settings: Mapping[str, Any]) -> None:
        """Read the file beside `journal`, if there is one; `settings` is what changes the answers, JSON-able.

        Raises DataError for another content, and SettingsConflict if batches with other settings are open.
        """
        self._journal = journal
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.path = records_path(journal)
        content = _read(self.path) if self.path.exists() else _Content(settings=self._settings)
        if content.settings != self._settings:
            self._check_settings(content)
            content = _Content(settings=self._settings)
        self._content = content

    @property
    def batches(self) -> tuple[BatchRecord, ...]:
        """Batches that are not joined yet, the oldest first."""
        return self._content.batches

    @property
    def tries(self) -> Mapping[str, tuple[Tried, ...]]:
        """By item, the tries that ended in no line of the journal yet."""
        return self._content.tries

    @property
    def requests_path(self) -> Path:
        """The file of requests that is to be uploaded next."""
        return self._journal.with_name(f"{self._journal.stem}.batch-requests.jsonl")

    def results_path(self, record: BatchRecord) -> Path:
        """The file of results of a batch."""
        return self._journal.with_name(f"{self._journal.stem}.{record.tag}.results.jsonl")

    def of(self, tag: str) -> BatchRecord:
        """The record with this `tag`."""
        return next(one for one in self.batches if one.tag == tag)

    def check_items(self, keys: Mapping[str, str]) -> None:
        """Raise SettingsConflict unless every item of a batch that may be at work is in `keys`, item name -> hash.

        Other batches with another item are forgotten.
        """
        kept = list[BatchRecord]()
        for record in self.batches:
            wrong = [one.name for one in record.requests.values() if keys.get(one.name) != one.key]
            if wrong and record.step not in _IDLE:
                what = "has another image or text now" if wrong[0] in keys else "is not in this data set"
                message = (
                    f"{self.path} has a batch with {wrong[0]!r}, which {what}. Restore the data until the batch has "
                    "ended, or choose another OUT."
                )
                raise SettingsConflict(message)
            kept += [] if wrong else [record]
        self._content = self._content.model_copy(update={"batches": tuple(kept)})

    def save(self, record: BatchRecord) -> BatchRecord:
        """Add `record`, or put it in the place of the one with its tag."""
        known = {one.tag: one for one in self.batches} | {record.tag: record}
        self._write(_Content(settings=self._settings, batches=tuple(known.values()), tries=dict(self.tries)))
        return record

    def close(self, record: BatchRecord, tries: Mapping[str, tuple[Tried, ...]] | None = None) -> None:
        """Forget `record`, and from now on know `tries`, in one step; then remove its files."""
        left = tuple(one for one in self.batches if one.tag != record.tag)
        self._write(_Content(settings=self._settings, batches=left, tries=dict(self.tries if tries is None else tries)))
        if record.step == "written":
            self.requests_path.unlink(missing_ok=True)
        self._remove_leftovers()
        if not (left or self.tries):
            self.path.unlink()

    def keep_tries(self, names: Collection[str]) -> None:
        """Forget the tries about items that are not in `names`; remove the file if it has nothing left."""
        kept = {name: tries for name, tries in self.tries.items() if name in names}
        if len(kept) < len(self.tries):
            self._write(_Content(settings=self._settings, batches=self.batches, tries=kept))
        if self.path.exists() and not (self.batches or kept):
            self.path.unlink()

    def _remove_leftovers(self) -> None:
        """Remove results of closed batches, and what kills have left half written."""
        kept = tuple(self.results_path(record).name for record in self.batches)
        for path in self._journal.parent.iterdir():
            results = path.name.startswith(f"{self._journal.stem}.{_TAG}") and ".results.jsonl" in path.name
            if path.name.startswith(f".{self.path.name}.") or (results and not path.name.startswith(kept)):
                path.unlink(missing_ok=True)

    def _check_settings(self, content: _Content) -> None:
        """Raise SettingsConflict if batches of other settings may be at work."""
        was, now = content.settings, self._settings
        if any(one.step not in _IDLE for one in content.batches):
            name = next(name for name in {**was, **now} if was.get(name) != now.get(name))
            message = (
                f"{self.path} has batches that were sent with other settings: {name} differs. Go on with those "
                "settings until the batches have ended, or choose another OUT."
            )
            raise SettingsConflict(message)

    def _write(self, content: _Content) -> None:
        with telling_disk_errors(f"writing {self.path}", "the batches are kept"):
            write_text_atomically(self.path, json.dumps(content.model_dump(), ensure_ascii=False) + "\n")
        self._content = content


def records_path(journal: Path) -> Path:
    """The file of records beside `journal`."""
    return journal.with_name(f"{journal.stem}.batches.json")


def refuse_open_batches(journal: Path) -> None:
    """Raise SettingsConflict if items of `journal` are in batches, which single requests would pay for again."""
    path = records_path(journal)
    batches = [one for one in _read(path).batches if one.step not in _IDLE] if path.exists() else []
    if batches:
        message = f"{path} has {len(batches)} open batches. Go on with --batch until they have ended."
        raise SettingsConflict(message)


def _read(path: Path) -> _Content:
    try:
        return _Content.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        message = (
            f"{path}: {where}: {first['msg']}. It records batches that are paid for: restore it, or remove it to give "
            "them up."
        )
        raise DataError(message) from error
