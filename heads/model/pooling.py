"""Poolings: from the encoded tokens of an item to one vector. Padding is masked.

A setting names a pooling alone (`mean`), over all tokens, or with the role of the tokens to pool (`mean@answer`). The
encoder reads all tokens in either case.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from agiqa.errors import DataError, HeadError, UnknownName
from agiqa.heads.data.features import FeatureSet, FeatureSource, location_of
from agiqa.heads.settings.config import HeadConfig
from agiqa.registry import Registry
from agiqa.store.format.layout import TOKEN_ROLES

AUTO = "auto"
"""The pooling of closed forms that depends on the roles of the tokens; see heads/closed/pooled.py."""
_ITEMS_PER_READ = 256

Tokens = Float[Tensor, "batch token width"]
Mask = Bool[Tensor, "batch token"]
"""True on the tokens to pool, anywhere in the item; every item has at least one."""
Pooled = Float[Tensor, "batch width"]
Positions = Int64[Tensor, "batch position"]


class Pooling(nn.Module, ABC):
    """Base: built from a HeadConfig and a width, called with tokens and mask."""

    def __init__(self, config: HeadConfig, width: int) -> None:
        """`width` is that of the encoder's outputs, which may differ from that of `config`."""
        del config, width
        super().__init__()

    @abstractmethod
    def forward(self, tokens: Tokens, mask: Mask) -> Pooled:
        """Pool the tokens where `mask` is True."""

    def fixed_positions(self, mask: Mask) -> Positions:
        """Positions of the tokens that this pooling reads for their position, which token dropout therefore keeps.

        Their number is the same for every mask: 0 for a pooling that treats all tokens alike.
        """
        return mask.new_zeros((len(mask), 0), dtype=torch.int64)


POOLINGS: Registry[Callable[[HeadConfig, int], Pooling]] = Registry("pooling")


@POOLINGS.register("mean")
class MeanPooling(Pooling):
    """The mean of the tokens, as in the paper."""

    def forward(self, tokens: Tokens, mask: Mask) -> Pooled:
        """Sum over tokens divided by their number."""
        return tokens.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)


@POOLINGS.register("max")
class MaxPooling(Pooling):
    """The largest value of each channel; tokens that share it share the gradient.

    It grows with the number of tokens and with the noise of dropout. Under token dropout or dropout, training therefore
    pools values of another level and variance than evaluation; the setting `calibrate` corrects the predictions.
    """

    def forward(self, tokens: Tokens, mask: Mask) -> Pooled:
        """Maximum over tokens."""
        return tokens.masked_fill(~mask[..., None], -math.inf).amax(1)


class PositionPooling(Pooling):
    """Base of poolings that take the mean of the tokens at `fixed_positions`."""

    def forward(self, tokens: Tokens, mask: Mask) -> Pooled:
        """The mean of the tokens at one or two positions."""
        items = torch.arange(len(tokens), device=tokens.device)
        return tokens[items[:, None], self.fixed_positions(mask)].mean(1)


@POOLINGS.register("first")
class FirstPooling(PositionPooling):
    """The first token. A causal encoder has read no other token there."""

    def fixed_positions(self, mask: Mask) -> Positions:
        """The first True of the mask."""
        return _first(mask)[:, None]


@POOLINGS.register("last")
class LastPooling(PositionPooling):
    """The last token."""

    def fixed_positions(self, mask: Mask) -> Positions:
        """The last True of the mask."""
        return _last(mask)[:, None]


@POOLINGS.register("first-last-mean")
class FirstLastMeanPooling(PositionPooling):
    """The mean of the first and the last token (Table IV of the paper), which may be the same token."""

    def fixed_positions(self, mask: Mask) -> Positions:
        """The first and the last True of the mask."""
        return torch.stack([_first(mask), _last(mask)], dim=1)


@POOLINGS.register("attention")
class AttentionPooling(Pooling):
    """A mean weighted by softmax(tokens . query / sqrt(width)), with one learned query.

    The query starts at 0: an untrained head pools the mean.
    """

    def __init__(self, config: HeadConfig, width: int) -> None:
        """A query of `width` channels."""
        super().__init__(config, width)
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tokens, mask: Mask) -> Pooled:
        """Products with the query, a softmax over the mask, and a weighted sum, in float32 at least."""
        tokens = tokens.masked_fill(~mask[..., None], 0.0)
        scores = (tokens * self.query).sum(-1, dtype=self.query.dtype) / math.sqrt(len(self.query))
        weights = scores.masked_fill(~mask, -math.inf).softmax(1)
        return (weights[..., None] * tokens).sum(1)


@dataclass(frozen=True, kw_only=True)
class PoolingName:
    """The setting `pooling`, parsed."""

    pooling: str
    """A name of POOLINGS."""
    role: str | None
    """A name of TOKEN_ROLES; None pools all tokens."""

    @classmethod
    def parse(cls, text: str) -> "PoolingName":
        """`POOLING` or `POOLING@ROLE`. Raises UnknownName for either name."""
        pooling, at, role = text.partition("@")
        POOLINGS.get(pooling)
        if at and role not in TOKEN_ROLES:
            error = UnknownName.of("token role", role, TOKEN_ROLES)
            error.add_note(f"in the pooling {text!r}")
            raise error
        return cls(pooling=pooling, role=role if at else None)


def pooling_names(config: HeadConfig) -> list[str]:
    """The poolings that a head computes: one, or those that a closed form joins by `+`; none for its `auto`."""
    if not config.is_closed:
        return [config.pooling]
    return [] if config.pooling == AUTO else [name.strip() for name in config.pooling.split("+")]


def select_role(mask: Mask, roles: UInt8[Tensor, "batch token"] | None, role: str) -> Mask:
    """The part of `mask` whose tokens have this role.

    Raises HeadError without `roles`, and DataError for an item without such a token; `check_roles` names the items.
    """
    if roles is None:
        message = f"Pooling the {role} tokens needs the role of every token: call the head with `roles`."
        raise HeadError(message)
    chosen = mask & (roles == TOKEN_ROLES[role])
    missing = int((~chosen.any(1)).sum())
    if missing:
        message = f"{missing} of {len(chosen)} items of a batch have no {role} token to pool. Call check_roles first."
        raise DataError(message)
    return chosen


def check_roles(source: FeatureSource, features: FeatureSet, pooling: str) -> None:
    """Raise DataError, naming the items of `features` that have no token of the role that `pooling` names.

    `source` is the store that `features` come from. Raises UnknownName as `PoolingName.parse`.
    """
    role = PoolingName.parse(pooling).role
    if role is None:
        return
    names = [source.items.names[item] for item in features.items]
    missing = _without_role(features.roles.cpu().numpy(), features.offsets.numpy(), role)
    _refuse(source, pooling, role, [names[k] for k in missing])


def check_item_roles(source: FeatureSource, items: Sequence[int] | NDArray[Any], pooling: str) -> None:
    """`check_roles` for items of a store: reads them, 256 at a time, if `pooling` names a role."""
    role = PoolingName.parse(pooling).role
    if role is None:
        return
    chosen = np.asarray(items, dtype=np.int64)
    missing: list[str] = []
    for start in range(0, len(chosen), _ITEMS_PER_READ):
        part = chosen[start : start + _ITEMS_PER_READ]
        block = source.read(part)
        missing += [source.items.names[part[k]] for k in _without_role(block.roles, block.offsets, role)]
    _refuse(source, pooling, role, missing)


def _without_role(roles: NDArray[np.uint8], offsets: NDArray[np.int64], role: str) -> list[int]:
    """Numbers of the items, delimited by `offsets`, that have no token of the role."""
    found = np.concatenate([[0], np.cumsum(roles == TOKEN_ROLES[role])])
    missing: list[int] = np.flatnonzero(found[offsets[1:]] == found[offsets[:-1]]).tolist()
    return missing


def _refuse(source: FeatureSource, pooling: str, role: str, names: Sequence[str]) -> None:
    """Raise DataError where `names` is not empty."""
    if not names:
        return
    error = DataError.from_problems(location_of(source), [f"{name!r} has no {role} token to pool" for name in names])
    error.add_note(f"The pooling is {pooling!r}. Choose one over all tokens, or leave these items out.")
    raise error


def _first(mask: Mask) -> Tensor:
    """The position of the first True of each row."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, steps, mask.shape[1]).amin(1)


def _last(mask: Mask) -> Tensor:
    """The position of the last True of each row."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, steps, -1).amax(1)
