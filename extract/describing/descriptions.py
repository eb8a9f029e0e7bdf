"""The file of `agiqa describe`: a line per item, appended as batches end and read again after a kill.

Each line is an M3-AGIQA conversation too, so that `agiqa extract --conversations` and `agiqa words` read the file as
it is. Beside `NAME.jsonl` lies `NAME.provenance.json`: the model, the questions and the settings that made it.
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
    whole_lines,
    write_text_atomically,
)
from agiqa.store.disk.locks import exclusive_lock

FORMAT, FORMAT_VERSION = "agiqa.descriptions", 1

Line = dict[str, Any]

_FREE = ("agiqa",)
"""What may change between two runs on one file."""
_ITEM = "item_sha256"


class DescriptionFile:
    """The lines that are there, and a place for more."""

    def __init__(self, path: Path, provenance: Mapping[str, Any]) -> None:
        """Read what is at `path`, and change nothing.

        Raises DataError for a file that is none of descriptions, SettingsConflict for one that was made otherwise
        than by `provenance`, naming what differs.
        """
        self.path = path
        self.provenance = {"format": FORMAT, "version": FORMAT_VERSION, **provenance}
        if not path.parent.is_dir():
            message = f"{path.parent} is no folder; make it, or write to another path."
            raise DataError(message)
        self.lines = _whole_lines(path)[0]
        if self.lines:
            self._check_provenance()

    @property
    def provenance_path(self) -> Path:
        """Where it is written how the lines were made."""
        return self.path.with_name(f"{self.path.stem}.provenance.json")

    def check_items(self, keys: Mapping[str, str]) -> None:
        """Raise SettingsConflict unless the items of all lines are among `keys`, name -> item hash, unchanged."""
        for name, line in self.lines.items():
            if keys.get(name) != line[_ITEM]:
                what = "has another image or prompt now" if name in keys else "is not in this data set"
                message = f"{self.path} describes {name!r}, which {what}. Choose another OUT, or remove that file."
                raise SettingsConflict(message)

    @contextmanager
    def writing(self) -> Generator[None]:
        """Make `append` possible inside: alone at the file, what a kill tore off removed, the provenance written.

        Raises BusyStore while another run writes to the file, and as the constructor.
        """
        doing = f"writing {self.path}"
        with telling_disk_errors(doing, "the items before are kept"), exclusive_lock(self.path) as mine:
            if not mine:
                message = f"Another run is writing to {self.path}. Wait for its end, or choose another OUT."
                raise BusyStore(message)
            self.lines, size = _whole_lines(self.path)
            if self.lines:
                self._check_provenance()
            else:
                write_text_atomically(
                    self.provenance_path, json.dumps(self.provenance, indent=2, ensure_ascii=False) + "\n"
                )
            if size < self.path.stat().st_size:
                os.truncate(self.path, size)
            yield

    def append(self, lines: Sequence[Line]) -> None:
        """Add the lines of a batch, and force them to the disk."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)  # ASCII: no line ends within
        with telling_disk_errors(f"writing {self.path}", "the items before are kept"):
            append_durably(self.path, text.encode())
        self.lines.update({line["name"]: line for line in lines})

    def _check_provenance(self) -> None:
        if not self.provenance_path.exists():
            message = (
                f"{self.path} is there already, and {self.provenance_path.name} beside it, which says how it was made, "
                "is not. Choose another OUT."
            )
            raise SettingsConflict(message)
        remedy = f"Choose another OUT, or remove it and {self.path.name}."
        recorded, now = read_json(self.provenance_path, remedy=remedy), json.loads(canonical_json(self.provenance))
        different = _difference(recorded, {**now, **{key: recorded.get(key) for key in _FREE if key in now}})
        if different is not None:
            name, was, is_now = different
            message = (
                f"{self.path} was made with other settings: {name} was {was!r}, and is {is_now!r} now. "
                "Choose another OUT, or go on with the settings that it was made with."
            )
            raise SettingsConflict(message)


def unspoken(path: Path) -> frozenset[str]:
    """The images of the file at `path` for which the model was asked for a rating and answered nothing at all.

    Empty for a conversation file that `agiqa describe` did not write.
    """
    found: set[str] = set()
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            line: Any = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and _ITEM in line and cast("Line", line).get("answer") == "":
            found.add(str(cast("Line", line).get("image")))
    return frozenset(found)


def _whole_lines(path: Path) -> tuple[dict[str, Line], int]:
    """The lines of the file by their item's name, and the bytes that they take; a torn last line is left out."""
    content, lines = whole_lines(path), dict[str, Line]()
    for number, text in enumerate(content.split(b"\n")[:-1], start=1):
        line = _parse(path, number, text)
        lines[line["name"]] = line
    return lines, len(content)


def _parse(path: Path, number: int, text: bytes) -> Line:
    message = f"{path}, line {number} is no line of `agiqa describe`. Choose another OUT, or remove a damaged line."
    try:
        line: Any = json.loads(text.decode())
    except ValueError as error:
        raise DataError(message) from error
    if not isinstance(line, dict) or not isinstance(line.get("name"), str) or not isinstance(line.get(_ITEM), str):
        raise DataError(message)
    return cast("Line", line)


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
