"""Prepared items as model inputs: tokens padded on the right, image inputs joined along axis 0."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from agiqa.errors import ModelError
from agiqa.extract.backbones.contract import Prepared

JOINED = frozenset(
    {
        "pixel_values",  # images, tiles or patches; Idefics and SmolVLM: one row of tiles per item
        "pixel_attention_mask",
        "image_sizes",
        "image_grid_thw",
        "image_position_ids",
        "spatial_shapes",
    }
)
"""Image inputs of which a batch is the concatenation of its items along axis 0."""
PER_TOKEN = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Inputs of shape (1, n), padded with zeros as the tokens are."""


def check_inputs(name: str, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise ModelError, naming it, for an input that no batch can be made of."""
    for key, value in inputs.items():
        if key not in JOINED | PER_TOKEN:
            message = (
                f"{name}: its processor makes the input {key!r} {tuple(value.shape)}, which agiqa cannot batch; "
                f"known: {', '.join(sorted(JOINED | PER_TOKEN))}."
            )
            raise ModelError(message)


def alike(batch: Sequence[Prepared]) -> list[list[int]]:
    """Positions of items that fit into one forward pass: the same image inputs, alike in all axes but the first.

    Images cut into different numbers of tiles thus run apart, instead of with pixels made up as padding.
    """
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = defaultdict(list)
    for position, item in enumerate(batch):
        joined = {key: value for key, value in item.inputs.items() if key in JOINED}
        shapes = [(key, tuple(value.shape[1:])) for key, value in sorted(joined.items())]
        others = [(key, ()) for key in sorted(item.inputs.keys() - joined.keys())]
        groups[(*shapes, *others)].append(position)
    return list(groups.values())


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
        values = [item.inputs[key] for item in batch]
        if key in PER_TOKEN:
            values = [torch.nn.functional.pad(value, (0, longest - value.shape[1])) for value in values]
        inputs[key] = torch.cat(values)
    return {
        key: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
    }
