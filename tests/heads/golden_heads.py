"""The heads in `golden/`, trained once by the code before a change of kernels, and the items that they rated.

`python -m tests.heads.golden_heads` trains those that are not there yet. A folder that was committed is never written
again: every later agiqa has to load it, and to predict what is in its `predictions.json`.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from agiqa.heads import HeadConfig, TrainConfig, predict
from tests.heads.conftest import MemoryItems, MemoryStore, ordered_mos

FOLDER = Path(__file__).resolve().parent / "golden"
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 129, 5)
"""One token, and on both sides of the chunks of tokens that recurrences are computed in."""
WIDTH, VOCABULARY = 4, 20
HEADS = {
    "xlstm": HeadConfig(projection="vocabulary", encoder="xlstm", width=16, blocks=2, num_heads=4),
    "xlstm-both": HeadConfig(projection="hidden", encoder="xlstm", width=8, blocks=2, num_heads=2, bidirectional=True),
    "mamba2": HeadConfig(projection="hidden", encoder="mamba2", width=16, layers=2, state_size=8),
    "transformer": HeadConfig(projection="hidden", encoder="transformer", width=8, layers=2, num_heads=2),
    "transformer-both": HeadConfig(
        projection="hidden", encoder="transformer", width=8, layers=1, num_heads=2, bidirectional=True
    ),
    "gru": HeadConfig(projection="hidden", encoder="gru", width=8, layers=2),
    "lstm": HeadConfig(projection="hidden", encoder="lstm", width=8, layers=2, residual=False),
}
KEPT = ("config.json", "head.safetensors", "metrics.json", "parts.json")
"""Files of a run folder."""


def rated_items() -> MemoryStore:
    """Items by formula, so that no change of a random generator reaches them."""
    count = 3 * len(LENGTHS)
    features = [_rows(item, LENGTHS[item % len(LENGTHS)]) for item in range(count)]
    items = MemoryItems(
        names=[f"{item:04d}.png" for item in range(count)],
        prompts=[f"prompt {item}" for item in range(count)],
        splits=["test" if item % 3 == 0 else "train" for item in range(count)],
        generators=[None] * count,
        labels={"quality": np.array([ordered_mos(np.resize(rows, (2, WIDTH))) for rows in features])},
    )
    return MemoryStore(features=features, items=items, encoding="hidden", weights=_rows(99, VOCABULARY))


def _rows(item: int, tokens: int) -> np.ndarray:
    """(tokens, WIDTH) float32 of multiples of 1/8, from -2 to 2."""
    token, channel = np.meshgrid(np.arange(tokens), np.arange(WIDTH), indexing="ij")
    return (((7 * item + 3 * token * token + 5 * channel * (token + 1) + item * channel) % 33 - 16) / 8).astype(
        np.float32
    )


def write_missing() -> None:
    """Train the heads that are not there yet."""
    from agiqa.heads import train_head  # its libraries import torch's compiler, which a test here must not see

    train = TrainConfig(epochs=2, lr=1e-2, device="cpu", precision="fp32", threads=1, validation=0.0)
    store = rated_items()
    for name, head in HEADS.items():
        if (FOLDER / name).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            small = head.model_copy(update={"regressor_hidden": 4})
            run = train_head(store, Path(folder) / "run", head=small, train=train)
            predictions = predict(run, store, device="cpu").tolist()
            kept = FOLDER / name
            kept.mkdir(parents=True)
            for file in KEPT:
                (kept / file).write_bytes((run.path / file).read_bytes())
        (kept / "predictions.json").write_text(json.dumps(predictions, indent=0) + "\n")


if __name__ == "__main__":
    write_missing()
