"""Items of phase 1: an image with its conversation and labels; and data sets of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agiqa.errors import DataError
from agiqa.extract.data.images import ImageFile, read_image_file
from agiqa.notebooks import html_table, one_line
from agiqa.store.format.labels import MosRange

Role = Literal["user", "assistant"]
OnBadItem = Literal["fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation; an image comes before the first."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image, the words that the model reads with it, and its MOS."""

    name: str
    """Unique in its data set: the image's path below the images folder, with forward slashes."""
    prompt: str
    """The text that the image was generated from."""
    conversation: tuple[Message, ...]
    image: Path | None
    """The image file, or None when the backbone reads no images."""
    labels: Mapping[str, float] = field(default_factory=dict[str, float])
    """MOS by aspect (quality, correspondence, authenticity); an absent aspect has no label."""
    deviations: Mapping[str, float] = field(default_factory=dict[str, float])
    """Standard deviation of the single ratings by aspect, on the scale of the MOS."""
    counts: Mapping[str, float] = field(default_factory=dict[str, float])
    """Ratings of each level by aspect and level, `quality_1` to `quality_5`."""
    split: str | None = None
    """train, val, test or None."""
    generator: str | None = None
    """The text-to-image model; None if the data set does not name it."""
    description: str | None = None
    """The first description in the conversation, if any."""
    image_sha256: str | None = None
    """Hash of the image file when this item was made, in hex, which `read_image` compares; None: not compared."""
    image_size: tuple[int, int] | None = None
    """(width, height) of the decoded image with the hash `image_sha256`; None if it was not decoded yet."""
    text_author: str | None = None
    """Who wrote the descriptions and the rating word in the conversation, one of TEXT_AUTHORS; None if unknown."""
    prefix_authors: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    """The same of the beginnings of the conversation that are variants themselves, by variant."""

    @property
    def checked_size(self) -> tuple[int, int] | None:
        """`image_size`, if `read_image` makes sure that the file is still the one that was decoded."""
        return None if self.image_sha256 is None else self.image_size

    @property
    def is_checked(self) -> bool:
        """Whether reading the item can crash no decoder: it has no image, or one that was decoded before."""
        return self.image is None or self.checked_size is not None

    def __str__(self) -> str:
        """For messages."""
        return f"item {self.name!r}"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Items in the order of their table, and the problems of those left out."""

    name: str
    items: tuple[Item, ...]
    skipped: tuple[str, ...]
    """One line, with the reason, per item left out under `on_bad_item="skip"`."""
    notes: tuple[str, ...] = ()
    """Notes for the user, such as the number of rows without a conversation."""
    warnings: tuple[str, ...] = ()
    """Warnings: what would make scores too high or training impossible, and what to do before the model runs."""
    table: Path | None = None
    """The file of the labels, if there is one."""
    mos_range: MosRange | None = None
    """The scale of the labels, lowest and highest; None if unknown."""

    def __repr__(self) -> str:
        """What the data set holds, in one line."""
        return one_line(f"DataSet {self.name}", self._shown())

    def _repr_html_(self) -> str:
        """What the data set holds, for notebooks."""
        return html_table(f"DataSet {self.name}", self._shown())

    def _shown(self) -> dict[str, object]:
        labels = sorted({aspect for item in self.items for aspect in item.labels})
        splits = Counter(item.split or "none" for item in self.items)
        return {
            "items": len(self.items),
            "MOS": " and ".join(labels) or "none",
            "splits": ", ".join(f"{split} {count}" for split, count in splits.items()) or "none",
            "left out": len(self.skipped),
        }


def read_image(item: Item) -> ImageFile | None:
    """The image file of `item`, None if it has none.

    Raises DataError when the file cannot be read, or has changed since the item was made.
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


def item_key(item: Item, image: ImageFile | None = None, *, messages: int | None = None) -> bytes:
    """SHA-256 (32 bytes) of what the model reads of `item`: its conversation, or its first `messages`, and image file.

    Items with equal keys have the same features. The conversation is hashed as canonical JSON after its length, so
    that no text can pass for image bytes. `image` is the file as it was decoded; by default the item's file is read
    now. Raises DataError when that file cannot be read.
    """
    turns = [[message.role, message.content] for message in item.conversation[:messages]]
    text = json.dumps(turns, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    digest = hashlib.sha256(len(text).to_bytes(8, "big") + text)
    if item.image is not None:
        try:
            digest.update(item.image.read_bytes() if image is None else image.content)
        except OSError as error:
            message = f"{item.name}: cannot read the image {item.image} ({error.strerror or error})."
            raise DataError(message) from error
    return digest.digest()
