"""How another process opens a source of features again: by the path of its store, and what is read of that store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import HeadError
from agiqa.heads.data.features import FeatureSource, items_identity, location_of
from agiqa.heads.data.layers import PooledRow, View, layer_of, read_layer
from agiqa.heads.data.variants import as_variant
from agiqa.store import Store, StoreUnion, VariantView, open_store, union
from agiqa.store.sharing.remotes import is_url


@dataclass(frozen=True, kw_only=True)
class SourceAddress:
    """How another process opens a source again; it can be pickled."""

    items: NDArray[np.int64]
    """The items that the other process needs."""
    identity: str
    """Their `items_identity`."""
    reopen: Callable[[], FeatureSource]

    @classmethod
    def of(cls, source: FeatureSource, items: NDArray[np.int64] | None = None) -> "SourceAddress":
        """The address of `source`, for some items or all."""
        wanted = np.arange(len(source.n_tokens)) if items is None else items
        return cls(items=wanted, identity=items_identity(source, wanted), reopen=_opener(source))

    def open(self) -> FeatureSource:
        """The source. Raises HeadError when another store has taken its place, and what opening a store raises."""
        source = self.reopen()
        if len(source.n_tokens) <= self.items.max() or items_identity(source, self.items) != self.identity:
            message = f"The store {location_of(source)} has other items than before: it was replaced meanwhile."
            raise HeadError(message)
        return source


def _opener(source: FeatureSource) -> Callable[[], FeatureSource]:
    """A function that opens `source` again in another process; a source that is no store is pickled itself."""
    if isinstance(source, PooledRow):
        return partial(_open_row, _opener(source.store), source.pooling)
    if isinstance(source, View):
        return partial(_open_layer, _opener(source.store), layer_of(source))
    if isinstance(source, VariantView):
        return partial(_open_variant, _opener(source.base), source.name)
    if isinstance(source, StoreUnion):
        return partial(_open_union, [_opener(store) for store in source.stores])
    if isinstance(source, Store):
        place = source.location if is_url(source.location) else source.path.absolute()
        return partial(open_store, place, allow_partial=not source.is_sealed)
    return partial(_as_it_is, source)


def _open_union(openers: Sequence[Callable[[], Any]]) -> Any:
    return union([reopen() for reopen in openers])


def _open_layer(reopen: Callable[[], FeatureSource], layer: str) -> FeatureSource:
    return read_layer(reopen(), layer)


def _open_row(reopen: Callable[[], FeatureSource], pooling: str) -> FeatureSource:
    return PooledRow.of(reopen(), pooling)


def _open_variant(reopen: Callable[[], FeatureSource], name: str) -> FeatureSource:
    return as_variant(reopen(), name)


def _as_it_is(source: FeatureSource) -> FeatureSource:
    return source
