"""Fill: write the units of a store, each by one writer. A unit exists if its commit record does; any run can resume."""

import os
import shutil
import socket
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import BusyStore, DamagedStore, DataError
from agiqa.store.disk.files import (
    canonical_json,
    describe_object,
    files_below,
    put_text_if_absent,
    sync_file,
    telling_disk_errors,
    write_bytes_atomically,
    write_text_atomically,
)
from agiqa.store.disk.locks import exclusive_lock, is_held, waiting_lock
from agiqa.store.format.arrays import WritableArrays, finite_rows, object_rows
from agiqa.store.format.layers import LAST, layer_array, token_scale_array
from agiqa.store.format.layout import MODEL_GROUPS, MODEL_LOCK, PULL_RECORD, RECORDS_LOCK
from agiqa.store.format.manifest import check_inside
from agiqa.store.format.metadata import open_group
from agiqa.store.format.objects import ObjectCodec
from agiqa.store.reading.store import Store

_KEPT = "finished units are kept"


class UnitWriter:
    """Writes the units of a planned store, each once, despite kills and other writers."""

    def __init__(self, store: Store) -> None:
        """A writer for `store`, which must be planned and not sealed. Raises as `open_group` if it is gone."""
        self.store = store
        open_group(store.layout)  # Zarr would make the folders of a store that is gone
        self.group = zarr.open_group(WritableArrays(store.layout.zarr), mode="r+", use_consolidated=False)
        self._worker = f"{socket.gethostname()}:{os.getpid()}"

    def pending(self, *, part: tuple[int, int] = (1, 1)) -> list[int]:
        """Units without a commit record, of share K of N; `part` is (K, N), K from 1 to N."""
        share, shares = part
        done = set(self.store.committed_units())
        units = range(share - 1, self.store.geometry.units, shares)
        return [unit for unit in units if unit not in done]

    @contextmanager
    def claim(self, unit: int) -> Generator[bool]:
        """Hold `unit` for this process while inside; yields False if another process holds it or has finished it.

        Raises BusyStore if a pull has replaced the store since it was opened.
        """
        lock = self.store.layout.unit_lock(unit)
        with telling_disk_errors(f"computing unit {unit} of {self.store.path}", _KEPT), exclusive_lock(lock) as held:
            mine = held and not self.store.layout.commit(unit).exists()
            if mine:
                self._require_not_pulled()
            yield mine

    def write_unit(
        self,
        unit: int,
        rows: NDArray[Any],
        *,
        seconds: float,
        scale: NDArray[np.float32] | None = None,
        logits: Callable[[int, int], NDArray[Any]] | None = None,
        layers: Mapping[str, NDArray[Any]] | None = None,
        layer_scales: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Write the features of `unit` and its commit record.

        `rows` is (rows used, width) in the dtype of `features`, the items of the unit one after the other; `seconds` is
        the time of computing them. `scale` (rows used,) belongs to `int8`. `logits(start, stop)` gives the raw logits
        (stop - start, V) of these rows of the unit, in a store that keeps them. `layers` has the rows of every layer
        but the last, as `rows`, and is asked for one at a time; `layer_scales` has their scales in `int8`. Raises
        DataError for rows, layers or scales that do not fit the plan, and with the first item that has a NaN or
        infinite value; and DamagedStore if the disk returns other bytes than were written.
        """
        self._check(unit, self.store.layer_name, rows)
        layers, others = layers or {}, self.store.layers[:-1]
        if set(layers) != set(others):
            message = f"unit {unit} has the layers {_told(layers)} besides the last, the plan expects {_told(others)}."
            raise DataError(message)
        own = {} if scale is None else {self.store.layer_name: scale}
        self._check_scales(unit, {**(layer_scales or {}), **own})
        with telling_disk_errors(f"writing unit {unit} of {self.store.path}", _KEPT):
            objects = self._put("features", unit, rows)
            if scale is not None:
                objects += self._put_scale(unit, self.store.layer_name, scale)
            if logits is not None:
                objects += self._put_logits(unit, len(rows), logits)
            for layer in others:
                objects += self._put_layer(unit, layer, layers[layer])
                if layer_scales is not None:
                    objects += self._put_scale(unit, layer, layer_scales[layer])
            record = {
                "unit": unit,
                "objects": objects,
                "items": len(self.store.items_of(unit)),
                "rows": len(rows),
                "worker": self._worker,
                "seconds": round(seconds, 3),
            }
            layout = self.store.layout
            put_text_if_absent(layout.commit(unit), canonical_json(record), lock=layout.locks / RECORDS_LOCK)

    def writes_model_arrays(self) -> bool:
        """Whether another process, or thread, is writing the arrays of the model at this moment."""
        return is_held(self.store.layout.locks / MODEL_LOCK)

    def write_model_arrays(self, write: Callable[[zarr.Group], None]) -> None:
        """Let `write` create the arrays of the model (MODEL_GROUPS), once per store.

        Other processes wait until the first one has finished. Replaces what a killed run left. Raises BusyStore if a
        pull has replaced the store since it was opened.
        """
        layout = self.store.layout
        doing = f"writing what {self.store.path} keeps of the model"
        with telling_disk_errors(doing, _KEPT), waiting_lock(layout.locks / MODEL_LOCK):
            if layout.model_commit.exists():
                return
            self._require_not_pulled()
            for name in MODEL_GROUPS:  # else the record would list the files of a killed run
                check_inside(self.store.path, layout.zarr / name)
                if (layout.zarr / name).exists():
                    shutil.rmtree(layout.zarr / name)
            write(self.group)
            names = [name for name in MODEL_GROUPS if (layout.zarr / name).exists()]
            files = [path for name in names for path in files_below(layout.zarr / name)]
            for path in files:
                sync_file(path)
            objects = [describe_object(self.store.path, path) for path in files]
            write_text_atomically(layout.model_commit, canonical_json({"objects": objects}))

    def _require_not_pulled(self) -> None:
        """Raise BusyStore if a pull has installed its store here, or is installing it.

        The caller holds the lock of the objects that it is going to write. A pull writes PULLING.json before it checks
        the locks, so at least one of the two notices the other.
        """
        layout = self.store.layout
        if layout.manifest.exists() or (layout.root / PULL_RECORD).exists():
            message = (
                f"A pull replaced {layout.root} while this run was at work on it. The pulled store was not changed; "
                "run the same command again to resume from it."
            )
            raise BusyStore(message)

    def _put_logits(self, unit: int, used: int, logits: Callable[[int, int], NDArray[Any]]) -> list[dict[str, Any]]:
        """Write the raw logits of `unit`, one shard in memory at a time."""
        shard_rows = object_rows(self.store.array("logits"))
        first = unit * self.store.geometry.unit_rows
        objects: list[dict[str, Any]] = []
        for start in range(0, used, shard_rows):
            block = logits(start, min(start + shard_rows, used))
            finite = finite_rows(block, self.store.logical_dtype)
            if not finite.all():
                raise self._not_finite(unit, start + int(np.argmin(finite)))
            objects += self._put("logits", (first + start) // shard_rows, block)
        return objects

    def _put_layer(self, unit: int, layer: str, rows: NDArray[Any]) -> list[dict[str, Any]]:
        self._check(unit, layer, rows)
        return self._put(layer_array(layer), unit, rows)

    def _put_scale(self, unit: int, layer: str, scale: NDArray[np.float32]) -> list[dict[str, Any]]:
        """Write the scales of a layer in `int8`. One that is NaN marks a row that eight bits cannot hold."""
        finite = np.isfinite(scale)
        if not finite.all():
            raise self._not_finite(unit, int(np.argmin(finite)), layer)
        return self._put(token_scale_array(None if layer == self.store.layer_name else layer), unit, scale)

    def _put(self, name: str, position: int, values: NDArray[Any]) -> list[dict[str, Any]]:
        """Write object number `position` of the array `name`, and read it back; returns its entries, none for zeros."""
        array = self.store.array(name)
        codec = ObjectCodec.of(array)
        path = self.store.layout.object_of(name, position, dimensions=array.ndim)
        check_inside(self.store.path, path)
        path.unlink(missing_ok=True)  # left by a killed run, of a unit without a record
        if not values.any():  # an object of zeros is not stored
            return []
        written = write_bytes_atomically(path, codec.encode(values))
        try:
            same = codec.holds(path, values)
        except (ValueError, RuntimeError):
            same = False
        if not same:
            message = f"{path}: the disk returned other bytes than were written. Check the disk, then run again."
            raise DamagedStore(message)
        return [{"path": path.relative_to(self.store.path).as_posix(), **written}]

    def _remedy(self) -> str:
        if self.store.encoding == "sketch":
            return (
                "If the hidden states are finite there, it exceeds the range of the sketch's dtype: store them instead."
            )
        if self.store.encoding == "int8":
            return "If it is finite, it exceeds 65504, the largest value of int8 stores: store hidden states instead."
        return "Try --dtype float32, or leave the item out."

    def _check(self, unit: int, layer: str, rows: NDArray[Any]) -> None:
        used, (width, logical_dtype) = self.store.rows_used(unit), self.store.layer_shape(layer)
        array = self.store.array_of_layer(layer)
        dtype = self.store.array(array).dtype
        if rows.shape != (used, width) or rows.dtype != dtype:
            message = (
                f"unit {unit}: {array} are {rows.dtype} {rows.shape}, the plan expects {dtype} {(used, width)}. "
                "The model does not fit this store."
            )
            raise DataError(message)
        if rows.dtype == np.int8:
            return
        finite = finite_rows(rows, logical_dtype)
        if not finite.all():
            raise self._not_finite(unit, int(np.argmin(finite)), layer)

    def _check_scales(self, unit: int, scales: Mapping[str, NDArray[np.float32]]) -> None:
        """Rows in eight bits mean nothing without their scales, and a reader would take missing ones for zeros."""
        used, expected = self.store.rows_used(unit), self.store.layers if self.store.encoding == "int8" else ()
        if set(scales) != set(expected):
            message = (
                f"unit {unit} has scales of the layers {_told(scales)}, and a store of {self.store.encoding} has those "
                f"of {_told(expected)}. Give a scale for each row of int8, and none for rows of another encoding."
            )
            raise DataError(message)
        for layer, scale in scales.items():
            if scale.shape != (used,) or scale.dtype != np.float32:
                message = (
                    f"unit {unit}: the scales of layer {layer} are {scale.dtype} {scale.shape}, the plan expects "
                    f"float32 {(used,)}: one for each row."
                )
                raise DataError(message)

    def _not_finite(self, unit: int, row_of_unit: int, layer: str = LAST) -> DataError:
        row = unit * self.store.geometry.unit_rows + row_of_unit
        items = self.store.items_of(unit)
        item = int(items[np.searchsorted(self.store.row_starts[items], row, side="right") - 1])
        return DataError(
            f"item {self.store.items.names[item]!r} (unit {unit}): the model gave a NaN or infinite value at "
            f"{'row' if self.store.pooled else 'token'} {row - int(self.store.row_starts[item])}"
            f"{'' if layer == LAST else f' of layer {layer}'}. {self._remedy()}"
        )


def _told(layers: Iterable[str]) -> str:
    return ", ".join(layers) or "none"
