"""Images that are named one by one, with their prompts, as items without labels."""

from collections.abc import Sequence
from pathlib import Path

from agiqa.errors import ConfigError, DataError
from agiqa.extract.image_checks import image_checks
from agiqa.extract.items import Item
from agiqa.extract.joining import row_name
from agiqa.store.label_tables import read_table


def items_of_images(images: Sequence[Path], *, prompt: str | None, table: Path | None) -> list[Item]:
    """An item per image, under its path as it is given, with no conversation yet.

    Either `prompt` is that of all images, or the csv `table` has the columns `name`, which an image's path ends in,
    and `prompt`. Raises ConfigError unless just one is given, and DataError that lists the images that cannot be read
    or have no prompt.
    """
    if (prompt is None) == (table is None):
        message = "Give either --prompt, the text of all images, or --prompts table.csv with the columns name, prompt."
        raise ConfigError(message)
    if prompt is not None and not prompt.strip():
        message = "The prompt is empty; give the text that the images were generated from."
        raise ConfigError(message)
    texts = {} if table is None else _read_prompts(table)
    items: list[Item] = []
    problems: list[str] = []
    with image_checks() as check:
        for image in images:
            text = prompt or texts.get(row_name(image.as_posix(), texts) or "", "")
            sha256 = None
            try:
                sha256 = check(image)
            except DataError as error:
                problems.append(str(error))
            if not text.strip():
                problems.append(f"{image}: {table} has no prompt under this name")
            if any(item.name == str(image) for item in items):
                problems.append(f"{image}: is given twice")
            items.append(_item(image, text, sha256))
    if problems:
        where = "the images to score"
        raise DataError.from_problems(where, problems)
    return items


def _item(image: Path, prompt: str, sha256: str | None) -> Item:
    return Item(
        name=str(image),
        prompt=prompt,
        conversation=(),
        image=image,
        labels={},
        split=None,
        generator=None,
        description=None,
        image_sha256=sha256,
    )


def _read_prompts(path: Path) -> dict[str, str]:
    """The prompts of a table by name; of two rows with one name, the first counts."""
    header, rows = read_table(path)
    for column in ("name", "prompt"):
        if column not in header:
            message = f"{path}: no column {column!r} (found: {', '.join(header)})."
            raise DataError(message)
    cells = [dict(zip(header, row.cells, strict=False)) for row in reversed(rows)]
    return {row["name"]: row.get("prompt", "") for row in cells}
