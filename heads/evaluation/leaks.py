"""What makes scores too high: items or prompts from the head's training, and texts whose author knew the MOS."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.data.features import FeatureSource, Joined
from agiqa.heads.data.prompt_groups import KnownPrompts, PromptOverlap
from agiqa.heads.evaluation.runs import Run, origin_of
from agiqa.store.format.items import TEACHER, count_authors, teacher_warning

Parts = Mapping[str, NDArray[np.int64]]
"""Item numbers by the name of the part."""


@runtime_checkable
class Authored(Protocol):
    """An item table that has the author of each item's text, such as that of a store."""

    @property
    def text_authors(self) -> list[str | None]: ...


def count_known(run: Run, source: FeatureSource, items: NDArray[np.int64]) -> tuple[int, PromptOverlap]:
    """How many of `items` trained the head of `run` or chose its epoch, and how many share a prompt with such items.

    `RecordedParts` says which items are the same. Raises HeadError.
    """
    parts, trained = run.parts(), ("train", "validation")
    known = KnownPrompts(prompt for part in trained for _, prompt in parts.pairs[part])
    seen = int(parts.contain(source, items, *trained).sum())
    return seen, known.count(source.items.prompts[item] for item in items)


def leak_warnings(run: Run, source: FeatureSource, items: NDArray[np.int64]) -> list[str]:
    """Lines about items and prompts that the head was trained on, or that chose its epoch. Raises HeadError."""
    seen, prompts = count_known(run, source, items)
    counts = {
        "were in the training of this head": seen,
        f"have a prompt that occurs in its training{prompts.note()}": prompts.same,
    }
    return [f"{count} of {len(items)} items {what}." for what, count in counts.items() if count]


def authors_by_part(source: FeatureSource, parts: Parts) -> dict[str, dict[str, int]]:
    """How many texts of each part each author wrote; empty if the source records no authors."""
    authors = _authors_of(source)
    return {part: count_authors(authors[item] for item in items) for part, items in parts.items()} if authors else {}


def author_warnings(source: FeatureSource, parts: Parts) -> list[str]:
    """A line for each part but `train` whose items hold the rating words of a teacher that knew the MOS.

    Such a word reveals the MOS. A conversation counts as holding it unless the store records that it ends before it.
    """
    return _teacher_lines(source, parts, rating_words=True)


def author_notes(source: FeatureSource, parts: Parts) -> list[str]:
    """A line for each part but `train` with texts of a teacher that knew the MOS, but without its rating words."""
    return _teacher_lines(source, parts, rating_words=False)


def _teacher_lines(source: FeatureSource, parts: Parts, *, rating_words: bool) -> list[str]:
    authors = _authors_of(source)
    if not authors:
        return []
    by_teacher = (np.array(authors, dtype=object) == TEACHER) & (_has_rating_word(source) == rating_words)
    return [
        teacher_warning(part, count, len(items), rating_words=rating_words)
        for part, items in parts.items()
        if part != "train" and (count := int(by_teacher[items].sum()))
    ]


def _authors_of(source: FeatureSource) -> list[str | None]:
    return source.items.text_authors if isinstance(source.items, Authored) else []


def _has_rating_word(source: FeatureSource) -> NDArray[np.bool_]:
    """Whether the conversation of each item holds the rating word; (items,)."""
    found = np.ones(len(source.items.names), np.bool_)
    stores = source.parts if isinstance(source, Joined) else [(source, np.arange(len(found)))]
    for store, positions in stores:
        found[positions] = origin_of(store).get("conversation", {}).get("variant", "full").startswith("full")
    return found
