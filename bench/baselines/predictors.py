"""Predictors without a head: means, the rating word, and closed-form regressions on one vector per item.

Tables compare heads with them: `generator` and `prompt` know nothing of the image, `generator + prompt` measures how
much a split that shares prompts reveals, `text` does without the language model's features, and `features` without the
order of the tokens. The regressions are those of heads in closed form (heads/closed/regressions.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from agiqa.bench.baselines.evidence import Array, Evidence, Positions
from agiqa.errors import ConfigError, DataError
from agiqa.heads.closed.regressions import Regression, best_kernel_ridge, best_ridge
from agiqa.store.format.labels import RATING_WORDS

RATING_WORD = "rating word"
"""The baseline that reads conversation files."""
WORD_PROBABILITIES = "word probabilities"
"""The baseline that has a line only where the store that it reads records the tokens of the rating words."""
KERNEL_ITEMS = 5_000
"""Most known items for a kernel ridge: its time grows with their third power."""

_MIDDLE = len(RATING_WORDS) // 2
"""The class of the middle rating word."""


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


def by_word_probabilities(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """The expected MOS under the model's own probabilities of the five rating words; reads no training items."""
    del train
    predicted, notes = evidence.expected_mos(test)
    return Guess(predicted=predicted, notes=tuple(notes))


def by_features(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """Ridge or kernel ridge on the mean feature row of all tokens or of the answer's, or on one of the pooled rows of a
    store that holds these; cross-validation chooses.

    Each channel is standardised on the training items.
    """
    mos, groups = evidence.mos[train], evidence.groups(train)
    rows: dict[str, tuple[Array, Array]] = {}
    tried: list[tuple[str, Regression]] = []
    notes: dict[str, None] = {}
    for tokens, (known, unknown) in evidence.features(train, test).items():
        scaler = StandardScaler()
        rows[tokens] = np.asarray(scaler.fit_transform(known)), np.asarray(scaler.transform(unknown))
        tried.append((tokens, best_ridge(rows[tokens][0], mos, groups, device=evidence.device)))
        if (reason := evidence.no_kernel or _too_many(len(mos))) is not None:
            notes[reason] = None
            continue
        try:
            tried.append((tokens, best_kernel_ridge(rows[tokens][0], mos, groups, device=evidence.device)))
        except (ConfigError, DataError) as error:  # too little memory, or features that are all equal
            notes[str(error)] = None
    tokens, best = min(tried, key=lambda one: one[1].inner_rmse)
    fit = {"tokens": tokens, **best.record(), "candidates": [{"tokens": read, **one.record()} for read, one in tried]}
    known, unknown = rows[tokens]
    predicted = best.fit(known, mos, device=evidence.device).predict(unknown)
    return Guess(predicted=predicted, fit=fit, notes=(*_edge_notes(best), *notes))


def _too_many(items: int) -> str | None:
    """Why no kernel ridge is tried on so many training items; None where it is."""
    if items <= KERNEL_ITEMS:
        return None
    return f"kernel ridge is not tried on more than {KERNEL_ITEMS:,} training items, and there are {items:,}"


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
    RATING_WORD: Baseline(predict=by_rating_word, title="rating word", reads="the model's rating word"),
    WORD_PROBABILITIES: Baseline(
        predict=by_word_probabilities, title="rating words (expected MOS)", reads="probabilities of the rating words"
    ),
    "features": Baseline(predict=by_features, title="ridge or kernel ridge (mean features)", reads="mean features"),
}
"""By the setting `baseline` of a result line. The row of `features` is named by `features_title`."""


def features_title(reads: str, fits: Sequence[Mapping[str, Any]]) -> str:
    """The name of the row of `features`, such as `kernel ridge (hidden states, mean of the answer's tokens)`."""
    kinds = dict.fromkeys(fit["regression"] for fit in fits)
    spelled = {"all": "all tokens", "answer": "the answer's tokens"}
    tokens = dict.fromkeys(fit["tokens"] for fit in fits)
    means = " or of ".join(spelled[name] for name in tokens if name in spelled)
    rows = [f"mean of {means}"] * bool(means) + [name for name in tokens if name not in spelled]
    return f"{' or '.join(kinds)} ({reads}, {' or '.join(rows)})"


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
