"""Small real stores, written through the public protocol, and the arrays that went into them."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from agiqa.store import (
    Items,
    Store,
    StorePlan,
    UnitWriter,
    create_store,
    create_whole_array,
    from_float32,
    seal,
    to_float32,
)
from agiqa.store.hdf5.export import export_hdf5
from tests.store.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Content:
    """What goes into a store: hidden states and tokens per item, and W_lm."""

    hidden: list[np.ndarray]  # per item (tokens, D), in the bits of the store
    token_ids: list[np.ndarray]
    roles: list[np.ndarray]
    lm_head: np.ndarray  # (V, D) float32
    items: Items
    logical_dtype: str

    @property
    def keys(self) -> list[bytes]:
        return [hashlib.sha256(name.encode()).digest() for name in self.items.names]


def make_content(lengths, *, width=16, vocabulary=40, logical_dtype="bfloat16", seed=0) -> Content:
    rng = np.random.default_rng(seed)
    count = len(lengths)
    scale = np.linspace(3.0, 0.1, width).astype(np.float32)
    hidden = [
        from_float32((rng.normal(size=(length, width)) * scale).astype(np.float32), logical_dtype) for length in lengths
    ]
    items = Items(
        names=[f"image_{position}.png" for position in range(count)],
        prompts=[f"prompt {position // 2}" for position in range(count)],
        splits=["train" if position % 4 else "test" for position in range(count)],
        generators=[None] * count,
        descriptions=[None] * count,
        labels={"quality": np.where(np.arange(count) % 5 == 4, np.nan, rng.uniform(0, 5, count))},
    )
    return Content(
        hidden=hidden,
        token_ids=[rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths],
        roles=[rng.integers(0, 4, length).astype(np.uint8) for length in lengths],
        lm_head=rng.normal(size=(vocabulary, width)).astype(np.float32),
        items=items,
        logical_dtype=logical_dtype,
    )


def plan_of(content: Content, **provenance) -> StorePlan:
    return StorePlan(
        encoding="hidden",
        logical_dtype=content.logical_dtype,
        width=content.lm_head.shape[1],
        provenance={"model": {"name": "made up", "revision": "a"}, **provenance},
        items=content.items,
        token_ids=content.token_ids,
        roles=content.roles,
        item_keys=content.keys,
        truncated=[False] * len(content.items),
    )


def write_model(writer: UnitWriter, content: Content) -> None:
    """W_lm, and the logits of the first token of the first item that has one."""
    store = writer.store
    sha256 = hashlib.sha256(content.lm_head.tobytes()).hexdigest()
    item = next((position for position, rows in enumerate(content.hidden) if len(rows)), None)

    def write(group):
        attributes = {"logical_dtype": "float32", "lm_head_sha256": sha256}
        create_whole_array(group, "lm_head/weight", content.lm_head, attributes=attributes)
        rows = np.zeros(0, np.int64) if item is None else store.row_starts[[item]]
        first = np.zeros((0, len(content.lm_head[0])), np.float32)
        if item is not None:
            first = to_float32(content.hidden[item][:1], content.logical_dtype)
        create_whole_array(group, "probe/rows", rows)
        create_whole_array(group, "probe/logits", first @ content.lm_head.T, attributes={"logical_dtype": "float32"})

    writer.write_model_arrays(write)


def unit_features(store: Store, content: Content, unit: int) -> np.ndarray:
    return np.concatenate([content.hidden[item] for item in store.items_of(unit)])


def fill(store: Store, content: Content, *, units=None) -> None:
    writer = UnitWriter(store)
    write_model(writer, content)
    for unit in writer.pending() if units is None else units:
        with writer.claim(unit) as mine:
            if mine:
                writer.write_unit(unit, unit_features(store, content, unit), seconds=0.0)


def make_store(path: Path, content: Content, **provenance) -> Store:
    store = create_store(path, plan_of(content, **provenance))
    fill(store, content)
    return seal(store)


@pytest.fixture
def content() -> Content:
    rng = np.random.default_rng(7)
    return make_content(rng.integers(1, 60, 40).tolist())


@pytest.fixture
def stored(tmp_path, content) -> Store:
    return make_store(tmp_path / "small.agiqa", content)


@pytest.fixture(scope="module")
def workers():
    """Processes of their own, that the tests of a module share."""
    started = Workers()
    yield started
    started.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store that no test changes."""
    return make_store(tmp_path_factory.mktemp("original") / "small.agiqa", make_content([9, 30, 22]))


@pytest.fixture(scope="module")
def exported(original):
    """The HDF5 export of `original` with bare chunks, from which tests take copies to harm."""
    return export_hdf5(original, original.path.with_name("original.h5"), compression="none").path


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copy(exported, tmp_path / "s.h5"))
