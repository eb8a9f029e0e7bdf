"""From `h W^T` to a model's logits: what a model does after its output embedding, found out and checked.

Stores keep `H` and `W_lm` instead of the logits, which is right only for a model whose logits are `H W_lm^T`. Some
scale them or cap them softly. Which one does is read from the configuration and then tried: bends hide while logits
are small, so the check also feeds the output embedding hidden states scaled until the logits are large.

A scale that is a power of two goes into `W_lm` without changing a bit. Everything else leaves the raw logits
(`--encoding logits`) as the only encoding that holds what the model says.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from agiqa.errors import ModelError

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest relative error, in the Frobenius norm, that rounding to this dtype explains."""
SCALE_TOLERANCE = 1e-3
"""Largest relative error of the scale between two sets of logits; rounding averages out over a vocabulary."""

LARGE_LOGIT = 300.0
"""Well above every soft cap in use (15 to 50)."""

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = (
    "logit_scale",
    "logits_scaling",
    "logits_scale",
    "lm_head_multiplier",
    "output_multiplier",
    "output_multiplier_scale",
)
"""Settings by which known models bend their logits. Of two that share the name `logits_scaling` one divides."""


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
        """What `h W^T` is multiplied with before the cap."""
        return self.factor / self.divisor

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits from those that its output embedding gives, in their dtype."""
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.divisor != 1.0:
            logits = logits / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def fold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`W_lm` (V, D) with `H W_lm^T` = logits. Raises ModelError where no such matrix holds them to the bit."""
        if self.bias:
            raise _bent(name, "its lm_head has a bias")
        if self.cap is not None:
            raise _bent(name, " and ".join(self.named))
        if self.scale == 1.0:
            return weight
        folded = weight * self.scale
        if math.frexp(self.scale)[0] != 0.5 or not torch.equal(folded / self.scale, weight):
            raise _bent(name, f"{' and '.join(self.named)} is no power of two, so W_lm cannot take it up exactly")
        return folded


class _HeadReached(Exception):
    """Ends a forward pass before the output embedding makes logits."""


def final_states(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(batch, n, D) what the base model gives; of a model without one (Llama 4), what its output embedding reads."""
    if model.base_model is not model:
        states: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
        return states
    seen: list[torch.Tensor] = []

    def stop(_module: Any, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(given[0])
        raise _HeadReached

    handle = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        with suppress(_HeadReached):
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    if not seen:
        message = f"{type(model).__name__} makes its logits without its output embedding (lm_head)."
        raise ModelError(message)
    return seen[0]


def find_logit_map(name: str, model: Any, token_ids: torch.Tensor) -> LogitMap:
    """What `model` does after its output embedding, tried on `token_ids` (1, n).

    Raises ModelError when it has no output embedding, feeds it anything but its final hidden states, or does what
    none of the known settings explains.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        message = f"{name}: {type(model).__name__} has no output embedding (lm_head) that makes its logits."
        raise ModelError(message)
    with torch.inference_mode():
        hidden = final_states(model, {"input_ids": token_ids})
        seen, logits = _large_logits(name, model, head, token_ids)
        tolerance = TOLERANCE[hidden.dtype]
        if seen[0].shape != hidden.shape or _error(seen[0], hidden) > tolerance:
            raise _strange(name, "its lm_head does not read what the final norm gives")
        bias = getattr(head, "bias", None)
        linear = seen[1].double() @ head.weight.double().T + (0 if bias is None else bias.double())
        if logits.shape != linear.shape:
            raise _strange(name, f"its logits have the shape {tuple(logits.shape)}, expected {tuple(linear.shape)}")
        for chosen in _candidates(model.config.get_text_config(), bias=bias is not None):
            expected = chosen(linear)
            if _error(logits, expected) <= tolerance and _scale_error(logits, expected) <= SCALE_TOLERANCE:
                return chosen
    error = _error(logits, linear)
    raise _strange(name, f"its logits are not those of its lm_head (relative error {error:.2g})")


def _candidates(settings: Any, *, bias: bool) -> Iterator[LogitMap]:
    """The maps that the settings may mean, beginning with none of them at work."""
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
    """((what the head was given, the same scaled up), the model's logits of the latter)."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def enlarge(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        largest = (inputs[0].float() @ head.weight.float().T).abs().max().clamp(min=1e-6)
        scaled = inputs[0] * (LARGE_LOGIT / largest).to(inputs[0].dtype)
        seen.append((inputs[0], scaled))
        return (scaled, *inputs[1:])

    handle = head.register_forward_pre_hook(enlarge)
    try:
        logits = model(input_ids=token_ids, use_cache=False).logits
    finally:
        handle.remove()
    if not seen:
        raise _strange(name, "it makes its logits without its lm_head")
    return seen[0], logits


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-12))


def _scale_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far from 1 the factor lies by which `expected` comes closest to `found`."""
    wide = expected.double()
    return abs(float((found.double() * wide).sum() / wide.square().sum().clamp(min=1e-12)) - 1.0)


def _bent(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name}: its logits are not a linear image of the hidden states: {why}. Hidden states and sketches "
        "of them would not hold it. Use --encoding logits, or another checkpoint of the family, without that setting."
    )


def _strange(name: str, why: str) -> ModelError:
    return ModelError(f"{name}: agiqa cannot make its logits from its hidden states: {why}. Use another checkpoint.")
