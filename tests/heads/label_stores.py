"""Stores with two labels, and the settings of heads that learn both."""

import numpy as np

from agiqa.heads import HeadConfig, TrainConfig
from tests.heads.conftest import MemoryStore

BOTH = "quality+correspondence"
LABELS = ("quality", "correspondence")
GRU = HeadConfig(projection="sketch", encoder="gru", width=16)
QUICK = TrainConfig(label=BOTH, split="grouped", epochs=2, lr=1e-2, batch_size=16)


def with_correspondence(store: MemoryStore) -> MemoryStore:
    """`store` with a second label, on another scale, that the first one says nothing of."""
    second = [50.0 + 10.0 * (rows[:, 2].mean() - rows[0, 3]) for rows in store.features]
    store.items.labels["correspondence"] = np.array(second)
    return store
