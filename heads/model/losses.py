"""Losses by name, on predictions and labels scaled to mean 0 and variance 1, and weighted sums such as `mse+0.5*plcc`.

mse, mae, huber            compare each prediction with its own label
plcc                       compares order and spacing within a batch: 1 minus Pearson's correlation
fidelity, margin, ranknet  compare the items of a batch in pairs

The last four do not determine the level of the predictions (plcc, fidelity and ranknet nor their scale). Alone they
train for correlation, and the level drifts, since AdamW scales the rounding noise in the gradient of the output bias up
to full steps. In a sum with `mse`, `mae` or `huber` they train for RMSE too. They need two items: `check_loss` refuses
a batch size of 1, the batch plan joins a single left-over item to its neighbour, and the loss of one item is 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from agiqa.errors import ConfigError
from agiqa.heads.settings.config import TrainConfig
from agiqa.registry import Registry

LossFormula = Callable[[Tensor, Tensor], Tensor]
Values = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]

_LEAST_VARIANCE = 1e-8
_HUBER_DELTA = 1.0


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One registered loss."""

    formula: LossFormula
    """From predictions and labels of at least `smallest_batch` items, (batch,) each, to a scalar."""
    smallest_batch: int = 1
    """Items that the formula needs: 2 where it compares items."""

    @property
    def __wrapped__(self) -> LossFormula:
        """The formula, as the code that the loss comes from."""
        return self.formula

    def __call__(self, predicted: Values, labels: Values) -> Scalar:
        """The loss; 0, with gradients of 0, for too small a batch. Raises ConfigError where no scalar comes out."""
        if len(predicted) < self.smallest_batch:
            return (predicted * 0.0).sum()
        found = cast("object", self.formula(predicted, labels))  # a user's formula may return anything
        if isinstance(found, Tensor) and found.ndim == 0:
            return found
        what = f"tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        message = (
            f"A loss must return one number for a batch, as a tensor without axes, but this one returned a {what}. "
            "Take the mean over the items."
        )
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A weighted sum of registered losses."""

    terms: tuple[tuple[float, LossTerm], ...]
    """Weight and loss."""

    @property
    def smallest_batch(self) -> int:
        """Items that every batch should have, so that every term can compare items."""
        return max(term.smallest_batch for _, term in self.terms)

    def __call__(self, predicted: Values, labels: Values) -> Scalar:
        """The sum, in float32 (float64 for float64 inputs), under autocast too."""
        with torch.autocast(device_type=predicted.device.type, enabled=False):
            predicted, labels = _precise(predicted), _precise(labels)
            values = [weight * term(predicted, labels) for weight, term in self.terms]
        return torch.stack(values).sum()

    def over_labels(self, predicted: Float[Tensor, "batch label"], labels: Float[Tensor, "batch label"]) -> Scalar:
        """The mean over the labels of the loss of each."""
        values = [self(column, truth) for column, truth in zip(predicted.unbind(1), labels.unbind(1), strict=True)]
        return torch.stack(values).mean()


class LossRegistry(Registry[LossTerm]):
    """Losses by name; a plain function becomes a LossTerm for batches of any size."""

    def add(self, name: str, part: LossTerm | LossFormula) -> None:
        """Register `part`. Raises ConfigError for a taken name, and for a class in place of an instance."""
        if isinstance(part, type):
            message = (
                f"The loss {name!r} must be a function of predictions and labels, or a LossTerm with one, not the "
                f"class {part.__name__}. Register an instance that can be called with both."
            )
            raise ConfigError(message)
        super().add(name, part if isinstance(part, LossTerm) else LossTerm(formula=part))


LOSSES = LossRegistry("loss")


def get_loss(name: str) -> Loss:
    """The loss called `name`: a registered name, or a weighted sum of them, such as `0.3*mae+ranknet`.

    Raises UnknownName for a loss that is not registered, and ConfigError for any other text or a weight that is not
    positive.
    """
    return Loss(terms=tuple(_parse_term(name, part.strip()) for part in name.split("+")))


def names_in_loss(name: str) -> list[str]:
    """The registered names in the text of a loss, in its order."""
    return [part.rpartition("*")[2].strip() for part in name.split("+")]


def check_loss(config: TrainConfig) -> None:
    """Raise as `get_loss`, and ConfigError where the loss compares items and a batch holds only one."""
    smallest = get_loss(config.loss).smallest_batch
    if config.batch_size < smallest:
        message = (
            f"The loss {config.loss!r} compares items within a batch, and batch_size is {config.batch_size}. "
            f"Set batch_size to {smallest} or more, or choose mse, mae or huber."
        )
        raise ConfigError(message)


def mse(predicted: Values, labels: Values) -> Scalar:
    """Mean squared error, the paper's loss."""
    return (predicted - labels).square().mean()


def mae(predicted: Values, labels: Values) -> Scalar:
    """Mean absolute error."""
    return (predicted - labels).abs().mean()


def huber(predicted: Values, labels: Values) -> Scalar:
    """Mean of e^2 / 2 up to an error e of 1 (a standard deviation of the labels), of |e| - 1/2 beyond (Huber 1964)."""
    return functional.huber_loss(predicted, labels, delta=_HUBER_DELTA)


def plcc(predicted: Values, labels: Values) -> Scalar:
    """1 minus Pearson's correlation over the batch, from 0 to 2; 1 where predictions or labels are constant.

    Standard deviations have a floor of 1e-4 (labels have 1). It bounds the gradient, and rounding noise in constant
    predictions does not count as correlation.
    """
    predicted, labels = predicted - predicted.mean(), labels - labels.mean()
    covariance = (predicted * labels).mean()
    variances = [values.square().mean().clamp_min(_LEAST_VARIANCE) for values in (predicted, labels)]
    return 1.0 - covariance / (variances[0].sqrt() * variances[1].sqrt())


def fidelity(predicted: Values, labels: Values) -> Scalar:
    """Mean over pairs of 1 - sqrt(p q) - sqrt((1 - p)(1 - q)), from 0 to 1.

    p is 1, 1/2 or 0 where the first label is above, equal to or below the second; q = Phi((f1 - f2) / sqrt(2)) is
    Thurstone's probability (case V, unit variances) from the predictions f. The loss is from Tsai et al. 2007 (FRank),
    q from Zhang et al. 2021 (UNIQUE). Square roots are taken through log Phi, whose gradient stays finite where q
    rounds to 0 or 1.
    """
    difference, preferred = _pairs(predicted, labels)
    score = difference / math.sqrt(2.0)
    above, below = (torch.exp(0.5 * torch.special.log_ndtr(sign * score)) for sign in (1.0, -1.0))
    return (1.0 - preferred.sqrt() * above - (1.0 - preferred).sqrt() * below).mean()


def margin(predicted: Values, labels: Values) -> Scalar:
    """Mean over pairs of max(0, |y1 - y2| - sign(y1 - y2) (f1 - f2)), of labels y and predictions f.

    A hinge whose margin is the difference of the labels, in their standard deviations (Wen and Wang 2021; Sun et al.
    2022, SimpleVQA): a pair in the right order and at least as far apart as its labels costs nothing, nor does a tie.
    """
    difference, _ = _pairs(predicted, labels)
    wanted, _ = _pairs(labels, labels)
    return (wanted.abs() - wanted.sign() * difference).clamp_min(0.0).mean()


def ranknet(predicted: Values, labels: Values) -> Scalar:
    """Mean over pairs of the cross entropy of p and the logistic function of f1 - f2 (Burges et al. 2005).

    p is 1, 1/2 or 0 where the first label is above, equal to or below the second.
    """
    difference, preferred = _pairs(predicted, labels)
    return functional.binary_cross_entropy_with_logits(difference, preferred)


for _formula in (mse, mae, huber):
    LOSSES.add(_formula.__name__, _formula)
for _formula in (plcc, fidelity, margin, ranknet):
    LOSSES.add(_formula.__name__, LossTerm(formula=_formula, smallest_batch=2))


def _pairs(predicted: Values, labels: Values) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """For each pair of the batch: the difference of the predictions, and 1, 1/2 or 0 by the order of the labels."""
    count = len(predicted)
    first, second = torch.triu_indices(count, count, 1, device=predicted.device)
    preferred = 0.5 * (1.0 + (labels[first] - labels[second]).sign())
    return predicted[first] - predicted[second], preferred


def _precise(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are in it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _parse_term(name: str, part: str) -> tuple[float, LossTerm]:
    """Weight and loss of one summand of `name`."""
    weight, star, loss = part.rpartition("*")
    if not loss.strip() or (star and not weight.strip()):
        message = f"The loss {name!r} has an empty part. Write names, or weights and names, as in 'mse+0.5*plcc'."
        raise ConfigError(message)
    return _parse_weight(name, weight.strip()) if star else 1.0, LOSSES.get(loss.strip())


def _parse_weight(name: str, text: str) -> float:
    """A positive, finite weight."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0.0):
        message = f"The loss {name!r} has the weight {text!r}; a weight is a positive number, as in 'mse+0.5*plcc'."
        raise ConfigError(message)
    return weight
