"""The stores in `golden/`, written once by the version that their names say, and what is in them by formula.

`python -m tests.store.golden` writes those of today's version that are not there yet. A file that was committed is
never written again: every later agiqa has to read it.
"""

import hashlib
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from agiqa.store import (
    Items,
    Store,
    StorePlan,
    UnitWriter,
    basis_from,
    convert_store,
    create_store,
    create_whole_array,
    from_float32,
    seal,
    sketch_store,
)

FOLDER = Path(__file__).resolve().parent / "golden"
LENGTHS = (3, 9, 0, 5, 1)
WIDTH, VOCABULARY = 8, 12
KINDS = ("hidden", "kept-logits", "sketch", "int8", "logits")


def hidden_of(item: int) -> np.ndarray:
    """(tokens, WIDTH) float32 of multiples of 1/4, which bfloat16 holds exactly."""
    token, channel = np.meshgrid(np.arange(LENGTHS[item]), np.arange(WIDTH), indexing="ij")
    return (((7 * item + 3 * token + 5 * channel * (token + 1)) % 17 - 8) / 4).astype(np.float32)


def lm_head() -> np.ndarray:
    """(VOCABULARY, WIDTH) float32."""
    word, channel = np.meshgrid(np.arange(VOCABULARY), np.arange(WIDTH), indexing="ij")
    return (((word * word + 3 * channel + word * channel) % 11 - 5) / 8).astype(np.float32)


def token_ids(item: int) -> np.ndarray:
    return (np.arange(LENGTHS[item]) * 5 + item).astype(np.int32)


def roles(item: int) -> np.ndarray:
    return (np.arange(LENGTHS[item]) % 4).astype(np.uint8)


def items() -> Items:
    return Items(
        names=[f"bild {item} é.png" for item in range(5)],
        prompts=["a red fox", "a red fox", "", "snow", "snow"],
        splits=["train", "train", "train", "val", "test"],
        generators=["one", None, None, "two", "two"],
        descriptions=[None, "quality is good", None, None, None],
        labels={"quality": np.array([1.5, 2.0, np.nan, 4.25, 5.0])},
    )


def _write_hidden(path: Path, *, keep_logits: bool) -> Store:
    plan = StorePlan(
        encoding="hidden",
        logical_dtype="bfloat16",
        width=WIDTH,
        provenance={"model": {"name": "golden"}},
        items=items(),
        token_ids=[token_ids(item) for item in range(5)],
        roles=[roles(item) for item in range(5)],
        item_keys=[hashlib.sha256(bytes([item])).digest() for item in range(5)],
        truncated=[False, True, False, False, False],
        kept_logits=VOCABULARY if keep_logits else None,
    )
    store = create_store(path, plan)
    writer = UnitWriter(store)

    def write_model(group):
        weight = lm_head()
        attributes = {"logical_dtype": "float32", "lm_head_sha256": hashlib.sha256(weight.tobytes()).hexdigest()}
        create_whole_array(group, "lm_head/weight", weight, attributes=attributes)
        create_whole_array(group, "probe/rows", store.row_starts[[1, 3]])
        logits = np.stack([hidden_of(1)[0], hidden_of(3)[0]]) @ weight.T
        create_whole_array(group, "probe/logits", logits, attributes={"logical_dtype": "float32"})

    writer.write_model_arrays(write_model)
    for unit in writer.pending():
        rows = np.concatenate([hidden_of(item) for item in store.items_of(unit)])

        def logits(start, stop, rows=rows):
            return from_float32(rows[start:stop] @ lm_head().T, "bfloat16")

        writer.write_unit(unit, from_float32(rows, "bfloat16"), seconds=0.0, logits=logits if keep_logits else None)
    return seal(store)


def write(kind: str, path: Path) -> Store:
    """The golden store of this kind, by today's code."""
    if kind in ("hidden", "kept-logits"):
        return _write_hidden(path, keep_logits=kind == "kept-logits")
    source = _write_hidden(path.with_name("source.agiqa"), keep_logits=False)
    if kind == "sketch":
        return sketch_store(source, path, basis=basis_from(source, 3)).store
    return convert_store(source, path, kind)


def main() -> None:
    """Write what is missing."""
    FOLDER.mkdir(exist_ok=True)
    for kind in KINDS:
        archive = FOLDER / f"v1-{kind}.tar.gz"
        if not archive.exists():
            with tempfile.TemporaryDirectory() as folder, tarfile.open(archive, "w:gz") as file:
                file.add(write(kind, Path(folder) / f"{kind}.agiqa").path, arcname=f"{kind}.agiqa")


if __name__ == "__main__":
    main()
