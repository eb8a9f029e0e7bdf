"""What a loaded model must satisfy: logits follow from hidden states, and hidden states do not depend on the batch.

**Logits.** Stores keep `H` and `W_lm` instead of logits, which is right only if the logits are `H W_lm^T`. Some models
scale their logits or cap them softly. The configuration says what a model may do, and a forward pass decides. A soft
cap hardly changes small logits, so the check also feeds the output embedding hidden states scaled up until the logits
are large. A scale that is a power of two goes into `W_lm` without changing a bit. With anything else, only raw logits
(`--encoding logits`) hold what the model computes.

**Batches.** Some models read the padding, or the padded length: CPM-Ant attends to all later tokens, and its features
change with the batch. Three forward passes over a few tokens find out: a short row alone, and twice the same row padded
beside a longer one, with other tokens in the padding and another companion.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from agiqa.errors import ModelError

LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest relative error of logits, in the Frobenius norm, that rounding to this dtype explains."""
SCALE_TOLERANCE = 1e-3
"""Largest relative error of the scale between two sets of logits; rounding averages out over a vocabulary."""
LARGE_LOGIT = 300.0
"""Well above every soft cap in use (15 to 50)."""

SHORT, LONG = 4, 16
"""Tokens of the row that is compared, and of the row beside it."""
TOKENS_NEEDED = 3 * LONG
BATCH_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
"""Largest relative difference of hidden states, in the Frobenius norm, that rounding explains.

Rounding differs with the shape of a batch, and may send a token to another expert. Of 121 text families of
transformers 5.23 with tiny random weights the largest difference was 3e-6 in float32, 0.012 in float16 and 0.093 in
bfloat16; CPM-Ant's is 0.7.
"""

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = (
    "logit_scale",
    "logits_scaling",
    "logits_scale",
    "lm_head_multiplier",
    "output_multiplier",
    "output_multiplier_scale",
)
"""Settings by which known models change their logits. Of two that share the name `logits_scaling` one divides."""


class _HeadReached(Exception):
    """Ends a forward pass before the output embedding makes logits."""


def final_states(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(batch, n, D) the output of the base model or, without one (Llama 4), the input of the output embedding."""
    if model.base_model is not model:
        states: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
        return states
    seen: list[torch.Tensor] = []

    def stop(_module: Any, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(given[0])
        raise _HeadReached

    with model.get_output_embeddings().register_forward_pre_hook(stop), suppress(_HeadReached):
        model(**inputs, use_cache=False)
    if not seen:
        message = f"{type(model).__name__} makes its logits without its output embedding (lm_head)."
        raise ModelError(message)
    return seen[0]


def refuse_batch_dependence(name: str, model: Any, tokens: Sequence[int], *, pad_id: int, dtype: torch.dtype) -> None:
    """Raise ModelError if the hidden states of a row depend on its batch, or are not finite.

    `tokens` are TOKENS_NEEDED ordinary token ids, `pad_id` is what batches are padded with, `dtype` is that of the
    weights.
    """
    row, first, second = tokens[:SHORT], tokens[LONG : 2 * LONG], tokens[2 * LONG : 3 * LONG]
    padding = [pad_id] * (LONG - SHORT)
    dtype_name = str(dtype).removeprefix("torch.")
    alone = _states_of_first_row(model, [list(row)])
    if not alone.isfinite().all():
        message = f"{name}: its hidden states are not finite in {dtype_name}; choose another --dtype."
        raise ModelError(message)
    beside = _states_of_first_row(model, [[*row, *padding], list(first)])
    beside_others = _states_of_first_row(model, [list(tokens[:LONG]), list(second)])
    error = max(relative_error(beside, alone), relative_error(beside_others, alone))
    tolerance = BATCH_TOLERANCE[dtype]
    if not error <= tolerance:  # nor if it is not a number
        message = (
            f"{name}: its hidden states depend on the batch: those of {SHORT} tokens change by {error:.2g} of their "
            f"norm when the tokens are padded and another row is beside them; rounding in {dtype_name} "
            f"explains {tolerance:.2g}. agiqa cannot extract its features; use another model."
        )
        raise ModelError(message)


def _states_of_first_row(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """The final hidden states (SHORT, D) of the first row; its tokens behind them are masked."""
    ids = torch.tensor(rows, device=model.device)
    mask = torch.ones_like(ids)
    mask[0, SHORT:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in inspect.signature(model.base_model.forward).parameters:
        inputs["token_type_ids"] = torch.zeros_like(ids)  # PaliGemma attends to padding without them
    with torch.inference_mode():
        return final_states(model, inputs)[0, :SHORT]


@dataclass(frozen=True, kw_only=True)
class LogitMap:
    """What a model does to `h W^T + b`; by default nothing."""

    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None
    """Logits x become cap tanh(x / cap)."""
    bias: bool = False
    """Whether the output embedding has a bias."""
    named: tuple[str, ...] = ()
    """The settings at work, for messages."""

    @property
    def scale(self) -> float:
        """The factor of `h W^T` before the cap."""
        return self.factor / self.divisor

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits from those of its output embedding, in their dtype."""
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.divisor != 1.0:
            logits = logits / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def fold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`W_lm` (V, D) with logits `H W_lm^T`. Raises ModelError if no matrix gives the logits to the bit."""
        if self.bias:
            raise _not_linear(name, "its lm_head has a bias")
        if self.cap is not None:
            raise _not_linear(name, " and ".join(self.named))
        if self.scale == 1.0:
            return weight
        folded = weight * self.scale
        if math.frexp(self.scale)[0] != 0.5 or not torch.equal(folded / self.scale, weight):
            raise _not_linear(name, f"{' and '.join(self.named)} is no power of two, so W_lm cannot take it up exactly")
        return folded


def find_logit_map(name: str, model: Any, token_ids: torch.Tensor) -> LogitMap:
    """What `model` does after its output embedding, found by a forward pass over `token_ids` (1, n).

    Raises ModelError if it has no output embedding, feeds it anything but its final hidden states, or makes logits that
    none of the known settings explains.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        message = f"{name}: {type(model).__name__} has no output embedding (lm_head) that makes its logits."
        raise ModelError(message)
    with torch.inference_mode():
        hidden = final_states(model, {"input_ids": token_ids})
        seen, logits = _large_logits(name, model, head, token_ids)
        tolerance = LOGIT_TOLERANCE[hidden.dtype]
        if seen[0].shape != hidden.shape or relative_error(seen[0], hidden) > tolerance:
            raise _unexplained(name, "its lm_head does not read what the final norm gives")
        bias = getattr(head, "bias", None)
        linear = seen[1].double() @ head.weight.double().T + (0 if bias is None else bias.double())
        if logits.shape != linear.shape:
            raise _unexplained(name, f"its logits have the shape {tuple(logits.shape)}, expected {tuple(linear.shape)}")
        for chosen in _candidates(model.config.get_text_config(), bias=bias is not None):
            expected = chosen(linear)
            if relative_error(logits, expected) <= tolerance and _scale_error(logits, expected) <= SCALE_TOLERANCE:
                return chosen
    error = relative_error(logits, linear)
    raise _unexplained(name, f"its logits are not those of its lm_head (relative error {error:.2g})")


def _candidates(settings: Any, *, bias: bool) -> Iterator[LogitMap]:
    """The maps that the settings may mean; the first uses none of them."""
    yield LogitMap(bias=bias)
    caps = [(key, getattr(settings, key, None)) for key in _CAPS]
    scales = [(key, getattr(settings, key, None)) for key in _SCALES]
    for cap_name, cap in [("", None), *((key, cap) for key, cap in caps if cap)]:
        named = (f"{cap_name} = {cap}",) if cap else ()
        if cap:
            yield LogitMap(cap=float(cap), bias=bias, named=named)
        for key, value in scales:
            if isinstance(value, int | float) and value not in (0, 1):
                both = (f"{key} = {value}", *named)
                yield LogitMap(factor=float(value), cap=cap, bias=bias, named=both)
                yield LogitMap(divisor=float(value), cap=cap, bias=bias, named=both)


def _large_logits(
    name: str, model: Any, head: Any, token_ids: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """((the input of `head`, the same scaled up), the model's logits of the scaled input)."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def enlarge(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        largest = (inputs[0].float() @ head.weight.float().T).abs().max().clamp(min=1e-6)
        scaled = inputs[0] * (LARGE_LOGIT / largest).to(inputs[0].dtype)
        seen.append((inputs[0], scaled))
        return (scaled, *inputs[1:])

    with head.register_forward_pre_hook(enlarge):
        logits = model(input_ids=token_ids, use_cache=False).logits
    if not seen:
        raise _unexplained(name, "it makes its logits without its lm_head")
    return seen[0], logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference in the Frobenius norm."""
    wide = expected.double()
    return float((found.double() - wide).norm() / wide.norm().clamp(min=1e-12))


def _scale_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance from 1 of the factor by which `expected` comes closest to `found`."""
    wide = expected.double()
    return abs(float((found.double() * wide).sum() / wide.square().sum().clamp(min=1e-12)) - 1.0)


def _not_linear(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name}: its logits are not linear in the hidden states: {why}. Stores of hidden states or sketches would "
        "lose this. Use --encoding logits, or another checkpoint of the family, without that setting."
    )


def _unexplained(name: str, why: str) -> ModelError:
    return ModelError(f"{name}: agiqa cannot make its logits from its hidden states: {why}. Use another checkpoint.")
