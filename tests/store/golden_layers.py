"""The golden stores of version 2: with layers, pooled rows, or without W_lm, and what is in them by formula.

`python -m tests.store.golden_layers` writes those that are not there yet, as `tests.store.golden` does.
"""

import tarfile
import tempfile
from pathlib import Path

import numpy as np

from agiqa.store import Store, basis_from, convert_store, sketch_store
from tests.store.golden import FOLDER
from tests.store.layered import WIDTH, Layered, begin, fill, make_store

LENGTHS = (3, 9, 2, 5, 1)
KINDS = ("layers", "layers-int8", "layers-sketch", "layers-logits", "layers-unfinished", "middle", "pooled", "tap")
READABLE = {"layers-unfinished": (0, 1)}
"""Items of the units that are there, of kinds that lack some."""
WIDTHS = {"0": 4}


def readable(kind: str) -> tuple[int, ...]:
    return READABLE.get(kind, tuple(range(len(LENGTHS))))


def states(layer: str, item: int, rows: int) -> np.ndarray:
    """(rows, width) float32 of multiples of 1/4, which bfloat16 holds exactly."""
    number = 30 if layer == "last" else int(layer)
    token, channel = np.meshgrid(np.arange(rows), np.arange(WIDTHS.get(layer, WIDTH)), indexing="ij")
    return (((7 * item + 3 * token + 5 * channel * (token + 1) + number) % 17 - 8) / 4).astype(np.float32)


def content(kind: str) -> Layered:
    """What went into the store of this kind, or into that which it was made of."""
    layers = {"middle": ("2", "10"), "tap": ("1", "last"), "pooled": ("10", "last")}.get(kind, ("0", "10", "last"))
    pooled = ("mean@image", "max", "last") if kind == "pooled" else ()
    counts = [len(pooled)] * len(LENGTHS) if pooled else LENGTHS
    roles = [np.array([1, 0, 3], np.uint8) if pooled else (np.arange(count) % 4).astype(np.uint8) for count in counts]
    return Layered(
        states={layer: [states(layer, item, count) for item, count in enumerate(counts)] for layer in layers},
        roles=roles,
        logical_dtype="bfloat16",
        pooled=pooled,
        tap="vision:12" if kind == "tap" else None,
        layer_count=32,
        splits=["train", "train", "train", "val", "test"],
        probes_states=kind not in ("tap", "layers-logits"),
    )


def write(kind: str, path: Path) -> Store:
    """The golden store of this kind, by today's code."""
    if kind == "layers-unfinished":
        writer = begin(path, content(kind))
        fill(writer, content(kind), [0, 1])
        return writer.store
    derived = kind.removeprefix("layers-") if kind.startswith("layers-") else None
    made = make_store(path if derived is None else path.with_name("source.agiqa"), content(kind))
    if derived == "sketch":
        return sketch_store(made, path, basis=basis_from(made, 5)).store
    return made if derived is None else convert_store(made, path, derived)


def main() -> None:
    """Write what is missing."""
    for kind in KINDS:
        archive = FOLDER / f"v2-{kind}.tar.gz"
        if not archive.exists():
            with tempfile.TemporaryDirectory() as folder, tarfile.open(archive, "w:gz") as file:
                file.add(write(kind, Path(folder) / f"{kind}.agiqa").path, arcname=f"{kind}.agiqa")


if __name__ == "__main__":
    main()
