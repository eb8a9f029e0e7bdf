"""How heads in closed form are fitted: ridge and kernel ridge on pooled states, and ridge on TF-IDF.

A form reads one input per item, fits each label on the items that have it, and gives a ClosedHead. The settings of its
regression are chosen by folds of whole prompts within the items that it is fitted to (see regressions.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from agiqa.errors import DataError
from agiqa.heads.closed.heads import (
    Array,
    BagHead,
    ClosedHead,
    Facts,
    Inputs,
    Items,
    KernelHead,
    LinearHead,
    Tensors,
    read_text,
)
from agiqa.heads.closed.pooled import Kept, pooled_vectors
from agiqa.heads.closed.regressions import (
    INNER_FOLDS,
    MOST_TO_CHOOSE_BY,
    STRENGTHS,
    Folds,
    Kernel,
    Linear,
    Regression,
    best_kernel_ridge,
    best_ridge,
    inner_folds,
    some_groups,
)
from agiqa.heads.closed.token_bags import Vocabulary, has_token_ids
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.settings.config import HeadConfig
from agiqa.registry import Registry

TRIED_STRENGTHS: Array = np.logspace(-2.5, 1.0, 8)
TRIED_WIDTHS = (0.5, 1.0, 2.0, 4.0)
"""Settings of a Gaussian kernel that heads try: more than baselines do, whose numbers are published."""
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Known:
    """The items that a form is fitted to."""

    labels: Array
    """(items, labels); NaN where an item lacks one."""
    groups: Items
    """A number for each prompt."""
    weights: Array
    """(items, labels), positive."""

    def of(self, places: Items) -> "Known":
        """Some of the items."""
        return replace(self, labels=self.labels[places], groups=self.groups[places], weights=self.weights[places])

    def folds(self, count: int) -> Folds:
        """The kept and the held items of each fold of whole prompts.

        The folds are of single items where whole prompts would leave fewer than two items with a MOS to fit a label to.
        Raises DataError where single items do too.
        """
        for groups in (fold_groups(self.groups), np.arange(len(self.groups))):
            folds = inner_folds(groups, count) if len(groups) > 1 else []
            if folds and all((np.isfinite(self.labels[kept]).sum(axis=0) > 1).all() for kept, _ in folds):
                return folds
        fewest = int(np.isfinite(self.labels).sum(axis=0).min())
        message = (
            "A stack, and `init`, predict each fold by a fit to the other items, which needs two of them with a MOS, "
            f"and {fewest} of {len(self.labels)} training items have one. Use more items or the encoder 'ridge', or "
            "leave out a label that few items have."
        )
        raise DataError(message)


def fold_groups(groups: Items) -> Items:
    """`groups`; where they are one, each item is a group of its own: there are no other prompts to predict."""
    return np.arange(len(groups)) if len(np.unique(groups)) == 1 else groups


@dataclass(frozen=True, kw_only=True)
class Form(ABC):
    """How a head in closed form is fitted, from the settings of `config`."""

    config: HeadConfig
    pooling: str
    """As `pooled_vectors` reads it."""
    label: str = "quality"
    """The labels, joined by `+`."""
    folds: int = INNER_FOLDS
    device: torch.device = _CPU
    chosen: tuple[Regression, ...] | None = None
    """The settings of each label; inner folds choose them if absent."""

    @abstractmethod
    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> Inputs:
        """The inputs of `items`. Raises DataError for items that lack something."""

    @abstractmethod
    def fit(self, inputs: Inputs, known: Known) -> ClosedHead:
        """The head fitted to all items. Raises DataError and ConfigError as the regressions."""

    def out_of_fold(self, inputs: Inputs, known: Known) -> Array:
        """Predictions (items, labels) for each item by a fit to the items of other prompts. Raises as `fit`."""
        found = np.empty_like(known.labels)
        for kept, held in known.folds(self.folds):
            found[held] = self.fit(inputs.of(kept), known.of(kept)).scores(inputs.of(held))
        return found

    def fit_and_fold(self, inputs: Inputs, known: Known) -> tuple[ClosedHead, Array]:
        """`fit`, and `out_of_fold` with the settings that the same folds chose.

        The two or three settings of a regression were then chosen on the items that it predicts, which the error of
        thousands of out-of-fold predictions hardly shows; a choice within each fold takes two to three times as long.
        """
        head = self.fit(inputs, known)
        settled = replace(self, chosen=tuple(Regression.of_record(fit) for fit in head.facts["fits"]))
        return head, settled.out_of_fold(inputs, known)

    @property
    def strengths(self) -> Array | None:
        """The only strength to try, if it is set."""
        return None if self.config.strength is None else np.array([self.config.strength])

    def regressions(
        self,
        known: Known,
        choose: Callable[[Items, Array, Array], Regression],
        fit: Callable[[Regression, Items, Array, Array], Any],
    ) -> list[tuple[Regression, Any]]:
        """What `fit` makes of each label by the settings that `choose` gives, unless they are chosen already.

        Both get the places of the items that have the label, their MOS and their weights.
        """
        found: list[tuple[Regression, Any]] = []
        for number, (labels, weights) in enumerate(zip(known.labels.T, known.weights.T, strict=True)):
            places = np.flatnonzero(np.isfinite(labels))
            if len(places) < 2:
                message = f"A closed form needs two training items with a MOS or more, and there are {len(places)}."
                raise DataError(message)
            its = (places, labels[places], weights[places])
            regression = choose(*its) if self.chosen is None else self.chosen[number]
            found.append((regression, fit(regression, *its)))
        return found


FORMS: Registry[type[Form]] = Registry("closed form")


class _VectorForm(Form):
    """Base of forms on pooled vectors."""

    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> Inputs:
        """Pooled vectors, as they are."""
        values, pooling = pooled_vectors(source, items, self.pooling, kept=kept)
        return Inputs(values=values, facts={"pooling": pooling})

    def fit(self, inputs: Inputs, known: Known) -> ClosedHead:
        """Standardise each channel on the items, choose the settings for each label, and fit."""
        scaler = StandardScaler()
        rows: Array = np.asarray(scaler.fit_transform(inputs.values), dtype=np.float64)
        constants = {"mean": torch.from_numpy(scaler.mean_), "std": torch.from_numpy(scaler.scale_)}

        def choose(places: Items, mos: Array, weights: Array) -> Regression:
            groups = fold_groups(known.groups[places])
            some = some_groups(groups, MOST_TO_CHOOSE_BY) if self.by_kernel(rows) else np.arange(len(places))
            return self.choose(rows[places[some]], mos[some], groups[some], weights[some])

        def fit(chosen: Regression, places: Items, mos: Array, weights: Array) -> tuple[Items, Any]:
            return places, chosen.fit(rows[places], mos, weights=weights, device=self.device)

        fitted = self.regressions(known, choose, fit)
        facts = {**inputs.facts, "fits": [chosen.record() for chosen, _ in fitted]}
        return self.head(constants, rows, [found for _, found in fitted], facts)

    def by_kernel(self, rows: Array) -> bool:
        """Whether a matrix of items x items is solved."""
        return bool(len(rows) <= rows.shape[1])

    def choose(self, rows: Array, mos: Array, groups: Items, weights: Array) -> Regression:
        """A ridge."""
        tried = STRENGTHS if self.strengths is None else self.strengths
        return best_ridge(rows, mos, groups, weights=weights, folds=self.folds, device=self.device, strengths=tried)

    def head(self, constants: Tensors, rows: Array, fitted: Sequence[tuple[Items, Any]], facts: Facts) -> ClosedHead:
        """A linear head."""
        del rows
        return LinearHead({**constants, **_linear_tensors([found for _, found in fitted])}, facts)


@FORMS.register("ridge")
class RidgeForm(_VectorForm):
    """Ridge regression."""


@FORMS.register("krr")
class KernelForm(_VectorForm):
    """Kernel ridge regression; with the linear kernel the ridge regression."""

    @property
    def _is_linear(self) -> bool:
        return self.config.kernel == "linear"

    def by_kernel(self, rows: Array) -> bool:
        """Always, but for the linear kernel on more items than channels."""
        return not self._is_linear or super().by_kernel(rows)

    def choose(self, rows: Array, mos: Array, groups: Items, weights: Array) -> Regression:
        """A kernel ridge."""
        if self._is_linear:
            return super().choose(rows, mos, groups, weights)
        tried = TRIED_STRENGTHS if self.strengths is None else self.strengths
        widths = TRIED_WIDTHS if self.config.kernel_width is None else (self.config.kernel_width,)
        how: dict[str, Any] = {"weights": weights, "folds": self.folds, "device": self.device}
        return best_kernel_ridge(rows, mos, groups, **how, strengths=tried, widths=widths)

    def head(self, constants: Tensors, rows: Array, fitted: Sequence[tuple[Items, Any]], facts: Facts) -> ClosedHead:
        """A kernel head on the vectors of all items in float32; those without a label have the coefficient 0."""
        if self._is_linear:
            return super().head(constants, rows, fitted, facts)
        kernels: list[Kernel] = [found for _, found in fitted]
        dual = torch.zeros((len(fitted), len(rows)), dtype=torch.float64)
        for of_label, (places, found) in zip(dual, fitted, strict=True):
            of_label[torch.from_numpy(places)] = torch.from_numpy(found.dual)
        tensors = {
            "known": torch.from_numpy(rows).float(),
            "dual": dual,
            "scale": torch.tensor([found.scale for found in kernels], dtype=torch.float64),
            "centre": torch.tensor([found.mean for found in kernels], dtype=torch.float64),
        }
        return KernelHead({**constants, **tensors}, facts)


@FORMS.register("tfidf")
class BagForm(Form):
    """Ridge regression on TF-IDF of token ids or, where `source` has none, of the words of its texts."""

    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> Inputs:
        """The n-grams of each item."""
        del kept
        return read_text(source, items, self.pooling, self.config.ngrams, words=not has_token_ids(source))

    def fit(self, inputs: Inputs, known: Known) -> ClosedHead:
        """Take the vocabulary of the items, choose the strength for each label, and fit."""
        words = Vocabulary.of(list(inputs.values))
        rows = words.vectors(list(inputs.values))
        tried = STRENGTHS if self.strengths is None else self.strengths

        def choose(places: Items, mos: Array, weights: Array) -> Regression:
            groups = fold_groups(known.groups[places])
            return best_ridge(rows[places], mos, groups, weights=weights, folds=self.folds, strengths=tried)

        def fit(chosen: Regression, places: Items, mos: Array, weights: Array) -> Any:
            return chosen.fit(rows[places], mos, weights=weights)

        fitted = self.regressions(known, choose, fit)
        tensors = {
            "keys": torch.from_numpy(words.keys),
            "idf": torch.from_numpy(words.idf),
            **_linear_tensors([found for _, found in fitted]),
        }
        return BagHead(tensors, {**inputs.facts, "fits": [chosen.record() for chosen, _ in fitted]})


def _linear_tensors(fitted: Sequence[Linear]) -> dict[str, Tensor]:
    return {
        "weights": torch.from_numpy(np.stack([found.weights for found in fitted])),
        "intercept": torch.tensor([found.intercept for found in fitted], dtype=torch.float64),
    }
