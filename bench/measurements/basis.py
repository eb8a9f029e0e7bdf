"""Time and memory of a basis at the size of an 8B model: `python -m agiqa.bench.measurements.basis --out FILE.jsonl`.

A store of random hidden states and a random W_lm (values do not matter to either) is written, then one basis is
computed from it and applied to it, in a process of its own whose memory is limited: over the limit it fails.
"""

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.bench.measurements.peers import peak_memory, plan_for
from agiqa.bench.recording.this_run import about_this_run
from agiqa.store import (
    UnitWriter,
    basis_from,
    create_store,
    create_whole_array,
    from_float32,
    open_store,
    seal,
    sketch_store,
)
from agiqa.store.disk.files import canonical_json

_TOKENS_PER_ITEM = 477


def write_store(path: Path, *, vocabulary: int, width: int, items: int) -> None:
    """A sealed store of `items` x 477 random hidden states (bfloat16) and a random W_lm."""
    random = np.random.default_rng(0)
    store = create_store(path, plan_for(np.full(items, _TOKENS_PER_ITEM), width, "bfloat16"))

    def bits(rows: int) -> NDArray[Any]:
        return from_float32(random.standard_normal((rows, width), np.float32), "bfloat16")

    def write_model(group: zarr.Group) -> None:
        weight = np.concatenate([bits(min(8192, vocabulary - start)) for start in range(0, vocabulary, 8192)])
        attributes = {"logical_dtype": "bfloat16", "lm_head_sha256": hashlib.sha256(weight.data).hexdigest()}
        create_whole_array(group, "lm_head/weight", weight, attributes=attributes)
        create_whole_array(group, "probe/rows", np.zeros(0, np.int64))
        empty = np.zeros((0, vocabulary), np.float32)
        create_whole_array(group, "probe/logits", empty, attributes={"logical_dtype": "float32"})

    writer = UnitWriter(store)
    writer.write_model_arrays(write_model)
    for unit in writer.pending():
        writer.write_unit(unit, bits(store.rows_used(unit)), seconds=0.0)
    seal(store)


def measure(path: Path, *, rank: int, method: str, limit: int) -> dict[str, Any]:
    """Seconds of basis and sketch, and the peak memory of this process, which may not allocate over `limit` bytes."""
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
@click.option("--out", type=click.Path(path_type=Path), help="Append result lines to this file.")
@click.option("--measure", "stage", nargs=2, type=str, hidden=True)
def main(**options: Any) -> None:
    """Write a store, then measure both methods; one line of JSON each."""
    limit = int(options["limit_gb"] * 1e9)
    if options["stage"]:
        path, method = options["stage"]
        print(json.dumps(measure(Path(path), rank=options["rank"], method=method, limit=limit)))
        return
    config = {name: options[name] for name in ("vocabulary", "width", "items", "rank", "limit_gb")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hidden.agiqa"
        write_store(path, vocabulary=options["vocabulary"], width=options["width"], items=options["items"])
        for method in ("second-moment", "lm_head"):
            given = ["--rank", str(options["rank"]), "--limit-gb", str(options["limit_gb"])]
            command = [sys.executable, "-m", "agiqa.bench.measurements.basis", *given, "--measure", str(path), method]
            told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            line = {
                "stage": "extras",
                "name": f"basis {method}",
                "config": config,
                "measured": json.loads(told),
                **about_this_run(),
            }
            print(json.dumps(line))
            if options["out"]:
                with options["out"].open("a", encoding="utf-8") as file:
                    file.write(canonical_json(line) + "\n")


if __name__ == "__main__":
    main()
