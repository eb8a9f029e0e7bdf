"""The parts of a training: which items train, which choose the epoch, and which are only tested.

`published` takes the split column of the store, `grouped` draws whole prompts, `folds` deals prompts into parts that
are each tested once, and `generator` holds out the images of one generator. The test part is never used for selection.
Where test prompts also occur in training, as in published splits, the overlap is counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError, UnknownName, listed
from agiqa.heads.data.features import ItemSource, location_of
from agiqa.heads.data.prompt_groups import KnownPrompts, PromptOverlap, prompt_groups
from agiqa.heads.settings.config import TrainConfig

Items = NDArray[np.int64]
PARTITION_SETTINGS = (
    *("split", "folds", "fold", "held_out", "test_share"),
    *("validation", "training_items", "training_seed", "split_seed"),
)
"""The training settings that `make_partition` reads."""
FEWEST_TO_CHOOSE_BY = 30
"""With fewer validation items, none chooses the epoch and nothing is fitted to them: the rank correlation of 10 items
without any relation exceeds 0.55 once in ten times."""
_TEST_STREAM, _VALIDATION_STREAM, _TRAINING_STREAM, _CALIBRATION_STREAM = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Item numbers of the store, ascending, no item in two parts."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    left_out: int
    """Number of items of the store that are in no part."""
    leak: PromptOverlap
    """Test items whose prompt also occurs in train or validation."""
    validation_leak: PromptOverlap
    """Validation items whose prompt also occurs in train; none unless the data set brings its own."""

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
                f"{self.leak.note()}; the metrics are of new images for known prompts. Use the split 'grouped' for "
                "new prompts."
            )
        if self.validation_leak.same:
            found.append(
                f"{self.validation_leak.same} of {len(self.validation)} validation items, which choose the epoch, have "
                f"a prompt that also occurs in training{self.validation_leak.note()}: the data set's own 'val' part "
                "was used."
            )
        if self.left_out:
            found.append(f"{self.left_out} items of the store are in no part of the split.")
        return found


def make_partition(source: ItemSource, config: TrainConfig) -> Partition:
    """The parts that `config` describes; the same store and config give the same parts.

    Raises DataError when the store has no such split, too few prompts or items, or `training_items` leaves none to
    train on, and as `generator_items`.
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
        remedy = "Set `validation` to 0 to hold out none. A network then keeps its last epoch."
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


def _drawn(source: ItemSource, config: TrainConfig) -> tuple[Items, Items, Items]:
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


def calibration_mask(source: ItemSource, validation: Items, config: TrainConfig) -> NDArray[np.bool_]:
    """Which of the `validation` items only make intervals: whole prompts, about `config.calibration_share` of them.

    Raises DataError for fewer than two prompts.
    """
    if config.calibration_share == 0.0 or not len(validation):
        return np.zeros(len(validation), dtype=bool)
    remedy = "Set `calibration_share` to 0, or raise `validation`."
    seed = [config.split_seed, _CALIBRATION_STREAM]
    held = hold_out(source.items.prompts, validation, config.calibration_share, seed, remedy=remedy)
    return np.isin(validation, held)


def _first(count: int, train: Items, validation: Items, seed: Sequence[int]) -> tuple[Items, Items]:
    """The items of both parts that are among the first `count` of one random order of them all.

    Raises DataError for fewer items.
    """
    pool = np.union1d(train, validation)
    if count > len(pool):
        message = (
            f"`training_items` is {count}, and only {len(pool)} items are not in the test part. Lower it, or "
            "leave it out to use them all."
        )
        raise DataError(message)
    chosen = pool[np.random.default_rng(seed).permutation(len(pool))[:count]]
    return np.intersect1d(train, chosen), np.intersect1d(validation, chosen)


def split_items(source: ItemSource, part: str) -> Items:
    """The items that the store's own split column calls `train`, `val` or `test`; `all` is every item.

    Raises DataError when there are none, with the splits that the store has.
    """
    if part == "all":
        return np.arange(len(source.items.names))
    chosen = _equal(source.items.splits, part)
    if not len(chosen):
        where = location_of(source)
        message = (
            f"{where}: no item is in the split {part!r}. The split column holds: "
            f"{_counts(source.items.splits)}. Join one with `agiqa store labels`, or evaluate `all`."
        )
        raise DataError(message)
    return chosen


def published_items(source: ItemSource) -> tuple[Items, Items, Items]:
    """Train, val and test of the split column; val may be empty. Raises DataError without train or test."""
    splits = source.items.splits
    if not {"train", "test"} <= set(splits):
        where = location_of(source)
        message = (
            f"{where}: the split 'published' needs items marked train and test, and the split column holds: "
            f"{_counts(splits)}. Use the split 'grouped', join a split column with `agiqa store labels`, or extract "
            "with `--conversations test=FILE` where FILE is the part to test on."
        )
        raise DataError(message)
    validation = split_items(source, "val") if "val" in splits else np.arange(0)
    return split_items(source, "train"), validation, split_items(source, "test")


def hold_out(prompts: list[str], pool: Items, share: float, seed: Sequence[int], *, remedy: str) -> Items:
    """The items of `pool` to hold out: whole prompts in random order, as near to `share` as they allow.

    `prompts` are those of all items of the store. Raises DataError, which ends with `remedy`, for fewer than two.
    """
    groups = prompt_groups([prompts[k] for k in pool])
    sizes = np.bincount(groups) if len(groups) else np.zeros(0, dtype=np.int64)
    if len(sizes) < 2:
        message = (
            f"A split by prompt needs two different prompts or more, and {len(pool)} items have {len(sizes)}. {remedy}"
        )
        raise DataError(message)
    order = np.random.default_rng(seed).permutation(len(sizes))
    reached = np.cumsum(sizes[order])[:-1]
    taken = int(np.argmin(np.abs(reached - share * len(pool)))) + 1
    return pool[np.isin(groups, order[:taken])]


def fold_items(source: ItemSource, folds: int, fold: int, seed: Sequence[int]) -> Items:
    """The items of one of `folds` parts, which together are all items and have no normalised prompt in common.

    Prompts are dealt in order of their number of items, the largest first and equal ones in random order, each to the
    smallest part so far: the sizes of the parts differ by at most the items of the largest prompt. Raises DataError
    for fewer prompts than folds.
    """
    groups = prompt_groups(source.items.prompts)
    sizes = np.bincount(groups)
    if len(sizes) < folds:
        message = (
            f"{location_of(source)}: {folds} folds need as many different prompts, and {len(groups)} items have "
            f"{len(sizes)}. Ask for fewer folds."
        )
        raise DataError(message)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    part_of, filled = np.empty(len(sizes), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        part_of[group] = np.argmin(filled)
        filled[part_of[group]] += sizes[group]
    return np.flatnonzero(part_of[groups] == fold)


def generator_items(source: ItemSource, generator: str | None) -> Items:
    """The items whose image `generator` made.

    Raises ConfigError for None and UnknownName for no such generator, both with those that the store has, and
    DataError for items without a generator, and where no other generator is left to train on.
    """
    generators, where = source.items.generators, location_of(source)
    missing = [name for name, made_by in zip(source.items.names, generators, strict=True) if not made_by]
    if missing:
        error = DataError.from_problems(where, [f"{name!r} has no generator" for name in missing])
        error.add_note(
            "The split 'generator' needs the generator of every item: join the column with `agiqa store labels`."
        )
        raise error
    known = sorted({made_by for made_by in generators if made_by})
    if generator is None:
        message = f"The split 'generator' needs `held_out`, the generator to test on. {where} has: {listed(known, 20)}."
        raise ConfigError(message)
    if generator not in known:
        kind = f"generator of {where}"
        raise UnknownName.of(kind, generator, known)
    if len(known) == 1:
        message = (
            f"{where}: all {len(generators)} items are of the generator {generator!r}, so holding it out leaves "
            f"nothing to train on. Use the split 'grouped', or train on other stores too."
        )
        raise DataError(message)
    return _equal(generators, generator)


def _equal(column: Sequence[str | None], value: str) -> Items:
    """Where `column` holds `value`."""
    return np.flatnonzero(np.array([entry == value for entry in column], dtype=bool))


def _counts(splits: Sequence[str | None]) -> str:
    """What a split column holds, for messages."""
    counted = Counter("no value" if name is None else name for name in splits)
    return ", ".join(f"{name} ({count})" for name, count in sorted(counted.items())) or "no items"
