"""Tokens and slices per item of MiniCPM-Llama3-V-2.5, estimated without its files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agiqa.extract.data.items import Item
from agiqa.extract.models.minicpm.slicing import slicing_of

PUBLISHED_SLICES = 9
"""Most slices of an image in the published MiniCPM-Llama3-V-2.5."""
_RESOLUTION, _PATCH, _QUERIES = 448, 14, 96
_MARKS_OF_SLICE, _MARKS_OF_SLICES = 2, 2
_TURN_TOKENS = 5
"""Tokens of Llama 3's chat template around a message, beside one at the beginning."""
_CHARACTERS_PER_TOKEN = 4.7
"""Measured with Llama 3's tokenizer: 4.7 in conversations of AGIQA-3k, 4.9 of AIGCIQA2023, 4.5 in single questions."""


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens of the items that would be stored."""

    tokens: NDArray[np.int64]
    """(items,)"""
    image_tokens: NDArray[np.int64]
    """(items,), those with the role image."""
    slices: NDArray[np.int64] | None
    """(items,), slices that the vision tower reads, the overview included; None for models that cut none here."""
    is_exact: bool
    """Whether the model's own tokenizer counted."""
    truncated: int = 0
    skipped: tuple[str, ...] = ()
    """A line about each item that is too long or cannot be prepared."""


def estimated(items: Sequence[Item], *, max_slices: int | None = None) -> TokenCounts:
    """About the tokens of MiniCPM-Llama3-V-2.5, without its tokenizer: those of images are exact, those of text not."""
    most = PUBLISHED_SLICES if max_slices is None else max_slices
    tokens, image_tokens, slices = np.zeros((3, len(items)), np.int64)
    for position, item in enumerate(items):
        text = sum(len(message.content) for message in item.conversation)
        tokens[position] = 1 + round(text / _CHARACTERS_PER_TOKEN) + _TURN_TOKENS * len(item.conversation)
        if item.image_size is None:
            continue
        grid = slicing_of(item.image_size, most=most, resolution=_RESOLUTION, patch=_PATCH).grid
        slices[position] = 1 if grid is None else 1 + grid[0] * grid[1]
        image_tokens[position] = slices[position] * _QUERIES
        marks = 0 if grid is None else _MARKS_OF_SLICES + grid[1] - 1
        tokens[position] += slices[position] * (_QUERIES + _MARKS_OF_SLICE) + marks
    return TokenCounts(tokens=tokens, image_tokens=image_tokens, slices=slices, is_exact=False)
