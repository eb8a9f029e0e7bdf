"""The regressor: from the pooled vector to the MOS of each label, in its unit."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agiqa.heads.data.scales import Line
from agiqa.heads.settings.config import HeadConfig


class Regressor(nn.Module):
    """Two linear layers with a ReLU between (d, hidden, labels), as published for one label, or one (d, labels).

    The layers predict labels scaled to mean 0 and variance 1 over the training items, each label by its own mean and
    standard deviation, which stay in the checkpoint (scalars for one label): one learning rate then fits a MOS of
    0-1, 0-5 and 0-100 alike, and an untrained head already predicts about the mean.
    """

    def __init__(self, config: HeadConfig, width: int, *, labels: int = 1) -> None:
        """`width` is that of the encoder's outputs; `config` gives the hidden channels; `labels` are counted."""
        super().__init__()
        hidden = config.regressor_hidden
        if hidden:
            self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, labels))
        else:
            self.layers = nn.Sequential(nn.Linear(width, labels))
        shape = () if labels == 1 else (labels,)
        self.label_mean: Tensor
        self.register_buffer("label_mean", torch.zeros(shape))
        self.label_std: Tensor
        self.register_buffer("label_std", torch.ones(shape))

    @torch.no_grad()
    def calibrate(self, labels: Float[Tensor, "items label"]) -> None:
        """Take mean and standard deviation of each training label, which must not be the same for all items."""
        columns = labels.double().T.contiguous()
        for constant, values in (
            (self.label_mean, [column.mean() for column in columns]),
            (self.label_std, [column.std(correction=0) for column in columns]),
        ):
            constant.copy_(torch.stack(values).view(constant.shape))

    @torch.no_grad()
    def rescale(self, lines: Sequence[Line]) -> None:
        """Predict on another scale from now on: the line of each label takes its predictions there."""
        slopes, offsets = torch.tensor(lines, dtype=torch.float64, device=self.label_mean.device).unbind(1)
        shape = self.label_mean.shape
        self.label_mean.copy_((self.label_mean.double().view(-1) * slopes + offsets).view(shape))
        self.label_std.copy_((self.label_std.double().view(-1) * slopes).view(shape))

    def scaled(self, labels: Float[Tensor, "batch label"]) -> Float[Tensor, "batch label"]:
        """Labels or predictions in the scale of the loss."""
        return (labels - self.label_mean) / self.label_std

    def forward(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch label"]:
        """The predicted MOS of each item."""
        outputs: Tensor = self.layers(pooled)
        return outputs.to(self.label_std.dtype) * self.label_std + self.label_mean
