"""Stores in memory for the heads: real classes that satisfy FeatureSource, with features that hold a known MOS."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class MemoryItems:
    names: list[str]
    prompts: list[str]
    splits: list[str | None]
    generators: list[str | None]
    labels: dict[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class MemoryRows:
    rows: NDArray[Any]
    roles: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    logical_dtype: str


@dataclass(frozen=True, kw_only=True)
class MemoryBasis:
    id: str


@dataclass(frozen=True, kw_only=True)
class MemoryStore:
    """A FeatureSource whose rows are float32 arrays in memory, answered in the bits of `logical_dtype`."""

    features: list[NDArray[np.float32]]
    items: MemoryItems
    id: str = "memory"
    encoding: str = "sketch"
    logical_dtype: str = "float32"
    basis_id: str = "basis-a"
    roles: list[NDArray[np.uint8]] | None = None
    """Per item; None is the answer throughout."""
    ids: list[NDArray[np.int32]] | None = None
    """Token ids per item; None is 0 throughout."""
    weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @property
    def width(self) -> int:
        return self.features[0].shape[1]

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        return np.array([len(rows) for rows in self.features], dtype=np.int32)

    @property
    def lm_head_sha256(self) -> str:
        return hashlib.sha256(self.weights.tobytes()).hexdigest()

    def read(self, items: Sequence[int] | NDArray[Any]) -> MemoryRows:
        chosen = [self.features[int(item)] for item in items]
        rows = np.concatenate(chosen)
        if self.logical_dtype == "bfloat16":
            rows = torch.from_numpy(rows).bfloat16().view(torch.uint16).numpy()
        rows = rows.astype(np.float16) if self.logical_dtype == "float16" else rows
        return MemoryRows(
            rows=rows,
            roles=np.concatenate([self.item_roles(int(item)) for item in items]),
            offsets=np.concatenate([[0], np.cumsum([len(part) for part in chosen])]),
            logical_dtype=self.logical_dtype,
        )

    def item_roles(self, item: int) -> NDArray[np.uint8]:
        return np.full(len(self.features[item]), 3, dtype=np.uint8) if self.roles is None else self.roles[item]

    def tokens(self, items: Sequence[int] | NDArray[Any]) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        ids = self.ids or [np.zeros(len(rows), np.int32) for rows in self.features]
        return [(ids[int(item)], self.item_roles(int(item))) for item in items]

    def lm_head(self) -> NDArray[np.float32]:
        return self.weights

    def basis(self) -> MemoryBasis:
        return MemoryBasis(id=self.basis_id)


StoreMaker = Callable[..., MemoryStore]


def ordered_mos(rows: NDArray[np.float32]) -> float:
    """A MOS that depends on the mean of channel 0, and on channel 1 of the earliest tokens."""
    return float(2.5 + rows[:, 0].mean() + 0.5 * (rows[0, 1] + rows[1, 1]))


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are too small to share, and threads that wait for busy cores cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_store() -> StoreMaker:
    """Builds stores whose MOS is `ordered_mos` of the tokens."""

    def make(
        n: int = 60,
        *,
        width: int = 4,
        prompts: int | None = None,
        published: bool = False,
        vocabulary: int = 40,
        seed: int = 0,
        **changes: Any,
    ) -> MemoryStore:
        random = np.random.default_rng(seed)
        features = [random.normal(size=(random.integers(4, 12), width)).astype(np.float32) for _ in range(n)]
        items = MemoryItems(
            names=[f"{k:04d}.png" for k in range(n)],
            prompts=[f"Prompt  {k % (prompts or n)}" for k in range(n)],
            splits=[("test" if k % 5 == 0 else "train") if published else None for k in range(n)],
            generators=[None] * n,
            labels={"quality": np.array([ordered_mos(rows) for rows in features])},
        )
        weights = random.normal(size=(vocabulary, width)).astype(np.float32)
        return replace(MemoryStore(features=features, items=items, weights=weights), **changes)

    return make
