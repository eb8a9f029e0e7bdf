"""`agiqa report`: the page, the same in markdown, and the tables and pictures, written to a folder."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from agiqa.bench.recording.trained_runs import is_run
from agiqa.bench.report.items import Examples
from agiqa.bench.report.pictures import Picture
from agiqa.bench.report.reading import read_all
from agiqa.bench.report.sections import Content, Missing, ReportSettings, Section, compose
from agiqa.bench.report.tables import Table, plain
from agiqa.errors import DataError
from agiqa.store.disk.files import telling_disk_errors, write_text_atomically
from agiqa.version import agiqa_version

PAGE, DOCUMENT, TABLES, PICTURES = "index.html", "report.md", "tables", "pictures"
_TEMPLATE, _STYLE, _SCRIPT = "page.html.j2", "page.css", "page.js"
_SUFFIXES = {TABLES: (".md", ".csv", ".tex"), PICTURES: (".png", ".svg", ".pdf")}
_KEPT = "the results and the parts of the report written so far are kept"
_HIGHEST = 5.0
"""The best MOS, at the right end of an item's scale."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The files of a report, and what it lacks."""

    page: Path
    document: Path
    """The page in markdown, without pictures."""
    tables: tuple[Path, ...]
    pictures: tuple[Path, ...]
    missing: tuple[Missing, ...]
    """The parts that have no data."""
    problems: tuple[str, ...]
    """What is left out because it could not be read, or because it is newer than the rows."""


def write_report(folders: Sequence[Path], to: Path | None = None, settings: ReportSettings | None = None) -> Report:
    """Write the report on result folders of `agiqa ablate`, `transfer` and `train` into the folder `to`.

    The default for `to` is the folder `report` in the first folder, or beside it if that is a single run. Tables and
    pictures of an earlier report there are replaced. Raises DataError for a folder without results, or if `to` exists
    and is no report; disk errors are raised as by `telling_disk_errors`.
    """
    settings = settings or ReportSettings()
    to = to or (folders[0].parent if is_run(folders[0]) else folders[0]) / "report"
    if to.exists() and (not to.is_dir() or (any(to.iterdir()) and not (to / PAGE).is_file())):
        message = f"{to} exists and is no report. Give another --to, or remove it."
        raise DataError(message)
    everything = read_all(folders, data=settings.data)
    content = compose(everything, settings)
    title = settings.title or " and ".join(one.name for one in everything)
    page = render(title, content)
    with telling_disk_errors(f"writing {to / PAGE}", _KEPT):
        to.mkdir(parents=True, exist_ok=True)
        write_text_atomically(to / PAGE, page)  # first: it marks the folder as a report, which may be written again
        write_text_atomically(to / DOCUMENT, document(title, content))
        for name, suffixes in _SUFFIXES.items():
            _clear(to / name, suffixes)
    tables: list[Path] = []
    pictures: list[Path] = []
    for block in content.blocks():
        if isinstance(block, Picture):
            with telling_disk_errors(f"writing the picture {block.name} to {to / PICTURES}", _KEPT):
                pictures += block.write(to / PICTURES, pdf=settings.pdf)
        elif isinstance(block, Examples):
            tables += _write_table(to / TABLES, block.table, latex=False)  # its prompts and descriptions are too long
        else:
            tables += _write_table(to / TABLES, block, latex=settings.latex)
    return Report(
        page=to / PAGE,
        document=to / DOCUMENT,
        tables=tuple(tables),
        pictures=tuple(pictures),
        missing=tuple(content.missing),
        problems=tuple(content.problems),
    )


def _clear(folder: Path, suffixes: Sequence[str]) -> None:
    """Make the folder, and remove the files of these kinds from it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in suffixes:
            path.unlink()


def _write_table(folder: Path, table: Table, *, latex: bool) -> list[Path]:
    texts = {f"{table.name}.md": table.markdown(), f"{table.name}.csv": table.csv()}
    texts |= {f"{name}.tex": text for name, text in table.latex().items()} if latex else {}
    for name, text in texts.items():
        with telling_disk_errors(f"writing {folder / name}", _KEPT):
            (folder / name).write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in texts]


def render(title: str, content: Content) -> str:
    """The page: one HTML file that contains its style, script, pictures and data, and needs no network.

    All text of the results is escaped. The style and script beside this module and SVG are not.
    """
    folder = resources.files("agiqa.bench.report")
    files = {name: (folder / name).read_text(encoding="utf-8") for name in (_TEMPLATE, _STYLE, _SCRIPT)}
    environment = Environment(loader=DictLoader(files), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(_TEMPLATE).render(
        title=title,
        content=content,
        css=Markup(files[_STYLE]),
        js=Markup(files[_SCRIPT]),
        version=agiqa_version(),
        csv_uri=_csv_uri,
        switched_on=content.show,
        code=_code,
        signed=_signed,
        place=lambda value: 100.0 * min(1.0, max(0.0, value / _HIGHEST)),
    )


def _signed(value: float) -> str:
    """Two digits after the point and a sign, which a rounded zero lacks."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\N{MINUS SIGN}")


def _code(text: str) -> Markup:
    """The text, with everything between backticks as code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if k % 2 else part for k, part in enumerate(parts))


def _csv_uri(table: Table) -> str:
    """The table's CSV as a link that saves it."""
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(table.csv().encode()).decode()}"


def document(title: str, content: Content) -> str:
    """The page in markdown without pictures: for a repository, an issue or a manuscript."""
    parts = [f"# {plain(title)}", _bullets(f"{name}: {value}" for name, value in content.facts.items())]
    parts += _listed("In short", content.findings)
    parts += _listed("What these numbers can and cannot show", content.notes)
    parts += [part for section in content.sections for part in _section(section)]
    parts += _listed("What is left out", content.problems)
    return "\n\n".join([*parts, "Made by `agiqa report`."]) + "\n"


def _section(section: Section) -> list[str]:
    """Its heading, words and tables; nothing if it has only pictures."""
    tables = [
        block.table if isinstance(block, Examples) else block
        for block in section.blocks
        if not isinstance(block, Picture)
    ]
    words = [_bullets(section.words)] if section.words else []
    parts = [*words, *(table.markdown().rstrip("\n") for table in tables)]
    return [f"## {plain(section.title)}", *parts] if parts else []


def _listed(heading: str, sentences: Sequence[str]) -> list[str]:
    return [f"## {heading}", _bullets(sentences)] if sentences else []


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)
