"""Who wrote the text that each part of a training reads: one by a teacher that was told the MOS spoils scores."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.data.features import FeatureSource, Joined
from agiqa.heads.evaluation.runs import origin_of
from agiqa.store.format.text_authors import TEACHER, count_authors, teacher_warning


@runtime_checkable
class Authored(Protocol):
    """An item table that tells who wrote the text that each item reads, as those of stores do."""

    @property
    def text_authors(self) -> list[str | None]: ...


Parts = Mapping[str, NDArray[np.int64]]
"""Item numbers by the name of the part."""


def authors_by_part(source: FeatureSource, parts: Parts) -> dict[str, dict[str, int]]:
    """How many items of each part read a text by each author; empty where the source tells of no item."""
    authors = source.items.text_authors if isinstance(source.items, Authored) else []
    if not authors:
        return {}
    return {part: count_authors(authors[item] for item in items) for part, items in parts.items()}


def author_warnings(source: FeatureSource, parts: Parts) -> list[str]:
    """A line for each part, but `train`, whose items read the rating words of a teacher that was told their MOS.

    Those are the MOS in other words. Where nothing says that the conversations end before them, they count as read.
    """
    return _remarks(source, parts, rating_words=True)


def author_notes(source: FeatureSource, parts: Parts) -> list[str]:
    """A line for each part, but `train`, whose items read texts of such a teacher without its rating words."""
    return _remarks(source, parts, rating_words=False)


def _remarks(source: FeatureSource, parts: Parts, *, rating_words: bool) -> list[str]:
    authors = source.items.text_authors if isinstance(source.items, Authored) else []
    if not authors:
        return []
    told = (np.array(authors, dtype=object) == TEACHER) & (_reads_rating_words(source) == rating_words)
    return [
        teacher_warning(part, count, len(items), rating_words=rating_words)
        for part, items in parts.items()
        if part != "train" and (count := int(told[items].sum()))
    ]


def _reads_rating_words(source: FeatureSource) -> NDArray[np.bool_]:
    """Whether the conversation of each item holds the rating word; (items,)."""
    found = np.ones(len(source.items.names), np.bool_)
    stores = source.parts if isinstance(source, Joined) else [(source, np.arange(len(found)))]
    for store, places in stores:
        found[places] = origin_of(store).get("conversation", {}).get("variant", "full") == "full"
    return found
