"""The parts of a training: which items train, which choose the epoch, and which are only ever tested on.

`published` takes the split column of the store, `grouped` draws whole prompts, `folds` deals them into parts that are
each tested on once, `generator` holds out the images of one generator. The test part has no say in any choice. Where
test prompts also occur in training, as in published splits, it is counted by how much.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.data.holding_out import Items, fold_items, generator_items, hold_out, published_items
from agiqa.heads.data.prompts import KnownPrompts, Shared
from agiqa.heads.settings.config import TrainConfig

PARTITION_SETTINGS = (
    *("split", "folds", "fold", "held_out", "test_share"),
    *("validation", "training_items", "training_seed", "split_seed"),
)
"""The training settings that `make_partition` asks for."""
FEWEST_TO_CHOOSE_BY = 30
"""Validation items. By fewer no epoch is chosen, and nothing is fitted to them: a rank correlation of 10 items without
any relation is above 0.55 once in ten times."""
_TEST_STREAM, _VALIDATION_STREAM, _TRAINING_STREAM = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Item numbers of the store, ascending, no item in two parts."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    left_out: int
    """Items of the store in no part."""
    leak: Shared
    """Test items whose prompt also occurs in train or validation."""
    validation_leak: Shared
    """Validation items whose prompt also occurs in train; none unless the data set brings its own."""

    @property
    def leaked(self) -> int:
        """Test items whose prompt also occurs in train or validation, letter by letter or nearly."""
        return self.leak.same

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
            "leak": {
                "test_items_with_a_training_prompt": self.leak.same,
                "test_items_with_a_training_prompt_verbatim": self.leak.verbatim,
                "share": self.leak.same / len(self.test),
            },
        }

    def warnings(self) -> list[str]:
        """What a reader of the metrics must know about this split."""
        found: list[str] = []
        if self.leak.same:
            found.append(
                f"{self.leak.same} of {len(self.test)} test items have a prompt that also occurs in training"
                f"{self.leak.told()}; the metrics tell of new images for known prompts. Use the split 'grouped' for "
                "new prompts."
            )
        if self.validation_leak.same:
            found.append(
                f"{self.validation_leak.same} of {len(self.validation)} validation items, which choose the epoch, have "
                f"a prompt that also occurs in training{self.validation_leak.told()}: the data set's own 'val' part "
                "was used."
            )
        if self.left_out:
            found.append(f"{self.left_out} items of the store are in no part of the split.")
        return found


def make_partition(source: FeatureSource, config: TrainConfig) -> Partition:
    """The parts that `config` asks for; the same store and config give the same parts.

    Raises DataError when the store has no such split, too few prompts or too few items, or `training_items` draws none
    that trains, and what `generator_items` raises.
    """
    prompts = source.items.prompts
    train, validation, test = _drawn(source, config)
    if config.validation == 0.0:
        validation = validation[:0]
    if config.training_items is not None:
        drawn_by = config.split_seed if config.training_seed is None else config.training_seed
        train, validation = _first(config.training_items, train, validation, [drawn_by, _TRAINING_STREAM])
        if not len(train):
            message = (
                f"{location_of(source)}: all of the {config.training_items} training items that were drawn are in the "
                "data set's own 'val' part, which leaves none to train on. Raise `training_items`, draw others by "
                "another `training_seed`, or set `validation` to 0, which leaves the 'val' part out."
            )
            raise DataError(message)
    if config.validation > 0.0 and not len(validation):
        seed = [config.split_seed, _VALIDATION_STREAM]
        remedy = "Set `validation` to 0 to hold out none and keep the last epoch."
        validation = hold_out(prompts, train, config.validation, seed, remedy=remedy)
        train = np.setdiff1d(train, validation)
    trained = KnownPrompts(prompts[k] for k in train)
    known = KnownPrompts(prompts[k] for k in (*train, *validation))
    return Partition(
        train=train,
        validation=validation,
        test=test,
        left_out=len(prompts) - len(train) - len(validation) - len(test),
        leak=known.count(prompts[k] for k in test),
        validation_leak=trained.count(prompts[k] for k in validation),
    )


def _drawn(source: FeatureSource, config: TrainConfig) -> tuple[Items, Items, Items]:
    """Train, val and test before anything is left out; val is empty unless the data set brings its own."""
    if config.split == "published":
        return published_items(source)
    everything, seed = np.arange(len(source.items.names)), [config.split_seed, _TEST_STREAM]
    if config.split == "folds":
        test = fold_items(source, config.folds, config.fold, seed)
    elif config.split == "generator":
        test = generator_items(source, config.held_out)
    else:
        remedy = "Use the split 'published', or a store of more prompts."
        test = hold_out(source.items.prompts, everything, config.test_share, seed, remedy=remedy)
    return np.setdiff1d(everything, test), everything[:0], test


def _first(count: int, train: Items, validation: Items, seed: Sequence[int]) -> tuple[Items, Items]:
    """The items of both parts that are among the first `count` of one random order of them all.

    Raises DataError for fewer items.
    """
    pool = np.union1d(train, validation)
    if count > len(pool):
        message = (
            f"{count} training items are asked for, and {len(pool)} are not in the test part. Lower `training_items`, "
            f"or leave it out to use them all."
        )
        raise DataError(message)
    chosen = pool[np.random.default_rng(seed).permutation(len(pool))[:count]]
    return np.intersect1d(train, chosen), np.intersect1d(validation, chosen)
