"""What an importer of a published data set says, and what it reads of the folder as downloaded."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from agiqa.errors import DataError, listed
from agiqa.progress import said_to
from agiqa.registry import Registry
from agiqa.store.disk.files import sha256_of_file
from agiqa.store.format.columns import ColumnNames, LabelTable, open_labels
from agiqa.store.format.labels import (
    ASPECT_COLUMNS,
    DEVIATION_COLUMNS,
    IMPORT_RECORD,
    MosRange,
    import_record,
)
from agiqa.store.format.names import NameIndex
from agiqa.store.format.tables import open_table

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz")


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """One image with its labels, as the files of the set say."""

    name: str
    """In the imported set: a plain relative path with forward slashes."""
    images: tuple[str, ...]
    """Where its file may be: the ends of paths below the folder of the set, the likeliest first."""
    prompt: str
    mos: Mapping[str, str]
    """By aspect, as written."""
    where: str
    """File and line, for messages."""
    std: Mapping[str, str] = field(default_factory=dict[str, str])
    """By aspect, the standard deviation of the scores, as written."""
    generator: str | None = None
    split: str | None = None
    reference: str | None = None
    """The image that the generator was given, for image-to-image sets."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """All labels of a set, and remarks for the user."""

    images: tuple[LabelledImage, ...]
    notes: tuple[str, ...] = ()


class Download:
    """The folder of a set as downloaded. Finds files in it wherever they lie, and remembers those that were read."""

    def __init__(self, folder: Path, *, without: Path | None = None, columns: ColumnNames | None = None) -> None:
        """Files below `without` are not of the set; `columns` say what the columns of its tables mean."""
        self.folder = folder
        self.columns = columns
        self.files = sorted(_files_below(folder, without))
        """Relative paths with forward slashes."""
        self.hashes: dict[str, str] = {}
        """Sha256 of the files that were read, by relative path."""
        self._images = NameIndex(self.images(), other_extensions=True)

    def images(self) -> list[str]:
        """The relative paths of all images."""
        return [name for name in self.files if name.lower().endswith(IMAGE_SUFFIXES)]

    def archives(self) -> list[str]:
        """The relative paths of archives, which may hold what is missing."""
        return [name for name in self.files if name.lower().endswith(_ARCHIVES)]

    def find(self, *names: str) -> Path | None:
        """The file with the first of `names` that is there, at the end of its path; of several, the one on top.

        Raises DataError where two files of one name are equally deep and differ.
        """
        for name in names:
            wanted = f"/{name.lower()}"
            found = [path for path in self.files if f"/{path.lower()}".endswith(wanted)]
            top = [path for path in found if path.count("/") == min(one.count("/") for one in found)]
            if len({sha256_of_file(self.folder / path) for path in top} if len(top) > 1 else top) > 1:
                message = f"{self.folder} has several different files {name}: {listed(top)}; give the folder of one."
                raise DataError(message)
            if top:
                return self.folder / top[0]
        return None

    def need(self, *names: str) -> Path:
        """As `find`. Raises DataError if none of `names` is there."""
        found = self.find(*names)
        if found is None:
            there = [Path(name).name for name in self.files if not name.lower().endswith(IMAGE_SUFFIXES)]
            seen = listed(there) if there else "no files but images" if self.files else "nothing"
            message = f"{self.folder}: no {' or '.join(names)} (found: {seen})."
            raise DataError(message)
        return found

    def used(self, path: Path) -> Path:
        """`path`, which counts as read from now on."""
        self.hashes[path.relative_to(self.folder).as_posix()] = sha256_of_file(path)
        return path

    def table(self, path: Path, columns: Mapping[str, Sequence[str]] | None = None) -> LabelTable:
        """The label table `path`. Its `columns` are those of the user, else those of these names, else recognised.

        Raises DataError as `open_labels`.
        """
        if self.columns is not None:
            return open_labels(self.used(path), self.columns)
        with said_to(lambda _line: None):  # `open_labels` says it
            header = {_plain(column): column for column in open_table(path).header}
        named = {
            meaning: [header[_plain(name)] for name in names if _plain(name) in header][:1]
            for meaning, names in (columns or {}).items()
        }
        return open_labels(self.used(path), {meaning: found[0] for meaning, found in named.items() if found})

    def image_of(self, one: LabelledImage) -> Path | None:
        """The image file of `one`; None if it is missing. Raises DataError where several may be meant."""
        found = next((path for wanted in one.images if (path := self._images.find(wanted)) is not None), None)
        return None if found is None else self.folder / found


def rows_of(table: LabelTable) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line, cells by meaning) of each row of `table`."""
    for row in table.rows:
        cells = {column: cell.strip() for column, cell in zip(table.header, row.cells, strict=False)}
        if "name" in cells:
            cells["name"] = cells["name"].replace("\\", "/")
        yield f"{table.path.name}, line {row.number}", cells


def labelled_image(where: str, cells: Mapping[str, str]) -> LabelledImage:
    """The image of a row, whose file name begins with its generator: GENERATOR_REST."""
    name = cells.get("name", "").rpartition("/")[2]
    return LabelledImage(
        name=name,
        images=(name,),
        prompt=cells.get("prompt", ""),
        mos=mos_of(cells),
        generator=name.partition("_")[0] or None,
        where=where,
    )


def mos_of(cells: Mapping[str, str]) -> dict[str, str]:
    """The MOS by aspect in the cells of a row that are not empty."""
    return {ASPECT_COLUMNS[column]: cell for column, cell in cells.items() if column in ASPECT_COLUMNS and cell}


def std_of(cells: Mapping[str, str]) -> dict[str, str]:
    """The standard deviations by aspect in the cells of a row that are not empty."""
    return {DEVIATION_COLUMNS[column]: cell for column, cell in cells.items() if column in DEVIATION_COLUMNS and cell}


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """An importer: what a published set is, and how its folder is read."""

    name: str
    """On the command line."""
    title: str
    source: str
    """URL of the repository that publishes it."""
    mos_range: MosRange | None
    """The scale of its MOS; None where no document states it, so that it is taken from the values."""
    image_name: re.Pattern[str]
    """Matches a whole file name of its images."""
    example: str
    """One such name."""
    signs: tuple[str, ...]
    """Ends of paths of files that no other set has."""
    std_column: str = "std"
    """Begins the names of the columns of standard deviations: "raw_std" where they are not on the scale of the MOS."""
    read: Callable[[Download], Labels]
    """The labels in the folder. Raises DataError for what is missing or cannot be read."""
    notes: tuple[str, ...] = ()
    """Remarks that hold for every import of the set."""

    @property
    def __wrapped__(self) -> Callable[[Download], Labels]:
        """The function that the set is made of, which tells where the set comes from (`agiqa.parts.Origin`)."""
        return self.read

    @property
    def summary(self) -> str:
        """One line for `agiqa parts`."""
        return f"{self.title}, {self.source}"

    def likeness(self, download: Download) -> float:
        """How much a folder looks like this set: 2 for a sign, and the share of image names that fit."""
        names = [name.rpartition("/")[2] for name in download.images()]
        share = sum(self.image_name.fullmatch(name) is not None for name in names) / max(1, len(names))
        sign = any(f"/{path}".lower().endswith(f"/{sign.lower()}") for path in download.files for sign in self.signs)
        return 2.0 * sign + share


IMPORTERS: Registry[PublishedSet] = Registry("published set")
"""Importers by name; `agiqa.extract.data.importers.sets` adds those that agiqa brings."""


def nearest_set(download: Download, *, but: str) -> PublishedSet | None:
    """The set that a folder looks like, if not like that called `but`; None if it is like no other."""
    found = {name: IMPORTERS.get(name).likeness(download) for name in IMPORTERS}
    best = max(found, key=lambda name: found[name], default=but)
    likely = best != but and found[best] >= 0.5 and found[best] > found.get(but, 0.0)
    return IMPORTERS.get(best) if likely else None


def repeated(images: Sequence[LabelledImage]) -> tuple[list[LabelledImage], list[str], int]:
    """The images without those that repeat an earlier one, what contradicts an earlier one, and how many repeat."""
    first: dict[str, LabelledImage] = {}
    problems: list[str] = []
    counts: Counter[bool] = Counter()
    for one in images:
        before = first.setdefault(one.name, one)
        if before is one:
            continue
        same = (before.prompt, before.mos, before.split) == (one.prompt, one.mos, one.split)
        counts[same] += 1
        if not same:
            problems.append(f"{one.where}: {one.name} is in {before.where} too, with other labels")
    return list(first.values()), problems, counts[True]


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _files_below(folder: Path, without: Path | None) -> Iterator[str]:
    """Relative paths of all files, but for hidden ones, those of macOS, and those below `without` or in an import."""
    left_out = None if without is None else os.path.realpath(without)
    for root, folders, names in os.walk(folder):
        if import_record(Path(root, IMPORT_RECORD)) is not None:
            folders.clear()
            continue
        with suppress(ValueError):
            folders.remove("__MACOSX")
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) != left_out  # noqa: PTH118
        ]
        for name in names:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")  # noqa: PTH118
