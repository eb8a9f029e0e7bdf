"""Import: the labels and images of a published set become a folder that `load_data_set` reads without options."""

import csv
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from agiqa.errors import ConfigError, DataError, listed
from agiqa.extract.data.importers.contract import (
    Download,
    LabelledImage,
    Labels,
    PublishedSet,
    nearest_set,
    repeated,
)
from agiqa.extract.data.importers.sets import IMPORTERS
from agiqa.progress import track
from agiqa.store.disk.files import sha256_of_file, telling_disk_errors, write_text_atomically
from agiqa.store.format.columns import ColumnNames
from agiqa.store.format.labels import (
    IMPORT_FORMAT,
    IMPORT_RECORD,
    IMPORTED_TABLE,
    MosRange,
    MosReader,
    check_range,
    import_record,
    likely_range,
)
from agiqa.version import agiqa_version

ASPECTS = ("quality", "correspondence", "authenticity")
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What is in the folder `out` now."""

    out: Path
    set: str
    mos_range: MosRange
    rows: tuple[LabelledImage, ...]
    """The rows of data.csv."""
    missing: tuple[str, ...]
    """Names of images that have labels and are not in the folder; they are left out."""
    unlabelled: int
    """Images in the folder without labels."""
    problems: tuple[str, ...]
    """Rows that were left out, with the reason."""
    changed: bool
    """False if `out` was the same before."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, with the rows counted by aspect, split and generator."""
        rows = self.rows
        generators = sorted(Counter(one.generator for one in rows if one.generator).items())
        return {
            "out": str(self.out),
            "set": self.set,
            "mos_range": list(self.mos_range),
            "items": len(rows),
            "labels": {aspect: count for aspect in ASPECTS if (count := sum(aspect in one.mos for one in rows))},
            "splits": dict(Counter(one.split for one in rows if one.split)),
            "generators": dict(generators),
            "missing": list(self.missing),
            "unlabelled": self.unlabelled,
            "problems": list(self.problems),
            "changed": self.changed,
            "notes": list(self.notes),
        }


def import_data_set(
    name: str,
    folder: Path,
    out: Path,
    *,
    copy: bool = False,
    on_bad_item: Literal["fail", "skip"] = "fail",
    mos_range: Sequence[float] | None = None,
    columns: ColumnNames | None = None,
) -> ImportResult:
    """Import the set called `name` from `folder`, as downloaded, into the folder `out`: data.csv, source.json, images.

    Images are linked, or with `copy` copied. Missing images and unusable rows are an error, or with
    `on_bad_item="skip"` left out. `mos_range` beats the scale of the set, and `columns` what is known of its tables.
    The same import again completes what a killed one began, adds images that were missing, and changes nothing else.

    Raises UnknownName for `name`; ConfigError where `out` holds anything else; DataError for a folder that does not
    have the layout of the set, with the set that it looks like.
    """
    published = IMPORTERS.get(name)
    _check_folders(folder, out, published)
    download = Download(folder, without=out, columns=columns)
    labels = _labels(published, download)
    scale = _scale(published, labels, mos_range)
    kept, problems, notes = _usable(published, download, labels, scale)
    images, missing = _images(download, kept, problems)
    _refuse(published, download, images, missing, problems, on_bad_item=on_bad_item)
    notes += [*labels.notes, *published.notes]
    rows = [one for one in kept if one.name in images]
    told = {"mos_range": list(scale), "missing": missing, "left_out": problems, "notes": notes}
    text = _table_text(rows, published.std_column)
    changed = _write(out, text, images, {**_origin(published, download), **told}, copy=copy)
    used = {path.relative_to(folder).as_posix() for path in images.values()}
    return ImportResult(
        out=out,
        set=name,
        mos_range=scale,
        rows=tuple(rows),
        missing=tuple(missing),
        unlabelled=len(set(download.images()) - used),
        problems=tuple(problems),
        changed=changed,
        notes=tuple(notes),
    )


def _origin(published: PublishedSet, download: Download) -> dict[str, Any]:
    """What source.json says of the set and its files."""
    return {
        "set": published.name,
        "title": published.title,
        "source": published.source,
        "agiqa": agiqa_version(),
        "folder": str(download.folder.resolve()),
        "files": dict(sorted(download.hashes.items())),
    }


def _check_folders(folder: Path, out: Path, published: PublishedSet) -> None:
    """Raise DataError without a folder, and ConfigError if `out` holds anything but an import of this set."""
    if not folder.is_dir():
        what = "a file; unpack it, and give the folder" if folder.exists() else "no such folder"
        message = f"{folder}: {what} of {published.title}."
        raise DataError(message)
    if import_record(folder / IMPORT_RECORD) is not None:
        message = f"{folder} is an import already: give it to the other commands as DATA."
        raise ConfigError(message)
    if out.exists() and folder.samefile(out):
        message = f"{out} is the folder to import from; give another path for the imported set."
        raise ConfigError(message)
    if out.exists() and not out.is_dir():
        message = f"{out} is a file; give the path of a folder."
        raise ConfigError(message)
    if not out.exists() or not any(out.iterdir()):
        return
    record = import_record(out / IMPORT_RECORD)
    if record is None:
        message = f"{out} has files that no import made; give another path."
        raise ConfigError(message)
    if record.get("set") != published.name:
        message = f"{out} holds an import of {record.get('set')}, not of {published.name}; give another path."
        raise ConfigError(message)


def _labels(published: PublishedSet, download: Download) -> Labels:
    """The labels of the set. Raises DataError with the set that the folder looks like."""
    try:
        labels = published.read(download)
    except DataError as error:
        _hinted(error, published, download)
        raise
    names = [one.name.rpartition("/")[2] for one in labels.images]
    strange = [name for name in names if published.image_name.fullmatch(name) is None]
    if published.image_name.pattern != "(?!)" and len(strange) * 2 > len(names):
        message = (
            f"{download.folder}: {len(strange)} of {len(names)} images are not called as those of {published.title} "
            f"(found: {strange[0]}, expected names such as {published.example})."
        )
        raise _hinted(DataError(message), published, download)
    return labels


def _hinted(error: DataError, published: PublishedSet, download: Download) -> DataError:
    """The error, with the set that the folder looks like."""
    near = nearest_set(download, but=published.name)
    if near is not None:
        error.add_note(f"the folder looks like {near.title}: agiqa data import {near.name} {download.folder} OUT")
    elif archives := download.archives():
        error.add_note(f"unpack the archives in the folder first: {listed(archives)}")
    return error


def _scale(published: PublishedSet, labels: Labels, given: Sequence[float] | None) -> MosRange:
    if given is not None:
        return check_range(given)
    if published.mos_range is not None:
        return published.mos_range
    values = [value for one in labels.images for cell in one.mos.values() if np.isfinite(value := _number(cell))]
    return likely_range(np.array(values or [0.0]))


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _usable(
    published: PublishedSet, download: Download, labels: Labels, scale: MosRange
) -> tuple[list[LabelledImage], list[str], list[str]]:
    """The rows that can be items, one line for each of the others, and remarks."""
    rows, problems, repeats = repeated(labels.images)
    marks = MosReader(download.folder)
    kept: list[LabelledImage] = []
    for number, one in enumerate(rows, start=1):
        wrong: list[str] = []
        for aspect, cell in one.mos.items():
            try:
                marks.read(f"MOS of {aspect}", cell, scale, number)
            except DataError as error:
                wrong.append(str(error))
        path = PurePosixPath(one.name)
        if not one.name or path.is_absolute() or ".." in path.parts:
            wrong.append(f"{one.name!r} is no name of an image")
        wrong += ["the prompt is empty"] * (not one.prompt.strip())
        wrong += ["no MOS"] * (not one.mos and one.split != "test")
        problems += [f"{one.name} ({one.where}): {'; '.join(wrong)}"] * bool(wrong)
        kept += [one] * (not wrong)
    marks.check()
    notes = [f"{repeats} rows that repeat an earlier one are left out."] if repeats else []
    if published.mos_range is None:
        notes.append(f"The scale {scale[0]:g} to {scale[1]:g} is taken from the values; no document states it.")
    return kept, problems, notes


def _images(
    download: Download, rows: Sequence[LabelledImage], problems: list[str]
) -> tuple[dict[str, Path], list[str]]:
    """The image files by name, and the names without one. Adds ambiguous ones to `problems`."""
    found: dict[str, Path] = {}
    missing: list[str] = []
    for one in rows:
        try:
            path = download.image_of(one)
        except DataError as error:
            problems.append(f"{one.name} ({one.where}): {error}")
            continue
        if path is None:
            missing.append(one.name)
        else:
            found[one.name] = path
    return found, missing


def _refuse(
    published: PublishedSet,
    download: Download,
    images: Mapping[str, Path],
    missing: Sequence[str],
    problems: Sequence[str],
    *,
    on_bad_item: str,
) -> None:
    """Raise DataError for missing images and unusable rows, unless they are to be left out."""
    total = len(images) + len(missing)
    if not images and missing:
        message = f"{download.folder}: the labels name {total} images, and none of them is there ({listed(missing)})."
        error = DataError(message)
        archives = download.archives()
        where = f"Unpack {listed(archives)} in the folder" if archives else "Put the images anywhere below the folder"
        error.add_note(f"{where} and run the same command again. {published.title}: {published.source}")
        raise error
    if on_bad_item == "skip" and images:
        return
    if problems:
        error = DataError.from_problems(str(download.folder), problems)
        error.add_note("Add --on-bad-item skip to leave these rows out.")
        raise error
    if missing:
        message = (
            f"{download.folder}: {len(missing)} of {total} images are missing ({listed(missing, _EXAMPLES)}). Complete "
            "the download and run the same command again, or add --on-bad-item skip to import the others."
        )
        raise DataError(message)


def _write(out: Path, text: str, images: Mapping[str, Path], record: Mapping[str, Any], *, copy: bool) -> bool:
    """Write the images, then data.csv with `text`, and source.json last. Returns whether anything changed."""
    table, source = out / IMPORTED_TABLE, out / IMPORT_RECORD
    before = import_record(source) or {}
    known = {before.get("data_sha256"), _sha256(text)}
    if table.exists() and sha256_of_file(table) not in known:
        message = f"{table} was changed after its import; give another path, or remove it to import it again."
        raise ConfigError(message)
    about = {"images": "copied" if copy else "linked", "items": len(images), "data_sha256": _sha256(text)}
    finished = {"format": IMPORT_FORMAT, "version": 1, **record, **about}
    if (
        before == finished
        and table.exists()
        and all(_is_there(out / "images" / name, path, copy=copy) for name, path in images.items())
    ):
        return False
    with telling_disk_errors(f"importing into {out}", "images that were imported are kept"):
        (out / "images").mkdir(parents=True, exist_ok=True)
        if not before:
            write_text_atomically(source, _json({**finished, "unfinished": True, "data_sha256": None}))
        with track("import", len(images), "images") as advance:
            for name, path in images.items():
                _put(out / "images" / name, path, copy=copy)
                advance(1)
        write_text_atomically(table, text)
        write_text_atomically(source, _json(finished))
    return True


def _put(target: Path, path: Path, *, copy: bool) -> None:
    if _is_there(target, path, copy=copy):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    if copy:
        shutil.copyfile(path, partial)
    else:
        partial.symlink_to(path.resolve())
    partial.replace(target)


def _is_there(target: Path, path: Path, *, copy: bool) -> bool:
    """Whether `target` is the link to `path`, or a copy of its size."""
    if copy:
        return target.is_file() and not target.is_symlink() and target.stat().st_size == path.stat().st_size
    return target.is_symlink() and target.exists() and target.samefile(path)


def _table_text(rows: Sequence[LabelledImage], std_column: str) -> str:
    """The text of data.csv. Columns without any value are left out."""
    cells = [
        {
            "name": one.name,
            "prompt": one.prompt,
            **{f"mos_{aspect}": one.mos.get(aspect, "") for aspect in ASPECTS},
            **{f"{std_column}_{aspect}": one.std.get(aspect, "") for aspect in ASPECTS},
            "split": one.split or "",
            "generator": one.generator or "",
            "reference": one.reference or "",
        }
        for one in rows
    ]
    columns = [column for column in cells[0] if any(row[column] for row in cells)]
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return stream.getvalue()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
