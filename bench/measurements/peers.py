"""The formats that store.py compares: each writes and reads the same rows in a process of its own.

Run by path (`python -P bench/measurements/peers.py`, the request as JSON on the standard input), so that a measured
process imports only the libraries of its format.
"""

import hashlib
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.store import Items, StorePlan, UnitWriter, create_store, create_whole_array, open_store, seal
from agiqa.store.disk.files import files_below, sync_file
from agiqa.store.format.arrays import FEWEST_UNITS, SHARD_BYTES, chunk_rows_for, storage_dtype

TYPICAL_LENGTH = 477
"""Tokens of a conversation about one image, image tokens included."""
LARGE_WIDTH = 4096
"""Hidden size of an 8B model."""
_CHUNK_CACHE_BYTES = 64 << 20
"""Chunk cache of h5py. Its default holds few chunks, so a chunk that two items share would be decoded twice."""

Read = Callable[[Sequence[int]], list[NDArray[Any]]]
"""Reads items by position; gives the rows of each, (tokens, width) in storage bits."""


class Source:
    """The rows that every format writes: one raw file and the length of each item."""

    def __init__(self, folder: Path) -> None:
        """Open what `save_source` wrote in `folder`."""
        self.folder = folder
        about = np.load(folder / "about.npz")
        self.width = int(about["width"])
        self.logical_dtype = str(about["logical_dtype"])
        self.offsets: NDArray[np.int64] = about["offsets"]
        """(items + 1,): item k is rows offsets[k] to offsets[k + 1]."""
        self.seconds = 0.0
        """Time spent in `rows` so far; it does not count as writing."""
        self.dtype = storage_dtype(self.logical_dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` as a new array (stop - start, width)."""
        started = time.perf_counter()
        count, offset = (stop - start) * self.width, start * self.row_bytes
        rows = np.fromfile(self.folder / "rows.raw", self.dtype, count=count, offset=offset).reshape(-1, self.width)
        self.seconds += time.perf_counter() - started
        return rows

    def item(self, position: int) -> NDArray[Any]:
        """The rows of one item."""
        return self.rows(int(self.offsets[position]), int(self.offsets[position + 1]))

    def blocks(self, rows: int) -> Generator[tuple[int, NDArray[Any]]]:
        """All rows in blocks of `rows`, each with its first row."""
        total = int(self.offsets[-1])
        for start in range(0, total, rows):
            yield start, self.rows(start, min(start + rows, total))


def save_source(
    folder: Path, lengths: NDArray[np.int64], blocks: Iterable[NDArray[Any]], *, width: int, logical_dtype: str
) -> Source:
    """Write a source into the new `folder`: items of `lengths`; `blocks` yields their rows (storage bits)."""
    folder.mkdir()
    with (folder / "rows.raw").open("wb") as file:
        for block in blocks:
            block.tofile(file)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.savez(folder / "about.npz", offsets=offsets, width=width, logical_dtype=logical_dtype)
    return Source(folder)


class Peer(ABC):
    """A format: how it writes a source into an empty folder, and how it reads items back."""

    modules: tuple[str, ...] = ()
    """Modules that it imports."""

    @abstractmethod
    def write(self, source: Source, folder: Path) -> None:
        """Write all items of `source`."""

    @abstractmethod
    def open(self, folder: Path) -> AbstractContextManager[Read]:
        """A context whose value reads items from `folder`."""

    def row_files(self, folder: Path) -> list[Path]:
        """The files that hold rows: all of them, except for a feature store."""
        return files_below(folder)


class RowsPeer(Peer):
    """A format of one (rows, width) array beside the offsets of the items."""

    def write(self, source: Source, folder: Path) -> None:
        """Write the rows and `offsets.npy`."""
        np.save(folder / "offsets.npy", source.offsets)
        self.write_rows(source, folder)

    @contextmanager
    def open(self, folder: Path) -> Generator[Read]:
        """Read by slices of the array."""
        offsets = np.load(folder / "offsets.npy")
        with self.open_rows(folder) as rows:
            yield lambda items: [rows[int(offsets[item]) : int(offsets[item + 1])] for item in items]

    @abstractmethod
    def write_rows(self, source: Source, folder: Path) -> None:
        """Write the array."""

    @abstractmethod
    def open_rows(self, folder: Path) -> AbstractContextManager[Any]:
        """The array, to be sliced."""


class Memmap(RowsPeer):
    """A raw .npy file mapped into memory; reading gives views, whose pages are loaded on access."""

    def write_rows(self, source: Source, folder: Path) -> None:
        shape = (int(source.offsets[-1]), source.width)
        mapped = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=source.dtype, shape=shape)
        for start, block in source.blocks(SHARD_BYTES // source.row_bytes):
            mapped[start : start + len(block)] = block
        mapped.flush()

    @contextmanager
    def open_rows(self, folder: Path) -> Generator[NDArray[Any]]:
        yield np.load(folder / "rows.npy", mmap_mode="r")


class Safetensors(RowsPeer):
    """One tensor in one file; its library writes it from memory in one piece."""

    modules = ("safetensors.numpy",)

    def write_rows(self, source: Source, folder: Path) -> None:
        rows = source.rows(0, int(source.offsets[-1]))
        import_module("safetensors.numpy").save_file({"rows": rows}, folder / "rows.safetensors")

    @contextmanager
    def open_rows(self, folder: Path) -> Generator[Any]:
        with import_module("safetensors").safe_open(folder / "rows.safetensors", framework="numpy") as file:
            yield file.get_slice("rows")


class Hdf5(RowsPeer):
    """One chunked data set, chunks as in a feature store, byte shuffle and a compressor."""

    def __init__(self, compression: Callable[[], dict[str, Any]], *modules: str) -> None:
        """`compression` gives the compressor as arguments of `create_dataset`, once `modules` are imported."""
        self._compression = compression
        self.modules = ("h5py", *modules)

    def write_rows(self, source: Source, folder: Path) -> None:
        shape = (int(source.offsets[-1]), source.width)
        chunk = min(shape[0], chunk_rows_for(total_rows=shape[0], row_bytes=source.row_bytes))
        with self._file(folder, "w") as file:
            options = {"chunks": (chunk, source.width), "shuffle": True, **self._compression()}
            rows = file.create_dataset("rows", shape, source.dtype, **options)
            for start, block in source.blocks(max(1, SHARD_BYTES // source.row_bytes // chunk) * chunk):
                rows[start : start + len(block)] = block

    @contextmanager
    def open_rows(self, folder: Path) -> Generator[Any]:
        for module in self.modules:
            import_module(module)
        with self._file(folder, "r") as file:
            yield file["rows"]

    @staticmethod
    def _file(folder: Path, mode: str) -> Any:
        return import_module("h5py").File(folder / "rows.h5", mode, rdcc_nbytes=_CHUNK_CACHE_BYTES)


class TorchFiles(Peer):
    """A .pt file per item."""

    modules = ("torch",)

    def write(self, source: Source, folder: Path) -> None:
        torch = import_module("torch")
        for item in range(len(source.offsets) - 1):
            torch.save(as_tensor(source.item(item), source.logical_dtype), folder / f"{item:08d}.pt")

    @contextmanager
    def open(self, folder: Path) -> Generator[Read]:
        torch = import_module("torch")

        def read_one(item: int) -> NDArray[Any]:
            tensor = torch.load(folder / f"{item:08d}.pt", weights_only=True)
            rows: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
            return rows

        yield lambda items: [read_one(item) for item in items]


class Agiqa(Peer):
    """A feature store: planned, filled and sealed, with all its checks."""

    def write(self, source: Source, folder: Path) -> None:
        plan = plan_for(np.diff(source.offsets), source.width, source.logical_dtype)
        store = create_store(folder / "rows.agiqa", plan)
        writer = UnitWriter(store)
        write_small_model(writer)
        for unit in writer.pending():
            items = store.items_of(unit)
            rows = source.rows(int(source.offsets[items[0]]), int(source.offsets[items[-1] + 1]))
            writer.write_unit(unit, rows, seconds=0.0)
        seal(store)

    def row_files(self, folder: Path) -> list[Path]:
        """The files of the features; the other formats hold no tokens, index, labels or records."""
        return files_below(folder / "rows.agiqa" / "store.zarr" / "features" / "c")

    @contextmanager
    def open(self, folder: Path) -> Generator[Read]:
        store = open_store(folder / "rows.agiqa")

        def read(items: Sequence[int]) -> list[NDArray[Any]]:
            found = store.read(items)
            return [found.rows[found.offsets[place] : found.offsets[place + 1]] for place in range(len(items))]

        yield read


PEERS: dict[str, Peer] = {
    "agiqa": Agiqa(),
    "memmap": Memmap(),
    "safetensors": Safetensors(),
    "h5py-gzip": Hdf5(lambda: {"compression": "gzip", "compression_opts": 4}),
    "h5py-zstd": Hdf5(lambda: dict(import_module("hdf5plugin").Zstd(clevel=1)), "hdf5plugin"),
    "torch-files": TorchFiles(),
}


def as_tensor(rows: NDArray[Any], logical_dtype: str) -> Any:
    """A torch tensor of dtype `logical_dtype` that shares the memory of `rows`."""
    torch = import_module("torch")
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if logical_dtype == "bfloat16" else tensor


def plan_for(lengths: NDArray[np.int64], width: int, logical_dtype: str) -> StorePlan:
    """The plan of a store with items of `lengths`, random token ids (which compress worst) and made-up labels."""
    rng = np.random.default_rng(0)
    count = len(lengths)
    names = [f"image_{item:06d}.png" for item in range(count)]
    items = Items(
        names=names,
        prompts=[f"a picture of {item} things on a table, oil on canvas, warm light" for item in range(count)],
        splits=["train" if item % 5 else "test" for item in range(count)],
        generators=[None] * count,
        descriptions=[None] * count,
        labels={"quality": rng.uniform(0, 5, count)},
    )
    return StorePlan(
        encoding="hidden",
        logical_dtype=logical_dtype,
        width=width,
        provenance={"made by": "agiqa.bench.measurements.store"},
        items=items,
        token_ids=[rng.integers(0, 50_000, length).astype(np.int32) for length in lengths.tolist()],
        roles=[np.zeros(length, np.uint8) for length in lengths.tolist()],
        item_keys=[hashlib.sha256(name.encode()).digest() for name in names],
        truncated=[False] * count,
    )


def write_model(writer: UnitWriter, weight: NDArray[Any], logical_dtype: str) -> None:
    """Write the W_lm `weight` (V, D), storage bits, and an empty probe: what a store needs to be sealed."""
    sha256 = hashlib.sha256(np.ascontiguousarray(weight).data).hexdigest()

    def write(group: zarr.Group) -> None:
        attributes = {"logical_dtype": logical_dtype, "lm_head_sha256": sha256}
        create_whole_array(group, "lm_head/weight", weight, attributes=attributes)
        create_whole_array(group, "probe/rows", np.zeros(0, np.int64))
        no_logits = np.zeros((0, len(weight)), np.float32)
        create_whole_array(group, "probe/logits", no_logits, attributes={"logical_dtype": "float32"})

    writer.write_model_arrays(write)


def write_small_model(writer: UnitWriter) -> None:
    """Write a W_lm of eight rows, which takes next to no bytes."""
    write_model(writer, np.ones((8, writer.store.width), np.float32), "float32")


def set_cache(folder: Path, *, cold: bool) -> None:
    """Bring the files below `folder` into the page cache, or drop them from it."""
    for path in files_below(folder):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                file.readall()


def touch(rows: NDArray[Any]) -> int:
    """The sum of all bytes of `rows`, eight at a time, modulo 2^64: reads every value at the speed of the memory."""
    flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    whole = len(flat) // 8 * 8
    total = int(flat[:whole].view(np.uint64).sum(dtype=np.uint64)) + int(flat[whole:].sum(dtype=np.uint64))
    return total % (1 << 64)


def peak_memory() -> int:
    """The most memory (bytes) that this process had resident since it began its program.

    Not `ru_maxrss`: on Linux a child inherits that from the parent's size at the moment of its start.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure_write(peer: Peer, source: Source, folder: Path) -> dict[str, Any]:
    """Write `source` into `folder` and flush every file and folder to the disk; seconds without reading the source."""
    started = time.perf_counter()
    peer.write(source, folder)
    for path in [*folder.rglob("*"), folder]:
        sync_file(path)
    return {"seconds": time.perf_counter() - started - source.seconds}


def measure_read(peer: Peer, folder: Path, reads: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Open, then read each list of items in `reads`; the sum proves that every value was touched."""
    started = time.perf_counter()
    with peer.open(folder) as read:
        opened = time.perf_counter()
        total = sum(touch(rows) for items in reads for rows in read(items)) % (1 << 64)
        ended = time.perf_counter()
    return {"open_seconds": opened - started, "seconds": ended - opened, "sum": total}


def plan_job(request: Mapping[str, Any]) -> dict[str, Any]:
    """Plan a store of D = 4096: everything but features."""
    plan = plan_for(np.full(request["items"], TYPICAL_LENGTH), LARGE_WIDTH, "bfloat16")
    started = time.perf_counter()
    create_store(Path(request["path"]), plan)
    return {"seconds": time.perf_counter() - started}


def open_job(request: Mapping[str, Any]) -> dict[str, Any]:
    """Open a store, then read its item table and index, all that a first read needs."""
    started = time.perf_counter()
    store = open_store(request["path"])
    opened = time.perf_counter()
    count = len(store.items) + len(store.row_starts) + len(store.units)
    return {"seconds": time.perf_counter() - started, "open_seconds": opened - started, "entries": count}


def fill_job(request: Mapping[str, Any]) -> dict[str, Any]:
    """Fill some units of 64 MiB; the peak includes the rows of one unit, which the caller of a writer holds."""
    rows = FEWEST_UNITS * SHARD_BYTES // (2 * LARGE_WIDTH)
    plan = plan_for(np.full(rows // TYPICAL_LENGTH + 1, TYPICAL_LENGTH), LARGE_WIDTH, "bfloat16")
    writer = UnitWriter(create_store(Path(request["path"]), plan))
    # bits of values from .5 to 8: like hidden states, little entropy in the high byte and full entropy in the low one
    shape = (writer.store.geometry.unit_rows, LARGE_WIDTH)
    unit_rows = np.random.default_rng(0).integers(0x3F00, 0x4100, shape, np.uint16)
    written, started = 0, time.perf_counter()
    for unit in writer.pending()[: request["units"]]:
        used = unit_rows[: writer.store.rows_used(unit)]
        writer.write_unit(unit, used, seconds=0.0)
        written += used.nbytes
    return {"write_mb_s": written / 1e6 / (time.perf_counter() - started)}


def _main(request: dict[str, Any]) -> dict[str, Any]:
    peer, jobs = PEERS[request.get("peer", "agiqa")], {"plan": plan_job, "open": open_job, "fill": fill_job}
    for module in peer.modules:
        import_module(module)
    found: dict[str, Any] = {}
    if request["job"] == "write":
        found = measure_write(peer, Source(Path(request["source"])), Path(request["folder"]))
    elif request["job"] == "read":
        found = measure_read(peer, Path(request["folder"]), request["reads"])
    elif request["job"] != "idle":
        found = jobs[request["job"]](request)
    return {**found, "peak_bytes": peak_memory()}


if __name__ == "__main__":
    print(json.dumps(_main(json.load(sys.stdin))))
