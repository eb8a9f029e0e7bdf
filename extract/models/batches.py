"""Batches: items of like length together, as many at once as the device has memory for."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from agiqa.errors import WorkerError
from agiqa.extract.models import Backbone
from agiqa.extract.models.memory import is_out_of_memory
from agiqa.progress import say

CPU_BATCH = 8
LARGEST_BATCH = 32
"""Above it, 8B models gain nothing: a batch of 16 conversations keeps a GPU as busy as one of 32."""
_MEMORY = 8 << 30
"""Bytes beside the weights that a first guess may use."""
_HIDDEN_VECTORS = 48
"""Vectors of the hidden size that a guess counts per token: those of a language model's widest layer, and as much again
for the image patches behind an image token."""
_MAKE_ROOM = "Cut it with --max-tokens and --truncate, leave it out, or use a device with more memory."
"""What to do about an item of a store that does not fit."""

_Item = TypeVar("_Item")


def even_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Positions of items of these `lengths`, by length, in as few batches of like size as `most` items each allow."""
    order = sorted(range(len(lengths)), key=lambda position: (lengths[position], position))
    return [order[start:stop] for start, stop in _even_cuts(len(order), most)]


def _even_cuts(count: int, most: int) -> list[tuple[int, int]]:
    pieces = math.ceil(count / most)
    return [(count * piece // pieces, count * (piece + 1) // pieces) for piece in range(pieces)]


def first_batch_size(backbone: Backbone, longest: int) -> int:
    """A batch size to begin with, for items of up to `longest` tokens; the weights of `backbone` are on its device."""
    if backbone.device.type != "cuda":
        return CPU_BATCH
    free, _total = torch.cuda.mem_get_info(backbone.device)
    itemsize = torch.finfo(getattr(torch, backbone.logical_dtype)).bits // 8
    per_item = max(1, longest) * _HIDDEN_VECTORS * backbone.hidden_size * itemsize
    return max(1, min(LARGEST_BATCH, int(min(_MEMORY, 0.8 * free)) // per_item))


class BatchRunner:
    """Runs batches; one that the device has no memory for runs in halves, as do all larger than those after it."""

    def __init__(self, size: int, *, remedy: str = _MAKE_ROOM) -> None:
        """`size` is in items, 1 or more; `remedy` tells users what to do about an item that does not fit alone."""
        self.size = size
        self._remedy = remedy

    def run(
        self, compute: Callable[[Sequence[_Item]], None], batch: Sequence[_Item], *, name: Callable[[_Item], str]
    ) -> None:
        """Let `compute` see every item of `batch` once without an error, in pieces of up to `size` items.

        Raises WorkerError with the `name` of the item that does not fit on its own.
        """
        start = 0
        while start < len(batch):
            _, stop = _even_cuts(len(batch) - start, self.size)[0]
            piece = batch[start : start + stop]
            if self._fits(compute, piece):
                start += len(piece)
                continue
            if len(piece) == 1:
                message = f"The device has not enough memory for {name(piece[0])}, even alone. {self._remedy}"
                raise WorkerError(message)
            self.size = len(piece) // 2
            say(f"the device has not enough memory for a batch of {len(piece)} items: going on with {self.size}")

    def _fits(self, compute: Callable[[Sequence[_Item]], None], piece: Sequence[_Item]) -> bool:
        try:
            compute(piece)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # the traceback holds the tensors of the failed pass: memory is free once it is gone
        else:
            return True
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return False
