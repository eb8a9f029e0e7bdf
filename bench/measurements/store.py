"""Speed and size of the store against its peers: `python -m agiqa.bench.measurements.store --help`.

Measures all formats of peers.py on the same rows, each in a fresh process, and then what only a feature store does.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.bench.measurements import peers as store_peers
from agiqa.bench.measurements.measuring import (
    Line,
    goal_cells,
    goal_table,
    joined,
    measured_table,
    print_tables,
    result_options,
)
from agiqa.bench.measurements.peers import LARGE_WIDTH, PEERS, TYPICAL_LENGTH, Source, save_source
from agiqa.bench.recording.tables import as_table
from agiqa.errors import ConfigError, DamagedStore, UnknownName
from agiqa.heads.data.batches import BatchLoader
from agiqa.heads.data.features import FeatureSet
from agiqa.progress import say
from agiqa.store import Store, UnitWriter, from_float32, open_store, seal
from agiqa.store.disk.files import canonical_json, describe_object, files_below, put_text_if_absent

ITEMS_PER_READ = 256  # in a sequential pass, as `agiqa.heads` reads a store
RANDOM_ITEMS = 200
BATCH = 32
EXTRAS = ("plan", "fill", "epoch")
_MB = 1e6


class Goal(NamedTuple):
    """A bound on a measured number, `key`, of the lines called `name`."""

    text: str
    name: str
    key: str
    at_most: float = float("inf")
    at_least: float = 0.0

    def applies(self, line: Line) -> bool:
        """Whether the goal is about `line`; the goal on bytes is about a model's own bfloat16 only."""
        config = line["config"]
        real = config.get("data") != "synthetic" and config.get("logical_dtype") == "bfloat16"
        return line["name"] == self.name and (real or self.key != "ratio")


GOALS = (
    Goal("bytes / raw of real bf16", "agiqa", "ratio", at_most=0.67),
    Goal("write, MB/s", "agiqa", "write_mb_s", at_least=500),
    Goal("sequential read, MB/s", "agiqa", "sequential_mb_s", at_least=1000),
    Goal("plan, s", "plan", "seconds", at_most=60),
    Goal("open, s", "open", "seconds", at_most=0.3),
    Goal("peak of filling units of 67 MB, MB", "fill", "peak_mb", at_most=567),
    Goal("speed of an epoch / memmap", "epoch", "of_memmap", at_least=0.8),
)

PEAKS = ("write_peak_mb", "sequential_peak_mb", "random_peak_mb")
COLUMNS = ("ratio", "write_mb_s", "sequential_mb_s", "random_mb_s", "first_batch_seconds", *PEAKS)


def run_child(job: str, **request: Any) -> dict[str, Any]:
    """The result of a job of peers.py in a fresh process; its errors go to this process's error stream."""
    command, text = [sys.executable, "-P", store_peers.__file__], json.dumps({"job": job, **request})
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def source_from_store(folder: Path, store: Store, *, rows: int | None) -> Source:
    """The first items of `store`, at most `rows` rows (None: all), as a source. Raises ConfigError for no item."""
    ends = np.cumsum(store.n_tokens, dtype=np.int64)
    count = len(ends) if rows is None else int(np.searchsorted(ends, rows, side="right"))
    if count == 0 or ends[count - 1] == 0:
        message = f"No item of {store.path} fits in {rows} rows. Give more --rows."
        raise ConfigError(message)

    def blocks() -> Generator[NDArray[Any]]:
        for unit in np.unique(store.units[:count]).tolist():
            items = store.items_of(unit)
            yield store.read(items[items < count]).rows

    lengths = store.n_tokens[:count].astype(np.int64)
    return save_source(folder, lengths, blocks(), width=store.width, logical_dtype=store.logical_dtype)


def synthetic_source(folder: Path, *, width: int, rows: int, seed: int = 0) -> Source:
    """About `rows` rows like an LLM's hidden states in bfloat16, in items of about 477 tokens.

    Gaussian values; the scales of the channels are log-normal, and a thousandth of them (at least two) are 50 times
    larger, like the massive activations of Sun et al. 2024 (arXiv:2402.17762).
    """
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.normal(TYPICAL_LENGTH, 60, max(2, round(rows / TYPICAL_LENGTH)))).astype(np.int64)
    scale = rng.lognormal(size=width).astype(np.float32)
    scale[rng.choice(width, max(2, width // 1000), replace=False)] *= 50

    def blocks() -> Generator[NDArray[Any]]:
        for start in range(0, int(lengths.sum()), 1024):
            count = min(1024, int(lengths.sum()) - start)
            yield from_float32(rng.standard_normal((count, width), np.float32) * scale, "bfloat16")

    return save_source(folder, lengths, blocks(), width=width, logical_dtype="bfloat16")


def first_seen(source: Source) -> NDArray[np.bool_]:
    """Which rows of `source` differ from all rows before them, (rows,)."""
    seen: set[bytes] = set()
    fresh = np.zeros(int(source.offsets[-1]), np.bool_)
    for start, block in source.blocks(1024):
        for place, row in enumerate(block, start):
            digest = hashlib.blake2b(row, digest_size=16).digest()
            fresh[place] = digest not in seen
            seen.add(digest)
    return fresh


def some_rows(folder: Path, source: Source, chosen: NDArray[np.bool_]) -> Source:
    """The items of `source` with their `chosen` rows only."""
    lengths = np.diff(np.concatenate([[0], np.cumsum(chosen)])[source.offsets])
    blocks = (block[chosen[start : start + len(block)]] for start, block in source.blocks(1024))
    return save_source(folder, lengths, blocks, width=source.width, logical_dtype=source.logical_dtype)


def chosen_peers(names: Sequence[str]) -> list[str]:
    """The peers to run: `names`, or all that are installed. Raises UnknownName for a name that is not."""
    able = [name for name, peer in PEERS.items() if all(find_spec(module.split(".")[0]) for module in peer.modules)]
    for name in names:
        if name not in able:
            raise UnknownName.of(kind="installed peer", name=name, known=able)
    if left_out := sorted(PEERS.keys() - able):
        say(f"not installed: {', '.join(left_out)} (pip install 'agiqa[hdf5]')")
    return list(names) or able


def reads_of(count: int) -> dict[str, list[list[int]]]:
    """The calls of each way of reading `count` items: lists of positions, one list per call."""
    rng = np.random.default_rng(0)
    parts = np.split(np.arange(count), range(ITEMS_PER_READ, count, ITEMS_PER_READ))
    return {
        "sequential": [part.tolist() for part in parts],
        "random": rng.integers(0, count, (RANDOM_ITEMS, 1)).tolist(),
        "first_batch": [rng.integers(0, count, BATCH).tolist()],
    }


class PeerBench:
    """Measures peers on one source, in rounds over all of them, so that a drift of the machine affects all alike."""

    def __init__(self, source: Source, work: Path, *, cold: bool) -> None:
        """Files of the formats go below `work`, one format at a time."""
        self._source_folder, self._work, self._cold = str(source.folder), work, cold
        lengths = np.diff(source.offsets)
        self._reads = reads_of(len(lengths))
        self._bytes, self._sums = dict[str, int](), dict[str, int]()
        for way, calls in self._reads.items():
            items = np.concatenate(calls).tolist()
            self._bytes[way] = int(lengths[items].sum()) * source.row_bytes
            self._sums[way] = sum(store_peers.touch(source.item(item)) for item in items) % (1 << 64)

    def lines(self, names: Sequence[str], *, repeats: int) -> Iterator[Line]:
        """A line per peer: the median of each number over the rounds, and the numbers of every round."""
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for turn in range(repeats):
            for name in names:
                say(f"round {turn + 1} of {repeats}: {name}")
                rounds[name].append(self._round(name))
        for name, runs in rounds.items():
            measured = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            yield {"stage": "peers", "name": name, "measured": measured, "runs": runs}

    def _round(self, name: str) -> dict[str, float]:
        idle = run_child("idle", peer=name)["peak_bytes"]
        with tempfile.TemporaryDirectory(dir=self._work) as made:
            folder = Path(made)
            found = run_child("write", peer=name, source=self._source_folder, folder=made)
            result = {
                "ratio": sum(path.stat().st_size for path in PEERS[name].row_files(folder)) / self._bytes["sequential"],
                "bytes_in_all": sum(path.stat().st_size for path in files_below(folder)),
                "write_mb_s": self._bytes["sequential"] / _MB / found["seconds"],
                "write_peak_mb": (found["peak_bytes"] - idle) / _MB,
            }
            for way, calls in self._reads.items():
                store_peers.set_cache(folder, cold=self._cold)
                found = run_child("read", peer=name, folder=made, reads=calls)
                if found["sum"] != self._sums[way]:
                    message = f"{name} ({way}) gave back other values than were written."
                    raise DamagedStore(message)
                result[f"{way}_mb_s"] = self._bytes[way] / _MB / found["seconds"]
                result[f"{way}_seconds"] = found["open_seconds"] + found["seconds"]
                result[f"{way}_peak_mb"] = (found["peak_bytes"] - idle) / _MB
        return result


def epoch(folders: Mapping[str, Path]) -> dict[str, float]:
    """Seconds of an epoch on one thread, from a store's decoded copy and from a memory map (`folders`, by peer).

    Raises DamagedStore when the two give different batches; the first pass, which compares them, also loads all pages.
    """
    store = open_store(folders["agiqa"] / "rows.agiqa")
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other measure the machine
    decoded = FeatureSet.from_store(store, np.flatnonzero(store.n_tokens))
    loader = BatchLoader(decoded, np.arange(len(decoded)), batch_size=BATCH, order=(0, 0))
    mapped = np.load(folders["memmap"] / "rows.npy", mmap_mode="c")  # torch warns of read-only memory
    offsets = decoded.offsets.tolist()

    def gather(positions: Sequence[int]) -> torch.Tensor:
        longest = max(offsets[place + 1] - offsets[place] for place in positions)
        features = torch.zeros(len(positions), longest, store.width)
        for row, place in enumerate(positions):
            rows = mapped[offsets[place] : offsets[place + 1]]
            features[row, : len(rows)] = store_peers.as_tensor(rows, store.logical_dtype)
        return features

    batches: list[list[int]] = []
    for batch in loader:
        batches.append(batch.positions.tolist())
        if not torch.equal(batch.features, gather(batches[-1])):
            message = f"The batch of items {batches[-1]} differs between the decoded copy and the memory map."
            raise DamagedStore(message)
    started = time.perf_counter()
    for _batch in loader:
        pass
    middle = time.perf_counter()
    for positions in batches:
        _gathered = gather(positions)  # held, as the loop above holds its batch
    seconds, memmap_seconds = middle - started, time.perf_counter() - middle
    return {"seconds": seconds, "memmap_seconds": memmap_seconds, "of_memmap": memmap_seconds / seconds}


def seal_nearly_empty(store: Store) -> None:
    """Seal a planned store with one row of ones in each unit: as many objects as in a full store, and few bytes."""
    writer = UnitWriter(store)
    store_peers.write_small_model(writer)
    features: Any = writer.group["features"]
    for unit in writer.pending():
        features[unit * store.geometry.unit_rows] = 1
        entry = describe_object(store.path, store.layout.features_object(unit))
        record = canonical_json({"objects": [entry], "seconds": 0.0})
        put_text_if_absent(store.layout.commit(unit), record, lock=store.layout.locks / "records")
    seal(store)


def extra_lines(source: Source, work: Path, config: Line, options: Mapping[str, Any]) -> Iterator[Line]:
    """The lines of operations that only a feature store has; `config` describes `source`."""
    chosen = EXTRAS if options["extras"] == "all" else (options["extras"],)
    idle = run_child("idle")["peak_bytes"]

    def line(name: str, config: Mapping[str, Any], runs: Sequence[Line]) -> Line:
        measured = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if "peak_bytes" in measured:
            measured["peak_mb"] = (measured.pop("peak_bytes") - idle) / _MB
        return {"stage": "extras", "name": name, "config": config, "measured": measured, "runs": runs}

    if "plan" in chosen:
        path, items = work / "planned.agiqa", options["items"]
        say(f"planning, sealing and opening {items} items")
        large = {"items": items, "tokens": items * TYPICAL_LENGTH, "width": LARGE_WIDTH}
        yield line("plan", large, [run_child("plan", path=str(path), items=items)])
        seal_nearly_empty(open_store(path, allow_partial=True))
        yield line("open", large, [run_child("open", path=str(path)) for _ in range(5)])
    if "fill" in chosen:
        say(f"filling {options['fill_units']} units")
        filled = {"units": options["fill_units"], "width": LARGE_WIDTH}
        yield line("fill", filled, [run_child("fill", path=str(work / "filled.agiqa"), units=filled["units"])])
    if "epoch" in chosen:
        say("epochs from the decoded copy and from a memory map")
        folders = {peer: work / f"epoch-{peer}" for peer in ("agiqa", "memmap")}
        for peer, folder in folders.items():
            folder.mkdir()
            run_child("write", peer=peer, source=str(source.folder), folder=str(folder))
        runs = [epoch(folders) for _ in range(options["repeats"])]
        yield line("epoch", {**config, "batch": BATCH, "threads": 1}, runs)


def described(values: Mapping[str, Any]) -> str:
    """`values` in words, numbers with at most three decimals."""
    return ", ".join(f"{key} {one if isinstance(one, str) else f'{round(one, 3):,}'}" for key, one in values.items())


def tables(lines: Sequence[Line]) -> str:
    """Markdown tables of result lines: the peers on each data set, the extras, and the goals."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault("" if line["stage"] == "extras" else described(line["config"]), []).append(line)
    extras = groups.pop("", [])
    parts: list[str] = []
    for config, group in groups.items():
        parts += [f"{config}:", measured_table({"format": lambda line: line["name"]}, COLUMNS, group)]
    rows = [[line["name"], described(line["measured"]), described(line["config"])] for line in extras]
    goals = [goal_row(goal, line) for goal in GOALS for line in lines if goal.applies(line)]
    return joined(*parts, as_table(["extra", "measured", "of"], rows), goal_table(goals, "of"))


def goal_row(goal: Goal, line: Line) -> list[str]:
    """The cells of one goal for `line`."""
    named = {"data", "repeated_rows", "items", "units", "page_cache"}
    of = {key: one for key, one in line["config"].items() if key in named}
    return [
        goal.text,
        described(of),
        *goal_cells(line["measured"][goal.key], at_most=goal.at_most, at_least=goal.at_least),
    ]


@click.command()
@click.option("--from", "store", type=click.Path(path_type=Path, exists=True), help="Rows of this feature store.")
@click.option("--synthetic", type=int, metavar="D", help="Made-up bfloat16 rows of this width [default: 4096].")
@click.option("--rows", type=int, help="At most so many rows [default: all of a store, 50,000 made-up ones].")
@click.option("--peers", default="", help=f"Comma-separated, of {', '.join(PEERS)} [default: all installed].")
@click.option("--extras", type=click.Choice(["all", "none", *EXTRAS]), default="all", help="What else to measure.")
@click.option("--items", default=20_000, show_default=True, help="Items of the store that is planned and opened.")
@click.option("--fill-units", default=4, show_default=True, help="Units of 64 MiB that are filled.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds, for medians.")
@click.option("--distinct", is_flag=True, help="Drop rows that repeat an earlier one, as those of a shared prompt do.")
@click.option("--cold", is_flag=True, help="Drop the files from the page cache before every read.")
@click.option("--work", type=click.Path(path_type=Path, exists=True), help="Where to write [default: temporary].")
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Measure feature stores against other formats on the same rows."""
    print_tables(measured_lines(options), tables, lambda line: f"measured: {line['name']}", out=out, table=table)


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """The lines that the command line asks for, measured in a temporary folder."""
    with tempfile.TemporaryDirectory(dir=options["work"]) as work:
        yield from _measured_in(Path(work), options)


def _measured_in(work: Path, options: Mapping[str, Any]) -> Iterator[Line]:
    names = chosen_peers([name for name in options["peers"].split(",") if name])
    folder = work / "source"
    if options["store"]:
        store = open_store(options["store"])
        source, data = source_from_store(folder, store, rows=options["rows"]), options["store"].name
    else:
        width, rows = options["synthetic"] or LARGE_WIDTH, options["rows"] or 50_000
        source, data = synthetic_source(folder, width=width, rows=rows), "synthetic"
    fresh = first_seen(source)
    if options["distinct"]:
        source, fresh = some_rows(work / "distinct", source, fresh), fresh[fresh]
    shape: Line = {"items": len(source.offsets) - 1, "rows": int(source.offsets[-1]), "width": source.width}
    shape |= {"logical_dtype": source.logical_dtype, "repeated_rows": round(1 - float(fresh.mean()), 4)}
    config = {"data": data, **shape, "page_cache": "cold" if options["cold"] else "warm", "repeats": options["repeats"]}
    for line in PeerBench(source, work, cold=options["cold"]).lines(names, repeats=options["repeats"]):
        yield {**line, "config": config}
    yield from extra_lines(source, work, {"data": data, **shape}, options)


if __name__ == "__main__":
    main()
