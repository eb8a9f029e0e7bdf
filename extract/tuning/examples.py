"""Examples: an item as the model's input, and which of its tokens the loss counts.

The loss counts the assistant's turns and the token that closes each: without it the model would never learn to stop.

An answer is learnt behind the words with which the template will ask for it. Templates of models that can think write
an empty thought there, and leave it out of earlier answers. With such a template each answer is learnt at the end of a
conversation of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.extract.data.items import Item, Message, item_key, read_image
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.rendering import Renderer
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
    earlier: "tuple[Example, ...]" = ()
    """Those of the earlier answers, if each answer is learnt alone."""

    @property
    def parts(self) -> "tuple[Example, ...]":
        """All that pass through the model for this item, in order."""
        return (*self.earlier, self)

    @property
    def count(self) -> int:
        """Labels of all parts."""
        return sum(len(part.labels) for part in self.parts)

    @property
    def targets(self) -> NDArray[np.int32]:
        """(labels,) the ids of these tokens."""
        return self.prepared.token_ids[self.labels]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What is known of an item before the first step."""

    tokens: int = 0
    """Of all parts of its example."""
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
    if not example.count:
        return Planned(key=key, problem=f"{item.name}: no token of an answer, so there is nothing to learn from it")
    inputs = [one for part in example.parts for one in part.prepared.inputs.items()]
    pixels = sum(value.numel() for name, value in inputs if name in _PIXELS)
    total = sum(len(part.prepared.token_ids) for part in example.parts)
    return Planned(tokens=total, labels=example.count, patches=pixels // _PATCH, key=key)


def unplanned(limited: Limited, reason: str) -> Planned:
    """What no worker process could prepare, for `Preparation`."""
    return Planned(problem=f"{limited.item.name}: {reason}")


def example_of(backbone: Backbone, item: Item) -> Example:
    """The input and labels of `item`. Needs no weights. Raises DataError as `Backbone.prepare` and `read_image`."""
    image, turns = read_image(item), item.conversation
    ends = [len(turns)]
    renderer = backbone.renderer if isinstance(backbone, HuggingFaceBackbone) else None
    if renderer is not None and not asks_as_shown(renderer, rounds=2) and asks_as_shown(renderer, rounds=1):
        ends = [end for end, turn in enumerate(turns, start=1) if turn.role == "assistant"] or ends
    parts: list[Example] = []
    for end in ends:
        prepared = backbone.prepare(turns[:end], image)
        spans = answer_spans(prepared, None if renderer is None else renderer.turn_end)
        positions = [np.arange(*span) for span in (spans if len(ends) == 1 else spans[-1:])]
        labels = np.concatenate([*positions, np.zeros(0, np.int64)]).astype(np.int64)
        rating = len(positions[-1]) if positions else 0
        parts.append(Example(name=item.name, prepared=prepared, labels=labels, rating=rating))
    return replace(parts[-1], earlier=tuple(parts[:-1]))


@lru_cache(maxsize=8)
def asks_as_shown(renderer: Renderer, *, rounds: int) -> bool:
    """Whether the words that ask for a first answer are those in front of it in a conversation of `rounds` rounds."""
    question, image = Message(role="user", content="?"), renderer.image_token is not None
    asked = renderer.render([question], image=image, answer=True).text
    shown = renderer.render([question, Message(role="assistant", content="!")] * rounds, image=image).text
    return shown.startswith(asked)


def template_warnings(backbone: HuggingFaceBackbone) -> Iterator[str]:
    """What a model of `backbone` cannot learn because of its chat template."""
    renderer, name = backbone.renderer, backbone.checkpoint.name
    if renderer.turn_end is None:
        yield (
            f"the chat template of {name} closes an answer with no special token, so the model does not learn where "
            "to stop"
        )
    if not asks_as_shown(renderer, rounds=1):
        yield (
            f"the chat template of {name} asks for an answer with other words than it writes in front of one (a "
            "thought, perhaps); the model learns its answers behind the latter"
        )


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
