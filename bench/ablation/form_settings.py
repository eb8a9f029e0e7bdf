"""Which settings closed forms read, so that a grid has no two runs with equal results."""

from agiqa.heads.settings.config import HeadConfig

_NETWORK_SETTINGS = (
    *("projection", "width", "standardise", "bidirectional", "token_dropout", "regressor_hidden", "loss", "epochs"),
    *("batch_size", "lr", "projection_lr", "weight_decay", "schedule", "warmup", "gradient_clip", "ema", "patience"),
    *("refit", "precision", "cuda_graphs", "compile"),
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


def unread_by_forms(head: HeadConfig) -> dict[str, str]:
    """The settings that this head does not read because it is a closed form, or has none; each with the reason."""
    form = f"the closed form {head.encoder!r}" if head.is_closed else "a head without `init`"
    fitted, unread = {head.encoder, head.init}, dict[str, str]()
    if head.is_closed:
        unread |= dict.fromkeys(_NETWORK_SETTINGS, form)
    if head.init is None:
        unread["init_pooling"] = form
    return unread | {name: form for name, forms in _FORM_SETTINGS.items() if not fitted & forms}
