"""Reading a store: its items, its rows, and the model's arrays that give the rows a meaning."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, IncompleteStore, ViewRefused
from agiqa.store.format.basis import Basis
from agiqa.store.format.bits import rows_dtype, storage_dtype, to_float32
from agiqa.store.format.checks import check_index, check_items, damaged, empty_array, require_no_pull
from agiqa.store.format.items import Items, count_items, item_positions
from agiqa.store.format.layout import LM_HEAD_NAMED_IN, StoreLayout
from agiqa.store.format.listings import are_attributes_of, is_root_metadata_of
from agiqa.store.format.provenance import content_hash
from agiqa.store.format.recorded_items import read_recorded_items
from agiqa.store.format.scaling import Scale
from agiqa.store.reading.stored_arrays import StoredArrays


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """The rows of some items, one after the other, in the bits of the store."""

    rows: NDArray[Any]
    """(tokens, width); uint16 where `logical_dtype` is bfloat16."""
    roles: NDArray[np.uint8]
    """(tokens,), values of TOKEN_ROLES."""
    offsets: NDArray[np.int64]
    """(items + 1,): item k of the request is rows[offsets[k] : offsets[k + 1]]."""
    logical_dtype: str

    def float32(self) -> NDArray[np.float32]:
        """The rows as float32, (tokens, width)."""
        return to_float32(self.rows, self.logical_dtype)


class Store(StoredArrays):
    """A feature store on a local disk; open one with `open_store`."""

    def __init__(
        self, path: Path, *, layout: StoreLayout | None = None, manifest: dict[str, Any] | None = None
    ) -> None:
        """As `StoredArrays`."""
        super().__init__(path, layout=layout, manifest=manifest)
        self.encoding: str = str(self.attributes["encoding"])
        self.logical_dtype: str = str(self.attributes["logical_dtype"])
        self.dtype = rows_dtype(self.encoding, self.logical_dtype)
        self.array("features")

    @property
    def width(self) -> int:
        """Values per token: hidden size D, sketch rank r, or vocabulary V of raw logits."""
        return self.geometry.width

    @property
    def keeps_logits(self) -> bool:
        """Whether the raw logits lie beside the hidden states."""
        return "kept_logits" in self.provenance

    @property
    def items(self) -> Items:
        """Names, prompts, splits and labels of the items."""
        return self._items

    @cached_property
    def _items(self) -> Items:
        return check_items(self.path, self._read_items())

    def _read_items(self) -> Items:
        return read_recorded_items(self.layout)

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
        """The three arrays that addresses come from, none of them read unless all have a row per item."""
        count = self._count_items()
        for name in ("n_tokens", "row_start", "unit", "item_key", "status"):
            if self.array(f"index/{name}").shape[:1] != (count,):
                raise damaged(self.path, f"index/{name} does not have one entry for each of {count} items")
        arrays = {name: self.whole(f"index/{name}") for name in ("n_tokens", "row_start", "unit")}
        check_index(self.path, self.geometry, **arrays)
        return arrays

    def committed_units(self) -> list[int]:
        """Units whose features are on disk with a commit record, ascending; all of them once the store is sealed."""
        if self.is_complete:
            pulled = self.pulled_units
            return list(range(self.geometry.units)) if pulled is None else pulled
        return [unit for unit in range(self.geometry.units) if self.layout.commit(unit).exists()]

    def items_of(self, unit: int) -> NDArray[np.int64]:
        """Positions of the items in `unit`."""
        return np.flatnonzero(self.units == unit)

    def rows_used(self, unit: int) -> int:
        """Rows of `unit` that belong to items; the rest is empty."""
        return int(self.n_tokens[self.units == unit].sum())

    def unit_rows(self, unit: int, array: str = "features") -> NDArray[Any]:
        """The used rows of `unit` of `features`, `tokens/ids` or `tokens/roles`, in the bits of the store."""
        first = unit * self.geometry.unit_rows
        return self.stored_rows(array, first, first + self.rows_used(unit))

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """The rows of `items` (positions), in that order; only the chunks that they lie in are decoded, each once.

        Raises DataError for positions that the store does not have, IncompleteStore when an item's unit was never
        committed, naming the item, and DamagedStore when a checksum does not match.
        """
        wanted = item_positions(items, count=len(self.n_tokens), where=self.location)
        self._require_committed(wanted)
        offsets = np.concatenate([[0], np.cumsum(self.n_tokens[wanted], dtype=np.int64)])
        dtype, shape = storage_dtype(self.logical_dtype), (int(offsets[-1]), self.width)
        rows = empty_array(self.path, f"{len(wanted)} items", shape, dtype)
        roles = np.empty(int(offsets[-1]), np.uint8)
        ends = self.row_ends
        for places in self._runs(wanted):
            items_of_run = wanted[places]
            first, last = int(self.row_starts[items_of_run[0]]), int(ends[items_of_run].max())
            run_roles = self.stored_rows("tokens/roles", first, last)
            block = slice(int(offsets[places[0]]), int(offsets[places[-1] + 1]))
            if self.encoding != "int8" and self._lie_as_asked(places, items_of_run):
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

    def _lie_as_asked(self, places: NDArray[np.int64], items: NDArray[np.int64]) -> bool:
        """Whether the rows of `items`, asked for at `places`, follow each other in the store just so."""
        together = (self.row_ends[items][:-1] == self.row_starts[items][1:]).all()
        return bool(together and (np.diff(places) == 1).all())

    def _runs(self, items: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Places in `items` whose rows lie in one unit and less than a chunk apart, each run by address."""
        order = np.lexsort((items, self.row_starts[items]))
        starts, ends = self.row_starts[items][order], self.row_ends[items][order]
        apart = starts[1:] - np.maximum.accumulate(ends)[:-1] >= self.geometry.chunk_rows
        cuts = np.flatnonzero(apart | (np.diff(self.units[items][order]) != 0)) + 1
        return np.split(order, cuts) if len(order) else []

    def rows_of(self, item: int, start: int, stop: int, *, array: str = "features") -> NDArray[Any]:
        """Tokens `start` to `stop` of `item` of `features` or `logits`, in the bits of `logical_dtype`.

        Raises as `read`.
        """
        self._require_committed(item_positions([item], count=len(self.n_tokens), where=self.location))
        first = int(self.row_starts[item])
        return self.rows_at(first + start, first + stop, array=array)

    def rows_at(self, start: int, stop: int, *, array: str = "features") -> NDArray[Any]:
        """Rows by address, all of one unit, in the bits of `logical_dtype`; those of `int8` are rescaled.

        Whether the unit was committed is not asked. Raises DamagedStore when a checksum does not match.
        """
        rows = self.stored_rows(array, start, stop)
        if self.encoding != "int8":
            return rows
        return self.scale.decode(rows, self.stored_rows("tokens/scale", start, stop))

    @cached_property
    def scale(self) -> Scale:
        """Mean and RMS deviation of the channels, of an `int8` store."""
        mean, rms = self.whole("scale/mean"), self.whole("scale/rms")
        return Scale(mean=mean, rms=rms, calibration=str(self._attribute("scale/mean", "calibration")))

    def _require_committed(self, wanted: NDArray[np.int64]) -> None:
        if self.is_complete and self.pulled_units is None:
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
        """Which bytes the rows are, see `content_hash`; of an unfinished store, whose rows may still come, its id."""
        if not self.is_complete:
            return self.id
        return content_hash((entry["path"], entry["sha256"]) for entry in self.manifest["objects"])

    @property
    def lm_head_sha256(self) -> str:
        """Which language-model head the features belong to: sha256 of its bits in row-major order."""
        return str(self._attribute(LM_HEAD_NAMED_IN[self.encoding], "lm_head_sha256"))

    def lm_head(self) -> NDArray[np.float32]:
        """The language-model head W_lm, (V, D) float32. Raises ViewRefused where the store has none."""
        return to_float32(*self.lm_head_bits())

    def lm_head_bits(self) -> tuple[NDArray[Any], str]:
        """W_lm (V, D) in the bits of the model, and their logical dtype. Raises ViewRefused where there is none."""
        if self.encoding not in ("hidden", "int8"):
            message = f"{self.path} holds {self.encoding} features without W_lm; read it from the store it came from."
            raise ViewRefused(message)
        bits = np.ascontiguousarray(self.whole("lm_head/weight"))
        if hashlib.sha256(bits.data).hexdigest() != self.lm_head_sha256:
            message = f"{self.path}: lm_head/weight is not the head that its hash names. Copy the store again."
            raise DamagedStore(message)
        logical_dtype = str(self._attribute("lm_head/weight", "logical_dtype"))
        if storage_dtype(logical_dtype) != bits.dtype:
            raise damaged(self.path, f"lm_head/weight is {bits.dtype}, which cannot be {logical_dtype}")
        return bits, logical_dtype

    def basis(self) -> Basis:
        """The basis of a sketch. Raises ViewRefused on other encodings."""
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


def is_planned(path: Path) -> bool:
    """Whether `path` holds a store, finished or not."""
    layout = StoreLayout(path)
    return layout.plan_commit.exists() or layout.manifest.exists()


def open_store(path: str | Path, *, allow_partial: bool = False) -> Store:
    """Open the feature store at `path`.

    Raises SchemaError where `path` is no store or of an unknown version, and IncompleteStore for a store that
    was never sealed unless `allow_partial` is set.
    """
    store = _open_as_listed(Path(path))
    if not allow_partial and not store.is_complete:
        done = len(store.committed_units())
        message = (
            f"{path} is incomplete: {done} of {store.geometry.units} units are finished and it is not sealed. "
            f"{store.remedy}"
        )
        raise IncompleteStore(message)
    return store


def _open_as_listed(path: Path) -> Store:
    """The store at `path`, its root metadata those that its manifest, or the record of its plan, lists.

    Raises as Store, IncompleteStore while a pull replaces its objects, and DamagedStore where metadata and listing do
    not belong together. A repair and a seal beside this may have replaced one of them between two looks, so only what
    is found twice counts.
    """
    seen = None
    while True:
        store = Store(path)
        if not store.is_complete:
            require_no_pull(store.layout)
            return _with_planned_attributes(store)
        if is_root_metadata_of(store.layout, store.manifest):
            return store
        if store.manifest == seen:
            raise damaged(store.layout.zarr / "zarr.json", f"it is not what {store.layout.manifest.name} lists")
        seen = store.manifest


def _with_planned_attributes(store: Store) -> Store:
    if not are_attributes_of(store.layout, store.attributes):
        what = f"its attributes are not those that {store.layout.plan_commit.name} records"
        raise damaged(store.layout.zarr / "zarr.json", what)
    return store
