"""Fitted heads in closed form: their tensors, and how they read and predict an item."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agiqa.heads.closed.pooled import Kept, pooled_vectors
from agiqa.heads.closed.regressions import gaussian, squared_distances
from agiqa.heads.closed.token_bags import Vocabulary, read_bags, read_word_bags
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.scales import Line

Array = NDArray[np.float64]
Items = NDArray[np.int64]
Tensors = Mapping[str, Tensor]
Facts = Mapping[str, Any]

_ITEMS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a form reads of some items."""

    values: Any
    """Indexed by item along its first axis: an array, or an object array of n-grams."""
    facts: Facts
    """What a prediction must know to read other items alike, ready for JSON."""

    def of(self, places: Items) -> "Inputs":
        """Of some of the items."""
        return replace(self, values=self.values[places])


class ClosedHead(nn.Module, ABC):
    """A fitted form: predicts items of a source. Its tensors are its state, its facts how it reads an item."""

    kind: ClassVar[str]
    """Its name in `facts`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The facts that it reads."""

    def __init__(self, tensors: Tensors, facts: Facts) -> None:
        """From the `state_dict` and the `facts` of a head of this class. Raises KeyError where one is missing."""
        super().__init__()
        for name in self.needs:
            facts[name]
        for name, value in tensors.items():
            self.register_buffer(name, value)
        self.facts: Facts = {"kind": self.kind, **facts}
        labels = self.labels_of(tensors)
        for name, start in (("slope", torch.ones), ("offset", torch.zeros)):
            if name not in tensors:
                self.register_buffer(name, start(labels, dtype=torch.float64))
        self.label_count = labels

    @staticmethod
    @abstractmethod
    def labels_of(tensors: Tensors) -> int:
        """The number of labels."""

    @abstractmethod
    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> Inputs:
        """The inputs of `items`. Raises DataError for items that lack something."""

    @abstractmethod
    def scores(self, inputs: Inputs) -> Array:
        """The predictions (items, labels), before `rescale`."""

    def predict(self, source: FeatureSource, items: Items, *, kept: Kept | None = None) -> Array:
        """The predicted MOS (items, labels). Raises as `read`."""
        parts = [items[k : k + _ITEMS_AT_ONCE] for k in range(0, len(items), _ITEMS_AT_ONCE)]
        found = [self.scores(self.read(source, part, kept)) for part in parts]
        slope, offset = (self.get_buffer(name).cpu().numpy() for name in ("slope", "offset"))
        predicted: Array = np.concatenate([np.empty((0, self.label_count)), *found]) * slope + offset
        return predicted

    def rescale(self, lines: Sequence[Line]) -> None:
        """Map all later predictions of each label by its line."""
        slopes, offsets = torch.tensor(lines, dtype=torch.float64).unbind(1)
        slope, offset = self.get_buffer("slope"), self.get_buffer("offset")
        slope.copy_(slope * slopes.to(slope.device))
        offset.copy_(offset * slopes.to(offset.device) + offsets.to(offset.device))

    def _numpy(self, name: str) -> Array:
        found: Array = self.get_buffer(name).double().cpu().numpy()
        return found


class _OnVectors(ClosedHead):
    """Base of heads that read standardised pooled vectors."""

    needs = ("pooling",)

    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> Inputs:
        """Pooled vectors, as they are."""
        values, _ = pooled_vectors(source, items, self.facts["pooling"], kept=kept)
        return Inputs(values=values, facts=self.facts)

    def standardised(self, inputs: Inputs) -> Array:
        """The vectors on the scale of the training items."""
        found: Array = (inputs.values - self._numpy("mean")) / self._numpy("std")
        return found


class LinearHead(_OnVectors):
    """Weights (labels, channels) and intercepts (labels,) on standardised vectors."""

    kind = "linear"

    @staticmethod
    def labels_of(tensors: Tensors) -> int:
        """Of the weights."""
        return len(tensors["weights"])

    def scores(self, inputs: Inputs) -> Array:
        """X W^T + intercept."""
        return self.standardised(inputs) @ self._numpy("weights").T + self._numpy("intercept")


class KernelHead(_OnVectors):
    """A Gaussian kernel around each training item, dual coefficients (labels, items), a scale and mean per label."""

    kind = "kernel"

    @staticmethod
    def labels_of(tensors: Tensors) -> int:
        """Of the dual coefficients."""
        return len(tensors["dual"])

    def scores(self, inputs: Inputs) -> Array:
        """K a + mean, on the device of the head."""
        known = self.get_buffer("known").double()
        rows = torch.from_numpy(self.standardised(inputs)).to(known.device)
        squares, found = squared_distances(rows, known), list[Tensor]()
        for dual, scale in zip(self.get_buffer("dual"), self._numpy("scale").tolist(), strict=True):
            found.append(gaussian(squares, scale) @ dual)
        return torch.stack(found, dim=1).cpu().numpy() + self._numpy("centre")


class BagHead(ClosedHead):
    """Weights (labels, n-grams) and intercepts on TF-IDF, with the vocabulary of the training items.

    The fact `words` says whether it counts the words of texts instead of token ids.
    """

    kind = "tfidf"
    needs = ("tokens", "ngrams")

    @staticmethod
    def labels_of(tensors: Tensors) -> int:
        """Of the weights."""
        return len(tensors["weights"])

    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> Inputs:
        """The n-grams of each item."""
        del kept
        return read_text(
            source, items, self.facts["tokens"], self.facts["ngrams"], words=self.facts.get("words", False)
        )

    def scores(self, inputs: Inputs) -> Array:
        """X W^T + intercept."""
        words = Vocabulary(keys=self.get_buffer("keys").cpu().numpy(), idf=self._numpy("idf"))
        found: Array = words.vectors(list(inputs.values)) @ self._numpy("weights").T + self._numpy("intercept")
        return found


def read_text(source: FeatureSource, items: Items, tokens: str, ngrams: int, *, words: bool) -> Inputs:
    """The n-grams of each item, as `read_word_bags` or `read_bags`."""
    bags = (read_word_bags if words else read_bags)(source, items, tokens, ngrams=ngrams)
    values = np.empty(len(bags), dtype=object)
    values[:] = bags
    return Inputs(values=values, facts={"tokens": tokens, "ngrams": ngrams, "words": words})


HEADS: dict[str, type[ClosedHead]] = {one.kind: one for one in (LinearHead, KernelHead, BagHead)}
"""Classes of heads by their kind."""


def head_of(tensors: Tensors, facts: Facts) -> ClosedHead:
    """The head with this `state_dict` and these facts. Raises KeyError where they are not those of a closed form."""
    return HEADS[facts["kind"]](tensors, facts)


def below(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
