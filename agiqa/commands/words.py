"""`agiqa words`: how well the rating words that a model answered agree with the true MOS."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from agiqa.commands.common import one_of, print_result, shared_options

if TYPE_CHECKING:
    from agiqa.extract.data.labels import Row


class Rated(NamedTuple):
    """One item: the model's answer and the truth."""

    answer: str
    mos: float
    prompt: str | None
    """None where the table has no prompts."""


@click.command("words")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--labels", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Table with the MOS.")
@click.option(
    "--aspect",
    type=one_of("aspect", ["quality", "correspondence", "authenticity"]),
    default="quality",
    show_default=True,
    help="quality, correspondence or authenticity.",
)
@click.option("--mos-range", nargs=2, type=float, default=(0.0, 5.0), show_default=True, help="Lowest and highest MOS.")
@shared_options
def command(file: Path, labels: Path | None, aspect: str, mos_range: tuple[float, float], *, as_json: bool) -> None:
    """Accuracy, rough accuracy, precision and F1 of the rating words in FILE, with prompt-clustered intervals.

    FILE is an M3-AGIQA conversation file, such as `agiqa describe` writes, whose MOS are in --labels data.csv, or a csv
    with the columns name and answer, and either prompt and mos_ASPECT or --labels. An answer that holds no clear word
    of bad, poor, fair, good and excellent is wrong; rough accuracy lets a neighbouring word count.
    """
    from agiqa.extract.data.sources import CONVERSATION_SUFFIXES
    from agiqa.heads.evaluation.rating_words import score_words
    from agiqa.progress import say

    told = file.suffix.lower() in CONVERSATION_SUFFIXES
    rated = (_read_conversations if told else _read_answers)(file, labels, aspect, mos_range)
    prompts = [one.prompt for one in rated if one.prompt is not None]
    if len(prompts) < len(rated):
        say(f"warning: {file} has no column 'prompt'; the intervals take every item for one of its own prompt")
    scores = score_words(
        [one.answer for one in rated],
        [one.mos for one in rated],
        prompts if len(prompts) == len(rated) else None,
        mos_range=mos_range,
    )
    print_result({"file": str(file), "aspect": aspect, **scores}, _lines(scores), as_json=as_json)


def _read_conversations(file: Path, labels: Path | None, aspect: str, mos_range: tuple[float, float]) -> list[Rated]:
    """The rating words of a conversation file, joined with the MOS of the table."""
    from agiqa.errors import DataError
    from agiqa.extract.data.conversations import read_conversations
    from agiqa.extract.data.joining import join
    from agiqa.extract.data.sources import find_sources
    from agiqa.extract.describing.descriptions import unspoken
    from agiqa.progress import say
    from agiqa.store.format.text_authors import TEACHER

    sources = find_sources(file, (), labels)
    talks = [talk for file in sources.conversations for talk in read_conversations(file.path, file.split)]
    joined = join(sources, _labelled_rows(sources.table, mos_range), talks)
    problems, rated, of_teacher, silent = list(joined.problems), list[Rated](), 0, unspoken(file)
    for row, talk in joined.pairs:
        where = f"{row.name} ({sources.table.name}, line {row.number})"
        if row.problems or aspect not in row.labels:
            problems.append(f"{where}: {'; '.join(row.problems) or f'no MOS of {aspect}'}")
        elif talk is not None and talk.rating is None and talk.image in silent:
            rated.append(Rated("", row.labels[aspect], row.prompt))
        elif talk is None or talk.rating is None:
            problems.append(f"{where}: its conversation has no rating word")
        else:
            of_teacher += talk.rating_author == TEACHER
            rated.append(Rated(talk.rating, row.labels[aspect], row.prompt))
    if problems:
        raise DataError.from_problems(str(file), problems)
    if of_teacher:
        say(
            f"warning: {of_teacher} of {len(rated)} conversations in {file} have no `response_1`; their words are the "
            "teacher's, who was told the MOS"
        )
    for note in joined.notes:
        say(f"note: {note}")
    return rated


def _read_answers(file: Path, labels: Path | None, aspect: str, mos_range: tuple[float, float]) -> list[Rated]:
    """The answers of a csv file, with the MOS and prompts of its own columns or of the table."""
    from agiqa.errors import DataError
    from agiqa.store.format.label_tables import read_table

    header, rows = read_table(file)
    for column in ("name", "answer"):
        if column not in header:
            message = f"{file}: no column {column!r} (found: {', '.join(header)})."
            raise DataError(message)
    truth = _own_truth(file, header, aspect, mos_range) if labels is None else _table_truth(labels, aspect, mos_range)
    problems, rated, lines = list[str](), list[Rated](), dict[str, int]()
    for row in rows:
        cells = dict(zip(header, row.cells, strict=False))
        name = cells.get("name", "")
        where = f"{name} ({file.name}, line {row.number})"
        if len(row.cells) != len(header):
            problems.append(f"{where}: has {len(row.cells)} fields where the header has {len(header)}")
        elif lines.setdefault(name, row.number) != row.number:
            problems.append(f"{where}: duplicate of line {lines[name]}")
        else:
            try:
                mos, prompt = truth(cells)
                rated.append(Rated(cells["answer"], mos, prompt))
            except DataError as error:
                problems.append(f"{where}: {error}")
    if problems:
        raise DataError.from_problems(str(file), problems)
    return rated


Truth = Callable[[Mapping[str, str]], tuple[float, str | None]]
"""From the cells of an answer to the MOS and the prompt of its item."""


def _own_truth(file: Path, header: list[str], aspect: str, mos_range: tuple[float, float]) -> Truth:
    """The truth that stands beside the answers."""
    from agiqa.errors import DataError
    from agiqa.store.format.label_tables import ASPECT_COLUMNS, read_mos

    columns = [column for column in header if ASPECT_COLUMNS.get(column) == aspect]
    if len(columns) != 1:
        what = f"two columns with the MOS of {aspect}" if columns else f"no column with the MOS of {aspect}"
        message = f"{file}: {what} (found: {', '.join(header)}); name it mos_{aspect}, or give --labels data.csv."
        raise DataError(message)

    def truth(cells: Mapping[str, str]) -> tuple[float, str | None]:
        return read_mos(columns[0], cells[columns[0]], mos_range), cells.get("prompt")

    return truth


def _table_truth(table: Path, aspect: str, mos_range: tuple[float, float]) -> Truth:
    """The truth in a label table, by item name."""
    from agiqa.errors import DataError
    from agiqa.extract.data.joining import row_name
    from agiqa.heads.data.prompt_groups import normalise_prompt

    rows = _labelled_rows(table, mos_range)
    by_name = {row.name: row for row in reversed(rows)}

    def truth(cells: Mapping[str, str]) -> tuple[float, str | None]:
        row = by_name.get(row_name(cells["name"], by_name) or "")
        if row is None:
            message = f"no row of {table.name} has this name"
        elif row.problems or aspect not in row.labels:
            message = f"{table.name}, line {row.number}: {'; '.join(row.problems) or f'no MOS of {aspect}'}"
        elif normalise_prompt(cells.get("prompt") or row.prompt) != normalise_prompt(row.prompt):
            message = f"its prompt is {cells['prompt']!r}, in {table.name}, line {row.number}, it is {row.prompt!r}"
        else:
            return row.labels[aspect], row.prompt
        raise DataError(message)

    return truth


def _labelled_rows(table: Path, mos_range: tuple[float, float]) -> "Sequence[Row]":
    """The rows of a table. Raises DataError for one without any MOS column."""
    from agiqa.errors import DataError
    from agiqa.extract.data.labels import read_rows
    from agiqa.store.format.label_tables import ASPECT_COLUMNS

    read = read_rows(table, mos_range)
    if not read.labelled:
        message = (
            f"{table}: no MOS column (found: {', '.join(read.header)}); expected at least one of "
            f"{', '.join(ASPECT_COLUMNS)}."
        )
        raise DataError(message)
    return read.rows


def _lines(scores: Mapping[str, Any]) -> str:
    """The metrics with their intervals, for people."""
    from agiqa.heads.evaluation.rating_words import WORD_METRICS

    lines = [f"{'answers':<20}n {scores['n']}, of which {scores['unknown']} hold no clear word"]
    for metric in WORD_METRICS:
        interval = scores["ci"][metric]
        around = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        lines.append(f"{metric.replace('_', ' '):<20}{scores[metric]:.4f}{around}")
    if "caution" in scores:
        lines.append(f"note: {scores['caution']}")
    return "\n".join(lines)
