"""What predicts MOS without a head: means, the rating word, and ridge regressions on one vector per item.

They are what a table of heads is read against: `generator` and `prompt` know nothing of the image, `generator +
prompt` measures what a split that shares prompts gives away, `text` does without the language model's features, and
`mean hidden state` without the order of the tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from agiqa.bench.baseline_words import RatingWords
from agiqa.errors import DataError
from agiqa.heads.features import FeatureSource, read_checked
from agiqa.heads.prompts import normalise_prompt, prompt_groups

Array = NDArray[np.float64]
Positions = NDArray[np.int64]

STRENGTHS = np.logspace(-1, 5, 13)
"""Ridge strengths to choose from: text and one-hot vectors have length 1, standardised features as many as channels."""

_FOLDS = 5


class MeanFeatures:
    """The mean feature row of every item of a store, computed when it is first asked for and then kept."""

    def __init__(self, source: FeatureSource) -> None:
        """Of the items of `source`; a row takes 8 bytes per channel."""
        self._source = source
        self._means: dict[int, Array] = {}

    def of(self, items: Positions) -> Array:
        """(items, width) float64. Raises DataError for raw logits, and for items without tokens or with NaN."""
        if self._source.encoding == "logits":
            message = (
                f"a ridge on {self._source.width} raw logits is not tried; `agiqa store sketch` makes fewer of them"
            )
            raise DataError(message)
        missing = np.array([item for item in items.tolist() if item not in self._means], dtype=np.int64)
        empty = missing[np.asarray(self._source.n_tokens)[missing] == 0]
        if len(empty):
            message = f"{self._source.items.names[empty[0]]!r} has no tokens"
            raise DataError(message)
        read = {k: item.rows.double().mean(0).numpy() for k, item in read_checked(self._source, missing)}
        self._means |= {int(missing[k]): row for k, row in read.items()}
        return np.stack([self._means[item] for item in items.tolist()])


class Evidence:
    """What the baselines of one label may look at, by item of the store."""

    def __init__(
        self, source: FeatureSource, label: str, mos: Array, *, words: RatingWords, means: MeanFeatures
    ) -> None:
        """`mos` is (items of the store,), and read for training items only."""
        self.label, self.mos, self.means = label, mos, means
        self._source, self._words = source, words

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

    def words(self, items: Positions) -> Array:
        """The classes of the rating words. Raises DataError where an item has none of the model's own."""
        names, prompts = self._source.items.names, self._source.items.prompts
        asked = {names[item]: prompts[item] for item in items}
        found = self._words.of(asked, self.label)
        return np.array([found[names[item]] for item in items], dtype=np.float64)

    def _column(self, column: str, items: Positions, what: str, remedy: str) -> list[str]:
        """A text column, whole. A source that is no store may not have it at all."""
        values: Sequence[str | None] = getattr(self._source.items, column, [None] * len(self._source.items.names))
        chosen = [values[item] for item in items]
        told = [value for value in chosen if value is not None]
        if len(told) < len(chosen):
            message = f"{len(chosen) - len(told)} of {len(chosen)} items have no {what}; {remedy}"
            raise DataError(message)
        return told


def by_generator(evidence: Evidence, train: Positions, test: Positions) -> Array:
    """The mean MOS of the generator in training; of an unknown one the mean of all."""
    return _group_means(evidence.generators(train), evidence.mos[train], evidence.generators(test))


def by_prompt(evidence: Evidence, train: Positions, test: Positions) -> Array:
    """The mean MOS of the prompt in training; of an unknown one the mean of all."""
    return _group_means(evidence.prompts(train), evidence.mos[train], evidence.prompts(test))


def by_generator_and_prompt(evidence: Evidence, train: Positions, test: Positions) -> Array:
    """Ridge on both as one-hot vectors; an unknown generator or prompt is all zeros."""
    encoder = OneHotEncoder(handle_unknown="ignore")
    known = encoder.fit_transform(_pairs(evidence, train))
    return fit_ridge(known, evidence.mos[train], evidence.groups(train), encoder.transform(_pairs(evidence, test)))


def by_text(evidence: Evidence, train: Positions, test: Positions) -> Array:
    """Ridge on TF-IDF of the words and word pairs of prompt and description."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    known = vectorizer.fit_transform(evidence.texts(train))
    return fit_ridge(known, evidence.mos[train], evidence.groups(train), vectorizer.transform(evidence.texts(test)))


def by_rating_word(evidence: Evidence, train: Positions, test: Positions) -> Array:
    """The class of the rating word, 0 to 4, which no training item has a say in: a scale of its own for RMSE."""
    del train
    return evidence.words(test)


def by_mean_features(evidence: Evidence, train: Positions, test: Positions) -> Array:
    """Ridge on the mean feature row, each channel scaled by the training items."""
    scaler = StandardScaler()
    known = scaler.fit_transform(evidence.means.of(train))
    unknown = scaler.transform(evidence.means.of(test))
    return fit_ridge(known, evidence.mos[train], evidence.groups(train), unknown)


BASELINES: dict[str, Callable[[Evidence, Positions, Positions], Array]] = {
    "generator": by_generator,
    "prompt": by_prompt,
    "generator + prompt": by_generator_and_prompt,
    "text": by_text,
    "rating word": by_rating_word,
    "mean hidden state": by_mean_features,
}
"""Each predicts the MOS of test items from training items, (test items,). Raises DataError for what it lacks."""


def fit_ridge(known: Any, mos: Array, groups: NDArray[np.int64], unknown: Any) -> Array:
    """Predictions for the rows of `unknown` by a ridge regression on those of `known`, dense or sparse.

    The strength is the one of STRENGTHS with the smallest error in a cross-validation within `known` whose folds share
    no group, such as a prompt. Raises DataError for fewer than two groups.
    """
    count = len(np.unique(groups))
    if count < 2:
        message = "the strength of a ridge is chosen by prompt, and the training items have one prompt only"
        raise DataError(message)
    errors = np.zeros(len(STRENGTHS))
    each: Any = STRENGTHS  # one per column of the targets, which the annotation of `alpha` does not tell
    for kept, held in GroupKFold(min(_FOLDS, count)).split(known, groups=groups):
        targets = np.repeat(mos[kept, None], len(STRENGTHS), axis=1)
        model = Ridge(alpha=each).fit(known[kept], targets)
        errors += np.square(model.predict(known[held]) - mos[held, None]).sum(axis=0)
    chosen = float(STRENGTHS[int(errors.argmin())])
    return np.asarray(Ridge(alpha=chosen).fit(known, mos).predict(unknown), dtype=np.float64)


def _pairs(evidence: Evidence, items: Positions) -> list[tuple[str, str]]:
    return list(zip(evidence.generators(items), evidence.prompts(items), strict=True))


def _group_means(known: Sequence[str], mos: Array, asked: Sequence[str]) -> Array:
    """The mean of `mos` over those of `known` with the same name; the mean of all for a name that is not there."""
    names, numbers = np.unique(np.array(known), return_inverse=True)
    means = np.bincount(numbers, weights=mos) / np.bincount(numbers)
    table = dict(zip(names.tolist(), means.tolist(), strict=True))
    overall = float(mos.mean())
    return np.array([table.get(name, overall) for name in asked])
