"""The data sets of a reproduction: imported where they are as published, and with the paper's split."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from agiqa.bench.reproducing.plan import Plan
from agiqa.errors import DataError
from agiqa.extract.data.conversations import parse_source, read_conversations
from agiqa.extract.data.importers.importing import import_data_set
from agiqa.extract.data.importers.sets import IMPORTERS
from agiqa.extract.data.matching import row_name
from agiqa.store.disk.files import write_text_atomically
from agiqa.store.format.labels import IMPORT_RECORD, IMPORTED_TABLE

_SPLIT = "split"


def missing_set(plan: Plan, name: str, root: Path) -> str | None:
    """Why the data set `name` cannot be used, and what to do; None if its folder is there."""
    folder = root / name
    if folder.is_dir():
        return None
    published = IMPORTERS.get(plan.data[name].importer)
    return (
        f"{folder}: no such folder. Put the data set {name} there, as downloaded and unpacked ({published.source}) or "
        "as written by `agiqa data import`."
    )


def prepare_set(plan: Plan, name: str, root: Path, out: Path) -> None:
    """Make the folder `out` with data.csv, source.json and images of the data set ROOT/NAME.

    It is imported unless it has the record of an import. A table without splits gets those of M3-AGIQA's conversation
    files (`quality_train.json`, `quality_test_res.json`) in the same folder. Raises DataError where both are missing,
    and as `import_data_set`.
    """
    folder = root / name
    if message := missing_set(plan, name, root):
        raise DataError(message)
    if (folder / IMPORT_RECORD).is_file():
        imported = folder
    else:
        imported = out.with_name(f"{name}.imported")
        import_data_set(plan.data[name].importer, folder, imported)
    out.mkdir(parents=True, exist_ok=True)
    images = out / "images"
    if not images.is_symlink():
        images.symlink_to((imported / "images").resolve(), target_is_directory=True)
    record = (imported / IMPORT_RECORD).read_text(encoding="utf-8")
    write_text_atomically(out / IMPORT_RECORD, record)
    write_text_atomically(out / IMPORTED_TABLE, _with_splits(imported / IMPORTED_TABLE, folder))


def _with_splits(table: Path, folder: Path) -> str:
    """The content of `table`, with a column `split` from the conversation files in `folder` if it has none."""
    text = table.read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    if any(row.get(_SPLIT) for row in rows):
        return text
    found = _splits(folder, {row["name"]: row for row in rows})
    lacking = [row["name"] for row in rows if row["name"] not in found]
    if lacking:
        message = (
            f"{folder}: {len(lacking)} of {len(rows)} images have no split, {lacking[0]!r} first. The set has none of "
            "its own: put M3-AGIQA's conversation files, such as quality_train.json and quality_test_res.json, into "
            "this folder, or add a column `split` (train, val, test) to an imported data.csv."
        )
        raise DataError(message)
    written = io.StringIO()
    writer = csv.DictWriter(written, list(dict.fromkeys([*rows[0], _SPLIT])), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, _SPLIT: found[row["name"]]} for row in rows)
    return written.getvalue()


def _splits(folder: Path, rows: Mapping[str, object]) -> dict[str, str]:
    """By image, the split of the first conversation file in `folder`, by name, that says one."""
    found: dict[str, str] = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")]):
        source = parse_source(str(path))
        if source.split is None:
            continue
        for talk in read_conversations(path, source.split):
            name = row_name(talk.image, rows)
            if name is not None and talk.split is not None:
                found.setdefault(name, talk.split)
    return found
