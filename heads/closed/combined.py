"""Heads made of other heads: a closed form plus the network that learned its residual, and a weighted sum of runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agiqa.heads.closed.heads import ClosedHead
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.scales import Line
from agiqa.heads.model.head import Head


class ResidualHead(nn.Module):
    """Predicts `closed` + `network`. See `predict_moments` of heads/evaluation/scoring.py."""

    def __init__(self, closed: ClosedHead, network: Head) -> None:
        """Both predict the same labels."""
        super().__init__()
        self.closed = closed
        self.network = network
        self.label_count = network.label_count

    def rescale(self, lines: Sequence[Line]) -> None:
        """Map all later predictions of each label by its line."""
        self.closed.rescale(lines)
        self.network.rescale([(slope, 0.0) for slope, _ in lines])


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of the heads that a MixedHead adds up."""

    head: "AnyHead"
    reads: Callable[[FeatureSource], FeatureSource]
    """Gives what the head reads, such as a layer, of a store."""


class MixedHead(nn.Module):
    """A weighted sum of heads, each stored with its own run: `mixing` (labels, members) and `intercept` (labels,)."""

    def __init__(self, members: Sequence[Member], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """From the `state_dict` and the `facts` of such a head. Raises KeyError where a tensor is missing."""
        super().__init__()
        self.members = list(members)  # no ModuleList: its tensors are not part of the state
        self.facts = facts
        for name in ("mixing", "intercept"):
            self.register_buffer(name, tensors[name].double())
        self.label_count = len(tensors["mixing"])

    def mix(self, predicted: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """The sum (items, labels) of the predictions (items, labels) of the members."""
        mixing, intercept = (self.get_buffer(name).cpu().numpy() for name in ("mixing", "intercept"))
        found: NDArray[np.float64] = (np.stack(predicted, axis=2) * mixing).sum(axis=2) + intercept
        return found

    def rescale(self, lines: Sequence[Line]) -> None:
        """Map all later predictions of each label by its line."""
        mixing, intercept = self.get_buffer("mixing"), self.get_buffer("intercept")
        slopes, offsets = torch.tensor(lines, dtype=torch.float64, device=mixing.device).unbind(1)
        mixing.mul_(slopes[:, None])
        intercept.mul_(slopes).add_(offsets)


AnyHead = Union[Head, ClosedHead, ResidualHead, MixedHead]  # noqa: UP007  (a class above names it before it exists)
"""What a run can hold."""


def network_of(head: AnyHead) -> Head | None:
    """The network of a head, which may learn the residual of a closed form; None without one."""
    if isinstance(head, ResidualHead):
        return head.network
    return head if isinstance(head, Head) else None
