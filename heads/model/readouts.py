"""Readouts: what a regressor's outputs mean where a head predicts a distribution, not only a MOS.

levels    five logits: the probability of each level (DeQA-Score, arXiv 2501.11561)
graded    position and discrimination of the image in the graded-response model (Samejima 1969): the probability of a
          rating of level k or above is the logistic function of a (theta - b_k). The four thresholds b_k are ordered,
          and shared by all images. That a differs between images is the location-scale form of McCullagh (1980)
gaussian  mean and log variance of the MOS, standardised as the labels are

Of levels and graded the predicted MOS is the expected level, and the spread its standard deviation.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from agiqa.errors import UnknownName
from agiqa.heads.data.soft_labels import LEVELS, NARROWEST

VALUE, SOFTMAX, GRADED, GAUSSIAN = "value", "levels", "graded", "gaussian"
OUTPUTS = {VALUE: 1, SOFTMAX: LEVELS, GRADED: 2, GAUSSIAN: 2}
"""Outputs of the regressor for each label, by readout."""
_LEAST_SHARE = 1e-4
"""Least share of a level among the training ratings, so that one that nobody gave can be predicted."""
_LEAST_GAP = 1e-3
"""Least distance of two thresholds."""
_LARGEST_LOG = 4.0
"""Largest |log| of a discrimination and of a standardised variance."""

LogProbabilities = Float[Tensor, "batch label 5"]


class LevelReadout(nn.Module):
    """Five levels of each label, and the moments of predicted distributions over them."""

    def __init__(self, labels: int) -> None:
        """Levels from 0 to 4, until `begin`."""
        super().__init__()
        self.levels: Tensor
        self.register_buffer("levels", torch.arange(float(LEVELS)).repeat(labels, 1))
        self.grouping: Tensor
        self.register_buffer("grouping", torch.zeros(labels))
        """Variance that soft labels have beyond that of the ratings, as they are rounded to levels, (labels,)."""

    def begin(
        self, levels: Float[Tensor, "label 5"], grouping: Float[Tensor, " label"], shares: Float[Tensor, "label 5"]
    ) -> None:
        """Take the values of the levels, and start at the shares of each level among the training ratings."""
        self.levels.copy_(levels)
        self.grouping.copy_(grouping)
        shares = shares.clamp_min(_LEAST_SHARE)
        self.start_at(shares / shares.sum(1, keepdim=True))

    def start_at(self, shares: Float[Tensor, "label 5"]) -> None:
        """Make outputs of 0 mean these probabilities."""
        raise NotImplementedError

    def log_probabilities(self, outputs: Float[Tensor, "batch label output"]) -> LogProbabilities:
        """The log probability of each level."""
        raise NotImplementedError

    def moments(
        self, outputs: Float[Tensor, "batch label output"]
    ) -> tuple[Float[Tensor, "batch label"], Float[Tensor, "batch label"]]:
        """The expected level, and the standard deviation of the ratings, on the MOS scale.

        A deviation below NARROWEST distances of two levels cannot be told from soft labels, and is that.
        """
        shares = self.log_probabilities(outputs).exp()
        mean = (shares * self.levels).sum(-1)
        variance = (shares * (self.levels - mean[..., None]).square()).sum(-1)
        narrowest = NARROWEST * (self.levels[:, 1] - self.levels[:, 0])
        return mean, (variance - self.grouping).clamp_min(narrowest.square()).sqrt()

    def rescale(self, slopes: Float[Tensor, " label"], offsets: Float[Tensor, " label"]) -> None:
        """Map the levels of each label by its line, which rises."""
        self.levels.copy_(self.levels.double() * slopes[:, None] + offsets[:, None])
        self.grouping.copy_(self.grouping.double() * slopes.square())


class SoftmaxLevels(LevelReadout):
    """Five logits, added to the log shares of the training ratings."""

    def __init__(self, labels: int) -> None:
        """Equal shares, until `begin`."""
        super().__init__(labels)
        self.prior: Tensor
        self.register_buffer("prior", torch.zeros(labels, LEVELS))

    def start_at(self, shares: Float[Tensor, "label 5"]) -> None:
        """Take the log shares."""
        self.prior.copy_(shares.log())

    def log_probabilities(self, outputs: Float[Tensor, "batch label output"]) -> LogProbabilities:
        """Log softmax."""
        return functional.log_softmax(outputs + self.prior, dim=-1)


class GradedResponse(LevelReadout):
    """Position theta and log discrimination of each image; thresholds that training learns, ordered by construction."""

    def __init__(self, labels: int) -> None:
        """Thresholds one apart, until `begin`."""
        super().__init__(labels)
        self.first = nn.Parameter(torch.full((labels, 1), -1.5))
        self.gaps = nn.Parameter(torch.ones(labels, LEVELS - 2).expm1().log())

    @property
    def thresholds(self) -> Float[Tensor, "label 4"]:
        """b_2 to b_5, ascending: the first one, and the distances as softplus."""
        return torch.cat([self.first, _LEAST_GAP + functional.softplus(self.gaps)], dim=1).cumsum(1)

    @torch.no_grad()
    def start_at(self, shares: Float[Tensor, "label 5"]) -> None:
        """Thresholds at which an image at 0 has these shares."""
        reached = shares.flip(1).cumsum(1).flip(1)[:, 1:].double()
        thresholds = -torch.logit(reached)
        gaps = (thresholds.diff(dim=1) - _LEAST_GAP).clamp_min(_LEAST_GAP)
        self.first.copy_(thresholds[:, :1])
        self.gaps.copy_(gaps + torch.log(-torch.expm1(-gaps)))

    def log_probabilities(self, outputs: Float[Tensor, "batch label output"]) -> LogProbabilities:
        """Differences of neighbouring logistic functions, whose logs stay finite where both are near 0 or 1."""
        position, log_scale = outputs.unbind(-1)
        scale = log_scale.clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()
        reached = scale[..., None] * (position[..., None] - self.thresholds)
        above, below = functional.logsigmoid(reached), functional.logsigmoid(-reached)
        distance = reached[..., :-1] - reached[..., 1:]
        between = above[..., :-1] + below[..., 1:] + torch.log(-torch.expm1(-distance))
        return torch.cat([below[..., :1], between, above[..., -1:]], dim=-1)


def log_variance(outputs: Float[Tensor, "batch label output"]) -> Float[Tensor, "batch label"]:
    """The log variance of a `gaussian` readout, in the unit of the standardised labels."""
    return outputs[..., 1].clamp(-2 * _LARGEST_LOG, 2 * _LARGEST_LOG)


def level_readout(readout: str, labels: int) -> LevelReadout | None:
    """The module of a readout of levels; None for the others."""
    return {SOFTMAX: SoftmaxLevels, GRADED: GradedResponse}[readout](labels) if readout in (SOFTMAX, GRADED) else None


def check_readout(name: str) -> None:
    """Raise UnknownName unless `name` is a readout."""
    if name not in OUTPUTS:
        kind = "readout"
        raise UnknownName.of(kind, name, OUTPUTS)
