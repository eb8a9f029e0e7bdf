"""Which items a split holds out: the data set's own, whole prompts, a fold of them, or the images of one generator."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError, UnknownName, listed
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.data.prompts import prompt_groups

Items = NDArray[np.int64]


def split_items(source: FeatureSource, part: str) -> Items:
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


def published_items(source: FeatureSource) -> tuple[Items, Items, Items]:
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


def fold_items(source: FeatureSource, folds: int, fold: int, seed: Sequence[int]) -> Items:
    """The items of one of `folds` parts, which together are all items and have no normalised prompt in common.

    Prompts are dealt from the one with the most items to that with the fewest, in random order among equals, each to
    the part that is smallest by then: the parts differ by no more items than the largest prompt has. Raises DataError
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


def generator_items(source: FeatureSource, generator: str | None) -> Items:
    """The items whose image `generator` made.

    Raises ConfigError for None and UnknownName for no such generator, both with those that the store has, and
    DataError for items without a generator, and where no other generator is left to train on.
    """
    generators, where = source.items.generators, location_of(source)
    missing = [name for name, made_by in zip(source.items.names, generators, strict=True) if not made_by]
    if missing:
        error = DataError.from_problems(where, [f"{name!r} has no generator" for name in missing])
        error.add_note("The split 'generator' needs that of every item: join the column with `agiqa store labels`.")
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
