"""Measurements behind the choice of codecs: `python -m agiqa.bench.measurements.codecs STORE [--out FILE.jsonl]`.

Compresses chunks of a store's features with other Blosc settings, and reads the same bytes through Zarr and through
`agiqa.store`.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import zarr
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]  # has no stub
from numpy.typing import NDArray

from agiqa.bench.measurements.measuring import Line, joined, measured_table, print_tables, result_options
from agiqa.store import Store, open_store

_CHUNKS = 64
_ITEMS = 50
_BLOCK = 512 << 10
SETTINGS: dict[str, tuple[str, int, int, int]] = {
    "zstd 1, shuffle, one block (as stored)": ("zstd", 1, blosc.SHUFFLE, 0),
    "zstd 1, shuffle, blocks of 512 KiB": ("zstd", 1, blosc.SHUFFLE, _BLOCK),
    "zstd 3, shuffle, one block": ("zstd", 3, blosc.SHUFFLE, 0),
    "zstd 7, shuffle, one block": ("zstd", 7, blosc.SHUFFLE, 0),
    "zstd 1, bitshuffle, one block": ("zstd", 1, blosc.BITSHUFFLE, 0),
    "zstd 1, no shuffle, one block": ("zstd", 1, blosc.NOSHUFFLE, 0),
    "lz4 1, shuffle, one block": ("lz4", 1, blosc.SHUFFLE, 0),
}
"""Codec, level, shuffle and bytes per block, 0 for the whole chunk."""


def codec_lines(store: Store) -> Iterator[Line]:
    """Ratio and speed on one core of every setting, over chunks spread evenly over the store."""
    chunk = store.geometry.chunk_rows
    starts = np.linspace(0, store.rows_used(0) - chunk, _CHUNKS).astype(int)
    pieces = [
        np.ascontiguousarray(store.read_unit(unit)[start : start + chunk]) for unit, start in _spread(store, starts)
    ]
    size = sum(piece.nbytes for piece in pieces)
    for name, (codec, level, shuffle, block) in SETTINGS.items():
        packed, seconds = _timed(partial(_compress, pieces, codec, level, shuffle, block))
        _, back = _timed(partial(_decompress, packed, np.empty_like(pieces[0])))
        measured = {
            "ratio": sum(map(len, packed)) / size,
            "compress_mb_s": size / seconds / 1e6,
            "decompress_mb_s": size / back / 1e6,
        }
        yield {"stage": "codec", "name": name, "config": {"chunks": len(pieces)}, "measured": measured}


def _compress(pieces: Sequence[NDArray[Any]], codec: str, level: int, shuffle: int, block: int) -> list[bytes]:
    return [blosc.compress(piece, codec.encode(), level, shuffle, block or piece.nbytes) for piece in pieces]


def _decompress(packed: Sequence[bytes], out: NDArray[Any]) -> None:
    for one in packed:
        blosc.decompress(one, out)


def _spread(store: Store, starts: NDArray[Any]) -> Iterator[tuple[int, int]]:
    for number, start in enumerate(starts.tolist()):
        unit = number % store.geometry.units
        yield unit, min(start, max(0, store.rows_used(unit) - store.geometry.chunk_rows))


def reading_lines(store: Store) -> Iterator[Line]:
    """Reading all units, and single items at random, through Zarr and through `agiqa.store`."""
    array: Any = zarr.open_group(store.layout.zarr, mode="r")["features"]
    used = [(unit * store.geometry.unit_rows, store.rows_used(unit)) for unit in range(store.geometry.units)]
    items = np.random.default_rng(0).integers(0, len(store.items), _ITEMS).tolist()
    spans = [(int(store.row_starts[item]), int(store.n_tokens[item])) for item in items]
    for what, parts in (("all units", used), (f"{_ITEMS} items at random", spans)):
        size = sum(rows for _, rows in parts) * store.width * array.dtype.itemsize
        ways: dict[str, Callable[[int, int], Any]] = {
            "Zarr": lambda start, stop: np.asarray(array[start:stop]),
            "agiqa.store": store.rows_at,
        }
        for name, read in ways.items():
            _, seconds = _timed(partial(_read_all, read, parts))
            measured = {"mb_s": size / seconds / 1e6}
            yield {"stage": "reading", "name": name, "config": {"what": what}, "measured": measured}


def _read_all(read: Callable[[int, int], Any], parts: Sequence[tuple[int, int]]) -> None:
    for start, rows in parts:
        read(start, start + rows)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and its seconds the second time."""
    work()
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def tables(lines: Sequence[Line]) -> str:
    """Markdown tables of result lines."""
    codecs, reading = ([line for line in lines if line["stage"] == stage] for stage in ("codec", "reading"))
    columns = {"read": lambda line: line["config"]["what"], "through": lambda line: line["name"]}
    return joined(
        measured_table(
            {"chunks of 1 MiB, one core": lambda line: line["name"]},
            ("ratio", "compress_mb_s", "decompress_mb_s"),
            codecs,
        ),
        measured_table(columns, ["mb_s"], reading),
    )


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True), required=False)
@result_options
def main(store: Path | None, *, out: Path | None, table: Path | None) -> None:
    """Compare Blosc settings and ways of reading on the features of STORE."""
    print_tables(measured_lines(store), tables, lambda line: f"{line['stage']} {line['name']}", out=out, table=table)


def measured_lines(store: Path | None) -> Generator[Line]:
    """The lines of both comparisons."""
    if store is None:
        message = "Give a STORE to measure, or --table with a file of result lines."
        raise click.UsageError(message)
    blosc.set_nthreads(1)
    opened = open_store(store)
    yield from codec_lines(opened)
    yield from reading_lines(opened)


if __name__ == "__main__":
    main()
