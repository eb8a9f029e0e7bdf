"""What predicts MOS without a head: means, the rating word, and closed-form regressions on one vector per item.

They are what a table of heads is read against: `generator` and `prompt` know nothing of the image, `generator +
prompt` measures what a split that shares prompts gives away, `text` does without the language model's features, and
`features` without the order of the tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from agiqa.bench.baselines.closed_form import Regression, best_kernel_ridge, best_ridge
from agiqa.bench.baselines.mean_features import Array, MeanFeatures, Positions
from agiqa.bench.baselines.words import MIDDLE, RatingWords
from agiqa.errors import DataError
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.prompt_groups import normalise_prompt, prompt_groups
from agiqa.heads.evaluation.rating_words import RATING_WORDS
from agiqa.store.format.items import TEACHER
from agiqa.store.format.labels import MosRange


@dataclass(frozen=True, kw_only=True)
class Guess:
    """What a baseline predicts of a test part, and how."""

    predicted: Array
    """(test items,)."""
    fit: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The regression, the tokens that its features are means of, and its settings, ready for JSON."""
    notes: tuple[str, ...] = ()
    """What a reader of its scores must know."""
    teachers: int = 0
    """Test items whose text, which is read, is by a teacher that was told their MOS."""
    on_scale: bool = True
    """Whether the predictions are on the scale of the MOS, so that they have an RMSE."""


class Evidence:
    """What the baselines of one label may look at, by item of the store."""

    def __init__(
        self, source: FeatureSource, label: str, mos: Array, *, words: RatingWords, means: MeanFeatures
    ) -> None:
        """`mos` is (items of the store,), and read for training items only.

        `means` are those of `source`, or of another store of the same items. Raises DataError where that lacks one.
        """
        self.label, self.mos = label, mos
        self._source, self._words, self._means = source, words, means
        self._places = means.places_of(source)

    def prompts(self, items: Positions) -> list[str]:
        """The normalised prompts."""
        return [normalise_prompt(self._source.items.prompts[item]) for item in items]

    def groups(self, items: Positions) -> NDArray[np.int64]:
        """A number for each prompt."""
        return prompt_groups(self.prompts(items))

    def generators(self, items: Positions) -> list[str]:
        """The generators. Raises DataError where an item has none."""
        return self._column("generators", items, "generator", "join them with `agiqa store labels`")

    def texts(self, items: Positions) -> list[str]:
        """Prompts and descriptions as one text. Raises DataError where an item has no description."""
        told = self._column("descriptions", items, "description", "extract a store with --conversations")
        return [f"{self._source.items.prompts[item]}\n{text}" for item, text in zip(items, told, strict=True)]

    def words(self, items: Positions) -> list[int | None]:
        """The classes of the rating words, None where an answer has no clear one.

        Raises DataError where an item has no answer of the model's own.
        """
        names, prompts = self._source.items.names, self._source.items.prompts
        asked = {names[item]: prompts[item] for item in items}
        found = self._words.of(asked, self.label)
        return [found[names[item]] for item in items]

    def features(self, train: Positions, test: Positions) -> dict[str, tuple[Array, Array]]:
        """The mean feature rows of both parts, by the tokens that they are means of; raises as `MeanFeatures.of`."""
        found = self._means.of(self._places[np.concatenate([train, test])])
        return {tokens: (rows[: len(train)], rows[len(train) :]) for tokens, rows in found.items()}

    @property
    def scale(self) -> MosRange | None:
        """The scale of the MOS; None where it is not known."""
        scales: Mapping[str, MosRange] = getattr(self._source.items, "mos_ranges", {})
        return scales.get(self.label)

    def teachers(self, items: Positions) -> int:
        """How many of the items have a text by a teacher that was told their MOS."""
        authors: Sequence[str | None] = getattr(self._source.items, "text_authors", [])
        return sum(authors[item] == TEACHER for item in items) if authors else 0

    def _column(self, column: str, items: Positions, what: str, remedy: str) -> list[str]:
        """A text column, whole. A source that is no store may not have it at all."""
        values: Sequence[str | None] = getattr(self._source.items, column, [None] * len(self._source.items.names))
        chosen = [values[item] for item in items]
        told = [value for value in chosen if value is not None]
        if len(told) < len(chosen):
            message = f"{len(chosen) - len(told)} of {len(chosen)} items have no {what}; {remedy}"
            raise DataError(message)
        return told


def by_generator(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """The mean MOS of the generator in training; of an unknown one the mean of all."""
    means = _group_means(evidence.generators(train), evidence.mos[train], evidence.generators(test))
    return Guess(predicted=means)


def by_prompt(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """The mean MOS of the prompt in training; of an unknown one the mean of all."""
    return Guess(predicted=_group_means(evidence.prompts(train), evidence.mos[train], evidence.prompts(test)))


def by_generator_and_prompt(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """Ridge on both as one-hot vectors; an unknown generator or prompt is all zeros.

    Its strength is chosen on unknown prompts unless the test part has known ones: what these are worth is the question.
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
    """The middle of the fifth of the MOS scale that the rating word stands for, in which no training item has a say.

    An answer without a clear word has the middle one. Where the scale is not known, the class of the word, 0 to 4.
    """
    del train
    said = evidence.words(test)
    unclear = said.count(None)
    classes = np.array([MIDDLE if word is None else word for word in said], dtype=np.float64)
    notes = [f"{unclear} of {len(said)} test items have no clear rating word and count as {RATING_WORDS[MIDDLE]}"]
    if evidence.scale is not None:
        low, high = evidence.scale
        middles = low + (classes + 0.5) * (high - low) / len(RATING_WORDS)
        return Guess(predicted=middles, notes=tuple(notes if unclear else ()))
    unknown = "the scale of the MOS is not recorded, so that rating words have no place on it and no RMSE"
    return Guess(predicted=classes, notes=(*(notes if unclear else ()), unknown), on_scale=False)


def by_features(evidence: Evidence, train: Positions, test: Positions) -> Guess:
    """Ridge or kernel ridge on the mean feature row of all tokens or of the answer's, whichever does best.

    Each channel is scaled by the training items, and a cross-validation within these chooses.
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
    """The MOS of test items from training items. Raises DataError for what it lacks."""
    title: str
    """What its row is called."""
    reads: str
    """What it reads of an item."""


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
"""By what the setting `baseline` of a result line says. The row of `features` tells what was read and chosen."""


def features_title(reads: str, fits: Sequence[Mapping[str, Any]]) -> str:
    """What the row of `features` is called: what was chosen for each test part, from features that are `reads`.

    As in `kernel ridge (hidden states, mean of the answer's tokens)`.
    """
    kinds = dict.fromkeys(fit["regression"] for fit in fits)
    spelled = {"all": "all tokens", "answer": "the answer's tokens"}
    tokens = dict.fromkeys(spelled[fit["tokens"]] for fit in fits)
    return f"{' or '.join(kinds)} ({reads}, mean of {' or of '.join(tokens)})"


def _ridge(evidence: Evidence, train: Positions, groups: Positions, known: Any, unknown: Any) -> Guess:
    """A ridge regression on the rows of `known`, those of the training items, whose folds share none of `groups`."""
    best = best_ridge(known, evidence.mos[train], groups)
    predicted = best.predict(known, evidence.mos[train], unknown)
    return Guess(predicted=predicted, fit=best.record(), notes=tuple(_edge_notes(best)))


def _edge_notes(best: Regression) -> list[str]:
    """A line for each setting that is the first or the last of those that were tried."""
    values = {"strength": best.strength, "width": best.width}
    return [
        f"the {name} {values[name]:g} of the {best.kind} is the first or last that was tried: one beyond may do better"
        for name in best.at_edge
    ]


def _pairs(evidence: Evidence, items: Positions) -> list[tuple[str, str]]:
    return list(zip(evidence.generators(items), evidence.prompts(items), strict=True))


def _group_means(known: Sequence[str], mos: Array, asked: Sequence[str]) -> Array:
    """The mean of `mos` over those of `known` with the same name; the mean of all for a name that is not there."""
    names, numbers = np.unique(np.array(known), return_inverse=True)
    means = np.bincount(numbers, weights=mos) / np.bincount(numbers)
    table = dict(zip(names.tolist(), means.tolist(), strict=True))
    overall = float(mos.mean())
    return np.array([table.get(name, overall) for name in asked])
