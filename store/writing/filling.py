"""Fill: one writer per unit, a unit exists when its commit record does, and any run can take up the rest."""

import os
import shutil
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import BusyStore, DamagedStore, DataError
from agiqa.store.disk.files import (
    canonical_json,
    describe_object,
    exclusive_lock,
    files_below,
    put_text_if_absent,
    sync_file,
    telling_disk_errors,
    waiting_lock,
    write_bytes_atomically,
    write_text_atomically,
)
from agiqa.store.format.arrays import WritableArrays, object_rows
from agiqa.store.format.bits import finite_rows
from agiqa.store.format.checks import check_inside
from agiqa.store.format.layout import MODEL_GROUPS, PULL_RECORD
from agiqa.store.format.objects import ObjectCodec
from agiqa.store.reading.store import Store

_KEPT = "finished units are kept"


class UnitWriter:
    """Writes the units of a planned store, each once, safely against kills and other writers."""

    def __init__(self, store: Store) -> None:
        """A writer for `store`, which must be planned and not sealed."""
        self.store = store
        self.group = zarr.open_group(WritableArrays(store.layout.zarr), mode="r+", use_consolidated=False)
        self._worker = f"{socket.gethostname()}:{os.getpid()}"

    def pending(self, *, part: tuple[int, int] = (1, 1)) -> list[int]:
        """Units without a commit record in share `part` = (K, N), K from 1 to N."""
        share, shares = part
        done = set(self.store.committed_units())
        units = range(share - 1, self.store.geometry.units, shares)
        return [unit for unit in units if unit not in done]

    @contextmanager
    def claim(self, unit: int) -> Generator[bool]:
        """Hold `unit` for this process; False when another process holds it or has finished it.

        Raises BusyStore where a pull has replaced the store since it was opened.
        """
        lock = self.store.layout.locks / f"{unit:08d}"
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
    ) -> None:
        """Write the features of `unit` and its commit record.

        `rows` is (rows used, width) in the dtype of `features`, the items of the unit one after the other;
        `seconds` is what computing them took. `scale` (rows used,) belongs to `int8`; `logits(start, stop)` gives the
        raw logits (stop - start, V) of these rows of the unit where the store keeps them. Raises DataError naming the
        first item with a NaN or infinite value, and DamagedStore when the disk gives back other bytes than were
        written.
        """
        self._check(unit, rows)
        with telling_disk_errors(f"writing unit {unit} of {self.store.path}", _KEPT):
            objects = self._put("features", unit, rows)
            if scale is not None:
                objects += self._put("tokens/scale", unit, scale)
            if logits is not None:
                objects += self._put_logits(unit, len(rows), logits)
            record = {
                "unit": unit,
                "objects": objects,
                "items": len(self.store.items_of(unit)),
                "rows": len(rows),
                "worker": self._worker,
                "seconds": round(seconds, 3),
            }
            layout = self.store.layout
            put_text_if_absent(layout.commit(unit), canonical_json(record), lock=layout.locks / "records")

    def write_model_arrays(self, write: Callable[[zarr.Group], None]) -> None:
        """Let `write` create the arrays that come from the model (`lm_head`, `basis`, `probe`), once per store.

        Other processes wait here until the first one is done. A part written by a killed run is replaced. Raises
        BusyStore where a pull has replaced the store since it was opened.
        """
        layout = self.store.layout
        doing = f"writing what {self.store.path} keeps of the model"
        with telling_disk_errors(doing, _KEPT), waiting_lock(layout.locks / "model"):
            if layout.model_commit.exists():
                return
            self._require_not_pulled()
            for name in MODEL_GROUPS:  # what a killed run left there would be recorded as if it belonged to them
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
        """Raise BusyStore where a pull has installed its store here, or is installing it.

        The caller holds the lock of what it is going to write. A pull writes PULLING.json before it looks at the locks,
        so at least one of the two sees the other.
        """
        layout = self.store.layout
        if layout.manifest.exists() or (layout.root / PULL_RECORD).exists():
            message = (
                f"{layout.root} was replaced by a pull while this run was at work on it. Nothing of the pull was "
                "changed; run the same command again to go on with what is there."
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

    def _put(self, name: str, position: int, values: NDArray[Any]) -> list[dict[str, Any]]:
        """Write object number `position` of the array `name`, whole, and read it back; its record."""
        array = self.store.array(name)
        codec = ObjectCodec.of(array)
        path = self.store.layout.object_of(name, position, dimensions=array.ndim)
        check_inside(self.store.path, path)
        path.unlink(missing_ok=True)  # what a killed run left of a unit that has no record
        if not values.any():  # zeros only are not stored at all
            return []
        written = write_bytes_atomically(path, codec.encode(values))
        try:
            same = codec.holds(path, values)
        except (ValueError, RuntimeError):
            same = False
        if not same:
            message = f"{path}: the disk gave back other bytes than were written. Check the disk, then run again."
            raise DamagedStore(message)
        return [{"path": path.relative_to(self.store.path).as_posix(), **written}]

    def _remedy(self) -> str:
        if self.store.encoding == "sketch":
            return "If the hidden states are finite there, it left the range of the sketch's dtype: store them instead."
        return "Try --dtype float32, or leave the item out."

    def _check(self, unit: int, rows: NDArray[Any]) -> None:
        used, width = self.store.rows_used(unit), self.store.width
        dtype = self.store.array("features").dtype
        if rows.shape != (used, width) or rows.dtype != dtype:
            message = (
                f"unit {unit}: features are {rows.dtype} {rows.shape}, the plan expects {dtype} {(used, width)}. "
                "The model does not fit this store."
            )
            raise DataError(message)
        if rows.dtype == np.int8:
            return
        finite = finite_rows(rows, self.store.logical_dtype)
        if not finite.all():
            raise self._not_finite(unit, int(np.argmin(finite)))

    def _not_finite(self, unit: int, row_of_unit: int) -> DataError:
        row = unit * self.store.geometry.unit_rows + row_of_unit
        items = self.store.items_of(unit)
        item = int(items[np.searchsorted(self.store.row_starts[items], row, side="right") - 1])
        return DataError(
            f"item {self.store.items.names[item]!r} (unit {unit}): the model gave a NaN or infinite value at "
            f"token {row - int(self.store.row_starts[item])}. {self._remedy()}"
        )
