"""The arrays of a store: checks their metadata, and decodes their bytes or reports them as damaged.

A store keeps the listing that it was opened with. A missing object means zeros only if that listing does not name it. A
listed object that is missing, or has another size, is an error.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import BusyStore, DamagedStore, IncompleteStore, StoreError
from agiqa.store.format.arrays import object_rows
from agiqa.store.format.layout import MODEL_GROUPS, PLANNED_ROW_ARRAYS, PULL_RECORD, StoreLayout, is_row_array
from agiqa.store.format.manifest import read_manifest, read_record
from agiqa.store.format.metadata import (
    UNREADABLE,
    check_array,
    check_attributes,
    check_expansion,
    damaged,
    open_group,
)
from agiqa.store.format.objects import ObjectCodec


class StoredArrays:
    """Any array of a store, whole or by rows, in the bits of the store."""

    def __init__(
        self, path: Path, *, layout: StoreLayout | None = None, manifest: dict[str, Any] | None = None
    ) -> None:
        """Read the manifest, unless `manifest` is given, and the root attributes of the store at `path`.

        Raises SchemaError if `path` is no store of a version read here, and DamagedStore if its manifest is invalid or
        that of another store.
        """
        self.path = path
        self.layout = StoreLayout(path) if layout is None else layout
        self._manifest = _manifest_at(self.layout.manifest) if manifest is None else manifest
        self._records: dict[Path, Mapping[str, int]] = {}
        self.group = open_group(self.layout)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._codecs: dict[str, ObjectCodec] = {}
        self.attributes: dict[str, Any] = dict(self.group.attrs)
        self.geometry = check_attributes(path, self.attributes)
        self.id: str = str(self.attributes["id"])
        self._folder = _identity(self.layout.root)
        if self._manifest is not None and self._manifest.get("id") != self.id:
            what = f"it is that of the store {str(self._manifest.get('id'))[:12]}, the metadata of {self.id[:12]}"
            raise damaged(self.layout.manifest if manifest is None else self.location, what)
        if self._manifest is not None and self._manifest.get("version") != self.attributes["version"]:
            what = f"it says version {self._manifest.get('version')}, the metadata {self.attributes['version']}"
            raise damaged(self.layout.manifest if manifest is None else self.location, what)
        self.provenance: dict[str, Any] = self.attributes["provenance"]

    @property
    def location(self) -> str:
        """The path of the store, or the URL where it is read in place."""
        return str(self.path)

    @property
    def is_sealed(self) -> bool:
        """Whether the store had a manifest when it was opened, be it a whole store or the pulled part of one."""
        return self._manifest is not None

    @property
    def manifest(self) -> dict[str, Any]:
        """MANIFEST.json as it was when the store was opened; its labels may have been replaced since.

        Raises IncompleteStore for a store that was not sealed.
        """
        if self._manifest is None:
            message = f"{self.path} is not sealed. {self.remedy}"
            raise IncompleteStore(message)
        return self._manifest

    @cached_property
    def pulled_units(self) -> list[int] | None:
        """The units of a store that was pulled in part; None for any other store."""
        if not self.is_sealed or self.manifest["state"] != "partial":
            return None
        return [int(unit) for unit in self.manifest["units"]]

    @property
    def state(self) -> str:
        """`unfinished`, `complete`, or `partial` for a store that was pulled in part."""
        if not self.is_sealed:
            return "unfinished"
        return "complete" if self.pulled_units is None else "partial"

    @property
    def remedy(self) -> str:
        """What to do to get the missing units."""
        if (self.path / PULL_RECORD).exists():
            return "A pull into it was cut off: run the same `agiqa store pull` again to finish it."
        if self.pulled_units is not None:
            return "It was pulled in part: `agiqa store pull` it again, with the items you need or without --items."
        maker = "extract"
        if "source" in self.provenance:
            maker = "store sketch" if self.attributes["encoding"] == "sketch" else "store convert"
        return f"Run the same `agiqa {maker}` again to finish it."

    def whole(self, name: str) -> NDArray[Any]:
        """All values of an array of the index or of the model. Zarr itself would read missing objects as zeros.

        Raises as `array`, DamagedStore for damaged bytes, and StoreError if memory does not suffice.
        """
        array = self.array(name)
        if name.partition("/")[0] in MODEL_GROUPS:
            check_expansion(self.path, name, array, listed=self._listed_bytes_of_all(name, array))
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
            self.require_in_place()
            message = (
                f"{self.path}: {what} cannot be decoded, its bytes are damaged ({error}). "
                f"`agiqa store verify --level full {self.path}` names all that is damaged."
            )
            raise DamagedStore(message) from error

    def require_in_place(self) -> None:
        """Raise BusyStore if another store took the place of this one since it was opened, as a larger one does."""
        if _identity(self.layout.root) == self._folder:
            return
        with suppress(StoreError):
            if open_group(self.layout).attrs.get("id") == self.id:
                return
        message = (
            f"{self.path} was replaced by another store while it was open, as `agiqa extract` does to add items. Open "
            "it again, or run the same command again."
        )
        raise BusyStore(message)

    def _ensure_here(self, path: Path) -> None:
        """Called before the object at `path` is read; a remote store fetches it here."""

    def array(self, name: str) -> zarr.Array[Any]:
        """The Zarr array `name`, for its shape and attributes.

        Raises IncompleteStore if an unfinished store does not have it yet, and DamagedStore for invalid metadata.
        """
        if name in self._arrays:
            return self._arrays[name]
        try:
            found = self.group[name]
        except UNREADABLE as error:
            there = (self.layout.zarr / name / "zarr.json").exists()
            if there or self.is_sealed:
                what = f"the metadata of {name} cannot be read ({error})" if there else f"it has no array {name}"
                raise damaged(self.path, what) from error
            message = f"{self.path} has no array {name!r} yet. {self.remedy}"
            raise IncompleteStore(message) from None
        if not isinstance(found, zarr.Array):
            raise damaged(self.path, f"{name} is a group where an array was expected")
        check_array(self.path, name, found, self.geometry, self.attributes)
        self._arrays[name] = found
        return found

    def has_array(self, name: str) -> bool:
        """Whether the store has the array `name`, by its listing if it is sealed."""
        if self.is_sealed:
            return f"store.zarr/{name}/zarr.json" in self._recorded_bytes
        return (self.layout.zarr / name / "zarr.json").exists()

    def _attribute(self, name: str, key: str) -> Any:
        if key not in self.array(name).attrs:
            raise damaged(self.path, f"{name} has no attribute {key}")
        return self.array(name).attrs[key]

    def stored_rows(self, name: str, start: int, stop: int, *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows `start` to `stop` of the array `name` as they are stored.

        Decodes the rows of one object into `out` if given: touching new memory takes as long as decoding. Raises as
        `array`, and DamagedStore for damaged bytes.
        """
        if name not in self._codecs:
            self._codecs[name] = ObjectCodec.of(self.array(name))
        codec, parts = self._codecs[name], list[NDArray[Any]]()
        if start >= stop:  # an item without tokens, whose address may be past the last unit
            return np.zeros((0, *codec.row_shape), codec.dtype) if out is None else out
        while start < stop:
            position = start // codec.rows
            first, end = position * codec.rows, min(stop, (position + 1) * codec.rows)
            path = self.layout.object_of(name, position, dimensions=1 + len(codec.row_shape))
            unit = start // self.geometry.unit_rows if is_row_array(name) else None
            listed = self._listed_bytes(name, path, unit)
            with self._decoding(repr(name) if unit is None else f"unit {unit} of {name!r}"):
                parts.append(self._read_object(codec, path, listed, start - first, end - first, out))
            start = end
        self.require_in_place()
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_object(
        self, codec: ObjectCodec, path: Path, listed: int | None, start: int, stop: int, out: NDArray[Any] | None
    ) -> NDArray[Any]:
        """Rows of the object at `path`, which has `listed` bytes, or is absent and all zero if that is None."""
        self._ensure_here(path)
        size = path.stat().st_size if path.exists() else None
        if size != listed:  # as the object of another unit or store, which is sound in itself
            here = "is missing" if size is None else f"has {size} bytes"
            there = "does not list it" if listed is None else f"lists {listed}"
            message = f"it {here}, {self.layout.manifest.name if self.is_sealed else 'its commit record'} {there}"
            raise ValueError(message)
        if size is not None:
            return codec.read(path, start, stop, out=out)
        if out is None:
            return np.zeros((stop - start, *codec.row_shape), codec.dtype)
        out[...] = 0
        return out

    def _listed_bytes_of_all(self, name: str, array: zarr.Array[Any]) -> int:
        """Bytes of all objects of an array of the model."""
        positions = range(-(-array.shape[0] // object_rows(array)))
        paths = [self.layout.object_of(name, position, dimensions=array.ndim) for position in positions]
        return sum(self._listed_bytes(name, path, None) or 0 for path in paths)

    def _record_of(self, name: str, unit: int | None) -> Path:
        """The record of an unfinished store that lists the objects of the array `name`, of this unit if any."""
        if unit is not None and name not in PLANNED_ROW_ARRAYS:
            return self.layout.commit(unit)
        return self.layout.model_commit if name.partition("/")[0] in MODEL_GROUPS else self.layout.plan_commit

    def _listed_bytes(self, array: str, path: Path, unit: int | None) -> int | None:
        """Bytes of the object of `array` at `path` by the store's listing; None for an unlisted object of zeros.

        Raises IncompleteStore if the unit was not pulled, or its record does not exist yet.
        """
        name = path.relative_to(self.path).as_posix()
        if self.is_sealed:
            if unit is not None and self._pulled is not None and unit not in self._pulled:
                message = f"{self.path}: unit {unit} was not pulled. {self.remedy}"
                raise IncompleteStore(message)
            return self._recorded_bytes.get(name)
        record = self._record_of(array, unit)
        if record not in self._records:
            if not record.exists():
                message = f"{self.path}: {name} does not count before commits/{record.name} is there. {self.remedy}"
                raise IncompleteStore(message)
            self._records[record] = _sizes(read_record(record))
        return self._records[record].get(name)

    @cached_property
    def _pulled(self) -> frozenset[int] | None:
        return None if self.pulled_units is None else frozenset(self.pulled_units)

    @cached_property
    def _recorded_bytes(self) -> Mapping[str, int]:
        return _sizes(self.manifest["objects"])


def empty_array(path: Path, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised array for `what` of the store at `path`. Raises StoreError if memory does not suffice."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        message = (
            f"{path}: {what} takes more memory than there is ({error}). Read less at a time; if the store should "
            f"not hold that much, `agiqa store verify --level full {path}` says what is damaged."
        )
        raise StoreError(message) from error


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells the folder from another one of its name; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _sizes(objects: Iterable[Mapping[str, Any]]) -> Mapping[str, int]:
    return {entry["path"]: entry["bytes"] for entry in objects}


def _manifest_at(path: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(path)
    except FileNotFoundError:
        return None
