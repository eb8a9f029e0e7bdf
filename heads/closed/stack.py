"""Stacks: several forms, weighted by how well they predict prompts that they have not seen.

The weights are not negative and minimise the squared error of the sum, with an intercept, over out-of-fold predictions:
the folds share no prompt (Breiman 1996, Stacked regressions).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn

from agiqa.errors import ConfigError, DataError
from agiqa.heads.closed.forms import FORMS, Form, Known
from agiqa.heads.closed.heads import HEADS, Array, ClosedHead, Facts, Inputs, Items, Tensors, below, head_of
from agiqa.heads.closed.pooled import Kept
from agiqa.heads.closed.regressions import kernel_too_large
from agiqa.heads.closed.token_bags import has_texts, has_token_ids
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.settings.config import HeadConfig

STACK, TFIDF, AUTO = "stack", "tfidf", "auto"
_ON_VECTORS = ("ridge", "krr")
_LEFT_OUT_IF_UNFIT = ("krr", TFIDF)
LEFT_OUT = "left_out"
"""The fact of a stack with the members that could not be fitted, each with the reason."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A sum of predictions with weights that are not negative, and an intercept."""

    weights: Array
    """(members,)."""
    intercept: float

    @classmethod
    def fit(cls, predicted: Array, mos: Array, weights: Array | None = None) -> "Mixture":
        """The least squared error for `predicted` (items, members); `weights` are those of the items.

        Equal weights where no member has a positive one, so that the mixture still orders items.
        """
        shares = np.full(len(mos), 1 / len(mos)) if weights is None else weights / weights.sum()
        means, mean, roots = shares @ predicted, float(shares @ mos), np.sqrt(shares)
        found, _ = nnls((predicted - means) * roots[:, None], (mos - mean) * roots)
        if not found.any():
            return cls.equal(predicted.shape[1])
        return cls(weights=found, intercept=mean - float(means @ found))

    @classmethod
    def equal(cls, members: int) -> "Mixture":
        """The mean of so many members."""
        return cls(weights=np.full(members, 1 / members), intercept=0.0)

    def of(self, predicted: Array) -> Array:
        """The mixture (items,) of `predicted` (items, members)."""
        found: Array = predicted @ self.weights + self.intercept
        return found


def mixtures(predicted: NDArray[np.float64], known: Known) -> list[Mixture]:
    """A mixture for each label; `predicted` is (members, items, labels). Items without a label do not count."""
    found: list[Mixture] = []
    for number, labels in enumerate(known.labels.T):
        has = np.isfinite(labels)
        found.append(Mixture.fit(predicted[:, has, number].T, labels[has], known.weights[has, number]))
    return found


@dataclass(frozen=True, kw_only=True)
class StackInputs(Inputs):
    """The inputs of every member."""

    parts: tuple[Inputs, ...]

    def of(self, places: Items) -> "StackInputs":
        """Of some of the items."""
        return StackInputs(values=None, facts=self.facts, parts=tuple(part.of(places) for part in self.parts))


class StackHead(ClosedHead):
    """Members of any form, their weights (labels, members) and intercepts (labels,)."""

    kind = STACK
    needs = ("members",)

    def __init__(self, tensors: Tensors, facts: Facts) -> None:
        """`members.0.NAME` is the tensor NAME of the first member, whose facts are the first of `members`."""
        own = {name: value for name, value in tensors.items() if not name.startswith("members.")}
        super().__init__(own, facts)
        self.members = nn.ModuleList(
            head_of(below(tensors, f"members.{number}."), of_member)
            for number, of_member in enumerate(facts["members"])
        )

    @staticmethod
    def labels_of(tensors: Tensors) -> int:
        """Of the weights."""
        return len(tensors["mixing"])

    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> StackInputs:
        """The inputs of every member; members that pool alike share them."""
        shared: dict[str, Inputs] = {}
        parts: list[Inputs] = []
        for member in self._closed():
            key = str(member.facts.get("pooling", member.facts["kind"]))
            if key not in shared:
                shared[key] = member.read(source, items, kept)
            parts.append(shared[key])
        return StackInputs(values=None, facts=self.facts, parts=tuple(parts))

    def scores(self, inputs: Inputs) -> Array:
        """The weighted sum; `inputs` may have parts of further members."""
        assert isinstance(inputs, StackInputs)
        parts = dict(zip(inputs.facts["names"], inputs.parts, strict=True))
        pairs = zip(self.facts["names"], self._closed(), strict=True)
        predicted = np.stack([member.scores(parts[name]) for name, member in pairs], axis=2)
        found: Array = (predicted * self._numpy("mixing")).sum(axis=2) + self._numpy("intercept")
        return found

    def _closed(self) -> list[ClosedHead]:
        return [member for member in self.members if isinstance(member, ClosedHead)]


HEADS[STACK] = StackHead


@FORMS.register(STACK)
class StackForm(Form):
    """Several forms, with weights from out-of-fold predictions."""

    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> StackInputs:
        """The inputs of every member; forms on pooled vectors share them."""
        found, names = dict[str, Inputs](), member_names(self.config)
        left_out = members_left_out(source, len(items), self.device) if self.config.members == AUTO else {}
        for name in (name for name in names if name not in left_out):
            same = next((other for other in found if other in _ON_VECTORS and name in _ON_VECTORS), None)
            found[name] = self._form(name).read(source, items, kept) if same is None else found[same]
        return StackInputs(values=None, facts={"names": list(found), LEFT_OUT: left_out}, parts=tuple(found.values()))

    def fit(self, inputs: Inputs, known: Known) -> ClosedHead:
        """Fit the members to all items, and the weights to out-of-fold predictions."""
        return self.fit_and_fold(inputs, known)[0]

    def out_of_fold(self, inputs: Inputs, known: Known) -> Array:
        """As `fit_and_fold`."""
        return self.fit_and_fold(inputs, known)[1]

    def fit_and_fold(self, inputs: Inputs, known: Known) -> tuple[ClosedHead, Array]:
        """The head, and the mixture of its members' out-of-fold predictions by the weights that all of them gave."""
        assert isinstance(inputs, StackInputs)
        members, left_out = self._members(inputs, known)
        names, fitted = [*members], [*members.values()]
        predicted = np.stack([folded for _, folded in fitted])
        mixing = mixtures(predicted, known)
        tensors: dict[str, Tensor] = {
            "mixing": torch.from_numpy(np.stack([one.weights for one in mixing])),
            "intercept": torch.tensor([one.intercept for one in mixing], dtype=torch.float64),
        }
        for number, (member, _) in enumerate(fitted):
            tensors |= {f"members.{number}.{name}": value for name, value in member.state_dict().items()}
        mixed = np.stack([one.of(predicted[:, :, k].T) for k, one in enumerate(mixing)], axis=1)
        fits = [_fit_record(names, one, mixed[:, k], known, k) for k, one in enumerate(mixing)]
        facts = {"names": names, "members": [member.facts for member, _ in fitted], "fits": fits}
        facts |= {LEFT_OUT: left_out} if left_out else {}
        return StackHead(tensors, facts), mixed

    def _members(self, inputs: StackInputs, known: Known) -> tuple[dict[str, tuple[ClosedHead, Array]], dict[str, str]]:
        """Each member with its out-of-fold predictions, and those of an `auto` stack that are left out, with reasons.

        Whether the kernel has a width, and whether there is a word to count, is known only when they are fitted. All
        items allow a ridge that allow any form.
        """
        found, left_out = dict[str, tuple[ClosedHead, Array]](), dict(inputs.facts[LEFT_OUT])
        for name, part in zip(inputs.facts["names"], inputs.parts, strict=True):
            try:
                found[name] = self._form(name).fit_and_fold(part, known)
            except (DataError, ConfigError) as error:
                if self.config.members != AUTO or name not in _LEFT_OUT_IF_UNFIT:
                    raise
                left_out[name] = str(error).rstrip(".")
        return found, left_out

    def _form(self, name: str) -> Form:
        pooling = AUTO if name == TFIDF else self.pooling
        return FORMS.get(name)(
            config=self.config, pooling=pooling, label=self.label, folds=self.folds, device=self.device
        )


def members_left_out(source: FeatureSource, items: int, device: torch.device) -> dict[str, str]:
    """The members of an `auto` stack that cannot be fitted to so many items of `source`, with the reason."""
    found = dict[str, str]()
    too_large = kernel_too_large(items, device)
    if too_large is not None:
        found["krr"] = too_large
    if not has_token_ids(source) and not has_texts(source):
        found[TFIDF] = f"{location_of(source)} has neither token ids nor texts"
    return found


def member_names(config: HeadConfig) -> list[str]:
    """The forms of a stack; `auto` is ridge, krr and tfidf.

    Raises UnknownName for no form, ConfigError for one that is there twice, or a stack.
    """
    if config.members == AUTO:
        return [*_ON_VECTORS, TFIDF]
    names = [name.strip() for name in config.members.split("+")]
    for name in names:
        FORMS.get(name)
    if {STACK, "rating-words"} & set(names) or len(set(names)) < len(names):
        message = (
            f"The members of a stack are other forms, each once, as in 'ridge+krr+tfidf'; given: {config.members!r}."
        )
        raise ConfigError(message)
    return names


def _fit_record(names: Sequence[str], mixing: Mixture, mixed: Array, known: Known, label: int) -> dict[str, Any]:
    """The weights by name, and the error of the out-of-fold predictions."""
    missed = np.square(mixed - known.labels[:, label])
    has = np.isfinite(missed)
    rmse = float(np.sqrt(np.average(missed[has], weights=known.weights[has, label])))
    weights = dict(zip(names, mixing.weights.tolist(), strict=True))
    return {"regression": STACK, "weights": weights, "intercept": mixing.intercept, "inner_rmse": rmse, "at_edge": []}
