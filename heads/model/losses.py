"""Losses by name, and weighted sums such as `mse+0.5*plcc`.

Most compare predictions with labels, both scaled to mean 0 and variance 1:

mse, mae, huber            compare each prediction with its own label
plcc                       compares order and spacing within a batch: 1 minus Pearson's correlation
fidelity, margin, ranknet  compare the items of a batch in pairs

Three need a head that predicts a distribution (readouts.py), and decide which one it has:

kl       the shares of the ratings on five levels, against the probabilities of a softmax
ordinal  the same shares, against those of a graded-response model
nll      the MOS, against a Gaussian with a predicted variance

In a sum with one of these, the other losses read the mean of the distribution. Two of them cannot be summed, as their
heads differ.

plcc, fidelity, margin and ranknet do not determine the level of the predictions (plcc, fidelity and ranknet nor their
scale). Alone they train for correlation, and the level drifts, since AdamW scales the rounding noise in the gradient of
the output bias up to full steps. In a sum with a loss that compares single items they train for RMSE too. They need two
items: `check_loss` refuses a batch size of 1, the batch plan joins a single left-over item to its neighbour, and the
loss of one item is 0.
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
from agiqa.heads.model.readouts import GAUSSIAN, GRADED, SOFTMAX, VALUE
from agiqa.heads.settings.config import TrainConfig
from agiqa.registry import Registry

LossFormula = Callable[[Tensor, Tensor], Tensor]
Values = Float[Tensor, " batch"]
Shares = Float[Tensor, "batch 5"]
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
    readout: str = VALUE
    """The readout of the head that it trains (readouts.py). With `levels` or `graded` the formula gets log
    probabilities and shares of ratings, (batch, 5) each; with `gaussian` mean and log variance, (batch, 2), and labels
    (batch,)."""
    each: LossFormula | None = None
    """The loss of each item (batch,), whose mean is `formula`; None where items are compared, without weights."""

    @property
    def __wrapped__(self) -> LossFormula:
        """The formula, as the code that the loss comes from."""
        return self.formula

    def __call__(self, predicted: Tensor, labels: Tensor) -> Scalar:
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

    @property
    def readout(self) -> str:
        """The readout of the head that it trains."""
        return next((term.readout for _, term in self.terms if term.readout != VALUE), VALUE)

    @property
    def reads_levels(self) -> bool:
        """Whether it needs the shares of the ratings on five levels."""
        return self.readout in (SOFTMAX, GRADED)

    def __call__(
        self, predicted: Values, labels: Values, *, distribution: Tensor | None = None, shares: Shares | None = None
    ) -> Scalar:
        """The sum, in float32 (float64 for float64 inputs), under autocast too.

        `distribution` and `shares` are what the terms of another readout than a value read; see `LossTerm.readout`.
        Raises ConfigError where such a term gets none.
        """
        with torch.autocast(device_type=predicted.device.type, enabled=False):
            predicted, labels = _precise(predicted), _precise(labels)
            values = [
                weight * term(*self._inputs(term, predicted, labels, distribution, shares))
                for weight, term in self.terms
            ]
        return torch.stack(values).sum()

    def _inputs(
        self, term: LossTerm, predicted: Values, labels: Values, distribution: Tensor | None, shares: Shares | None
    ) -> tuple[Tensor, Tensor]:
        """What a term reads."""
        if term.readout == VALUE:
            return predicted, labels
        truth = labels if term.readout == GAUSSIAN else shares
        if distribution is None or truth is None:
            message = f"A loss of the readout {term.readout!r} needs the predicted distribution, and got the MOS alone."
            raise ConfigError(message)
        return _precise(distribution), _precise(truth)

    def over_labels(
        self,
        predicted: Float[Tensor, "batch label"],
        labels: Float[Tensor, "batch label"],
        *,
        distribution: Float[Tensor, "batch label number"] | None = None,
        shares: Float[Tensor, "batch label 5"] | None = None,
        weights: Float[Tensor, "batch label"] | None = None,
        gaps: bool = False,
    ) -> Scalar:
        """The mean over the labels of the loss of each.

        With `gaps`, NaN stands for a label that an item lacks: the item does not count for it. `weights` of the items
        are for terms with a loss of `each` item, see `check_loss`.
        """
        found: list[Tensor] = []
        for number, (column, truth) in enumerate(zip(predicted.unbind(1), labels.unbind(1), strict=True)):
            has = ~truth.isnan() if gaps else slice(None)
            column, truth = column[has], truth[has]
            if not len(truth):
                found.append((predicted[:, number] * 0.0).sum())
            elif weights is None:
                read = (None if values is None else values[:, number][has] for values in (distribution, shares))
                found.append(self(column, truth, **dict(zip(("distribution", "shares"), read, strict=True))))
            else:
                found.append(self.weighted(column, truth, weights[:, number][has]))
        return torch.stack(found).mean()

    def weighted(self, predicted: Values, labels: Values, weights: Values) -> Scalar:
        """The sum of the terms, each the mean of weight times the loss of an item."""
        with torch.autocast(device_type=predicted.device.type, enabled=False):
            predicted, labels = _precise(predicted), _precise(labels)
            values = [
                share * (weights * term.each(predicted, labels)).mean() for share, term in self.terms if term.each
            ]
        return torch.stack(values).sum()


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

    Raises UnknownName for a loss that is not registered, and ConfigError for any other text, a weight that is not
    positive, and losses that need different heads.
    """
    loss = Loss(terms=tuple(_parse_term(name, part.strip()) for part in name.split("+")))
    readouts = dict(zip((term.readout for _, term in loss.terms), names_in_loss(name), strict=True))
    readouts.pop(VALUE, None)
    if len(readouts) > 1:
        message = (
            f"The loss {name!r} sums {' and '.join(readouts.values())}, whose heads have different outputs. Keep one "
            "of them; mse, mae, huber, plcc, fidelity, margin and ranknet can be added to any."
        )
        raise ConfigError(message)
    return loss


def readout_of(config: TrainConfig) -> str:
    """The readout of the head that the loss trains. Raises as `get_loss`."""
    return get_loss(config.loss).readout


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


def check_weights(config: TrainConfig) -> None:
    """Raise ConfigError where items are weighted and the loss compares items."""
    if config.weights != "equal" and any(term.each is None for _, term in get_loss(config.loss).terms):
        message = (
            f"The loss {config.loss!r} has no loss of a single item that `weights` could multiply. Use mse, mae or "
            "huber, or set `weights` to equal."
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


def divergence(log_probabilities: Shares, shares: Shares) -> Scalar:
    """Mean over the items of the Kullback-Leibler divergence of the predicted from the known shares of five levels."""
    return functional.kl_div(log_probabilities, shares, reduction="batchmean")


def nll(distribution: Float[Tensor, "batch 2"], labels: Values) -> Scalar:
    """Mean Gaussian negative log likelihood, without its constant, of the labels given mean and log variance.

    A spread that training items do not confirm costs as much as an error, so it is that of the MOS around its
    prediction, not that of single ratings (Nix and Weigend 1994).
    """
    mean, variance = distribution.unbind(1)
    return 0.5 * (variance + (labels - mean).square() * (-variance).exp()).mean()


for _formula, _each in (
    (mse, lambda predicted, labels: (predicted - labels).square()),
    (mae, lambda predicted, labels: (predicted - labels).abs()),
    (huber, lambda predicted, labels: functional.huber_loss(predicted, labels, delta=_HUBER_DELTA, reduction="none")),
):
    LOSSES.add(_formula.__name__, LossTerm(formula=_formula, each=_each))
for _formula in (plcc, fidelity, margin, ranknet):
    LOSSES.add(_formula.__name__, LossTerm(formula=_formula, smallest_batch=2))
LOSSES.add("kl", LossTerm(formula=divergence, readout=SOFTMAX))
LOSSES.add("ordinal", LossTerm(formula=divergence, readout=GRADED))
LOSSES.add("nll", LossTerm(formula=nll, readout=GAUSSIAN))


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
