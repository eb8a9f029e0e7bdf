"""Settings that have no say in a training, as others make them meaningless: `layers` of the encoder `none`."""

from agiqa.heads.model.encoders.base import encoder_settings
from agiqa.heads.settings.config import HeadConfig, TrainConfig

_OF_ENCODERS = ("blocks", "num_heads", "layers", "state_size", "residual", "dropout")
"""Settings that nothing but the encoder may read."""


def unread_settings(head: HeadConfig, train: TrainConfig) -> dict[str, str]:
    """The settings that nothing of these reads, each with who does not, as in `the encoder 'none'`."""
    read = encoder_settings(head.encoder)
    found = {name: f"the encoder {head.encoder!r}" for name in _OF_ENCODERS if read is not None and name not in read}
    split = f"the split {train.split!r}"
    found |= {name: split for name, of in (("folds", "folds"), ("test_share", "grouped")) if train.split != of}
    if train.training_items is None:
        found["training_seed"] = "a training without `training_items`"
    return found
