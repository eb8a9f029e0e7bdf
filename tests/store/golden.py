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
    Prefixes,
    Store,
    StorePlan,
    UnitWriter,
    basis_from,
    convert_store,
    create_store,
    create_whole_array,
    from_float32,
    open_store,
    seal,
    sketch_store,
)
from agiqa.store.sharing.pulling import pull

FOLDER = Path(__file__).resolve().parent / "golden"
LENGTHS = (3, 9, 0, 5, 1)
WIDTH, VOCABULARY = 8, 12
KINDS = ("hidden", "kept-logits", "sketch", "int8", "logits")
SPARSE = ("absent", "unfinished")
"""Kinds whose item 1, alone in its unit with the empty item 2, is all zero, so that no object of that unit is there."""
READABLE = {"partial": (0, 3, 4), "unfinished": (0, 1, 2)}
"""Items of the units that are there, of kinds that lack some."""
VIEW_KINDS = ("views", "view-keys")
"""Only the second has the item keys of the shorter conversations."""
ALL_KINDS = (*KINDS, "absent", "partial", "unfinished", "deviations", *VIEW_KINDS, "counts")


FULL = {"variant": "full", "aspect": "quality"}
SHORTER = {"question": (1, 4, 0, 2, 0), "id": (3, 8, 0, 4, 1)}
"""Rows of each item in the views of the kind `views`."""
AUTHORS = {"question": (0, 0, 0, 0, 0), "id": (1, 2, 3, 0, 3)}


def item_key(item: int, name: str = "") -> bytes:
    """The key of the item, or of the shorter conversation `name` of it."""
    return hashlib.sha256(bytes([item]) + name.encode()).digest()


def prefixes(kind: str) -> Prefixes | None:
    """The shorter conversations of a store of this kind."""
    if kind not in VIEW_KINDS:
        return None
    keys = [b"".join(item_key(item, name) for name in SHORTER) for item in range(5)]
    return Prefixes(
        names=tuple(SHORTER),
        rows=np.array([*SHORTER.values()], np.int32).T.copy(),
        authors=np.array([*AUTHORS.values()], np.uint8).T.copy(),
        keys=np.array([list(row) for row in keys], np.uint8) if kind == "view-keys" else None,
    )


def readable(kind: str) -> tuple[int, ...]:
    """Items that a store of this kind holds rows of."""
    return READABLE.get(kind, tuple(range(len(LENGTHS))))


def hidden_of(item: int, kind: str = "hidden") -> np.ndarray:
    """(tokens, WIDTH) float32 of multiples of 1/4, which bfloat16 holds exactly."""
    if kind in SPARSE and item == 1:
        return np.zeros((LENGTHS[item], WIDTH), np.float32)
    token, channel = np.meshgrid(np.arange(LENGTHS[item]), np.arange(WIDTH), indexing="ij")
    return (((7 * item + 3 * token + 5 * channel * (token + 1)) % 17 - 8) / 4).astype(np.float32)


def lm_head() -> np.ndarray:
    """(VOCABULARY, WIDTH) float32."""
    word, channel = np.meshgrid(np.arange(VOCABULARY), np.arange(WIDTH), indexing="ij")
    return (((word * word + 3 * channel + word * channel) % 11 - 5) / 8).astype(np.float32)


def token_ids(item: int, kind: str = "hidden") -> np.ndarray:
    ids = np.arange(LENGTHS[item]) * 5 + item
    return (ids * 0 if kind in SPARSE and item == 1 else ids).astype(np.int32)


def roles(item: int, kind: str = "hidden") -> np.ndarray:
    found = np.arange(LENGTHS[item]) % 4
    return (found * 0 if kind in SPARSE and item == 1 else found).astype(np.uint8)


def status(kind: str) -> list[int]:
    return [0] * len(LENGTHS) if kind in SPARSE else [0, 1, 0, 0, 0]


def items(kind: str = "hidden") -> Items:
    """Sparse stores were made when the scale of MOS and the authors of texts were recorded already."""
    recorded = {
        "text_authors": [None, "teacher", "teacher-blind", "model", None],
        "mos_ranges": {"quality": (1.0, 5.5)},
    }
    return Items(
        names=[f"bild {item} é.png" for item in range(5)],
        prompts=["a red fox", "a red fox", "", "snow", "snow"],
        splits=["train", "train", "train", "val", "test"],
        generators=["one", None, None, "two", "two"],
        descriptions=[None, "quality is good", None, None, None],
        labels={"quality": np.array([1.5, 2.0, np.nan, 4.25, 5.0])},
        **(recorded if kind in SPARSE else {}),
        **({"deviations": {"quality": np.array([0.5, np.nan, np.nan, 0.0, 1.25])}} if kind == "deviations" else {}),
        **({"counts": counts()} if kind == "counts" else {}),
    )


def counts() -> dict[str, np.ndarray]:
    """Ratings of each level of quality; those of item 2 are unknown."""
    of_items = [[3, 1, 0, 0, 0], [0, 1, 0, 0, 0], [np.nan] * 5, [0, 0, 1, 1, 2], [0, 0, 0, 0, 4]]
    return {f"quality_{level + 1}": np.array(of_items, np.float64)[:, level] for level in range(5)}


def _begin(path: Path, kind: str) -> UnitWriter:
    """The plan and the model of a store of hidden states; its probe is tokens of the items 1 and 3, or row 0 alone."""
    plan = StorePlan(
        encoding="hidden",
        logical_dtype="bfloat16",
        width=WIDTH,
        provenance={"model": {"name": "golden"}, **({"conversation": FULL} if kind in VIEW_KINDS else {})},
        items=items(kind),
        token_ids=[token_ids(item, kind) for item in range(5)],
        roles=[roles(item, kind) for item in range(5)],
        item_keys=[item_key(item) for item in range(5)],
        truncated=[bool(cut) for cut in status(kind)],
        kept_logits=VOCABULARY if kind in ("kept-logits", *SPARSE) else None,
        prefixes=prefixes(kind),
    )
    store = create_store(path, plan)
    writer = UnitWriter(store)

    def write_model(group):
        weight = lm_head()
        attributes = {"logical_dtype": "float32", "lm_head_sha256": hashlib.sha256(weight.tobytes()).hexdigest()}
        create_whole_array(group, "lm_head/weight", weight, attributes=attributes)
        probed = [0] if kind in SPARSE else [1, 3]
        create_whole_array(group, "probe/rows", store.row_starts[probed])
        logits = np.stack([hidden_of(item)[0] for item in probed]) @ weight.T
        create_whole_array(group, "probe/logits", logits, attributes={"logical_dtype": "float32"})

    writer.write_model_arrays(write_model)
    return writer


def _fill(writer: UnitWriter, kind: str, units: list[int]) -> None:
    for unit in units:
        rows = np.concatenate([hidden_of(item, kind) for item in writer.store.items_of(unit)])

        def logits(start, stop, rows=rows):
            return from_float32(rows[start:stop] @ lm_head().T, "bfloat16")

        keeps = writer.store.keeps_logits
        writer.write_unit(unit, from_float32(rows, "bfloat16"), seconds=0.0, logits=logits if keeps else None)


def _write_hidden(path: Path, kind: str) -> Store:
    writer = _begin(path, kind)
    _fill(writer, kind, [0, 1] if kind == "unfinished" else writer.pending())
    return writer.store if kind == "unfinished" else seal(writer.store)


def write(kind: str, path: Path) -> Store:
    """The golden store of this kind, by today's code."""
    if kind in ("hidden", "kept-logits", "deviations", "counts", *VIEW_KINDS, *SPARSE):
        return _write_hidden(path, kind)
    if kind == "partial":
        whole = write("int8", path.with_name("whole.agiqa"))
        pull(f"file://{whole.path}", path, items=[items().names[item] for item in READABLE[kind]])
        return open_store(path)
    source = _write_hidden(path.with_name("source.agiqa"), "hidden")
    if kind == "sketch":
        return sketch_store(source, path, basis=basis_from(source, 3)).store
    return convert_store(source, path, kind)


def main() -> None:
    """Write what is missing."""
    FOLDER.mkdir(exist_ok=True)
    for kind in ALL_KINDS:
        archive = FOLDER / f"v1-{kind}.tar.gz"
        if not archive.exists():
            with tempfile.TemporaryDirectory() as folder, tarfile.open(archive, "w:gz") as file:
                file.add(write(kind, Path(folder) / f"{kind}.agiqa").path, arcname=f"{kind}.agiqa")


if __name__ == "__main__":
    main()
