"""The check that a model's logits are `E = H W_lm^T`.

Stores keep `H` and `W_lm` instead of the logits, which is only right for a model that does nothing else to
them. Bends such as soft-capping hide while logits are small, so the check also feeds the output embedding
hidden states scaled until the logits are large.
"""

from typing import Any

import torch

from agiqa.errors import ModelError

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest relative error, in the Frobenius norm, that rounding to this dtype explains."""

LARGE_LOGIT = 300.0
"""Well above every soft cap in use (30 to 50)."""

_NEUTRAL: dict[str, tuple[float | None, ...]] = {
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "logits_scale": (None, 1.0),
    "lm_head_multiplier": (None, 1.0),
    "output_multiplier_scale": (None, 1.0),
}
"""Settings by which known models bend their logits, with the values that leave them alone."""


def check_linear(name: str, model: Any, token_ids: torch.Tensor) -> None:
    """Raise ModelError unless the logits of `model` on `token_ids` (1, n) are its hidden states times `W_lm`."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None or model.base_model is model:
        message = f"{name}: {type(model).__name__} has no output embedding (lm_head) that makes its logits."
        raise ModelError(message)
    if getattr(head, "bias", None) is not None:
        raise _bent(name, "its lm_head has a bias")
    with torch.inference_mode():
        hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        seen, logits = _large_logits(model, head, token_ids)
        tolerance = TOLERANCE[hidden.dtype]
        if seen[0].shape != hidden.shape or _error(seen[0], hidden) > tolerance:
            raise _bent(name, "its lm_head does not read what the final norm gives")
        expected = seen[1].double() @ head.weight.double().T
    error = _error(logits, expected) if logits.shape == expected.shape else float("inf")
    settings = model.config.get_text_config()
    named = [f"{key} = {getattr(settings, key)}" for key in _NEUTRAL if _bends(settings, key)]
    if error > tolerance:
        raise _bent(name, f"{' and '.join(named) or 'the logits differ'} (relative error {error:.2g})")


def _large_logits(
    model: Any, head: Any, token_ids: torch.Tensor
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
        raise _bent(name=type(model).__name__, why="it makes its logits without its lm_head")
    return seen[0], logits


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-12))


def _bends(settings: Any, key: str) -> bool:
    return getattr(settings, key, None) not in _NEUTRAL[key]


def _bent(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name}: its logits are not a linear image of the hidden states: {why}. Hidden states and sketches "
        "of them would not hold it. Use another checkpoint of the family, without that setting."
    )
