"""Reads the answers of a model to the rating question, with the true MOS, from conversation files or csv tables.

`heads/evaluation/rating_words.py` finds the rating word in each answer and scores it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from agiqa.errors import DataError
from agiqa.extract.data.conversations import asked_otherwise, read_conversations
from agiqa.extract.data.labels import Row, read_rows
from agiqa.extract.data.matching import join, row_name
from agiqa.extract.data.sources import find_sources
from agiqa.extract.describing.describing import images_without_answer
from agiqa.heads.data.prompt_groups import normalise_prompt
from agiqa.progress import say
from agiqa.store.format.columns import ColumnNames, LabelTable, open_labels
from agiqa.store.format.items import TEACHER
from agiqa.store.format.labels import ASPECT_COLUMNS, MosRange, MosReader
from agiqa.store.format.tables import holds_conversations


class RatedItem(NamedTuple):
    """One item: the model's answer to the rating question, and the true MOS."""

    answer: str
    mos: float
    prompt: str | None
    """None if the table has no prompts."""


def read_rated_items(
    file: Path, labels: Path | None, *, label: str, mos_range: MosRange, columns: ColumnNames | None = None
) -> list[RatedItem]:
    """The items of `file` with the MOS of `label`, which is on the scale `mos_range`.

    `file` is an M3-AGIQA conversation file, whose MOS are in the table `labels`, or a table with the columns name
    and answer, whose MOS are in one of its columns or in `labels`. `columns` say which column of the table with the
    MOS means what, see `open_labels`. Raises DataError that lists every unusable item.
    """
    read = _read_conversations if holds_conversations(file) else _read_answers
    return read(file, labels, label, mos_range, columns)


def _read_conversations(
    file: Path, labels: Path | None, label: str, mos_range: MosRange, columns: ColumnNames | None
) -> list[RatedItem]:
    """The rating words of a conversation file, joined with the MOS of the table."""

    sources = find_sources(file, (), labels)
    talks = [talk for file in sources.conversations for talk in read_conversations(file.path, file.split)]
    joined = join(sources.table, _labelled_rows(sources.table, mos_range, columns), talks)
    problems, rated, of_teacher, silent = list(joined.problems), list[RatedItem](), 0, images_without_answer(file)
    for row, talk in joined.pairs:
        where = f"{row.name} ({sources.table.name}, line {row.number})"
        if row.problems or label not in row.labels:
            problems.append(f"{where}: {'; '.join(row.problems) or f'no MOS of {label}'}")
        elif talk is not None and talk.rating is None and talk.image in silent:
            rated.append(RatedItem("", row.labels[label], row.prompt or None))
        elif talk is None or talk.rating is None:
            problems.append(f"{where}: its conversation has no rating word")
        else:
            of_teacher += talk.rating_author == TEACHER
            rated.append(RatedItem(talk.rating, row.labels[label], row.prompt or None))
    if problems:
        raise DataError.from_problems(str(file), problems)
    if of_teacher:
        say(
            f"warning: {of_teacher} of {len(rated)} conversations in {file} have no `response_1`; their rating words "
            "are those of the teacher, which knew the MOS"
        )
    for other, count in asked_otherwise(talks, label).items():
        say(
            f"warning: {count} of {len(talks)} conversations in {file} ask about {other}, and their words are compared "
            f"with the MOS of {label}. Give --label {other}"
        )
    for note in joined.notes:
        say(f"note: {note}")
    return rated


def _read_answers(
    file: Path, labels: Path | None, label: str, mos_range: MosRange, columns: ColumnNames | None
) -> list[RatedItem]:
    """The answers of a table, with MOS and prompts from its own columns or from the table `labels`."""

    table = open_labels(file, columns if labels is None else None)
    table.need("name")
    table.need("answer")
    marks = MosReader(file)
    truth = (
        _own_truth(table, label, mos_range, marks)
        if labels is None
        else _table_truth(labels, label, mos_range, columns)
    )
    problems, rated, lines = list[str](), list[RatedItem](), dict[str, int]()
    for row in table.rows:
        cells = dict(zip(table.header, row.cells, strict=False))
        name = cells.get("name", "")
        where = f"{name} ({file.name}, line {row.number})"
        if len(row.cells) != len(table.header):
            problems.append(f"{where}: has {len(row.cells)} fields where the header has {len(table.header)}")
        elif lines.setdefault(name, row.number) != row.number:
            problems.append(f"{where}: duplicate of line {lines[name]}")
        else:
            try:
                mos, prompt = truth(cells, row.number)
                rated.append(RatedItem(cells["answer"], mos, prompt))
            except DataError as error:
                problems.append(f"{where}: {error}")
    marks.check()
    if problems:
        raise DataError.from_problems(str(file), problems)
    return rated


Truth = Callable[[Mapping[str, str], int], tuple[float, str | None]]
"""A function from the cells of an answer, and its line, to the MOS and the prompt of its item."""


def _own_truth(table: LabelTable, label: str, mos_range: MosRange, marks: MosReader) -> Truth:
    """Look up the MOS in the answer's own row."""

    column = next((column for column in table.header if ASPECT_COLUMNS.get(column) == label), None)
    if column is None:
        message = (
            f"{table.path}: no column with the MOS of {label} ({table.shown()}); name it mos_{label}, add --columns "
            f"mos_{label}=COLUMN, or give --labels data.csv."
        )
        raise DataError(message)

    def truth(cells: Mapping[str, str], line: int) -> tuple[float, str | None]:
        return marks.read(table.written[column], cells[column], mos_range, line), cells.get("prompt")

    return truth


def _table_truth(table: Path, label: str, mos_range: MosRange, columns: ColumnNames | None) -> Truth:
    """Look up the MOS in a label table, by item name."""

    rows = _labelled_rows(table, mos_range, columns)
    by_name = {row.name: row for row in reversed(rows)}

    def truth(cells: Mapping[str, str], _line: int) -> tuple[float, str | None]:
        row = by_name.get(row_name(cells["name"], by_name) or "")
        if row is None:
            message = f"no row of {table.name} has this name"
        elif row.problems or label not in row.labels:
            message = f"{table.name}, line {row.number}: {'; '.join(row.problems) or f'no MOS of {label}'}"
        elif row.prompt and normalise_prompt(cells.get("prompt") or row.prompt) != normalise_prompt(row.prompt):
            message = f"its prompt is {cells['prompt']!r}, in {table.name}, line {row.number}, it is {row.prompt!r}"
        else:
            return row.labels[label], row.prompt or cells.get("prompt")
        raise DataError(message)

    return truth


def _labelled_rows(table: Path, mos_range: MosRange, columns: ColumnNames | None) -> Sequence[Row]:
    """The rows of a table. Raises DataError for one without any MOS column."""

    read = read_rows(table, mos_range, columns=columns, prompts=False)
    if not read.labelled:
        message = (
            f"{table}: no MOS column (found: {', '.join(read.header)}); expected at least one of "
            f"{', '.join(ASPECT_COLUMNS)}, or add --columns mos_quality=COLUMN."
        )
        raise DataError(message)
    for note in read.notes:
        say(note)
    return read.rows
