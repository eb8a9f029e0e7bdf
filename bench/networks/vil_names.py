"""The tensors of published ViL checkpoints (`vil2_tiny`, `vil2_small`, `vil2_base`) under the names of our layers.

A published block of a pair is `blocks.3.rowwise_from_top_left` or `blocks.3.rowwise_from_bot_right`; ours are numbered.
Published norms store their scale minus 1. Queries, keys and values, and the two gates, are separate layers there.
"""

import re

import torch
from torch import Tensor

_PAIR = re.compile(r"blocks\.(\d+)\.rowwise_from_(top_left|bot_right)\.(.+)")
_NORMS = ("norm.weight", "head_norm.weight")
_IN_BLOCKS = {
    "norm": "norm",
    "layer.proj_up": "up",
    "layer.conv": "convolution",
    "layer.mlstm_cell.outnorm": "head_norm",
    "layer.proj_down": "down",
}
_STACKED = {"layer.q_proj": 0, "layer.k_proj": 1, "layer.v_proj": 2}
"""Layers whose tensors our `parts` has one above the other, in this order."""
_JOINED = {"layer.mlstm_cell.igate": 0, "layer.mlstm_cell.fgate": 1}
"""Layers whose outputs our `gates` has one after the other, in this order."""
_OUTSIDE = {
    "patch_embed.proj.weight": "patches.weight",
    "patch_embed.proj.bias": "patches.bias",
    "pos_embed.embed": "positions",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` by our names; one that has none of the published blocks is returned as it is.

    Layers that are one of ours keep their own names where some of them are missing, or where their shapes differ.
    """
    if not any(_PAIR.fullmatch(key) for key in state):
        return state
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, str]] = {}
    for key, value in state.items():
        ours, place = _renamed(key)
        if place is None:
            found[ours] = 1 + value if ours.endswith(_NORMS) else value
        else:
            parts.setdefault(ours, {})[place] = key
    for ours, keys in parts.items():
        tensors = {key: state[key] for _, key in sorted(keys.items())}
        whole = len(keys) == len(_STACKED if ".parts." in ours else _JOINED)
        if whole and len({value.shape for value in tensors.values()}) == 1:
            join = torch.stack if ".parts." in ours else torch.cat
            found[ours] = join(list(tensors.values()))
        else:
            found |= tensors
    return found


def _renamed(key: str) -> tuple[str, int | None]:
    """Our name of a tensor, and its place among those that are one of ours."""
    match = _PAIR.fullmatch(key)
    if match is None:
        return _OUTSIDE.get(key, key), None
    block = f"blocks.{2 * int(match[1]) + (match[2] == 'bot_right')}"
    if match[3] == "layer.learnable_skip":
        return f"{block}.skip", None
    layer, _, what = match[3].rpartition(".")
    for name, places in (("parts", _STACKED), ("gates", _JOINED)):
        if layer in places:
            return f"{block}.{name}.{what}", places[layer]
    return f"{block}.{_IN_BLOCKS.get(layer, layer)}.{what}", None
