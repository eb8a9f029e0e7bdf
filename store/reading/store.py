"""Reading a store: its items, its rows, and the arrays of the model that give the rows their meaning."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, DataError, IncompleteStore, ViewRefused
from agiqa.store.format.arrays import Geometry, rows_dtype, storage_dtype, to_float32
from agiqa.store.format.artefacts import Basis, Scale
from agiqa.store.format.items import Items, count_items
from agiqa.store.format.layout import LM_HEAD_NAMED_IN, StoreLayout
from agiqa.store.format.manifest import content_hash, has_listed_metadata, has_planned_attributes, read_recorded_items
from agiqa.store.format.metadata import damaged, require_no_pull
from agiqa.store.reading.by_name import ByName
from agiqa.store.reading.stored_arrays import StoredArrays, empty_array


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """The rows of several items, one item after the other, in the bits of the store."""

    rows: NDArray[Any]
    """(tokens, width); uint16 for the logical dtype bfloat16."""
    roles: NDArray[np.uint8]
    """(tokens,), values of TOKEN_ROLES."""
    offsets: NDArray[np.int64]
    """(items + 1,): item k of the request is rows[offsets[k] : offsets[k + 1]]."""
    logical_dtype: str

    def float32(self) -> NDArray[np.float32]:
        """The rows as float32, (tokens, width)."""
        return to_float32(self.rows, self.logical_dtype)


class Store(ByName, StoredArrays):
    """A feature store in a local folder; `agiqa.store.open_store` opens it."""

    def __init__(
        self, path: Path, *, layout: StoreLayout | None = None, manifest: dict[str, Any] | None = None
    ) -> None:
        """As `StoredArrays`."""
        super().__init__(path, layout=layout, manifest=manifest)
        self.encoding: str = str(self.attributes["encoding"])
        self.logical_dtype: str = str(self.attributes["logical_dtype"])
        self.dtype = rows_dtype(self.encoding, self.logical_dtype)
        self._value_dtype = storage_dtype(self.logical_dtype)
        self.array("features")

    @property
    def width(self) -> int:
        """Values per token, see `Geometry.width`."""
        return self.geometry.width

    @property
    def keeps_logits(self) -> bool:
        """Whether raw logits are stored beside the hidden states."""
        return "kept_logits" in self.provenance

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

    def _count_items(self) -> int:
        return count_items(self.layout.items)

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """Tokens per item, (items,)."""
        return self._checked_index["n_tokens"]

    @cached_property
    def row_starts(self) -> NDArray[np.int64]:
        """First row of each item, (items,)."""
        return self._index("row_start")

    @property
    def row_ends(self) -> NDArray[np.int64]:
        """One past the last row of each item, (items,)."""
        return self.row_starts + self.n_tokens

    @cached_property
    def units(self) -> NDArray[np.int32]:
        """Unit of each item, (items,)."""
        return self._index("unit")

    @cached_property
    def item_keys(self) -> NDArray[np.uint8]:
        """sha256 of each item's image and conversation, (items, 32)."""
        return self._index("item_key")

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """Per item, a value of ITEM_STATUS, (items,)."""
        return self._index("status")

    def _index(self, name: str) -> NDArray[Any]:
        arrays = self._checked_index
        return arrays[name] if name in arrays else self.whole(f"index/{name}")

    @cached_property
    def _checked_index(self) -> dict[str, NDArray[Any]]:
        """The three arrays with the addresses of items; read only if all arrays of the index have a row per item."""
        count = self._count_items()
        for name in ("n_tokens", "row_start", "unit", "item_key", "status"):
            if self.array(f"index/{name}").shape[:1] != (count,):
                self.require_in_place()
                raise damaged(self.path, f"index/{name} does not have one entry for each of {count} items")
        arrays = {name: self.whole(f"index/{name}") for name in ("n_tokens", "row_start", "unit")}
        _check_index(self.path, self.geometry, **arrays)
        return arrays

    def committed_units(self) -> list[int]:
        """Units whose features are finished, ascending: those with a commit record, or all that a sealed store has."""
        if self.is_sealed:
            pulled = self.pulled_units
            return list(range(self.geometry.units)) if pulled is None else pulled
        return [unit for unit in range(self.geometry.units) if self.layout.commit(unit).exists()]

    def items_of(self, unit: int) -> NDArray[np.int64]:
        """Positions of the items in `unit`."""
        return np.flatnonzero(self.units == unit)

    def rows_used(self, unit: int) -> int:
        """Number of rows of `unit` that belong to items."""
        return int(self.n_tokens[self.units == unit].sum())

    def read_unit(self, unit: int, array: str = "features") -> NDArray[Any]:
        """The rows of the items of `unit` in `features`, `tokens/ids` or `tokens/roles`, in the bits of the store."""
        first = unit * self.geometry.unit_rows
        return self.stored_rows(array, first, first + self.rows_used(unit))

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """The rows of `items` (positions), in that order. Decodes only the chunks that hold them, each once.

        Raises DataError for invalid positions, IncompleteStore if the unit of an item is not finished, and DamagedStore
        if a checksum does not match.
        """
        wanted = item_positions(items, count=len(self.n_tokens), where=self.location)
        self._require_committed(wanted)
        offsets = np.concatenate([[0], np.cumsum(self.n_tokens[wanted], dtype=np.int64)])
        rows = empty_array(self.path, f"{len(wanted)} items", (int(offsets[-1]), self.width), self._value_dtype)
        roles = np.empty(int(offsets[-1]), np.uint8)
        ends = self.row_ends
        for places in self._runs(wanted):
            items_of_run = wanted[places]
            first, last = int(self.row_starts[items_of_run[0]]), int(ends[items_of_run].max())
            run_roles = self.stored_rows("tokens/roles", first, last)
            block = slice(int(offsets[places[0]]), int(offsets[places[-1] + 1]))
            if self.encoding != "int8" and self._are_contiguous(places, items_of_run):
                self.stored_rows("features", first, last, out=rows[block])
                roles[block] = run_roles
                continue
            run_rows = self.rows_at(first, last)
            for place, item in zip(places.tolist(), items_of_run.tolist(), strict=True):
                source = slice(int(self.row_starts[item]) - first, int(ends[item]) - first)
                target = slice(int(offsets[place]), int(offsets[place + 1]))
                rows[target] = run_rows[source]
                roles[target] = run_roles[source]
        return TokenRows(rows=rows, roles=roles, offsets=offsets, logical_dtype=self.logical_dtype)

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
        """Tokens `start` to `stop` of `item`, of `features` or `logits`, in the bits of `logical_dtype`.

        Raises as `read`.
        """
        self._require_committed(item_positions([item], count=len(self.n_tokens), where=self.location))
        first = int(self.row_starts[item])
        return self.rows_at(first + start, first + stop, array=array)

    def rows_at(self, start: int, stop: int, *, array: str = "features") -> NDArray[Any]:
        """Rows by address, all of one unit, in the bits of `logical_dtype`; rescales those of `int8`.

        Raises DamagedStore if a checksum does not match.
        """
        rows = self.stored_rows(array, start, stop)
        if self.encoding != "int8":
            return rows
        return self.scale.decode(rows, self.stored_rows("tokens/scale", start, stop))

    @cached_property
    def scale(self) -> Scale:
        """The scale of an `int8` store."""
        mean, rms = self.whole("scale/mean"), self.whole("scale/rms")
        return Scale(mean=mean, rms=rms, calibration=str(self._attribute("scale/mean", "calibration")))

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

    @cached_property
    def content(self) -> str:
        """The `content_hash` of a sealed store; the id of an unfinished one."""
        if not self.is_sealed:
            return self.id
        return content_hash((entry["path"], entry["sha256"]) for entry in self.manifest["objects"])

    @property
    def lm_head_sha256(self) -> str:
        """The language-model head of the features: sha256 of its bits in row-major order."""
        return str(self._attribute(LM_HEAD_NAMED_IN[self.encoding], "lm_head_sha256"))

    def lm_head(self) -> NDArray[np.float32]:
        """The language-model head W_lm, (V, D) float32. Raises ViewRefused if the store has none."""
        return to_float32(*self.lm_head_bits())

    def lm_head_bits(self) -> tuple[NDArray[Any], str]:
        """W_lm (V, D) in the bits of the model, and their logical dtype. Raises ViewRefused if the store has none."""
        if self.encoding not in ("hidden", "int8"):
            message = f"{self.path} holds {self.encoding} features without W_lm; read it from the store it came from."
            raise ViewRefused(message)
        bits = np.ascontiguousarray(self.whole("lm_head/weight"))
        if hashlib.sha256(bits.data).hexdigest() != self.lm_head_sha256:
            message = (
                f"{self.path}: lm_head/weight does not have the sha256 that the store states. Copy the store again."
            )
            raise DamagedStore(message)
        logical_dtype = str(self._attribute("lm_head/weight", "logical_dtype"))
        if storage_dtype(logical_dtype) != bits.dtype:
            raise damaged(self.path, f"lm_head/weight is {bits.dtype}, which cannot be {logical_dtype}")
        return bits, logical_dtype

    def basis(self) -> Basis:
        """The basis of a sketch. Raises ViewRefused for other encodings."""
        if self.encoding != "sketch":
            message = (
                f"{self.path} holds {self.encoding}, which has no basis. "
                "`agiqa store sketch STORE OUT --rank R` makes a sketch of it."
            )
            raise ViewRefused(message)
        parts: dict[str, Any] = {name: self.whole(f"basis/{name}") for name in ("map", "q", "energy", "mean")}
        if self._attribute("basis/q", "rank") != self.width or parts["map"].shape[1:] != parts["energy"].shape:
            raise damaged(self.path, "the arrays of its basis do not fit each other")
        for name in ("id", "method", "lm_head_sha256", "calibration"):
            parts[name] = str(self._attribute("basis/q", name))
        return Basis(rank=self.width, **parts)


def _check_index(
    path: Path,
    geometry: Geometry,
    *,
    n_tokens: NDArray[np.int32],
    row_start: NDArray[np.int64],
    unit: NDArray[np.int32],
) -> None:
    """Raise DamagedStore unless items follow each other in units without gap or overlap; names the first wrong item.

    The three arrays are (items,).
    """
    lengths = n_tokens.astype(np.int64)
    begin = np.clip(unit, 0, geometry.units).astype(np.int64) * geometry.unit_rows
    inside = (lengths >= 0) & (unit >= 0) & (unit < geometry.units)
    inside &= (row_start >= begin) & (row_start <= begin + geometry.unit_rows)
    inside &= lengths <= geometry.unit_rows - (row_start - begin) * inside
    if not inside.all():
        item = int(np.argmin(inside))
        what = f"{lengths[item]} rows from {row_start[item]} in unit {unit[item]}"
        raise damaged(path, f"its index says that item {item} has {what}, which is outside of that unit")
    same = np.diff(unit, prepend=-1) == 0
    expected = np.where(same, np.concatenate([[0], (row_start + lengths)[:-1]]), begin) if len(unit) else begin
    placed = (expected == row_start) & (np.diff(unit, prepend=0) >= 0)
    if not placed.all():
        item = int(np.argmin(placed))
        what = f"item {item} begins at row {row_start[item]} of unit {unit[item]}, where {expected[item]} was next"
        raise damaged(path, f"its index says that {what}")


def item_positions(items: Sequence[int] | NDArray[Any], *, count: int, where: str) -> NDArray[np.int64]:
    """`items` as positions in a store at `where` with `count` items, (items,). Raises DataError for invalid ones."""
    wanted = np.asarray(items)
    if wanted.size == 0:
        return np.zeros(0, np.int64)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.max() >= count:
        message = (
            f"{where} has {count} items, read by their positions, whole numbers from 0 to {count - 1}; got "
            f"{np.array2string(wanted, threshold=5)}. `items.names` of the store has their names, in that order."
        )
        raise DataError(message)
    return wanted.astype(np.int64)


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
