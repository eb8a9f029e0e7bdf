"""Batches: which items share a forward pass, their model inputs, and how many fit into the device's memory."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import ModelError, WorkerError, first_line
from agiqa.extract.models.contract import Backbone, Prepared
from agiqa.progress import say

CPU_BATCH = 8
LARGEST_BATCH = 32
"""Larger batches of an 8B model are no faster: 16 conversations keep a GPU as busy as 32."""
_MEMORY = 8 << 30
"""Most bytes, besides the weights, that the first batch size is chosen for."""
_HIDDEN_VECTORS = 48
"""Vectors of the hidden size that the first batch size counts per token: those of a language model's widest layer, and
as many again for the image patches behind an image token."""
_REDUCE = "Cut it with --max-tokens and --truncate, leave it out, or use a device with more memory."
"""What to do about an item that does not fit on its own."""

PATCHES_AT_ONCE = 1 << 15
"""Bounds the memory of one pass of an image encoder, in patches of 16 x 16 pixels: 167 images of 224 x 224."""
_PATCH_VALUES = 3 * 16 * 16

JOINED = frozenset(
    {
        "pixel_values",  # images, tiles or patches; Idefics and SmolVLM: one row of tiles per item
        "pixel_attention_mask",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "batch_num_images",
        "image_sizes",
        "image_grid_thw",
        "image_position_ids",
        "spatial_shapes",
        "target_sizes",
        "patches",  # MiniCPM-Llama3-V-2.5: the patches of all slices
    }
)
"""Image inputs of which a batch is the concatenation of its items along `_axis`; items with other inputs run alone."""
PER_TOKEN = frozenset({"token_type_ids", "mm_token_type_ids", "cross_attention_mask"})
"""Inputs of shape (1, n, ...), padded with zeros as the tokens are."""

_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
"""Parts of the errors that libraries raise when they allocate memory without torch's allocator, and that of the CPU."""

_Item = TypeVar("_Item")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had too little memory, so that a smaller batch may succeed."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


@contextmanager
def room_for_weights(name: str, device: torch.device) -> Generator[None]:
    """Raise ModelError if the weights of the model `name`, loaded inside the block, do not fit on `device`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = (
            f"{name}: the weights do not fit into the free memory of the device {device} ({first_line(error)}). Free "
            "it of other work, use a larger one, or a --dtype of fewer bytes."
        )
        raise ModelError(message) from error


def uploaded(values: NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`. They go through pinned memory: a copy from pageable memory waits for all earlier work."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def indices(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """`values` as int64 on `device`."""
    return uploaded(torch.tensor(list(values), dtype=torch.int64), device)


def check_inputs(name: str, inputs: Mapping[str, Any], accepted: Collection[str]) -> None:
    """Raise ModelError for an input that is no tensor or not `accepted` by the model."""
    for key, value in inputs.items():
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        if key not in accepted or not isinstance(value, torch.Tensor):
            message = (
                f"{name}: its processor makes the input {key!r} ({shape}), which the model does not take as a tensor; "
                f"it takes {', '.join(sorted(accepted))}."
            )
            raise ModelError(message)


def alike(batch: Sequence[Prepared]) -> list[list[int]]:
    """Positions of the items that fit into one forward pass: the same inputs, with equal shapes but for the batch axis.

    Images cut into different numbers of tiles thus run separately, without made-up pixels as padding. An item with an
    input of unknown batch axis runs alone.
    """
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = defaultdict(list)
    for position, item in enumerate(batch):
        shapes = [(key, _other_axes(key, item.inputs)) for key in sorted(item.inputs)]
        shapes += [(key, (position,)) for key in item.inputs if key not in JOINED | PER_TOKEN]
        groups[tuple(shapes)].append(position)
    return list(groups.values())


def _axis(key: str, inputs: Mapping[str, torch.Tensor]) -> int:
    """The axis along which the items of a batch are joined; for inputs per token, that of the tokens.

    With `target_sizes`, the number of patches of each image (MiniCPM-V 4), the pixels of all images are one row,
    (1, channels, side, patches x side).
    """
    if key in PER_TOKEN:
        return 1
    return 3 if key == "pixel_values" and "target_sizes" in inputs else 0


def _other_axes(key: str, inputs: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    shape, axis = inputs[key].shape, _axis(key, inputs)
    return (*shape[:axis], *shape[axis + 1 :])


def collate(
    batch: Sequence[Prepared], *, pad_id: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Model inputs of items that are `alike`: input_ids and attention_mask (batch, longest), and their images.

    Tokens are padded on the right. Floating-point inputs are cast to `dtype`.
    """
    longest = max(len(item.token_ids) for item in batch)
    ids = np.full((len(batch), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(batch), longest), dtype=np.int64)
    for row, item in enumerate(batch):
        ids[row, : len(item.token_ids)] = item.token_ids
        mask[row, : len(item.token_ids)] = 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    for key in batch[0].inputs:
        if key in PER_TOKEN:
            inputs[key] = torch.cat([_per_token(item, key, longest) for item in batch])
        else:
            inputs[key] = torch.cat([item.inputs[key] for item in batch], dim=_axis(key, batch[0].inputs))
    return {
        key: uploaded(value, device).to(dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
    }


def _per_token(item: Prepared, key: str, length: int) -> torch.Tensor:
    """An input of `item` per token, padded with zeros to (1, length, ...); truncated as its tokens may have been."""
    value = item.inputs[key][:, : len(item.token_ids)]
    longer = value.new_zeros((1, length, *value.shape[2:]))
    longer[:, : value.shape[1]] = value
    return longer


def image_groups(batch: Sequence[Prepared]) -> list[list[int]]:
    """Positions of items that are `alike`, whose images have about PATCHES_AT_ONCE patches at most, or are alone."""
    found: list[list[int]] = []
    for group in alike(batch):
        patches, piece = 0, list[int]()
        for position in group:
            own = _patches_in(batch[position])
            if piece and patches + own > PATCHES_AT_ONCE:
                found.append(piece)
                patches, piece = 0, []
            piece.append(position)
            patches += own
        found.append(piece)
    return found


def _patches_in(item: Prepared) -> int:
    pixels = [item.inputs[name].numel() for name in ("pixel_values", "patches") if name in item.inputs]
    return sum(pixels) // _PATCH_VALUES


def even_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Positions of items of these `lengths`, sorted by length, in the fewest batches of up to `most`, of even size."""
    order = sorted(range(len(lengths)), key=lambda position: (lengths[position], position))
    return [order[start:stop] for start, stop in _even_cuts(len(order), most)]


def _even_cuts(count: int, most: int) -> list[tuple[int, int]]:
    pieces = math.ceil(count / most)
    return [(count * piece // pieces, count * (piece + 1) // pieces) for piece in range(pieces)]


def first_batch_size(backbone: Backbone, longest: int, *, layers: int = 1) -> int:
    """A first batch size for items of up to `longest` tokens, of which the hidden states of `layers` layers are kept.

    The weights of `backbone` are on its device.
    """
    if backbone.device.type != "cuda":
        return CPU_BATCH
    free, _total = torch.cuda.mem_get_info(backbone.device)
    itemsize = torch.finfo(getattr(torch, backbone.logical_dtype)).bits // 8
    per_item = max(1, longest) * (_HIDDEN_VECTORS + 2 * (layers - 1)) * backbone.hidden_size * itemsize
    return max(1, min(LARGEST_BATCH, int(min(_MEMORY, 0.8 * free)) // per_item))


class BatchRunner:
    """Runs batches. When the device runs out of memory it halves the batch size, for all later batches too."""

    def __init__(self, size: int, *, remedy: str = _REDUCE) -> None:
        """`size` is in items, 1 or more; `remedy` says what to do about an item that does not fit on its own."""
        self.size = size
        self._remedy = remedy

    def run(
        self, compute: Callable[[Sequence[_Item]], None], batch: Sequence[_Item], *, name: Callable[[_Item], str]
    ) -> None:
        """Call `compute` on pieces of `batch` of up to `size` items, until each item has passed once.

        Raises WorkerError with the `name` of an item that does not fit on its own.
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
