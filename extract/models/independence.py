"""Whether hidden states of an item depend on what is beside and behind it in a batch: tried on the loaded model.

Some models read the padding, or the padded length: CPM-Ant attends to all that follows, and its features change with
the batch. Three forward passes over a few tokens tell: of a short row alone, and of the same row padded beside a
longer one, twice, with other tokens in the padding and another companion.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from agiqa.errors import ModelError
from agiqa.extract.models.linearity import final_states

SHORT, LONG = 4, 16
"""Tokens of the row that is watched, and of its companion."""
TOKENS_NEEDED = 3 * LONG
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
"""Largest relative difference, in the Frobenius norm, that rounding explains.

Rounding differs with the shape of a batch, and may send a token to another expert. Of 121 text families of
transformers 5.23 with tiny random weights the largest difference was 3e-6 in float32, 0.012 in float16 and 0.093 in
bfloat16; CPM-Ant's is 0.7.
"""


def refuse_batch_dependence(name: str, model: Any, tokens: Sequence[int], *, pad_id: int, dtype: torch.dtype) -> None:
    """Raise ModelError where the states that `model` gives a row depend on its batch, or are not finite.

    `tokens` are TOKENS_NEEDED ordinary token ids, `pad_id` is what batches are padded with, `dtype` is that of the
    weights.
    """
    row, first, second = tokens[:SHORT], tokens[LONG : 2 * LONG], tokens[2 * LONG : 3 * LONG]
    padding = [pad_id] * (LONG - SHORT)
    alone = _states(model, [list(row)])
    if not alone.isfinite().all():
        message = f"{name}: its hidden states are not finite in {_short(dtype)}; choose another --dtype."
        raise ModelError(message)
    beside = _states(model, [[*row, *padding], list(first)])
    beside_others = _states(model, [list(tokens[:LONG]), list(second)])
    error = max(_error(beside, alone), _error(beside_others, alone))
    tolerance = TOLERANCE[dtype]
    if not error <= tolerance:  # nor if it is not a number
        message = (
            f"{name}: its hidden states depend on the batch: those of {SHORT} tokens change by {error:.2g} of their "
            f"norm when the tokens are padded and another row is beside them; rounding in {_short(dtype)} "
            f"explains {tolerance:.2g}. agiqa cannot extract its features; use another model."
        )
        raise ModelError(message)


def _states(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """The final hidden states (SHORT, D) of the first row; what is behind its SHORT tokens is masked."""
    ids = torch.tensor(rows, device=model.device)
    mask = torch.ones_like(ids)
    mask[0, SHORT:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in inspect.signature(model.base_model.forward).parameters:
        inputs["token_type_ids"] = torch.zeros_like(ids)  # PaliGemma attends to padding without them
    with torch.inference_mode():
        return final_states(model, inputs)[0, :SHORT]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    wide = expected.double()
    return float((found.double() - wide).norm() / wide.norm().clamp(min=1e-12))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
