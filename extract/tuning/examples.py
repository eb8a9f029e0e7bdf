"""Examples: an item as the model's input, and which of its tokens the loss counts.

The loss counts the assistant's turns and the token that closes each: without it the model would never learn to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.extract.data.items import Item, item_key, read_image
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.store import TOKEN_ROLES

_PIXELS = ("patches", "pixel_values")
_PATCH = 3 * 14 * 14
"""Values of one patch in most vision towers."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation with its labels."""

    name: str
    """Of its item."""
    prepared: Prepared
    labels: NDArray[np.int64]
    """(labels,) positions of the tokens that the loss counts, none of them 0."""
    rating: int
    """How many of the last labels belong to the last answer, the rating word."""

    @property
    def targets(self) -> NDArray[np.int32]:
        """(labels,) the ids of these tokens."""
        return self.prepared.token_ids[self.labels]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What is known of an item before the first step."""

    tokens: int = 0
    labels: int = 0
    """Tokens that the loss counts."""
    patches: int = 0
    """About as many patches as the vision tower sees: its pixels in squares of 14 x 14."""
    key: str | None = None
    """Hash of the conversation and the image."""
    problem: str | None = None
    """Why it cannot be trained on."""


@dataclass(frozen=True, kw_only=True)
class Limited:
    """An item, and the longest conversation that may be trained on."""

    item: Item
    max_length: int | None

    def __str__(self) -> str:
        """For messages."""
        return str(self.item)


def plan_example(backbone: Backbone, limited: Limited) -> Planned:
    """The counts of an item, or why it cannot be trained on. Needs no weights."""
    item = limited.item
    try:
        image = read_image(item)
        example = example_of(backbone, item)
    except DataError as error:
        return Planned(problem=f"{item.name}: {error}")
    key, tokens = item_key(item, image).hex(), len(example.prepared.token_ids)
    longest = min((most for most in (limited.max_length, backbone.max_positions) if most is not None), default=None)
    if longest is not None and tokens > longest:
        seen = int((example.prepared.roles == TOKEN_ROLES["image"]).sum())
        why = f"{tokens} tokens ({seen} of the image), more than the {longest} allowed (--set max_length=N)"
        return Planned(key=key, problem=f"{item.name}: {why}")
    if not len(example.labels):
        return Planned(key=key, problem=f"{item.name}: no token of an answer, so there is nothing to learn from it")
    pixels = sum(value.numel() for name, value in example.prepared.inputs.items() if name in _PIXELS)
    return Planned(tokens=tokens, labels=len(example.labels), patches=pixels // _PATCH, key=key)


def unplanned(limited: Limited, reason: str) -> Planned:
    """What no worker process could prepare, for `Preparation`."""
    return Planned(problem=f"{limited.item.name}: {reason}")


def example_of(backbone: Backbone, item: Item) -> Example:
    """The input and labels of `item`. Needs no weights. Raises DataError as `Backbone.prepare` and `read_image`."""
    prepared = backbone.prepare(item.conversation, read_image(item))
    end = backbone.renderer.turn_end if isinstance(backbone, HuggingFaceBackbone) else None
    spans = answer_spans(prepared, end)
    positions = [np.arange(start, stop) for start, stop in spans]
    labels = np.concatenate([*positions, np.zeros(0, np.int64)]).astype(np.int64)
    return Example(name=item.name, prepared=prepared, labels=labels, rating=len(positions[-1]) if positions else 0)


def answer_spans(prepared: Prepared, turn_end: int | None) -> list[tuple[int, int]]:
    """(first, one past the last) position of each answer and what the template writes behind it, up to `turn_end`.

    Without a `turn_end` behind it, an answer ends with its last token.
    """
    answered = prepared.roles == TOKEN_ROLES["answer"]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], answered, [False]]).astype(np.int8)))
    spans: list[tuple[int, int]] = []
    for start, stop in edges.reshape(-1, 2).tolist():
        spans.append((max(start, 1), _closed(prepared.token_ids, prepared.roles, stop, turn_end)))
    return spans


def _closed(ids: NDArray[np.int32], roles: NDArray[np.uint8], stop: int, turn_end: int | None) -> int:
    behind = stop
    while turn_end is not None and behind < len(ids) and roles[behind] == TOKEN_ROLES["special"]:
        behind += 1
        if ids[behind - 1] == turn_end:
            return behind
    return stop


def longest(plans: Sequence[Planned]) -> Planned:
    """The item with the most tokens."""
    return max(plans, key=lambda one: one.tokens)
