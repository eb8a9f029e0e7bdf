"""Reading a store: its items, its rows, and the model's arrays that give the rows a meaning."""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, IncompleteStore, SchemaError, ViewRefused
from agiqa.store.arrays import Geometry
from agiqa.store.basis import Basis, load_basis
from agiqa.store.bits import to_float32
from agiqa.store.files import read_json, sha256_of_file
from agiqa.store.items import Items, read_items
from agiqa.store.layout import ENCODINGS, FORMAT, VERSION, StoreLayout


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


class Store:
    """A feature store on a local disk; open one with `open_store`."""

    def __init__(self, path: Path) -> None:
        """Read the store's attributes. Raises SchemaError where `path` is no store of a version read here."""
        self.path = path
        self.layout = StoreLayout(path)
        self.group = _open_group(self.layout)
        attributes = dict(self.group.attrs)
        _check_schema(path, attributes)
        self.id: str = str(attributes["id"])
        self.encoding: str = str(attributes["encoding"])
        self.logical_dtype: str = str(attributes["logical_dtype"])
        self.provenance: dict[str, Any] = _as_dict(attributes["provenance"])
        numbers = {name: int(str(attributes[name])) for name in ("units", "unit_rows", "chunk_rows", "width")}
        self.geometry = Geometry(**numbers)

    @property
    def width(self) -> int:
        """Values per token: hidden size D, or sketch rank r."""
        return self.geometry.width

    @property
    def is_complete(self) -> bool:
        """Whether the store was sealed."""
        return self.layout.manifest.exists()

    @property
    def items(self) -> Items:
        """Names, prompts, splits and labels of the items."""
        return self._items

    @cached_property
    def _items(self) -> Items:
        if self.is_complete:
            recorded = read_json(self.layout.manifest)["labels"]["sha256"]
            if not self.layout.items.exists() or sha256_of_file(self.layout.items) != recorded:
                message = f"{self.layout.items} is not the item table that the manifest lists. Copy the store again."
                raise DamagedStore(message)
        items = read_items(self.layout.items)
        if len(items) != len(self.n_tokens):
            message = f"{self.layout.items} has {len(items)} rows, the index {len(self.n_tokens)} items."
            raise DamagedStore(message)
        return items

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """Tokens per item, (items,)."""
        return self._n_tokens

    @cached_property
    def _n_tokens(self) -> NDArray[np.int32]:
        return self._index("n_tokens")

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

    @property
    def remedy(self) -> str:
        """How an unfinished store is finished."""
        maker = "store sketch" if "source" in self.provenance else "extract"
        return f"Run the same `agiqa {maker}` again to finish it."

    def _index(self, name: str) -> NDArray[Any]:
        return self._whole(f"index/{name}")

    def _whole(self, name: str) -> NDArray[Any]:
        array = self.array(name)
        with self._decoding(f"{name!r}"):
            return np.asarray(array[...])

    @contextmanager
    def _decoding(self, what: str) -> Generator[None]:
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            message = (
                f"{self.path}: {what} cannot be decoded, its bytes are damaged ({error}). "
                f"`agiqa store verify --level full {self.path}` names all that is damaged."
            )
            raise DamagedStore(message) from error

    def array(self, name: str) -> zarr.Array[Any]:
        """The Zarr array `name`. Raises IncompleteStore when it is not there (yet)."""
        try:
            found = self.group[name]
        except KeyError:
            message = f"{self.path} has no array {name!r} yet. {self.remedy}"
            raise IncompleteStore(message) from None
        if not isinstance(found, zarr.Array):
            message = f"{self.path}: {name!r} is a group where an array was expected."
            raise DamagedStore(message)
        return found

    def committed_units(self) -> list[int]:
        """Units whose features are on disk with a commit record, ascending; all of them once the store is sealed."""
        if self.is_complete:
            return list(range(self.geometry.units))
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
        rows, used = self.array(array), self.rows_used(unit)
        with self._decoding(f"unit {unit} of {array!r}"):
            return np.asarray(rows[first : first + used])

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """The rows of `items` (positions), in that order; each unit is decoded once.

        Raises IncompleteStore when an item's unit was never committed, naming the item; DamagedStore when a
        checksum does not match.
        """
        wanted = np.asarray(items, np.int64)
        self._require_committed(wanted)
        offsets = np.concatenate([[0], np.cumsum(self.n_tokens[wanted], dtype=np.int64)])
        rows = np.empty((int(offsets[-1]), self.width), self.array("features").dtype)
        roles = np.empty(int(offsets[-1]), np.uint8)
        for unit in np.unique(self.units[wanted]).tolist():
            unit_rows = self.unit_rows(unit)
            unit_roles = self.unit_rows(unit, "tokens/roles")
            for place in np.flatnonzero(self.units[wanted] == unit):
                start = int(self.row_starts[wanted[place]]) - unit * self.geometry.unit_rows
                source = slice(start, start + int(self.n_tokens[wanted[place]]))
                target = slice(int(offsets[place]), int(offsets[place + 1]))
                rows[target] = unit_rows[source]
                roles[target] = unit_roles[source]
        return TokenRows(rows=rows, roles=roles, offsets=offsets, logical_dtype=self.logical_dtype)

    def _require_committed(self, wanted: NDArray[np.int64]) -> None:
        if self.is_complete:
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
    def lm_head_sha256(self) -> str:
        """Which language-model head the features belong to: sha256 of its bits in row-major order."""
        source = "lm_head/weight" if self.encoding == "hidden" else "basis/q"
        return str(self.array(source).attrs["lm_head_sha256"])

    def lm_head(self) -> NDArray[np.float32]:
        """The language-model head W_lm, (V, D) float32. Raises ViewRefused where the store has none."""
        if self.encoding != "hidden":
            message = f"{self.path} holds a {self.encoding}, without W_lm; read it from the store it came from."
            raise ViewRefused(message)
        array = self.array("lm_head/weight")
        bits = self._whole("lm_head/weight")
        if hashlib.sha256(bits.tobytes()).hexdigest() != self.lm_head_sha256:
            message = f"{self.path}: lm_head/weight is not the head that its hash names. Copy the store again."
            raise DamagedStore(message)
        return to_float32(bits, str(array.attrs["logical_dtype"]))

    def basis(self) -> Basis:
        """The basis of a sketch. Raises ViewRefused on other encodings."""
        if self.encoding != "sketch":
            message = (
                f"{self.path} holds {self.encoding}, which has no basis. "
                "`agiqa store sketch STORE OUT --rank R` makes a sketch of it."
            )
            raise ViewRefused(message)
        self.array("basis/q")
        with self._decoding("the basis"):
            return load_basis(self.group)


def is_planned(path: Path) -> bool:
    """Whether `path` holds a store, finished or not."""
    layout = StoreLayout(path)
    return layout.plan_commit.exists() or layout.manifest.exists()


def open_store(path: str | Path, *, allow_partial: bool = False) -> Store:
    """Open the feature store at `path`.

    Raises SchemaError where `path` is no store or of an unknown version, and IncompleteStore for a store that
    was never sealed unless `allow_partial` is set.
    """
    store = Store(Path(path))
    if not allow_partial and not store.is_complete:
        done = len(store.committed_units())
        message = (
            f"{path} is incomplete: {done} of {store.geometry.units} units are finished and it is not sealed. "
            f"{store.remedy}"
        )
        raise IncompleteStore(message)
    return store


def _open_group(layout: StoreLayout) -> zarr.Group:
    if not (layout.zarr / "zarr.json").exists():
        message = f"{layout.root} is not a feature store: it has no {layout.zarr.name}/zarr.json."
        raise SchemaError(message)
    try:
        return zarr.open_group(layout.zarr, mode="r")
    except (ValueError, TypeError, KeyError) as error:
        message = f"{layout.zarr}/zarr.json cannot be read ({error}). Copy the store again, or extract it again."
        raise DamagedStore(message) from error


def _check_schema(path: Path, attributes: dict[str, Any]) -> None:
    found, version = attributes.get("format"), attributes.get("version")
    if found != FORMAT or version != VERSION:
        message = f"{path} is {found} v{version}; this agiqa reads {FORMAT} v{VERSION}."
        raise SchemaError(message)
    if attributes.get("encoding") not in ENCODINGS:
        message = f"{path}: encoding {attributes.get('encoding')!r}; this agiqa reads {', '.join(ENCODINGS)}."
        raise SchemaError(message)


def _as_dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        message = f"A store's provenance is {type(value).__name__}, expected an object."
        raise SchemaError(message)
    return {str(key): entry for key, entry in value.items()}
