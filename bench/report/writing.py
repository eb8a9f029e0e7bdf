"""`agiqa report`: the page, its tables and its pictures in a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agiqa.bench.report.document import document
from agiqa.bench.report.examples import Examples
from agiqa.bench.report.figures import Picture
from agiqa.bench.report.missing import Missing
from agiqa.bench.report.page import render
from agiqa.bench.report.reading import read_all
from agiqa.bench.report.sections import compose
from agiqa.bench.report.tables import Table
from agiqa.errors import DataError
from agiqa.store.disk.files import telling_disk_errors, write_text_atomically

PAGE, DOCUMENT, TABLES, PICTURES = "index.html", "report.md", "tables", "pictures"
_KEPT = "the results are kept, and what was written of the report"
_MADE = {TABLES: (".md", ".csv"), PICTURES: (".png", ".svg")}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written."""

    page: Path
    document: Path
    """What the page says, in markdown without pictures."""
    tables: tuple[Path, ...]
    pictures: tuple[Path, ...]
    missing: tuple[Missing, ...]
    """What there was no data for."""
    problems: tuple[str, ...]
    """What is left out, as it could not be read or is newer than the rows."""


def write_report(
    folders: Sequence[Path],
    to: Path,
    *,
    images: Path | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
    data: str | None = None,
) -> Report:
    """Write the report on result folders of `agiqa ablate` and `agiqa transfer` into the folder `to`.

    Tables and pictures that an earlier report left there are replaced. `images` is the folder of the images by item
    name, `notes` what the reader is told of the data, `data` the data set of stores that do not tell theirs. Raises
    DataError for a folder that holds no results, or for a `to` that is something else, and as `telling_disk_errors`.
    """
    if to.exists() and (not to.is_dir() or ((any(to.iterdir())) and not (to / PAGE).is_file())):
        message = f"{to} is there already and is no report. Give another --to, or remove it."
        raise DataError(message)
    everything = read_all(folders, data=data)
    content = compose(everything, images=images, notes=notes)
    title = title or " and ".join(one.name for one in everything)
    page = render(title, content)
    with telling_disk_errors(f"writing {to / PAGE}", _KEPT):
        to.mkdir(parents=True, exist_ok=True)
        write_text_atomically(to / PAGE, page)  # first: what is broken off after it can be written anew
        write_text_atomically(to / DOCUMENT, document(title, content))
        for name, ends in _MADE.items():
            _clear(to / name, ends)
    tables: list[Path] = []
    pictures: list[Path] = []
    for block in content.blocks():
        if isinstance(block, Picture):
            with telling_disk_errors(f"writing the picture {block.name} to {to / PICTURES}", _KEPT):
                pictures += block.write(to / PICTURES)
        else:
            tables += _write_table(to / TABLES, block.table() if isinstance(block, Examples) else block)
    return Report(
        page=to / PAGE,
        document=to / DOCUMENT,
        tables=tuple(tables),
        pictures=tuple(pictures),
        missing=tuple(content.missing),
        problems=tuple(content.problems),
    )


def _clear(folder: Path, ends: Sequence[str]) -> None:
    """An empty folder, but for what a report does not make."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in ends:
            path.unlink()


def _write_table(folder: Path, table: Table) -> list[Path]:
    paths = [folder / f"{table.name}.md", folder / f"{table.name}.csv"]
    for path, text in zip(paths, (table.markdown(), table.csv()), strict=True):
        with telling_disk_errors(f"writing {path}", _KEPT):
            path.write_text(text, encoding="utf-8", newline="")
    return paths
