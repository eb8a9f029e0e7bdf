"""Time and memory of a basis at the size of an 8B model: `python -m agiqa.bench.measurements.basis --out FILE.jsonl`.

Writes a store of random hidden states and a random W_lm (values change neither time nor memory). Then a separate
process computes a basis from the store and applies it. It fails if it allocates more memory than the limit.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from agiqa.bench.measurements.measuring import Line, out_option, recorded
from agiqa.bench.measurements.peers import TYPICAL_LENGTH, peak_memory, plan_for, write_model
from agiqa.store import UnitWriter, basis_from, create_store, from_float32, open_store, seal, sketch_store


def write_store(path: Path, *, vocabulary: int, width: int, items: int) -> None:
    """A sealed store of `items` x 477 random hidden states (bfloat16) and a random W_lm."""
    random = np.random.default_rng(0)
    store = create_store(path, plan_for(np.full(items, TYPICAL_LENGTH), width, "bfloat16"))

    def bits(rows: int) -> NDArray[Any]:
        return from_float32(random.standard_normal((rows, width), np.float32), "bfloat16")

    writer = UnitWriter(store)
    weight = np.concatenate([bits(min(8192, vocabulary - start)) for start in range(0, vocabulary, 8192)])
    write_model(writer, weight, "bfloat16")
    for unit in writer.pending():
        writer.write_unit(unit, bits(store.rows_used(unit)), seconds=0.0)
    seal(store)


def measure(path: Path, *, rank: int, method: str, limit: int) -> dict[str, Any]:
    """Time of basis and sketch in seconds, and the peak memory of this process, which may allocate `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    store = open_store(path)
    started = time.perf_counter()
    basis = basis_from(store, rank, method=method)
    with_basis = time.perf_counter()
    result = sketch_store(store, path.with_name(f"sketch-{method}.agiqa"), basis=basis)
    return {
        "basis_seconds": round(with_basis - started, 1),
        "sketch_seconds": round(time.perf_counter() - with_basis, 1),
        "peak_gb": round(peak_memory() / 1e9, 2),
        "energy_kept": round(result.energy_kept, 4),
        "logit_error": round(result.logit_error, 4),
        "projection_error": round(result.projection_error, 4),
    }


@click.command()
@click.option("--vocabulary", default=128_256, show_default=True)
@click.option("--width", default=4096, show_default=True)
@click.option("--items", default=40, show_default=True)
@click.option("--rank", default=512, show_default=True)
@click.option("--limit-gb", default=8.0, show_default=True, help="Memory that the measured process may allocate.")
@click.option("--measure", "stage", nargs=2, type=str, hidden=True)
@out_option
def main(*, out: Path | None, **options: Any) -> None:
    """Write a store, then measure both methods; one line of JSON each."""
    if options["stage"]:
        (path, method), limit = options["stage"], int(options["limit_gb"] * 1e9)
        print(json.dumps(measure(Path(path), rank=options["rank"], method=method, limit=limit)))
        return
    for line in recorded(measured_lines(options), out, lambda line: line["name"]):
        print(json.dumps(line))


def measured_lines(options: dict[str, Any]) -> Iterator[Line]:
    """A line per method, each measured in a separate process."""
    config = {name: options[name] for name in ("vocabulary", "width", "items", "rank", "limit_gb")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hidden.agiqa"
        write_store(path, vocabulary=options["vocabulary"], width=options["width"], items=options["items"])
        for method in ("second-moment", "lm_head"):
            given = ["--rank", str(options["rank"]), "--limit-gb", str(options["limit_gb"])]
            command = [sys.executable, "-m", "agiqa.bench.measurements.basis", *given, "--measure", str(path), method]
            printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            yield {"stage": "extras", "name": f"basis {method}", "config": config, "measured": json.loads(printed)}


if __name__ == "__main__":
    main()
