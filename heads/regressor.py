"""The regressor: from the pooled vector to a MOS in the unit of the labels."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agiqa.heads.config import HeadConfig


class Regressor(nn.Module):
    """Two linear layers with a ReLU between (d, hidden, 1), as published, or a single one (d, 1).

    The layers predict labels scaled to mean 0 and variance 1 over the training items, and mean and standard
    deviation stay in the checkpoint: one learning rate then fits a MOS of 0-1, 0-5 and 0-100 alike, and an
    untrained head already predicts about the mean.
    """

    def __init__(self, config: HeadConfig, width: int) -> None:
        """`width` is that of the encoder's outputs; `config` gives the hidden channels."""
        super().__init__()
        hidden = config.regressor_hidden
        if hidden:
            self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        else:
            self.layers = nn.Sequential(nn.Linear(width, 1))
        self.label_mean: Tensor
        self.register_buffer("label_mean", torch.zeros(()))
        self.label_std: Tensor
        self.register_buffer("label_std", torch.ones(()))

    @torch.no_grad()
    def calibrate(self, labels: Float[Tensor, " items"]) -> None:
        """Take mean and standard deviation of the training labels, which must not all be equal."""
        self.label_mean.copy_(labels.double().mean())
        self.label_std.copy_(labels.double().std(correction=0))

    def scaled(self, labels: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Labels or predictions in the scale of the loss."""
        return (labels - self.label_mean) / self.label_std

    def forward(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, " batch"]:
        """The predicted MOS of each item."""
        outputs: Tensor = self.layers(pooled)
        return outputs.squeeze(-1).to(self.label_std.dtype) * self.label_std + self.label_mean
