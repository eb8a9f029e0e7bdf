"""How a training goes by its steps: the learning rate, and the moving average of the weights."""

import math

from agiqa.heads.settings.config import TrainConfig

EMA_WINDOW = 0.1
"""The longest window of an average of weights, 1 / (1 - decay) steps, as a share of all steps of a training."""


def ema_decay(decay: float, steps: int) -> float:
    """The decay per step of a training of `steps` steps: `decay`, or less where its window would be too long."""
    return min(decay, 1.0 - 1.0 / max(1.0, EMA_WINDOW * steps))


def newest_share(decay: float, step: int) -> float:
    """How far the average moves to the weights after step number `step`, from 1.

    The average is then the mean of all weights so far, each weighted by `decay` to the power of its age in steps: the
    moving average that starts at 0 with the bias correction of Adam (Kingma & Ba 2015, arXiv 1412.6980, section 3).
    """
    return (1.0 - decay) / (1.0 - decay**step)


def lr_factor(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then cosine to 0 or constant."""
    rise = math.ceil(config.warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))
