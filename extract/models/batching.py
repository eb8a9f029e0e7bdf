"""Prepared items as model inputs: tokens padded on the right, image inputs joined along axis 0."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from agiqa.errors import ModelError
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.uploading import uploaded

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
    }
)
"""Image inputs of which a batch is the concatenation of its items along `_axis`; items with others run alone."""
PER_TOKEN = frozenset({"token_type_ids", "mm_token_type_ids", "cross_attention_mask"})
"""Inputs of shape (1, n, ...), padded with zeros as the tokens are."""


def check_inputs(name: str, inputs: Mapping[str, Any], accepted: Collection[str]) -> None:
    """Raise ModelError for an input, by its name, that is no tensor or not among those that the model `accepted`."""
    for key, value in inputs.items():
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        if key not in accepted or not isinstance(value, torch.Tensor):
            message = (
                f"{name}: its processor makes the input {key!r} ({shape}), which the model does not take as a tensor; "
                f"it takes {', '.join(sorted(accepted))}."
            )
            raise ModelError(message)


def alike(batch: Sequence[Prepared]) -> list[list[int]]:
    """Positions of items that fit into one forward pass: the same inputs, alike in all axes that are not joined.

    Images cut into different numbers of tiles thus run apart, instead of with pixels made up as padding. So does an
    item with an input of which it is not known how a batch is made.
    """
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = defaultdict(list)
    for position, item in enumerate(batch):
        shapes = [(key, _other_axes(key, item.inputs)) for key in sorted(item.inputs)]
        shapes += [(key, (position,)) for key in item.inputs if key not in JOINED | PER_TOKEN]
        groups[tuple(shapes)].append(position)
    return list(groups.values())


def _axis(key: str, inputs: Mapping[str, torch.Tensor]) -> int:
    """The axis along which items of a batch follow each other: tokens are axis 1, whatever else is axis 0.

    Where `target_sizes` says how many patches each image has (MiniCPM-V 4), the pixels of all images are one row,
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
    """Model inputs for items that are `alike`: input_ids and attention_mask (batch, longest), and their images.

    Floating-point inputs are cast to `dtype`.
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
    """An input (1, n, ...) of `item`, cut as its tokens may have been, with zeros behind them, (1, length, ...)."""
    value = item.inputs[key][:, : len(item.token_ids)]
    longer = value.new_zeros((1, length, *value.shape[2:]))
    longer[:, : value.shape[1]] = value
    return longer
