"""Which settings networks read, and which closed forms: a grid has no two runs with equal results, and settings of
networks alone ask for a network.
"""

from collections.abc import Mapping
from typing import Any

from agiqa.heads.settings.config import HeadConfig

_NETWORK_SETTINGS = (
    *("projection", "width", "standardise", "bidirectional", "token_dropout", "regressor_hidden", "loss", "epochs"),
    *("batch_size", "lr", "projection_lr", "weight_decay", "schedule", "warmup", "gradient_clip", "ema", "patience"),
    *("refit", "precision", "cuda_graphs", "compile", "layer_mix", "tensorboard"),
)
"""Settings that closed forms do not read."""
_FORM_SETTINGS = {
    "kernel": {"krr", "stack"},
    "kernel_width": {"krr", "stack"},
    "strength": {"ridge", "krr", "tfidf", "stack"},
    "ngrams": {"tfidf", "stack"},
    "members": {"stack"},
    "inner_folds": {"ridge", "krr", "tfidf", "stack"},
    "rating_tokens": {"rating-words"},
}
"""Settings that only these closed forms read."""
_IF_TRUE = ("paper_compatible", "tensorboard")
"""Settings that ask for a network where they are true: they report on its epochs."""


def asks_for_network(given: Mapping[str, Any]) -> bool:
    """Whether flat settings without an encoder name one that asks for a network, such as `width` or `epochs`."""
    of_heads = HeadConfig.model_fields.keys() - _FORM_SETTINGS.keys()
    asking = {*of_heads, *_NETWORK_SETTINGS} - {*_IF_TRUE}
    return any(given.get(name) is not None for name in asking) or any(given.get(name) for name in _IF_TRUE)


def unread_by_forms(head: HeadConfig) -> dict[str, str]:
    """The settings that this head does not read because it is a closed form, or has none; each with the reason."""
    form = f"the closed form {head.encoder!r}" if head.is_closed else "a head without `init`"
    fitted, unread = {head.encoder, head.init}, dict[str, str]()
    if head.is_closed:
        unread |= dict.fromkeys(_NETWORK_SETTINGS, form)
    if head.init is None:
        unread["init_pooling"] = form
    return unread | {name: form for name, forms in _FORM_SETTINGS.items() if not fitted & forms}
