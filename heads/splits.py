"""Which items train, which choose the epoch, and which are only ever tested on.

`published` takes the split column of the store, `grouped` draws whole prompts. The test part has no say in
any choice. Published splits may hold test prompts that also occur in training; by how much is counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.heads.config import TrainConfig
from agiqa.heads.features import FeatureSource, ItemColumns
from agiqa.heads.prompts import normalise_prompt, prompt_groups

_TEST_STREAM, _VALIDATION_STREAM = 0, 1


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Item numbers of the store, ascending, no item in two parts."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    left_out: int
    """Items of the store in no part."""
    leaked: int
    """Test items whose normalised prompt also occurs in train or validation."""
    validation_leaked: int
    """Validation items whose normalised prompt also occurs in train; 0 unless the data set brings its own."""

    def parts(self) -> dict[str, NDArray[np.int64]]:
        """The items of each part by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def record(self) -> dict[str, Any]:
        """The counts, ready for JSON."""
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "left_out": self.left_out,
            "leak": {"test_items_with_a_training_prompt": self.leaked, "share": self.leaked / len(self.test)},
        }

    def warnings(self) -> list[str]:
        """What a reader of the metrics must know about this split."""
        found: list[str] = []
        if self.leaked:
            found.append(
                f"{self.leaked} of {len(self.test)} test items have a prompt that also occurs in training; "
                f"the metrics tell of new images for known prompts. Use the split 'grouped' for new prompts."
            )
        if self.validation_leaked:
            found.append(
                f"{self.validation_leaked} of {len(self.validation)} validation items, which choose the epoch, have a "
                "prompt that also occurs in training: the data set's own 'val' part was used."
            )
        if self.left_out:
            found.append(f"{self.left_out} items of the store are in no part of the split.")
        return found


def make_partition(source: FeatureSource, config: TrainConfig) -> Partition:
    """The parts that `config` asks for; the same store and config give the same parts.

    Raises DataError when the store has no such split or too few prompts.
    """
    items = source.items
    if config.split == "published":
        train, validation, test = _published(source)
        if config.validation == 0.0:
            validation = validation[:0]
    else:
        everything = np.arange(len(items.names))
        train, test = _hold_out(items, everything, config.test_share, [config.split_seed, _TEST_STREAM])
        validation = everything[:0]
    if config.validation > 0.0 and not len(validation):
        seed = [config.split_seed, _VALIDATION_STREAM]
        train, validation = _hold_out(items, train, config.validation, seed)
    trained = {normalise_prompt(items.prompts[k]) for k in train}
    known = trained | {normalise_prompt(items.prompts[k]) for k in validation}
    return Partition(
        train=train,
        validation=validation,
        test=test,
        left_out=len(items.names) - len(train) - len(validation) - len(test),
        leaked=sum(normalise_prompt(items.prompts[k]) in known for k in test),
        validation_leaked=sum(normalise_prompt(items.prompts[k]) in trained for k in validation),
    )


def identities(source: FeatureSource, items: NDArray[np.int64]) -> list[tuple[str, str]]:
    """Name and prompt of each item: what makes it the same item in another store."""
    return [(source.items.names[item], source.items.prompts[item]) for item in items]


def split_items(source: FeatureSource, part: str) -> NDArray[np.int64]:
    """The items that the store's own split column calls `train`, `val` or `test`; `all` is every item.

    Raises DataError when there are none, with the splits that the store has.
    """
    if part == "all":
        return np.arange(len(source.items.names))
    chosen = np.flatnonzero(np.array([name == part for name in source.items.splits], dtype=bool))
    if not len(chosen):
        message = (
            f"{source.id}: no item is in the split {part!r}. The split column holds: "
            f"{_counts(source.items.splits)}. Join one with `agiqa store labels`, or evaluate `all`."
        )
        raise DataError(message)
    return chosen


def _published(source: FeatureSource) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Train, val and test of the split column; val may be empty."""
    splits = source.items.splits
    if not {"train", "test"} <= set(splits):
        message = (
            f"{source.id}: the split 'published' needs items marked train and test, and the split column holds: "
            f"{_counts(splits)}. Use the split 'grouped', or join a split column with `agiqa store labels`."
        )
        raise DataError(message)
    validation = split_items(source, "val") if "val" in splits else np.arange(0)
    return split_items(source, "train"), validation, split_items(source, "test")


def _hold_out(
    items: ItemColumns, pool: NDArray[np.int64], share: float, seed: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split `pool` into (kept, held): whole prompts in random order, as near to `share` as they allow."""
    groups = prompt_groups([items.prompts[k] for k in pool])
    sizes = np.bincount(groups) if len(groups) else np.zeros(0, dtype=np.int64)
    if len(sizes) < 2:
        message = f"A split by prompt needs two different prompts or more, and {len(pool)} items have {len(sizes)}."
        raise DataError(message)
    order = np.random.default_rng(seed).permutation(len(sizes))
    reached = np.cumsum(sizes[order])[:-1]
    taken = int(np.argmin(np.abs(reached - share * len(pool)))) + 1
    held = np.isin(groups, order[:taken])
    return pool[~held], pool[held]


def _counts(splits: Sequence[str | None]) -> str:
    """What a split column holds, for messages."""
    counted = Counter("no value" if name is None else name for name in splits)
    return ", ".join(f"{name} ({count})" for name, count in sorted(counted.items())) or "no items"
