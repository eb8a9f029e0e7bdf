"""Reading a store: its items, its rows, and the arrays of the model that give the rows their meaning."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import IncompleteStore, ViewRefused
from agiqa.store.format.arrays import rows_dtype, storage_dtype
from agiqa.store.format.items import Items
from agiqa.store.format.layers import FEATURES, layer_array, layer_of_array, token_scale_array
from agiqa.store.format.layout import StoreLayout
from agiqa.store.format.manifest import content_hash, has_listed_metadata, has_planned_attributes, read_recorded_items
from agiqa.store.format.metadata import damaged, require_no_pull
from agiqa.store.reading.by_name import ByName
from agiqa.store.reading.layers import LayerSource, layer_of
from agiqa.store.reading.model_arrays import ModelArrays
from agiqa.store.reading.prefixes import VariantView, variant_of
from agiqa.store.reading.stored_arrays import empty_array
from agiqa.store.reading.token_rows import TokenRows, item_positions


class Store(ByName, ModelArrays):
    """A feature store in a local folder; `agiqa.store.open_store` opens it."""

    def __init__(
        self, path: Path, *, layout: StoreLayout | None = None, manifest: dict[str, Any] | None = None
    ) -> None:
        """As `StoredArrays`."""
        super().__init__(path, layout=layout, manifest=manifest)
        self.encoding: str = str(self.attributes["encoding"])
        self.logical_dtype: str = str(self.attributes["logical_dtype"])
        self.dtype = rows_dtype(self.encoding, self.logical_dtype)
        self.array(FEATURES)

    @property
    def width(self) -> int:
        """Values per token, see `Geometry.width`."""
        return self.geometry.width

    @property
    def keeps_logits(self) -> bool:
        """Whether raw logits are stored beside the hidden states."""
        return "kept_logits" in self.provenance

    def variant(self, name: str) -> "Store | VariantView":
        """The store read as the variant `name` of its conversations, such as `id` of `full`; see `variant_of`."""
        here: Any = self  # pyright sees this class twice: here, and through the link agiqa/store
        found: Any = variant_of(here, name)
        read: Store | VariantView = found
        return read

    @property
    def items(self) -> Items:
        """Names, prompts, splits and labels of the items."""
        return self._items  # pyright finds no cached_property that satisfies the property of a protocol

    @cached_property
    def _items(self) -> Items:
        return self._read_items()

    def _read_items(self) -> Items:
        items = read_recorded_items(self.layout)
        self.require_in_place()
        return items

    def read_unit(self, unit: int, array: str = "features") -> NDArray[Any]:
        """The rows of the items of `unit` in `features`, `tokens/ids` or `tokens/roles`, in the bits of the store."""
        first = unit * self.geometry.unit_rows
        return self.stored_rows(array, first, first + self.rows_used(unit))

    @property
    def layer_name(self) -> str:
        """The layer that `features` holds, and that the store gives where none is named."""
        return self.layers[-1]

    @property
    def layer_count(self) -> int | None:
        """Number of blocks of the model, where the store records it."""
        return self.content_of_rows.layer_count

    def layer(self, name: str) -> LayerSource:
        """A layer, such as `8`, `-1` or `last`, or several with their channels one after the other: `8+16+last`.

        The layer of `features` is the store itself. Raises UnknownName, with the stored layers.
        """
        return layer_of(self, name)

    def layer_shape(self, layer: str) -> tuple[int, str]:
        """Values per row and logical dtype of a stored layer."""
        if layer == self.layer_name:
            return self.width, self.logical_dtype
        content = self.content_of_rows
        return content.layer_widths.get(layer, self.width), content.layer_dtypes.get(layer, self.logical_dtype)

    def array_of_layer(self, layer: str) -> str:
        """The name of the array with the rows of a stored layer."""
        return FEATURES if layer == self.layer_name else layer_array(layer)

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """The rows of `items` (positions), in that order. Decodes only the chunks that hold them, each once.

        Raises DataError for invalid positions, IncompleteStore if the unit of an item is not finished, and DamagedStore
        if a checksum does not match.
        """
        return self.read_layer(items, self.layer_name)

    def read_layer(self, items: Sequence[int] | NDArray[Any], layer: str) -> TokenRows:
        """As `read`, of a stored layer."""
        array, (width, logical_dtype) = self.array_of_layer(layer), self.layer_shape(layer)
        wanted = item_positions(items, count=len(self.n_tokens), where=self.location)
        self._require_committed(wanted)
        offsets = np.concatenate([[0], np.cumsum(self.n_tokens[wanted], dtype=np.int64)])
        rows = empty_array(self.path, f"{len(wanted)} items", (int(offsets[-1]), width), storage_dtype(logical_dtype))
        roles = np.empty(int(offsets[-1]), np.uint8)
        ends = self.row_ends
        for places in self._runs(wanted):
            items_of_run = wanted[places]
            first, last = int(self.row_starts[items_of_run[0]]), int(ends[items_of_run].max())
            run_roles = self.stored_rows("tokens/roles", first, last)
            block = slice(int(offsets[places[0]]), int(offsets[places[-1] + 1]))
            if self.encoding != "int8" and self._are_contiguous(places, items_of_run):
                self.stored_rows(array, first, last, out=rows[block])
                roles[block] = run_roles
                continue
            run_rows = self.rows_at(first, last, array=array)
            for place, item in zip(places.tolist(), items_of_run.tolist(), strict=True):
                source = slice(int(self.row_starts[item]) - first, int(ends[item]) - first)
                target = slice(int(offsets[place]), int(offsets[place + 1]))
                rows[target] = run_rows[source]
                roles[target] = run_roles[source]
        return TokenRows(rows=rows, roles=roles, offsets=offsets, logical_dtype=logical_dtype)

    def tokens(self, items: Sequence[int] | NDArray[Any]) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """The token ids and the roles of each of `items` (positions), without their features.

        Raises as `read`, and ViewRefused where rows are not tokens.
        """
        self._require_tokens()
        wanted = item_positions(items, count=len(self.n_tokens), where=self.location)
        self._require_committed(wanted)
        found: dict[int, tuple[NDArray[np.int32], NDArray[np.uint8]]] = {}
        for places in self._runs(wanted):
            run = wanted[places]
            first, last = int(self.row_starts[run[0]]), int(self.row_ends[run].max())
            ids, roles = (self.stored_rows(f"tokens/{name}", first, last) for name in ("ids", "roles"))
            for item in run.tolist():
                rows = slice(int(self.row_starts[item]) - first, int(self.row_ends[item]) - first)
                found[item] = ids[rows], roles[rows]
        return [found[item] for item in wanted.tolist()]

    def _require_tokens(self) -> None:
        if self.tap is None and not self.pooled:
            return
        rows = f"those of {self.tap}" if self.tap is not None else f"pooled over tokens ({', '.join(self.pooled)})"
        message = (
            f"{self.location} has no token ids: its rows are {rows}. Give a store whose rows are tokens, as "
            "`agiqa extract` writes it without --pool-tokens and --tap."
        )
        raise ViewRefused(message)

    def _are_contiguous(self, places: NDArray[np.int64], items: NDArray[np.int64]) -> bool:
        """Whether the rows of `items` follow each other in the store, and in the result, where they have `places`."""
        together = (self.row_ends[items][:-1] == self.row_starts[items][1:]).all()
        return bool(together and (np.diff(places) == 1).all())

    def _runs(self, items: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Places in `items` of the items to be read at once: of one unit, less than a chunk apart, by address."""
        order = np.lexsort((items, self.row_starts[items]))
        starts, ends = self.row_starts[items][order], self.row_ends[items][order]
        apart = starts[1:] - np.maximum.accumulate(ends)[:-1] >= self.geometry.chunk_rows
        cuts = np.flatnonzero(apart | (np.diff(self.units[items][order]) != 0)) + 1
        return np.split(order, cuts) if len(order) else []

    def rows_of(self, item: int, start: int, stop: int, *, array: str = "features") -> NDArray[Any]:
        """Tokens `start` to `stop` of `item`, of `features`, `logits` or a layer, in the bits of its logical dtype.

        Raises as `read`.
        """
        self._require_committed(item_positions([item], count=len(self.n_tokens), where=self.location))
        first = int(self.row_starts[item])
        return self.rows_at(first + start, first + stop, array=array)

    def rows_at(self, start: int, stop: int, *, array: str = "features") -> NDArray[Any]:
        """Rows by address, all of one unit, in the bits of the logical dtype; rescales those of `int8`.

        Raises DamagedStore if a checksum does not match.
        """
        rows = self.stored_rows(array, start, stop)
        if self.encoding != "int8":
            return rows
        other = layer_of_array(array)
        scale = self.scale if other is None else self.layer_scale(other)
        return scale.decode(rows, self.stored_rows(token_scale_array(other), start, stop))

    def _require_committed(self, wanted: NDArray[np.int64]) -> None:
        if self.is_sealed and self.pulled_units is None:
            return
        missing = set(self.units[wanted].tolist()) - set(self.committed_units())
        for position in wanted.tolist():
            if int(self.units[position]) in missing:
                message = (
                    f"{self.path}: item {self.items.names[position]!r} has no features yet "
                    f"({len(missing)} of the units asked for are missing). {self.remedy}"
                )
                raise IncompleteStore(message)

    @property
    def content(self) -> str:
        """The `content_hash` of a sealed store; the id of an unfinished one."""
        return self._content

    @cached_property
    def _content(self) -> str:
        if not self.is_sealed:
            return self.id
        return content_hash((entry["path"], entry["sha256"]) for entry in self.manifest["objects"])


AnyStore = Store | VariantView
"""A store, or the view of one as a shorter conversation."""


def is_planned(path: Path) -> bool:
    """Whether `path` holds a store, sealed or not."""
    layout = StoreLayout(path)
    return layout.plan_commit.exists() or layout.manifest.exists()


def open_local_store(path: str | Path, *, allow_partial: bool = False) -> Store:
    """Open the feature store in the local folder `path`.

    Raises SchemaError if `path` is no store of a version read here, and IncompleteStore for an unsealed store unless
    `allow_partial` is set.
    """
    store = _open_as_listed(Path(path))
    if not allow_partial and not store.is_sealed:
        done = len(store.committed_units())
        message = (
            f"{path} is incomplete: {done} of {store.geometry.units} units are finished and it is not sealed. "
            f"{store.remedy}"
        )
        raise IncompleteStore(message)
    return store


def _open_as_listed(path: Path) -> Store:
    """The store at `path`, with the root metadata that its manifest, or the record of its plan, lists.

    Raises as Store, IncompleteStore while a pull replaces its objects, and DamagedStore if metadata and listing do not
    belong together. A repair or seal in another process may replace one of them between the two reads, so a mismatch
    counts only if it is found twice.
    """
    seen = None
    while True:
        store = Store(path)
        if not store.is_sealed:
            require_no_pull(store.layout)
            return _with_planned_attributes(store)
        if has_listed_metadata(store.layout, store.manifest):
            return store
        if store.manifest == seen:
            raise damaged(store.layout.zarr / "zarr.json", f"it is not what {store.layout.manifest.name} lists")
        seen = store.manifest


def _with_planned_attributes(store: Store) -> Store:
    if not has_planned_attributes(store.layout, store.attributes):
        what = f"its attributes are not those that {store.layout.plan_commit.name} records"
        raise damaged(store.layout.zarr / "zarr.json", what)
    return store
