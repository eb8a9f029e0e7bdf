"""Who wrote the text that each part of a training reads: one by a teacher that was told the MOS spoils scores."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.features import FeatureSource
from agiqa.heads.runs import origin_of
from agiqa.store.text_authors import TEACHER, count_authors, teacher_warning


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
    return _remarks(source, parts) if _reads_rating_words(source) else []


def author_record(source: FeatureSource, parts: Parts) -> dict[str, Any]:
    """For metrics.json: `text_authors` as `authors_by_part`, and `notes` on teachers' texts without rating words."""
    notes = [] if _reads_rating_words(source) else _remarks(source, parts)
    return {"text_authors": authors_by_part(source, parts), "notes": notes}


def _remarks(source: FeatureSource, parts: Parts) -> list[str]:
    return [
        teacher_warning(part, count, len(parts[part]), rating_words=_reads_rating_words(source))
        for part, counts in authors_by_part(source, parts).items()
        if part != "train" and (count := counts.get(TEACHER, 0))
    ]


def _reads_rating_words(source: FeatureSource) -> bool:
    return bool(origin_of(source).get("conversation", {}).get("variant", "full") == "full")
