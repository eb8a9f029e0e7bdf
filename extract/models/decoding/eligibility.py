"""Whether a model can answer from a cache in slots: by what its own cache looks like, and by trying."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from agiqa.errors import first_line
from agiqa.extract.models.checks import BATCH_TOLERANCE, final_states, relative_error
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.decoding.cache import LayerShape
from agiqa.extract.models.decoding.slot_model import LoadedModel, SlotModel, Suffix, read_prompts

_FREQUENCIES = ("dynamic", "longrope")
"""Rotary frequencies that depend on the longest row of a batch."""
_SHORT, _LONG, _MORE, _STEPS = 5, 11, 3, 2
"""Tokens of the two prompts of the trial, those that the first goes on with, and decoding steps after that."""
_LENGTH = 64
_FAILURES = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What models raise that take no explicit positions, no cache of this kind or no mask of four dimensions."""


class Unfit(Exception):
    """The reason why a model cannot answer from slots."""


def slot_shapes(loaded: LoadedModel, *, keeps: bool = False) -> list[LayerShape]:
    """The sizes of the cache's layers, for a model that can answer from slots. Raises Unfit for another.

    Two prompts of some tokens are read; one goes on with more tokens, then both with one token per step. All logits
    must be those of whole passes over the same tokens; with `keeps`, the kept hidden states too.
    """
    _refuse_by_structure(loaded)
    try:
        with torch.inference_mode():
            shapes = _shapes(loaded)
            errors = _try_out(loaded, shapes, keeps=keeps)
    except _FAILURES as failure:
        message = f"trying it raised {type(failure).__name__}: {first_line(failure)}"
        raise Unfit(message) from failure
    for what, error in errors.items():
        if not error <= BATCH_TOLERANCE[shapes[0].dtype]:  # nor if it is not a number
            message = f"its {what} differ from those of whole passes by {error:.2g} of their norm"
            raise Unfit(message)
    return shapes


def _refuse_by_structure(loaded: LoadedModel) -> None:
    text = loaded.model.config.get_text_config(decoder=True)
    if text._attn_implementation != "sdpa":
        message = f"its attention is {text._attn_implementation!r}"
        raise Unfit(message)
    stated = getattr(text, "rope_parameters", None) or {}
    kinds = {stated.get("rope_type"), *(one.get("rope_type") for one in stated.values() if isinstance(one, dict))}
    if kinds & set(_FREQUENCIES):
        message = "its rotary frequencies depend on the longest row of a batch"
        raise Unfit(message)


def _shapes(loaded: LoadedModel) -> list[LayerShape]:
    items = _prompts(loaded)
    cache, _ = read_prompts(loaded.model, loaded.collate(items), _last(loaded, items))
    layers: list[Any] = list(cache.layers)
    if not layers:
        message = "it keeps no keys and values"
        raise Unfit(message)
    for layer in layers:
        kind, plain = type(layer).__name__, type(layer) is DynamicLayer
        if not plain or not layer.is_initialized or layer.keys.shape[2] != _LONG:
            message = f"a layer of its cache is a {kind} that does not hold every token"
            raise Unfit(message)
    return [
        LayerShape(
            heads=layer.keys.shape[1],
            key_width=layer.keys.shape[3],
            value_width=layer.values.shape[3],
            dtype=layer.keys.dtype,
        )
        for layer in layers
    ]


def _try_out(loaded: LoadedModel, shapes: Sequence[LayerShape], *, keeps: bool) -> dict[str, float]:
    """The largest relative error of logits, and with `keeps` of hidden states, in the Frobenius norm."""
    items, tokens = _prompts(loaded), loaded.ordinary(_SHORT + _LONG + _MORE + 2 * _STEPS)
    model = SlotModel(loaded, shapes, slots=2, length=_LENGTH, keeps=keeps)
    logits, offsets = model.read([1, 0], items)
    rows = {1: items[0].token_ids.tolist(), 0: items[1].token_ids.tolist()}
    errors = [_error(loaded, rows[1], logits[0]), _error(loaded, rows[0], logits[1])]
    offsets = torch.cat([offsets.flip(0), offsets[:1] * 0])
    suffix = Suffix(row=1, start=_SHORT - 1, ids=tokens[-_MORE:])
    rows[1] = [*rows[1][:-1], *suffix.ids]
    errors.append(_error(loaded, rows[1], model.read_on([suffix], offsets, rows=2, width=_MORE + 1)[0]))
    for step in range(_STEPS):
        new, lengths = tokens[2 * step : 2 * step + 2], [len(rows[0]), len(rows[1])]
        logits = model.next_logits(
            torch.tensor(new, device=loaded.device),
            torch.tensor(lengths, device=loaded.device),
            offsets,
            _LENGTH,
        )
        for row in rows:
            rows[row].append(new[row])
            errors.append(_error(loaded, rows[row], logits[row]))
    found = {"logits": _largest(errors)}
    if model.states is not None:
        kept = {row: model.states.of(row, len(ids)) for row, ids in rows.items()}
        found["hidden states"] = _largest([_state_error(loaded, ids, kept[row]) for row, ids in rows.items()])
    return found


def _largest(errors: Sequence[float]) -> float:
    """The largest of `errors`, of which one that is not a number counts as the worst."""
    return max(errors, key=lambda error: error if error == error else float("inf"))


def _error(loaded: LoadedModel, ids: list[int], logits: torch.Tensor) -> float:
    """How far `logits` (V,) are from those of a pass over all `ids`."""
    item = _item(loaded, ids)
    with torch.inference_mode():
        cache_free = loaded.model(**loaded.collate([item]), use_cache=False).logits[0, -1]
    return relative_error(logits, cache_free)


def _state_error(loaded: LoadedModel, ids: list[int], states: torch.Tensor) -> float:
    """How far `states` (n, D) are from those of a pass over all `ids`, as they are extracted."""
    return relative_error(states, final_states(loaded.model, loaded.collate([_item(loaded, ids)]))[0])


def _prompts(loaded: LoadedModel) -> list[Prepared]:
    tokens = loaded.ordinary(_SHORT + _LONG + _MORE + 2 * _STEPS)
    return [_item(loaded, tokens[:_SHORT]), _item(loaded, tokens[_SHORT : _SHORT + _LONG])]


def _item(loaded: LoadedModel, ids: list[int]) -> Prepared:
    inputs: dict[str, Any] = {}
    if "token_type_ids" in inspect.signature(loaded.model.base_model.forward).parameters:
        inputs["token_type_ids"] = torch.zeros(1, len(ids), dtype=torch.int64)
    return Prepared(token_ids=np.array(ids, np.int32), roles=np.zeros(len(ids), np.uint8), inputs=inputs)


def _last(loaded: LoadedModel, items: Sequence[Prepared]) -> torch.Tensor:
    return torch.tensor([len(item.token_ids) - 1 for item in items], device=loaded.device)
