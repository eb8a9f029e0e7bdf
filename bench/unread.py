"""Settings that have no say in a training, as others make them meaningless: `layers` of the encoder `none`."""

from collections.abc import Mapping

from agiqa.heads.config import HeadConfig, TrainConfig

_WITH_LAYERS = ("lstm", "gru", "mamba2", "transformer")
_ENCODERS = ("xlstm", *_WITH_LAYERS, "none")
_READ_BY: Mapping[str, tuple[str, ...]] = {
    "blocks": ("xlstm",),
    "num_heads": ("xlstm", "transformer"),
    "layers": _WITH_LAYERS,
    "state_size": ("mamba2",),
    "dropout": ("xlstm", *_WITH_LAYERS),
}
"""The encoders that read a setting, of those that agiqa brings."""


def unread_settings(head: HeadConfig, train: TrainConfig) -> dict[str, str]:
    """The settings that nothing of these reads, each with who does not, as in `the encoder 'none'`.

    Of an encoder that is not agiqa's own all settings are taken to be read.
    """
    found = {
        name: f"the encoder {head.encoder!r}"
        for name, encoders in _READ_BY.items()
        if head.encoder in _ENCODERS and head.encoder not in encoders
    }
    split = f"the split {train.split!r}"
    found |= {name: split for name, of in (("folds", "folds"), ("test_share", "grouped")) if train.split != of}
    if train.training_items is None:
        found["training_seed"] = "a training without `training_items`"
    return found
