"""Losses by name, on predictions and labels scaled to mean 0 and variance 1."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from agiqa.registry import Registry

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: Registry[Loss] = Registry("loss")


def mse(predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean squared error, the paper's loss."""
    return (predicted - labels).square().mean()


LOSSES.add("mse", mse)
