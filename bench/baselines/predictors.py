"""Predictors without a head: means, the rating word, and closed-form regressions on one vector per item.

Tables compare heads with them: `generator` and `prompt` know nothing of the image, `generator + prompt` measures how
much a split that shares prompts reveals, `text` does without the language model's features, and `features` without the
order of the tokens. A cross-validation on the training items chooses the settings of each regression; its folds share
no group, such as a prompt, and the mean squared error decides.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from agiqa.bench.baselines.evidence import Array, Evidence, Positions
from agiqa.errors import DataError
from agiqa.store.format.labels import RATING_WORDS

RIDGE, KERNEL_RIDGE = "ridge", "kernel ridge"
STRENGTHS = np.logspace(-1, 5, 13)
"""Strengths of a ridge: text and one-hot vectors have length 1, standardised features one per channel."""
KERNEL_STRENGTHS = np.logspace(-1.5, 0.5, 5)
"""Strengths of a kernel ridge, as multiples of the spread of its kernel: 1 (its diagonal) minus its mean.

Without the spread, the same strength would smooth a wide kernel more than a narrow one.
"""
WIDTHS = (0.5, 1.0, 2.0)
"""Widths of the kernel, as multiples of the median distance between known items."""
KERNEL_ITEMS = 5_000
"""Most known items for a kernel ridge: its time grows with their third power."""

_FOLDS = 5
_MIDDLE = len(RATING_WORDS) // 2
"""The class of the middle rating word."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A kind of regression with its settings, and its error in cross-validation."""

    kind: str
    """RIDGE or KERNEL_RIDGE."""
    strength: float
    """For KERNEL_RIDGE as a multiple of the spread of the kernel."""
    width: float | None
    """Of the kernel, as a multiple of the median distance between known items; None for RIDGE."""
    inner_rmse: float
    """Root mean squared error of the cross-validation, on the scale of the MOS."""
    at_edge: tuple[str, ...]
    """Which of `strength` and `width` is at an end of the values tried, so that a value beyond may be better."""

    def record(self) -> dict[str, Any]:
        """The facts for a result line, ready for JSON."""
        width = {} if self.width is None else {"width": self.width}
        facts = {"regression": self.kind, "strength": self.strength, **width, "inner_rmse": self.inner_rmse}
        return {**facts, "at_edge": list(self.at_edge)}

    def predict(self, known: Any, mos: Array, unknown: Any) -> Array:
        """Predictions for the rows of `unknown` by a fit to all rows of `known`."""
        if self.width is None:
            return np.asarray(Ridge(alpha=self.strength).fit(known, mos).predict(unknown), dtype=np.float64)
        squares = euclidean_distances(known, squared=True)
        scale, mean = self.width * _median_distance(squares), float(mos.mean())
        kernel = _gaussian(squares, scale)
        alpha = _alpha(self.strength * _spread(kernel))
        model = KernelRidge(alpha=alpha, kernel="precomputed").fit(kernel, mos - mean)
        beside = _gaussian(euclidean_distances(unknown, known, squared=True), scale)
        return np.asarray(model.predict(beside), dtype=np.float64) + mean


def best_ridge(known: Any, mos: Array, groups: Positions) -> Regression:
    """The ridge regression, with an intercept, on the rows of `known`, dense or sparse.

    Its strength is one of STRENGTHS. Raises DataError for fewer than two groups.
    """
    errors = np.zeros(len(STRENGTHS))
    for kept, held in _folds(groups):
        model = Ridge(alpha=_alpha(STRENGTHS)).fit(known[kept], _repeated(mos[kept], STRENGTHS))
        errors += np.square(model.predict(known[held]) - mos[held, None]).sum(axis=0)
    chosen = int(errors.argmin())
    return Regression(
        kind=RIDGE,
        strength=float(STRENGTHS[chosen]),
        width=None,
        inner_rmse=math.sqrt(errors[chosen] / len(mos)),
        at_edge=_edges(strength=(chosen, len(STRENGTHS))),
    )


def best_kernel_ridge(known: Array, mos: Array, groups: Positions) -> Regression:
    """The ridge regression with a Gaussian kernel, exp(-d^2 / 2 s^2), on the rows of `known`; MOS minus their mean.

    Its strength is one of KERNEL_STRENGTHS times the spread of the kernel; s is one of WIDTHS times the median distance
    d between two rows. Raises DataError for fewer than two groups, more than KERNEL_ITEMS rows, and a median distance
    of zero.
    """
    if len(known) > KERNEL_ITEMS:
        message = (
            f"kernel ridge is not tried on more than {KERNEL_ITEMS:,} training items, and there are {len(known):,}"
        )
        raise DataError(message)
    squares = euclidean_distances(known, squared=True)
    median = _median_distance(squares)
    if median == 0:
        message = "kernel ridge is not tried: half of all pairs of training items, or more, have equal features"
        raise DataError(message)
    folds = _folds(groups)
    errors = np.zeros((len(WIDTHS), len(KERNEL_STRENGTHS)))
    for of_width, width in zip(errors, WIDTHS, strict=True):
        kernel = _gaussian(squares, width * median)
        alpha = _alpha(KERNEL_STRENGTHS * _spread(kernel))
        for kept, held in folds:
            mean = mos[kept].mean()
            model = KernelRidge(alpha=alpha, kernel="precomputed")
            model.fit(kernel[np.ix_(kept, kept)], _repeated(mos[kept] - mean, KERNEL_STRENGTHS))
            missed = model.predict(kernel[np.ix_(held, kept)]) + mean - mos[held, None]
            of_width += np.square(missed).sum(axis=0)
    width, strength = (int(place) for place in np.unravel_index(errors.argmin(), errors.shape))
    return Regression(
        kind=KERNEL_RIDGE,
        strength=float(KERNEL_STRENGTHS[strength]),
        width=WIDTHS[width],
        inner_rmse=math.sqrt(errors[width, strength] / len(mos)),
        at_edge=_edges(strength=(strength, len(KERNEL_STRENGTHS)), width=(width, len(WIDTHS))),
    )


def _folds(groups: Positions) -> Sequence[tuple[Positions, Positions]]:
    """The kept and the held items of each fold. Raises DataError for fewer than two groups."""
    count = len(np.unique(groups))
    if count < 2:
        message = "the strength of a ridge is chosen by prompt, and the training items have one prompt only"
        raise DataError(message)
    return list(GroupKFold(min(_FOLDS, count)).split(groups, groups=groups))


def _alpha(strength: float | Array) -> Any:
    """`strength`, one or one for each column of the targets; the annotations of `alpha` allow neither."""
    return strength


def _repeated(mos: Array, strengths: Array) -> Array:
    return np.repeat(mos[:, None], len(strengths), axis=1)


def _median_distance(squares: Array) -> float:
    """The median distance between two different rows, from the squared distances of all."""
    return math.sqrt(float(np.median(squares[np.triu_indices(len(squares), 1)])))


def _gaussian(squares: Array, scale: float) -> Array:
    return np.exp(squares / (-2 * scale * scale))


def _spread(kernel: Array) -> float:
    return 1 - float(kernel.mean())


def _edges(**chosen: tuple[int, int]) -> tuple[str, ...]:
    """The names of the settings that are the first or the last of `count` values tried."""
    return tuple(name for name, (place, count) in chosen.items() if place in (0, count - 1))


@dataclass(frozen=True, kw_only=True)
class Guess:
    """The predictions of a baseline for a test part."""

    predicted: Array
    """(test items,)."""
    fit: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The regression, the tokens that its features are means of, and its settings, ready for JSON."""
    notes: tuple[str, ...] = ()
    """Caveats for a reader of its scores."""
    teachers: int = 0
    """The number of test items whose text, which the predictor reads, is by a teacher that knew their MOS."""
    on_scale: bool = True
    """Whether the predictions are on the scale of the MOS, so that they have an RMSE."""


def by_generator(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """The mean MOS of the generator in training; of an unknown one the mean of all."""
    means = group_means(evidence.generators(train), evidence.mos[train], evidence.generators(test))
    return Guess(predicted=means)


def by_prompt(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """The mean MOS of the prompt in training; of an unknown one the mean of all."""
    return Guess(predicted=group_means(evidence.prompts(train), evidence.mos[train], evidence.prompts(test)))


def by_generator_and_prompt(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """Ridge on both as one-hot vectors; an unknown generator or prompt is all zeros.

    If training and test part share prompts, cross-validation also splits the images of one prompt; else it does not.
    """
    encoder = OneHotEncoder(handle_unknown="ignore")
    known, unknown = encoder.fit_transform(_pairs(evidence, train)), encoder.transform(_pairs(evidence, test))
    shared = not set(evidence.prompts(train)).isdisjoint(evidence.prompts(test))
    groups = np.arange(len(train)) if shared else evidence.groups(train)
    return _ridge(evidence, train, groups, known, unknown)


def by_text(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """Ridge on TF-IDF of the words and word pairs of prompt and description."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    known = vectorizer.fit_transform(evidence.texts(train))
    unknown = vectorizer.transform(evidence.texts(test))
    guess = _ridge(evidence, train, evidence.groups(train), known, unknown)
    return replace(guess, teachers=evidence.teachers(test))


def by_rating_word(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """The middle of the fifth of the MOS scale that the rating word stands for; reads no training items.

    An answer without a clear word counts as the middle word. Where the scale is unknown, the class of the word, 0 to 4.
    """
    del train
    said = evidence.words(test)
    unclear = said.count(None)
    classes = np.array([_MIDDLE if word is None else word for word in said], dtype=np.float64)
    notes = [f"{unclear} of {len(said)} test items have no clear rating word and count as {RATING_WORDS[_MIDDLE]}"]
    if evidence.scale is not None:
        low, high = evidence.scale
        middles = low + (classes + 0.5) * (high - low) / len(RATING_WORDS)
        return Guess(predicted=middles, notes=tuple(notes if unclear else ()))
    unknown = "the scale of the MOS is not recorded, so that rating words have no place on it and no RMSE"
    return Guess(predicted=classes, notes=(*(notes if unclear else ()), unknown), on_scale=False)


def by_features(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """Ridge or kernel ridge on the mean feature row of all tokens or of the answer's; cross-validation chooses.

    Each channel is standardised on the training items.
    """
    mos, groups = evidence.mos[train], evidence.groups(train)
    rows: dict[str, tuple[Array, Array]] = {}
    tried: list[tuple[str, Regression]] = []
    notes: dict[str, None] = {}
    for tokens, (known, unknown) in evidence.features(train, test).items():
        scaler = StandardScaler()
        rows[tokens] = np.asarray(scaler.fit_transform(known)), np.asarray(scaler.transform(unknown))
        tried.append((tokens, best_ridge(rows[tokens][0], mos, groups)))
        try:
            tried.append((tokens, best_kernel_ridge(rows[tokens][0], mos, groups)))
        except DataError as error:
            notes[str(error)] = None
    tokens, best = min(tried, key=lambda one: one[1].inner_rmse)
    fit = {"tokens": tokens, **best.record(), "candidates": [{"tokens": read, **one.record()} for read, one in tried]}
    known, unknown = rows[tokens]
    return Guess(predicted=best.predict(known, mos, unknown), fit=fit, notes=(*_edge_notes(best), *notes))


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A way to predict without a head."""

    predict: Callable[[Evidence, Positions, Positions], Guess]
    """The MOS of test items from training items. Raises DataError if an input is missing."""
    title: str
    """Name of its row."""
    reads: str
    """The part of an item that it reads."""


BASELINES = {
    "generator": Baseline(predict=by_generator, title="generator", reads="generator"),
    "prompt": Baseline(predict=by_prompt, title="prompt", reads="prompt"),
    "generator + prompt": Baseline(
        predict=by_generator_and_prompt, title="generator + prompt", reads="generator and prompt"
    ),
    "text": Baseline(predict=by_text, title="ridge (TF-IDF of prompt and description)", reads="prompt and description"),
    "rating word": Baseline(predict=by_rating_word, title="rating word", reads="the model's rating word"),
    "features": Baseline(predict=by_features, title="ridge or kernel ridge (mean features)", reads="mean features"),
}
"""By the setting `baseline` of a result line. The row of `features` is named by `features_title`."""


def features_title(reads: str, fits: Sequence[Mapping[str, Any]]) -> str:
    """The name of the row of `features`, such as `kernel ridge (hidden states, mean of the answer's tokens)`."""
    kinds = dict.fromkeys(fit["regression"] for fit in fits)
    spelled = {"all": "all tokens", "answer": "the answer's tokens"}
    tokens = dict.fromkeys(spelled[fit["tokens"]] for fit in fits)
    return f"{' or '.join(kinds)} ({reads}, mean of {' or of '.join(tokens)})"


def _ridge(evidence: Evidence, train: Positions, groups: Positions, known: Any, unknown: Any) -> Guess:
    """A ridge regression on the rows of `known`, those of the training items; its folds share none of `groups`."""
    best = best_ridge(known, evidence.mos[train], groups)
    predicted = best.predict(known, evidence.mos[train], unknown)
    return Guess(predicted=predicted, fit=best.record(), notes=tuple(_edge_notes(best)))


def _edge_notes(best: Regression) -> list[str]:
    """A note for each setting at an end of the values tried."""
    values = {"strength": best.strength, "width": best.width}
    return [
        f"the {name} {values[name]:g} of the {best.kind} is at an end of the values tried: a value beyond may be better"
        for name in best.at_edge
    ]


def _pairs(evidence: Evidence, items: Positions) -> list[tuple[str, str]]:
    return list(zip(evidence.generators(items), evidence.prompts(items), strict=True))


def group_means(known: Sequence[str], mos: Array, asked: Sequence[str]) -> Array:
    """The mean of `mos` over those of `known` with the same name; the mean of all for an unknown name."""
    names, numbers = np.unique(np.array(known), return_inverse=True)
    means = np.bincount(numbers, weights=mos) / np.bincount(numbers)
    table = dict(zip(names.tolist(), means.tolist(), strict=True))
    overall = float(mos.mean())
    return np.array([table.get(name, overall) for name in asked])
