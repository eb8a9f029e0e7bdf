"""Which files a data set consists of: its table, its conversation files, and the folders of its images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agiqa.errors import ConfigError, DataError, listed
from agiqa.extract.data.conversations import ConversationFile, parse_source, read_conversations
from agiqa.extract.data.image_names import images_below
from agiqa.progress import say
from agiqa.store.format.arrow_tables import is_saved_data_set
from agiqa.store.format.labels import IMPORT_RECORD, import_record
from agiqa.store.format.tables import TABLE_FORMATS, holds_conversations

CONVERSATION_SUFFIXES = (".json", ".jsonl")
_ALONE = (".csv", ".tsv", ".xlsx", ".parquet")
"""Suffixes of a table that is found by being alone in its folder."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files of one data set."""

    name: str
    table: Path
    conversations: tuple[ConversationFile, ...]
    folders: tuple[Path, ...]
    """Folders to look for images in, in this order."""

    @property
    def without_table(self) -> bool:
        """Whether `table` is a folder with nothing but images."""
        return self.table.is_dir() and not is_saved_data_set(self.table)


def find_sources(
    data: Path, conversations: Sequence[str], labels: Path | None, *, aspect: str | None = None
) -> Sources:
    """The files of `data`: a folder with a table, a table, or a conversation file whose labels are `labels`.

    `conversations` are further files, see `parse_source`; a conversation file `data` describes `aspect`. Raises
    DataError when a file is missing, and ConfigError when `labels` is missing or belongs to no conversation file.
    """
    files = [parse_source(source) for source in conversations]
    name = data.resolve().name if data.is_dir() else data.stem
    if not data.is_dir() and data.suffix.lower() in CONVERSATION_SUFFIXES and holds_conversations(data):
        if labels is None:
            _require_conversations(data)
            message = f"{data} holds conversations; name the table with their MOS too: --labels data.csv."
            raise ConfigError(message)
        files.insert(0, replace(parse_source(str(data)), aspect=aspect))
        table = labels
    elif labels is not None:
        message = f"--labels goes with a conversation file; {data} has its own labels."
        raise ConfigError(message)
    else:
        table = _table_in(data) if data.is_dir() else data
    for path in (table, *(file.path for file in files)):
        if not path.is_file() and not is_saved_data_set(path) and not (path == data and data.is_dir()):
            inside = f" (looked for data.csv in the folder {data})" if data.is_dir() and path == table else ""
            message = f"{path}: no such file{inside}."
            raise DataError(message)
    if table.is_file() and table.suffix.lower() not in TABLE_FORMATS:
        message = (
            f"{table}: expected a folder with data.csv, a table ({', '.join(TABLE_FORMATS)}), or a .json or .jsonl "
            "conversation file; save it as one of these."
        )
        raise DataError(message)
    parent = data if data.is_dir() else data.parent
    bases = dict.fromkeys([parent if table.is_dir() else table.parent, parent])
    folders = tuple(folder for base in bases for folder in (base / "images", base))
    return Sources(name=name, table=table, conversations=tuple(files), folders=folders)


def _require_conversations(data: Path) -> None:
    """Raise DataError for a JSON file that holds neither a table nor conversations."""
    found = read_conversations(data, None)
    if all(one.problems for one in found):
        message = (
            f"{data}: neither a table nor conversations: {found[0].where} {found[0].problems[0]}; expected a list of "
            "objects with name, prompt and MOS (--columns says what they are called), or conversations."
        )
        raise DataError(message)


def _table_in(folder: Path) -> Path:
    """The table of a folder: data.csv, the metadata of an `imagefolder`, or the only table in it.

    The folder itself is the table if `datasets` saved it, or if it holds images alone. Raises DataError for several,
    and for an import that was cut off.
    """
    names = ("data.csv", "metadata.csv", "metadata.jsonl", "metadata.parquet")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is not None or is_saved_data_set(folder):
        return found or folder
    if import_record(folder / IMPORT_RECORD) is not None:
        message = (
            f"{folder / names[0]}: no such file. The import into {folder} was cut off: run the same "
            "`agiqa data import` again."
        )
        raise DataError(message)
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith((".", "~$"))]
    tables = [file for file in files if file.suffix.lower() in _ALONE]
    tables = tables or [
        file for file in files if file.suffix.lower() in CONVERSATION_SUFFIXES and not holds_conversations(file)
    ]
    if len(tables) > 1:
        message = (
            f"{folder}: no data.csv, and {len(tables)} tables ({listed([file.name for file in tables])}); give the one "
            "to read instead of the folder."
        )
        raise DataError(message)
    if tables:
        say(f"{folder}: reading the table {tables[0].name}")
        return tables[0]
    return folder if images_below(folder) else folder / names[0]
