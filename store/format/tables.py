"""Tables of labels from files of any usual format: a header, and rows of text cells with their numbers.

csv (comma, semicolon or tab; UTF-8, UTF-16 or an older encoding), xlsx, JSON and JSON lines, parquet, and folders that
Hugging Face `datasets` saved. A csv is parsed
one row at a time, so that a table of a million rows takes no more memory than its text.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from agiqa.errors import ConfigError, DataError, first_line
from agiqa.progress import say
from agiqa.registry import Registry
from agiqa.store.disk.files import refuse_lfs_pointers
from agiqa.store.format.arrow_tables import arrow_records

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_TWO_BYTES = re.compile(rb"[\x80-\xff]{2}")
_KANA = re.compile("[\u3040-\u30ff]")
_RECORDS_OF_SAMPLE, _SAMPLE = 20, 256
"""Records by which the separator is chosen, and bytes by which UTF-16 without a mark is told."""
_BLOCK = 1 << 16
"""Characters in which these records are looked for."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of a table."""

    number: int
    """The line of a csv on which the row ends, the row of a sheet, or the record of any other file; from 1."""
    cells: list[str]


TABLE_FORMATS: Registry[Callable[[Path], Iterable[TableRow]]] = Registry("table format")
"""Readers of tables by suffix, such as `.csv`. Each gives the header first, then the rows; `table_rows` makes both from
records."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The header and the rows of a file."""

    path: Path
    header: list[str]
    """Without white space around the names. The columns at the end that have no name are left out."""
    rows: Iterator[TableRow]
    """Can be read once. Rows whose cells are all empty are left out."""
    first_number: int = 1
    """The number of the header."""


def open_table(path: Path) -> Table:
    """The table in the file `path`, by its suffix, or in a folder that `datasets` saved.

    An error in a row of a csv is raised when the row is reached. Raises DataError for a file that is no
    table or has no rows, and ConfigError where a library is missing.
    """
    records = iter(_reader_of(path)(path))
    first = next(records)
    header = [cell.strip() for cell in first.cells]
    while header and not header[-1]:
        header.pop()
    rows = _trimmed(records, len(header))
    second = next(rows, None)
    if second is None:
        message = f"{path}: a header ({', '.join(header)}) but no rows; expected a row for each image."
        raise DataError(message)
    return Table(path=path, header=header, rows=chain([second], rows), first_number=first.number)


def _reader_of(path: Path) -> Callable[[Path], Iterable[TableRow]]:
    suffix = path.suffix.lower()
    if path.is_dir():
        return _arrow_rows
    return TABLE_FORMATS.get(suffix) if suffix in TABLE_FORMATS else _csv_rows


def read_table(path: Path) -> tuple[list[str], list[TableRow]]:
    """Header and all rows of the file `path`. Raises as `open_table`."""
    table = open_table(path)
    return table.header, list(table.rows)


def holds_conversations(path: Path) -> bool:
    """Whether the JSON file `path` holds conversations, and not a table. Raises DataError if it cannot be read."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        return False
    start = _decoded(path, announce=False).lstrip()
    try:
        found: Any = json.loads(start) if start.startswith("[") else json.loads(start.split("\n", 1)[0])
    except (RecursionError, ValueError):
        try:
            found = json.loads(start)
        except (RecursionError, ValueError):
            return True  # the reader of conversations says what is wrong, and in which line
    if isinstance(found, dict) and found and (_are(dict, found) or all(map(_is_list_or_number, found.values()))):
        return False
    record = next(iter(found), None) if isinstance(found, list) else found
    talks = ("conversations", "messages", "explanations")
    return not isinstance(record, dict) or not record or any(key in record for key in talks)


def _are(kind: type, found: Mapping[str, Any]) -> bool:
    return all(isinstance(value, kind) for value in found.values())


def _all_dicts(found: Sequence[Any]) -> bool:
    return all(isinstance(value, dict) for value in found)


def _is_list_or_number(value: Any) -> bool:
    return isinstance(value, list | int | float) and not isinstance(value, bool)


def _trimmed(rows: Iterable[TableRow], width: int) -> Iterator[TableRow]:
    """The rows without empty cells after the last column, and without empty rows."""
    for row in rows:
        cells = row.cells
        while len(cells) > width and not cells[-1].strip():
            cells.pop()
        if any(cell.strip() for cell in cells):
            yield row


def _csv_rows(path: Path) -> Iterator[TableRow]:
    """All records of a csv, the header first."""
    text = _decoded(path)
    separator, skipped = _named_separator(text)
    separator = separator or _separator(path, text)
    if separator != ",":
        say(f"{path}: columns are separated by {_SEPARATORS.get(separator, repr(separator))}")
    stream = io.StringIO(text, newline="")
    for _ in range(skipped):
        stream.readline()
    spaced = _is_spaced(text, separator, skipped)
    reader, started = csv.reader(stream, delimiter=separator, strict=True, skipinitialspace=spaced), False
    try:
        for cells in reader:
            if cells or not started:
                started = True
                yield TableRow(number=reader.line_num + skipped, cells=cells)
    except csv.Error as error:
        message = f"{path}, line {reader.line_num + skipped}: not a csv file ({error})."
        raise DataError(message) from error


def _is_spaced(text: str, separator: str, skipped: int) -> bool:
    """Whether a space follows each separator of the header, which then belongs to no value."""
    lines = text.lstrip().splitlines()[: skipped + 1]
    cells = lines[-1].split(separator)[1:]
    return bool(cells) and all(cell.startswith(" ") for cell in cells)


def _decoded(path: Path, *, announce: bool = True) -> str:
    """The text of `path`; any encoding but UTF-8 is announced. Raises DataError for binary and empty files."""
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror or error})."
        raise DataError(message) from error
    refuse_lfs_pointers([path], DataError)
    for encoding in _encodings(content):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        if announce and encoding != "utf-8-sig":
            guessed = "" if encoding.startswith("utf-16") else ". If names or prompts look wrong, save it as UTF-8"
            say(f"{path}: not UTF-8, reading it as {encoding.upper()}{guessed}")
        if not text.strip():
            message = f"{path}: the file is empty."
            raise DataError(message)
        return text
    message = f"{path}: not UTF-8 text, nor text of another known encoding; save it as UTF-8."
    raise DataError(message)


def _encodings(content: bytes) -> Iterator[str]:
    """The encodings to try. Latin-1 reads every file; the western ones come first only where no two bytes pair.

    Every second byte of UTF-16 is zero where the text is ASCII.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        yield "utf-16"
        return
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if content[first:_SAMPLE:2].count(0) > len(content[:_SAMPLE]) // 4:
            yield encoding
            return
    yield "utf-8-sig"
    if _TWO_BYTES.search(content):
        japanese = content.decode("shift_jis", errors="ignore")
        yield from ("shift_jis", "gb18030") if len(_KANA.findall(japanese)) > 1 else ("gb18030", "shift_jis")
    yield "cp1252"
    yield "latin-1"


def _named_separator(text: str) -> tuple[str | None, int]:
    """The separator that a first line `sep=X` names, and how many lines to skip for it."""
    line = text[: text.find("\n")].strip() if "\n" in text[:20] else ""
    named = line.strip('"')
    return (named[4:] or "\t", 1) if named[:4].lower() == "sep=" and len(named) <= 5 else (None, 0)


def _separator(path: Path, text: str) -> str:
    """The separator that splits the header, and the first rows as the header.

    Raises DataError where two separators fit equally well.
    """
    widths = {separator: _widths(text, separator) for separator in _SEPARATORS}
    splitting = [separator for separator, found in widths.items() if found[0] > 1]
    if len(splitting) > 1:
        even = [separator for separator in splitting if set(widths[separator]) == {widths[separator][0]}]
        splitting = even or splitting
    if len(splitting) > 1:
        most = max(widths[separator][0] for separator in splitting)
        splitting = [separator for separator in splitting if widths[separator][0] == most]
    if len(splitting) > 1:
        names = " or ".join(_SEPARATORS[separator] for separator in splitting)
        message = f"{path}: the columns may be separated by {names}; add a first line such as 'sep=;' to say which."
        raise DataError(message)
    return splitting[0] if splitting else ","


def _widths(text: str, separator: str) -> list[int]:
    """The number of cells of the first records, at least one."""
    lines = io.StringIO(text[:_BLOCK], newline="")
    found: list[int] = []
    with suppress(csv.Error):  # the reader of the whole file names the line
        found.extend(
            len(cells) for cells in islice(csv.reader(lines, delimiter=separator), _RECORDS_OF_SAMPLE) if cells
        )
    if len(found) > 1 and len(text) > _BLOCK and len(found) < _RECORDS_OF_SAMPLE:
        found.pop()  # cut off at the end of the block
    return found or [1]


def _xlsx_rows(path: Path) -> Iterator[TableRow]:
    """All rows of the only sheet that has some."""
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        message = f"{path}: reading xlsx needs openpyxl: pip install 'agiqa[xlsx]', or save the sheet as csv."
        raise ConfigError(message) from error
    import zipfile
    import zlib
    from xml.etree.ElementTree import ParseError

    broken = (InvalidFileException, zipfile.BadZipFile, zlib.error, ParseError, EOFError, OSError, NotImplementedError)
    refuse_lfs_pointers([path], DataError)
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            sheets = {sheet.title: _sheet_rows(sheet) for sheet in book.worksheets}
        finally:
            book.close()
    except (*broken, AttributeError, LookupError, TypeError, ValueError) as error:  # openpyxl trusts the XML
        message = f"{path}: cannot be read as xlsx ({first_line(error)}); save it again, or as csv."
        raise DataError(message) from error
    filled = {title: rows for title, rows in sheets.items() if len(rows) > 1}
    if len(filled) > 1:
        message = f"{path}: {len(filled)} sheets have rows ({', '.join(filled)}); save the one to read as a csv."
        raise DataError(message)
    if not any(sheets.values()):
        message = f"{path}: the file is empty."
        raise DataError(message)
    yield from next(iter(filled.values()), None) or next(rows for rows in sheets.values() if rows)


def _sheet_rows(sheet: Any) -> list[TableRow]:
    numbered = enumerate(sheet.iter_rows(values_only=True), start=1)
    rows = [TableRow(number=number, cells=[_cell(value) for value in values]) for number, values in numbered]
    filled = [row for row in rows if any(row.cells)]
    width = len(filled[0].cells) if filled else 0  # sheets that state no size have shorter rows where cells are empty
    return [replace(row, cells=row.cells + [""] * (width - len(row.cells))) for row in filled]


def _arrow_rows(path: Path) -> Iterator[TableRow]:
    """All rows of parquet or Arrow files, the names of the columns first."""
    for number, values in arrow_records(path):
        yield TableRow(number=number, cells=[_cell(value) for value in values])


def _json_rows(path: Path) -> Iterator[TableRow]:
    """The records of a JSON list or of JSON lines, of a dict of columns, or of a dict of scores by name."""
    found = _parsed(path)
    if isinstance(found, dict):
        found = _of_dict(path, cast("dict[str, Any]", found))
    wrong = next((number for number, record in enumerate(found, start=1) if not isinstance(record, dict)), None)
    if wrong is not None:
        message = f"{path}, record {wrong}: not a JSON object; expected a list of objects, one per image."
        raise DataError(message)
    yield from table_rows(path, cast("list[Mapping[str, Any]]", found))


def table_rows(path: Path, records: Iterable[Mapping[str, Any]]) -> Iterator[TableRow]:
    """The rows of records that were read from `path`: a row of all names first, then one per record, from 1.

    Raises DataError without records.
    """
    found = list(records)
    names = list(dict.fromkeys(str(key) for record in found for key in record))
    if not names:
        message = f"{path}: the file has no records."
        raise DataError(message)
    yield TableRow(number=0, cells=names)
    for number, record in enumerate(found, start=1):
        yield TableRow(number=number, cells=[_cell(record.get(name)) for name in names])


def _parsed(path: Path) -> Any:
    text = _decoded(path)
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as whole:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if len(lines) < 2 or text.lstrip().startswith("["):
            message = f"{path}: not JSON ({whole})."
            raise DataError(message) from whole
    records: list[Any] = []
    for number, line in lines:
        try:
            records.append(json.loads(line))
        except (RecursionError, ValueError) as error:
            message = f"{path}, line {number}: not JSON ({error})."
            raise DataError(message) from error
    return records


def _of_dict(path: Path, found: Mapping[str, Any]) -> Sequence[Any]:
    """The records of a dict of columns, or of a dict of scores or records by image name; one record as it is."""
    values = list(found.values())
    lists = [(key, value) for key, value in found.items() if value and isinstance(value, list) and _all_dicts(value)]
    if len(lists) == 1:
        say(f"{path}: reading the list {lists[0][0]!r}")
        return cast("Sequence[Any]", lists[0][1])
    if values and _are(list, found):
        lengths = {name: len(value) for name, value in found.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            message = f"{path}: the lists of its columns differ in length ({told})."
            raise DataError(message)
        return [dict(zip(found, cells, strict=True)) for cells in zip(*values, strict=True)]
    if values and all(_is_list_or_number(value) for value in values):
        say(f"{path}: reading its keys as image names and its numbers as MOS of quality")
        return [{"name": name, "mos_quality": value} for name, value in found.items()]
    if (
        values
        and _are(dict, found)
        and len({tuple(value) for value in values}) == 1
        and all(map(str.isdecimal, values[0]))
    ):
        return [dict(zip(found, cells, strict=True)) for cells in zip(*(one.values() for one in values), strict=True)]
    if values and _are(dict, found):
        say(f"{path}: reading its keys as image names")
        return [{"name": name, **value} for name, value in found.items()]
    return [found]


def _cell(value: Any) -> str:
    """A value as text: empty for none, the path of an image that is a dict {bytes, path}, alone in a list or not."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, dict):
        path = cast("dict[str, Any]", value).get("path")
        return path if isinstance(path, str) else json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list) else str(value)


for _suffixes, _reader in (
    ((".csv", ".tsv", ".txt"), _csv_rows),
    ((".xlsx",), _xlsx_rows),
    ((".parquet",), _arrow_rows),
    ((".json", ".jsonl"), _json_rows),
):
    for _suffix in _suffixes:
        TABLE_FORMATS.add(_suffix, _reader)
