"""What phase 1 works on: one image with its conversation and labels, and a set of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agiqa.errors import DataError
from agiqa.extract.data.images import ImageFile, read_image_file
from agiqa.store.format.labels import MosRange

Role = Literal["user", "assistant"]
OnBadItem = Literal["fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation; the image, where there is one, precedes the first."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image, the words that the model reads with it, and what people said of it."""

    name: str
    """Unique in its data set: the image's path below the images folder, with forward slashes."""
    prompt: str
    """The text that the image was generated from."""
    conversation: tuple[Message, ...]
    image: Path | None
    """The image file, or None when the backbone reads no images."""
    labels: Mapping[str, float]
    """MOS by aspect (quality, correspondence, authenticity); an absent aspect has no label."""
    split: str | None
    """train, val, test or None."""
    generator: str | None
    """The text-to-image model, where the data set names it."""
    description: str | None
    """The description that the conversation contains, if any."""
    image_sha256: str | None = None
    """Of the image file when this item was made, in hex; `read_image` compares it. None compares nothing."""
    text_author: str | None = None
    """Who wrote the descriptions and the rating word in the conversation, one of TEXT_AUTHORS; None if unknown."""

    def __str__(self) -> str:
        """For messages."""
        return f"item {self.name!r}"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Items in the order of their table, and what was left out."""

    name: str
    items: tuple[Item, ...]
    skipped: tuple[str, ...]
    """One line, with the reason, per item left out under `on_bad_item="skip"`."""
    notes: tuple[str, ...] = ()
    """What a user should know though nothing is wrong, such as rows that no conversation names."""
    warnings: tuple[str, ...] = ()
    """What makes scores of heads too high, or training impossible, and how to mend it before the model runs."""
    table: Path | None = None
    """The file that the labels come from, where there is one."""
    mos_range: MosRange | None = None
    """The scale of the labels, lowest and highest; None where nobody said."""


def read_image(item: Item) -> ImageFile | None:
    """The image file of `item`, None where it has none.

    Raises DataError when the file cannot be read, or is not the one that the item was made with.
    """
    if item.image is None:
        return None
    file = read_image_file(item.image)
    if item.image_sha256 not in (None, file.sha256):
        message = (
            f"{item.image}: the image file was replaced or changed during this run. Restore the file and run the same "
            "command again, or write to another path."
        )
        raise DataError(message)
    return file


def item_key(item: Item, image: ImageFile | None = None) -> bytes:
    """The 32 bytes that say what the model reads of `item`: SHA-256 over conversation and image file.

    Two items with equal keys give the same features. The conversation enters as canonical JSON, its
    length first, so that no text can pass for image bytes. `image` is the file as it was decoded; where none is
    given, the item's file is read as it is now. Raises DataError when that is gone.
    """
    turns = [[message.role, message.content] for message in item.conversation]
    text = json.dumps(turns, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    digest = hashlib.sha256(len(text).to_bytes(8, "big") + text)
    if item.image is not None:
        try:
            digest.update(item.image.read_bytes() if image is None else image.content)
        except OSError as error:
            message = f"{item.name}: cannot read the image {item.image} ({error.strerror or error})."
            raise DataError(message) from error
    return digest.digest()
