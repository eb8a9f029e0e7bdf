"""Image names that differ in their folders, case or extension from the names that exist."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from agiqa.errors import DataError, listed
from agiqa.progress import say

_EXTENSION = re.compile(r"\.(png|jpe?g|webp|bmp|tiff?|gif)\Z", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class _Found:
    name: str
    kind: str
    """What differs, for messages."""


class NameIndex:
    """Finds the existing name that a written one means, and counts what differed."""

    def __init__(self, names: Iterable[str], *, other_extensions: bool) -> None:
        """`names` exist, with forward slashes; `other_extensions`: whether a.png may mean a.jpg."""
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._other_extensions = other_extensions
        self._mapped: dict[str, tuple[int, str, str]] = {}
        for name in names:
            self._by_stem[_stem(name)].append(name)

    def find(self, written: str) -> str | None:
        """The name that `written` means; None if there is none. Raises DataError listing the names it may mean."""
        wanted = written.replace("\\", "/")
        candidates = [
            name
            for name in self._by_stem.get(_stem(wanted), ())
            if _shared_folders(name, wanted) is not None and (self._other_extensions or _same_kind(name, wanted))
        ]
        ranks = {name: _rank(name, wanted) for name in candidates}
        best = [name for name in candidates if ranks[name] == max(ranks.values())]
        if len(best) > 1:
            message = f"{written!r} may be {listed(best)}; write the one that is meant"
            raise DataError(message)
        if not best:
            return None
        found = _Found(name=best[0], kind=_difference(best[0], wanted))
        count, example, target = self._mapped.get(found.kind, (0, written, found.name))
        self._mapped[found.kind] = (count + 1, example, target)
        return found.name

    def announce(self, where: str) -> None:
        """Say once for each kind of difference how many names of `where` had it, with an example."""
        for kind, (count, example, target) in self._mapped.items():
            say(f"{where}: image names that differ in {kind}: {count}, such as {example!r}, read as {target!r}")
        self._mapped.clear()


def _stem(name: str) -> str:
    return _EXTENSION.sub("", _composed(name).rpartition("/")[2]).lower()


def _composed(name: str) -> str:
    """`name` with accents in one code point each: some file systems write two."""
    return unicodedata.normalize("NFC", name)


def _extension(name: str) -> str:
    found = _EXTENSION.search(name)
    return found[0].lower() if found else ""


def _same_kind(name: str, wanted: str) -> bool:
    return _extension(wanted) in ("", _extension(name))


def _shared_folders(name: str, wanted: str) -> int | None:
    """How many folders before the file both have; None where these differ before one of the names begins."""
    here, there = (_composed(one).lower().split("/")[-2::-1] for one in (name, wanted))
    pairs = list(zip(here, there, strict=False))
    return len(pairs) if all(one == other for one, other in pairs) else None


def _rank(name: str, wanted: str) -> tuple[bool, int, bool]:
    """How well `name` fits: the extension, the folders in common at its end, the case."""
    shared = _shared_folders(name, wanted) or 0
    return _extension(name) == _extension(wanted), shared, name.rpartition("/")[2] == wanted.rpartition("/")[2]


def _difference(name: str, wanted: str) -> str:
    parts: list[str] = []
    name, wanted = _composed(name), _composed(wanted)
    if name.rpartition("/")[0].lower() != wanted.rpartition("/")[0].lower():
        parts.append("folder")
    if _extension(name) != _extension(wanted):
        parts.append("extension")
    if _EXTENSION.sub("", name.rpartition("/")[2]) != _EXTENSION.sub("", wanted.rpartition("/")[2]):
        parts.append("case")
    return " and ".join(parts) or "the encoding of accents"
