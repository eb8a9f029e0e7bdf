"""Images that are named one by one, with their prompts, as items without labels."""

from collections.abc import Sequence
from pathlib import Path

from agiqa.errors import ConfigError, DataError
from agiqa.extract.data.image_checks import image_checks
from agiqa.extract.data.items import Item
from agiqa.extract.data.joining import row_name
from agiqa.store.format.labels import read_table


def items_of_images(
    images: Sequence[Path], *, prompt: str | None, table: Path | None
) -> tuple[list[Item], dict[str, str]]:
    """An item per image, under its path as it is given, with no conversation yet; and images that make none, with why.

    Either `prompt` is that of all images, or the csv `table` has the columns `name`, which an image's path ends in,
    and `prompt`. An image that cannot be read or has no prompt makes no item, and one that is given twice makes one.
    Raises ConfigError unless just one of `prompt` and `table` is given, and DataError for a table that cannot be read.
    """
    if (prompt is None) == (table is None):
        message = "Give either --prompt, the text of all images, or --prompts table.csv with the columns name, prompt."
        raise ConfigError(message)
    if prompt is not None and not prompt.strip():
        message = "The prompt is empty; give the text that the images were generated from."
        raise ConfigError(message)
    texts = {} if table is None else _read_prompts(table)
    items: list[Item] = []
    problems: dict[str, str] = {}
    with image_checks() as check:
        for image in dict.fromkeys(images):
            text = prompt or texts.get(row_name(image.as_posix(), texts) or "", "")
            if not text.strip():
                problems[str(image)] = f"{image}: {table} has no prompt under this name"
                continue
            try:
                items.append(_item(image, text, check(image)))
            except DataError as error:
                problems[str(image)] = str(error)
    return items, problems


def _item(image: Path, prompt: str, sha256: str) -> Item:
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
