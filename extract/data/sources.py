"""Which files make up a data set: the three forms of DATA, and where its images lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agiqa.errors import ConfigError, DataError
from agiqa.extract.data.conversations import ConversationFile, parse_source

CONVERSATION_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files behind one data set."""

    name: str
    table: Path
    conversations: tuple[ConversationFile, ...]
    folders: tuple[Path, ...]
    """Where images are looked for, in this order."""

    def image_of(self, name: str) -> Path | None:
        """The file called `name` in the first folder that has it."""
        candidates = (folder / name for folder in self.folders)
        return next((path for path in candidates if path.is_file()), None)


def find_sources(
    data: Path, conversations: Sequence[str], labels: Path | None, *, aspect: str | None = None
) -> Sources:
    """Take `data` for a folder with data.csv, a csv file, or a conversation file whose labels are `labels`.

    `conversations` are further files as `parse_source` reads them; a conversation file `data` is on `aspect`.

    Raises DataError when a file is missing and ConfigError when `labels` is missing or has no place.
    """
    files = [parse_source(source) for source in conversations]
    name = data.resolve().name if data.is_dir() else data.stem
    if data.suffix.lower() in CONVERSATION_SUFFIXES and not data.is_dir():
        if labels is None:
            message = f"{data} holds conversations; name the table with their MOS too: --labels data.csv."
            raise ConfigError(message)
        files.insert(0, replace(parse_source(str(data)), aspect=aspect))
        table = labels
    elif labels is not None:
        message = f"--labels goes with a conversation file; {data} has its own labels."
        raise ConfigError(message)
    else:
        table = data / "data.csv" if data.is_dir() else data
    _check_files(data, table, [file.path for file in files])
    bases = dict.fromkeys([table.parent, data if data.is_dir() else data.parent])
    folders = tuple(folder for base in bases for folder in (base / "images", base))
    return Sources(name=name, table=table, conversations=tuple(files), folders=folders)


def _check_files(data: Path, table: Path, conversations: Sequence[Path]) -> None:
    for path in (table, *conversations):
        if not path.is_file():
            inside = f" (looked for data.csv in the folder {data})" if data.is_dir() and path == table else ""
            message = f"{path}: no such file{inside}."
            raise DataError(message)
    if table.suffix.lower() != ".csv":
        message = f"{table}: expected a folder with data.csv, a .csv file, or a .json or .jsonl conversation file."
        raise DataError(message)
