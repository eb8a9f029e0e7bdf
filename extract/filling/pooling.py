"""Pooled rows: mean, maximum, first or last of the tokens of an item, or of those of one role, as one row each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.models.batches import uploaded
from agiqa.store import TOKEN_ROLES
from agiqa.store.format.layers import POOLINGS


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """One row of every item."""

    method: str
    """One of POOLINGS."""
    role: str | None
    """Of the tokens that are pooled; None for all."""

    def __str__(self) -> str:
        """As users and stores write it: `mean@image`."""
        return self.method if self.role is None else f"{self.method}@{self.role}"

    def places(self, roles: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The tokens that are pooled, of an item with these `roles` (n,); empty where it has none of the role."""
        places = np.arange(len(roles)) if self.role is None else np.flatnonzero(roles == TOKEN_ROLES[self.role])
        return {"first": places[:1], "last": places[-1:]}.get(self.method, places)

    def role_of(self, roles: NDArray[np.uint8]) -> int:
        """The role of the row: that of the tokens, and 0 (special) for a mean or maximum over all of them."""
        if self.role is not None:
            return TOKEN_ROLES[self.role]
        return int(roles[self.places(roles)[0]]) if self.method in ("first", "last") else 0


def parse_poolings(written: str | Iterable[str]) -> tuple[Pooling, ...]:
    """The poolings `written` as METHOD or METHOD@ROLE, with commas between; none for nothing.

    Raises UnknownName for a method or role, and ConfigError for one that is written twice.
    """
    given = [written] if isinstance(written, str) else list(written)
    parts = [part.strip() for one in given for part in one.split(",") if part.strip()]
    found: list[Pooling] = []
    for part in parts:
        method, at, role = part.partition("@")
        if method not in POOLINGS:
            raise UnknownName.of(kind="pooling of tokens", name=method, known=POOLINGS)
        if at and not role:
            message = f"--pool-tokens: {part!r} names no role. Write {method}, or {method}@ROLE."
            raise ConfigError(message)
        if at and role not in TOKEN_ROLES:
            raise UnknownName.of(kind="role of tokens", name=role, known=TOKEN_ROLES)
        pooling = Pooling(method=method, role=role or None)
        if pooling in found:
            message = f"--pool-tokens has {str(pooling)!r} twice. Name each pooling once."
            raise ConfigError(message)
        found.append(pooling)
    return tuple(found)


def lacking(poolings: Sequence[Pooling], roles: NDArray[np.uint8]) -> str | None:
    """Why an item with these `roles` (n,) has no row of some pooling; None if it has all rows."""
    without = [pooling for pooling in poolings if not len(pooling.places(roles))]
    if not without:
        return None
    names = {number: name for name, number in TOKEN_ROLES.items()}
    has = ", ".join(names[role] for role in np.unique(roles).tolist())
    return f"it has no tokens for --pool-tokens {without[0]}; its tokens are of the roles {has}."


def pooled_roles(poolings: Sequence[Pooling], roles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The role of each row (poolings,) of an item with these `roles` (n,)."""
    return np.array([pooling.role_of(roles) for pooling in poolings], np.uint8)


def pooled(
    poolings: Sequence[Pooling], states: Mapping[str, torch.Tensor], roles: Mapping[str, NDArray[np.uint8]]
) -> dict[str, torch.Tensor]:
    """The rows (poolings, D) of an item from its `states` (n, D) by layer, on their device and in their dtype.

    `roles` (n,) are those of the rows of each layer. Computed in float32. Layers of equal shape and roles are pooled
    together: a GPU would wait for many small operations.
    """
    found: dict[str, torch.Tensor] = {}
    for names in _alike(states, roles):
        stacked = torch.stack([states[name] for name in names])
        rows = [_pool(pooling.method, stacked, pooling.places(roles[names[0]])) for pooling in poolings]
        together = torch.stack(rows, dim=1).to(stacked.dtype)
        found |= dict(zip(names, together, strict=True))
    return found


def _alike(states: Mapping[str, torch.Tensor], roles: Mapping[str, NDArray[np.uint8]]) -> list[list[str]]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, values in states.items():
        groups.setdefault((tuple(values.shape), values.dtype, roles[name].tobytes()), []).append(name)
    return list(groups.values())


def _pool(method: str, states: torch.Tensor, places: NDArray[np.int64]) -> torch.Tensor:
    """(layers, D) in float32 of `states` (layers, n, D) at the tokens `places`."""
    first, stop = int(places[0]), int(places[-1]) + 1
    run = stop - first == len(places)  # which needs no indices on the device
    chosen = states[:, first:stop] if run else states.index_select(1, uploaded(places, states.device))
    wide = chosen.float()
    return wide.amax(dim=1) if method == "max" else wide.mean(dim=1)
