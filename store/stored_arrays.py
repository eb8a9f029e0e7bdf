"""The arrays of a store as they lie on disk: their metadata checked, their bytes decoded or found damaged."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, IncompleteStore
from agiqa.store.arrays import object_rows
from agiqa.store.checks import UNREADABLE, check_array, check_attributes, damaged, empty_array, open_group
from agiqa.store.layout import PULL_RECORD, ROW_ARRAYS, StoreLayout
from agiqa.store.listings import read_manifest, read_record
from agiqa.store.objects import ObjectCodec


class StoredArrays:
    """What every reader of a store needs: any of its arrays, in whole or by rows, in the bits of the store."""

    def __init__(self, path: Path) -> None:
        """Read the store's attributes. Raises SchemaError where `path` is no store of a version read here."""
        self.path = path
        self.layout = StoreLayout(path)
        self.group = open_group(self.layout)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._codecs: dict[str, ObjectCodec] = {}
        self.attributes: dict[str, Any] = dict(self.group.attrs)
        self.geometry = check_attributes(path, self.attributes)
        self.id: str = str(self.attributes["id"])
        self.provenance: dict[str, Any] = self.attributes["provenance"]

    @property
    def location(self) -> str:
        """Where the store is: its path, or the URL at which it is read in place."""
        return str(self.path)

    @property
    def is_complete(self) -> bool:
        """Whether the store was sealed; so is a part that was pulled of a sealed store."""
        return self.layout.manifest.exists()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """MANIFEST.json as it was when it was first looked at: the labels that it lists may have been replaced since.

        Raises DamagedStore where it is not that of this store.
        """
        return read_manifest(self.layout.manifest, store_id=self.id)

    @cached_property
    def pulled_units(self) -> list[int] | None:
        """The units that are here of a store that was pulled in part; None for any other store."""
        if not self.is_complete or self.manifest["state"] != "partial":
            return None
        return [int(unit) for unit in self.manifest["units"]]

    @property
    def state(self) -> str:
        """`unfinished`, `complete`, or `partial` for a store of which some units were pulled."""
        if not self.is_complete:
            return "unfinished"
        return "complete" if self.pulled_units is None else "partial"

    @property
    def remedy(self) -> str:
        """How a store without all its units gets the rest."""
        if (self.path / PULL_RECORD).exists():
            return "A pull into it was cut off: run the same `agiqa store pull` again to finish it."
        if self.pulled_units is not None:
            return "It was pulled in part: `agiqa store pull` it again, with the items you need or without --items."
        maker = "extract"
        if "source" in self.provenance:
            maker = "store sketch" if self.attributes["encoding"] == "sketch" else "store convert"
        return f"Run the same `agiqa {maker}` again to finish it."

    def whole(self, name: str) -> NDArray[Any]:
        """All values of an array of the index or of the model, not by Zarr, which takes what is missing for zeros.

        Raises as `array`, DamagedStore where bytes are damaged, and StoreError where memory does not suffice.
        """
        array = self.array(name)
        values = empty_array(self.path, repr(name), array.shape, array.dtype)
        for start in range(0, len(values), object_rows(array)):
            stop = min(start + object_rows(array), len(values))
            values[start:stop] = self.stored_rows(name, start, stop)
        return values

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

    def _have(self, path: Path) -> None:
        """Called before the object at `path` is read: where a remote store gets it, if it is not here yet."""

    def array(self, name: str) -> zarr.Array[Any]:
        """The Zarr array `name`. Raises IncompleteStore when it is not there (yet)."""
        if name in self._arrays:
            return self._arrays[name]
        try:
            found = self.group[name]
        except UNREADABLE as error:
            there = (self.layout.zarr / name / "zarr.json").exists()
            if there or self.is_complete:
                what = f"the metadata of {name} cannot be read ({error})" if there else f"it has no array {name}"
                raise damaged(self.path, what) from error
            message = f"{self.path} has no array {name!r} yet. {self.remedy}"
            raise IncompleteStore(message) from None
        if not isinstance(found, zarr.Array):
            raise damaged(self.path, f"{name} is a group where an array was expected")
        check_array(self.path, name, found, self.geometry, self.attributes)
        self._arrays[name] = found
        return found

    def _attribute(self, name: str, key: str) -> Any:
        if key not in self.array(name).attrs:
            raise damaged(self.path, f"{name} has no attribute {key}")
        return self.array(name).attrs[key]

    def stored_rows(self, name: str, start: int, stop: int, *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows `start` to `stop` of the array `name` as they are stored; Zarr is asked for the array's shape only.

        Rows of one object can be decoded into `out`: memory that was never used costs as much time as decoding.
        Raises as `array`, and DamagedStore where bytes are damaged.
        """
        if name not in self._codecs:
            self._codecs[name] = ObjectCodec.of(self.array(name))
        codec, parts, rows = self._codecs[name], list[NDArray[Any]](), name in ROW_ARRAYS
        while start < stop or not parts:
            position = start // codec.rows
            first, end = position * codec.rows, min(stop, (position + 1) * codec.rows)
            path = self.layout.object_of(name, position, dimensions=1 + len(codec.row_shape))
            with self._decoding(f"unit {start // self.geometry.unit_rows} of {name!r}" if rows else repr(name)):
                parts.append(self._read_object(codec, path, start - first, max(start, end) - first, out))
            start = max(start + 1, end)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_object(
        self, codec: ObjectCodec, path: Path, start: int, stop: int, out: NDArray[Any] | None
    ) -> NDArray[Any]:
        self._have(path)
        try:
            self._check_size(path)
            return codec.read(path, start, stop, out=out)
        except FileNotFoundError:  # all zero, so never stored
            if self._is_recorded(path):
                raise
            if out is None:
                return np.zeros((stop - start, *codec.row_shape), codec.dtype)
            out[...] = 0
            return out

    def _check_size(self, path: Path) -> None:
        """Raise ValueError for the object of another unit or store in a sealed one, which is sound in itself."""
        size = path.stat().st_size
        recorded = self._recorded_bytes.get(self._name(path)) if self.is_complete else size
        if recorded != size:
            listed = "does not list it" if recorded is None else f"lists {recorded}"
            message = f"it has {size} bytes, {self.layout.manifest.name} {listed}"
            raise ValueError(message)

    @cached_property
    def _recorded_bytes(self) -> dict[str, int]:
        return {entry["path"]: entry["bytes"] for entry in self.manifest["objects"]}

    def _is_recorded(self, path: Path) -> bool:
        """Whether the store's records list the object at `path`."""
        if self.is_complete:
            return self._name(path) in self._recorded_bytes
        records = sorted(self.layout.commits.glob("*.json"))
        return any(entry["path"] == self._name(path) for record in records for entry in read_record(record))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()
