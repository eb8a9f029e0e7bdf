"""Losses by name, on predictions and labels scaled to mean 0 and variance 1, and weighted sums such as `mse+0.5*plcc`.

mse, mae, huber         compare each prediction with its own label
plcc                    compares the order and spacing within a batch: 1 minus Pearson's correlation
fidelity, margin, ranknet  compare the items of a batch in pairs

The last four leave the level of the predictions open (plcc, fidelity and ranknet also their scale): alone they train
for correlation, in a sum with `mse`, `mae` or `huber` for RMSE too. (The output bias then has a gradient of rounding
noise only, which AdamW scales up to steps: the level drifts.) They need two items: `check_loss` refuses a batch
size of 1, the batch plan joins a single left-over item to its neighbour, and a batch of one item counts 0.
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

_LEAST_VARIANCE = 1e-8
_HUBER_DELTA = 1.0


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One registered loss."""

    formula: LossFormula
    """Predictions and labels of at least `smallest_batch` items, (batch,) each, to a scalar."""
    smallest_batch: int = 1
    """Items that the formula needs: 2 where it compares them with each other."""

    def __call__(self, predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The formula, a scalar or else ConfigError; of a batch that is too small 0, with gradients of 0."""
        if len(predicted) < self.smallest_batch:
            return (predicted * 0.0).sum()
        found = cast("object", self.formula(predicted, labels))  # a user's own may return anything
        if isinstance(found, Tensor) and found.ndim == 0:
            return found
        what = f"tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        message = (
            f"A loss must return one number for a batch, as a tensor without axes, and this one returned a {what}. "
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
        """Items that every batch should have, so that every term has something to compare."""
        return max(term.smallest_batch for _, term in self.terms)

    def __call__(self, predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The sum, computed in float32 (float64 for float64 inputs) also within an autocast region."""
        with torch.autocast(device_type=predicted.device.type, enabled=False):
            predicted, labels = _precise(predicted), _precise(labels)
            values = [weight * term(predicted, labels) for weight, term in self.terms]
        return torch.stack(values).sum()

    def over_labels(
        self, predicted: Float[Tensor, "batch label"], labels: Float[Tensor, "batch label"]
    ) -> Float[Tensor, ""]:
        """The mean of the losses of each label: items are compared within a label, never across."""
        values = [self(column, truth) for column, truth in zip(predicted.unbind(1), labels.unbind(1), strict=True)]
        return torch.stack(values).mean()


class LossRegistry(Registry[LossTerm]):
    """Losses by name; a plain function joins as a LossTerm for batches of any size."""

    def add(self, name: str, part: LossTerm | LossFormula) -> None:
        """Register `part`. Raises ConfigError for a taken name, and for a class, which called makes no loss."""
        if isinstance(part, type):
            message = (
                f"The loss {name!r} must be a function of predictions and labels, or a LossTerm with one, not the "
                f"class {part.__name__}. Register an instance that can be called with both."
            )
            raise ConfigError(message)
        super().add(name, part if isinstance(part, LossTerm) else LossTerm(formula=part))


LOSSES = LossRegistry("loss")


def get_loss(name: str) -> Loss:
    """The loss called `name`: a registered name, or a sum of them with weights, such as `0.3*mae+ranknet`.

    Raises UnknownName for a loss that is not registered, and ConfigError for text that is no such sum or a weight
    that is not a positive number.
    """
    return Loss(terms=tuple(_parse_term(name, part.strip()) for part in name.split("+")))


def check_loss(config: TrainConfig) -> None:
    """Raise what is wrong with `config.loss`, before training: what `get_loss` raises, or ConfigError.

    ConfigError where the loss compares items and batches hold one each.
    """
    smallest = get_loss(config.loss).smallest_batch
    if config.batch_size < smallest:
        message = (
            f"The loss {config.loss!r} compares items within a batch, and batch_size is {config.batch_size}. "
            f"Set batch_size to {smallest} or more, or choose mse, mae or huber."
        )
        raise ConfigError(message)


def mse(predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean squared error, the paper's loss."""
    return (predicted - labels).square().mean()


def mae(predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean absolute error."""
    return (predicted - labels).abs().mean()


def huber(predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean of e^2 / 2 up to an error e of 1 (a standard deviation of the labels), of |e| - 1/2 beyond (Huber 1964)."""
    return functional.huber_loss(predicted, labels, delta=_HUBER_DELTA)


def plcc(predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """1 minus Pearson's correlation over the batch, from 0 to 2; 1 where predictions or labels are constant.

    A standard deviation counts as 1e-4 at least (of the 1 that all labels have): this bounds the gradient, and keeps
    rounding noise in constant predictions from being taken for a correlation.
    """
    predicted, labels = predicted - predicted.mean(), labels - labels.mean()
    covariance = (predicted * labels).mean()
    variances = [values.square().mean().clamp_min(_LEAST_VARIANCE) for values in (predicted, labels)]
    return 1.0 - covariance / (variances[0].sqrt() * variances[1].sqrt())


def fidelity(predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over pairs of 1 - sqrt(p q) - sqrt((1 - p)(1 - q)), from 0 to 1.

    p is 1, 1/2 or 0 as the first label is above, equal to or below the second; q = Phi((f1 - f2) / sqrt(2)) is
    Thurstone's probability (case V, unit variances) from the predictions f. The loss is that of Tsai et al. 2007
    (FRank), with this q as in Zhang et al. 2021 (UNIQUE). The square roots come from log Phi, whose gradient stays
    finite where q rounds to 0 or 1.
    """
    difference, preferred = _pairs(predicted, labels)
    score = difference / math.sqrt(2.0)
    above, below = (torch.exp(0.5 * torch.special.log_ndtr(sign * score)) for sign in (1.0, -1.0))
    return (1.0 - preferred.sqrt() * above - (1.0 - preferred).sqrt() * below).mean()


def margin(predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over pairs of max(0, |y1 - y2| - sign(y1 - y2) (f1 - f2)), of labels y and predictions f.

    A hinge whose margin is the label difference itself, in standard deviations of the labels (Wen and Wang 2021; Sun
    et al. 2022, SimpleVQA): a pair costs nothing once it is in order and at least as far apart as its labels. A
    tie asks for no order and costs nothing.
    """
    difference, _ = _pairs(predicted, labels)
    wanted, _ = _pairs(labels, labels)
    return (wanted.abs() - wanted.sign() * difference).clamp_min(0.0).mean()


def ranknet(predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over pairs of the cross entropy of p and the logistic function of f1 - f2 (Burges et al. 2005).

    p is 1, 1/2 or 0 as the first label is above, equal to or below the second.
    """
    difference, preferred = _pairs(predicted, labels)
    return functional.binary_cross_entropy_with_logits(difference, preferred)


for _formula in (mse, mae, huber):
    LOSSES.add(_formula.__name__, _formula)
for _formula in (plcc, fidelity, margin, ranknet):
    LOSSES.add(_formula.__name__, LossTerm(formula=_formula, smallest_batch=2))


def _pairs(
    predicted: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Of every pair of the batch, once: the difference of the predictions, and 1, 1/2 or 0 by the labels' order."""
    count = len(predicted)
    first, second = torch.triu_indices(count, count, 1, device=predicted.device)
    preferred = 0.5 * (1.0 + (labels[first] - labels[second]).sign())
    return predicted[first] - predicted[second], preferred


def _precise(values: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
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
