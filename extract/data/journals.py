"""Journals: files of one JSON line per item, written as the work goes on and read again after a kill.

`NAME.provenance.json` beside `NAME.jsonl` records how the lines were made. A line is whole or absent: each is flushed
to the disk at once, and a torn last line is cut off.
"""

import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from agiqa.errors import BusyStore, DataError, SettingsConflict
from agiqa.store.disk.files import (
    append_durably,
    canonical_json,
    read_json,
    telling_disk_errors,
    write_text_atomically,
)
from agiqa.store.disk.locks import exclusive_lock

Line = dict[str, Any]

ITEM = "item_sha256"
"""The field of a line with the hash of what its item is made from."""


class Journal:
    """The file of one command: its lines by item name, the last one of each item, and how to append more."""

    def __init__(
        self,
        path: Path,
        provenance: Mapping[str, Any],
        *,
        command: str,
        verb: str,
        free: Sequence[str] = ("agiqa",),
    ) -> None:
        """Read the file at `path`, if there is one, and change nothing.

        `command`, such as `agiqa describe`, and `verb`, such as describes, are words for messages. Provenance named in
        `free` may differ between two runs on one file. Raises DataError for another kind of file, and SettingsConflict,
        naming the first difference, for one with another `provenance`.
        """
        self.path = path
        self.provenance = dict(provenance)
        self._command = command
        self._verb = verb
        self._free = free
        if not path.parent.is_dir():
            message = f"{path.parent} is no folder; make it, or write to another path."
            raise DataError(message)
        self.lines = self._whole_lines()[0]
        self._refuse_other_files()

    @property
    def provenance_path(self) -> Path:
        """The file that records how the lines were made."""
        return self.path.with_name(f"{self.path.stem}.provenance.json")

    def check_items(self, keys: Mapping[str, str]) -> None:
        """Raise SettingsConflict unless every line's item is in `keys`, item name -> hash, with the same hash."""
        for name, line in self.lines.items():
            if keys.get(name) != line[ITEM]:
                what = "has another image or prompt now" if name in keys else "is not in this data set"
                message = f"{self.path} {self._verb} {name!r}, which {what}. Choose another OUT, or remove that file."
                raise SettingsConflict(message)

    @contextmanager
    def writing(self) -> Generator[None]:
        """Allow `append` inside: lock the file, cut off a torn last line, and write the provenance.

        Raises BusyStore while another run writes to the file, and as the constructor.
        """
        doing = f"writing {self.path}"
        with telling_disk_errors(doing, "the items before are kept"), exclusive_lock(self.path) as mine:
            if not mine:
                message = f"Another run is writing to {self.path}. Wait for its end, or choose another OUT."
                raise BusyStore(message)
            self.lines, size = self._whole_lines()
            self._refuse_other_files()
            if not self.lines:
                text = json.dumps(self.provenance, indent=2, ensure_ascii=False)
                write_text_atomically(self.provenance_path, text + "\n")
            self._end_last_line(size)
            yield

    def append(self, lines: Sequence[Line]) -> None:
        """Add `lines`, and flush them to the disk."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)  # ASCII: no line ends within
        with telling_disk_errors(f"writing {self.path}", "the items before are kept"):
            append_durably(self.path, text.encode())
        self.lines.update({line["name"]: line for line in lines})

    def _refuse_other_files(self) -> None:
        """Raise SettingsConflict for lines of other settings, and for a file that is no journal, torn line or not."""
        if not self.provenance_path.exists() and self.path.exists() and self.path.stat().st_size:
            message = (
                f"{self.path} exists, but {self.provenance_path.name} beside it, which records how it was made, does "
                "not. Choose another OUT."
            )
            raise SettingsConflict(message)
        if self.lines:
            self._check_provenance()

    def _check_provenance(self) -> None:
        remedy = f"Choose another OUT, or remove it and {self.path.name}."
        recorded, now = read_json(self.provenance_path, remedy=remedy), json.loads(canonical_json(self.provenance))
        different = _difference(recorded, {**now, **{key: recorded.get(key) for key in self._free if key in now}})
        if different is not None:
            name, was, is_now = different
            message = (
                f"{self.path} was made with other settings: {name} was {was!r}, and is {is_now!r} now. "
                "Choose another OUT, or go on with the settings that it was made with."
            )
            raise SettingsConflict(message)

    def _whole_lines(self) -> tuple[dict[str, Line], int]:
        """The lines by their item's name, and the bytes that they take; a torn last line is left out."""
        content, lines = self.path.read_bytes() if self.path.exists() else b"", dict[str, Line]()
        *texts, last = content.split(b"\n")
        if last and _parse_object(last) is not None:  # only the line end is missing: an editor has removed it
            texts, last = [*texts, last], b""
        for number, text in enumerate(texts, start=1):
            line = self._parse(number, text)
            lines[line["name"]] = line
        return lines, len(content) - len(last)

    def _end_last_line(self, size: int) -> None:
        """Cut off a torn line after the first `size` bytes, and add the line end that a whole one lacks."""
        if size < self.path.stat().st_size:
            os.truncate(self.path, size)
        with self.path.open("rb") as file:
            file.seek(max(size - 1, 0))
            is_ended = file.read(1) in (b"", b"\n")
        if not is_ended:
            append_durably(self.path, b"\n")

    def _parse(self, number: int, text: bytes) -> Line:
        message = (
            f"{self.path}, line {number} is no line of `{self._command}`. Choose another OUT, or remove a damaged line."
        )
        line = _parse_object(text)
        if line is None or not isinstance(line.get("name"), str) or not isinstance(line.get(ITEM), str):
            raise DataError(message)
        return line


def _parse_object(text: bytes) -> Line | None:
    """The JSON object in `text`; None if it is none."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("Line", found) if isinstance(found, dict) else None


def _difference(was: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place, dotted, where two JSON values differ, with both values."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return None if was == now else (name, was, now)
    old, new = cast("Line", was), cast("Line", now)
    for key in {**old, **new}:  # in the order of the file
        found = _difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        if found is not None:
            return found
    return None
