"""One vector per item for heads in closed form: pooled tokens, several poolings side by side, in float64.

The setting names poolings as those of other heads, such as `mean@answer`, joined by `+`. `auto` stands for
`mean@answer` where every item has an answer and other tokens, else for `mean`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.heads.data.features import FeatureSet, FeatureSource, ItemRows, location_of, read_checked, token_offsets
from agiqa.heads.data.layers import PooledRow
from agiqa.heads.model.pooling import AUTO, POOLINGS, MeanPooling, Pooling, PoolingName
from agiqa.heads.settings.config import HeadConfig
from agiqa.store import TOKEN_ROLES

Array = NDArray[np.float64]
Items = NDArray[np.int64]

_WITH_ANSWER, _WITHOUT = "mean@answer", "mean"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Features that are in memory already, with the numbers of their items."""

    features: FeatureSet

    def has(self, items: Items) -> bool:
        """Whether all `items` are among them."""
        return bool(np.isin(items, self.features.items).all())


def check_pooled(text: str) -> None:
    """Raise UnknownName or ConfigError unless `text` is `auto`, or poolings without weights, joined by `+`."""
    if text == AUTO:
        return
    names = [name.strip() for name in text.split("+")]
    for name in names:
        _pooling(name)
    if len(set(names)) < len(names):
        message = f"The pooling {text!r} has a name twice. Write each once, as in 'mean@question+mean@answer'."
        raise ConfigError(message)


def pooled_vectors(source: FeatureSource, items: Items, pooling: str, *, kept: Kept | None = None) -> tuple[Array, str]:
    """The vectors (items, channels) of all poolings in their order, and the pooling that `auto` stands for.

    `kept` saves reading what is in memory. A network reads one row of a store of pooled rows; a closed form below it
    chooses among all of them. Raises DataError, naming items, for missing roles, no tokens, NaN and inf.
    """
    if isinstance(source, PooledRow):
        source, kept = source.store, None
    pooling = _stored_choice(source, pooling)
    names = [_WITHOUT, _WITH_ANSWER] if pooling == AUTO else [name.strip() for name in pooling.split("+")]
    token_offsets(source, items)  # refuses items without tokens
    columns = _stored_columns(source, names)
    width, poolings = source.width, [_pooling(name) for name in names]
    found = np.full((len(items), len(names), width), np.nan)
    others = False
    for position, item in item_rows(source, items, kept):
        for number, (pool, role) in enumerate(poolings):
            chosen = None if role is None else item.roles == TOKEN_ROLES[role]
            if columns is not None:
                found[position, number] = item.rows[columns[number]].double().cpu().numpy()
            elif chosen is None or chosen.any():
                found[position, number] = _pool(pool, item.rows if chosen is None else item.rows[chosen])
            others = others or (chosen is not None and not bool(chosen.all()))
    if pooling == AUTO:
        answered = bool(np.isfinite(found[:, 1]).all()) and others
        names, found = ([_WITH_ANSWER], found[:, 1:]) if answered else ([_WITHOUT], found[:, :1])
    _refuse_missing(source, items, names, found)
    return found.reshape(len(items), -1), "+".join(names)


def item_rows(source: FeatureSource, items: Items, kept: Kept | None) -> Iterator[tuple[int, ItemRows]]:
    """Every item with its position in `items`, from memory where all are kept. Raises as `read_checked`."""
    if kept is None or not kept.has(items) or kept.features.is_streamed:
        yield from read_checked(source, items)
        return
    places = kept.features.positions_of(items)
    for position in range(len(items)):
        yield position, kept.features.take(places[position : position + 1])[0]


def _pool(pool: Pooling, rows: Tensor) -> Array:
    """One vector (channels,) of rows (tokens, channels)."""
    if isinstance(pool, MeanPooling):
        return rows.mean(0, dtype=torch.float64).cpu().numpy()
    mask = torch.ones((1, len(rows)), dtype=torch.bool, device=rows.device)
    pooled: Tensor = pool(rows.double()[None], mask)
    return pooled[0].cpu().numpy()


def _pooling(name: str) -> tuple[Pooling, str | None]:
    """The pooling and the role of its tokens. Raises UnknownName, and ConfigError for one with weights to learn."""
    parsed = PoolingName.parse(name)
    pool = POOLINGS.get(parsed.pooling)(HeadConfig(), 1)
    if any(True for _ in pool.parameters()):
        message = (
            f"The pooling {name!r} has weights that are learned by epochs, which a closed form has none of. Use mean."
        )
        raise ConfigError(message)
    return pool, parsed.role


def _stored_choice(source: FeatureSource, pooling: str) -> str:
    """What `auto` stands for in a store whose rows are poolings: the answer's mean, or all rows side by side."""
    pooled: Sequence[str] = getattr(source, "pooled", ())
    if pooling != AUTO or not pooled:
        return pooling
    return _WITH_ANSWER if _WITH_ANSWER in pooled else "+".join(pooled)


def _stored_columns(source: FeatureSource, names: Sequence[str]) -> list[int] | None:
    """The row of each pooling in a store whose rows are poolings; None where rows are tokens."""
    pooled: Sequence[str] = getattr(source, "pooled", ())
    if not pooled:
        return None
    for name in names:
        if name not in pooled:
            kind = f"pooled row of {location_of(source)}"
            raise UnknownName.of(kind, name, pooled)
    return [list(pooled).index(name) for name in names]


def _refuse_missing(source: FeatureSource, items: Items, names: Sequence[str], found: NDArray[Any]) -> None:
    """Raise DataError for items without a token of a role."""
    for number, name in enumerate(names):
        missing = np.flatnonzero(~np.isfinite(found[:, number]).all(axis=1))
        if len(missing):
            role = PoolingName.parse(name).role
            problems = [f"{source.items.names[items[k]]!r} has no {role} token to pool" for k in missing]
            error = DataError.from_problems(location_of(source), problems)
            error.add_note(f"The pooling is {name!r}. Choose one over all tokens, or leave these items out.")
            raise error
