"""Prediction and evaluation: of a head in memory during training, and of a run folder on any store that it can read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import DataError, HeadError, UnknownName
from agiqa.heads.closed.combined import AnyHead, MixedHead, ResidualHead
from agiqa.heads.closed.heads import ClosedHead
from agiqa.heads.closed.pooled import Kept
from agiqa.heads.data.batches import BatchLoader
from agiqa.heads.data.features import FeatureSet, FeatureSource, location_of, read_labels
from agiqa.heads.data.layers import base_of
from agiqa.heads.data.scales import (
    Scales,
    conversions,
    convert_columns,
    lines_between,
    on_another_scale,
    scales_of,
    scales_record,
    unknown_scales,
)
from agiqa.heads.data.soft_labels import known_deviations
from agiqa.heads.data.splits import split_items
from agiqa.heads.data.variants import as_variant
from agiqa.heads.evaluation.calibration import calibration_fields
from agiqa.heads.evaluation.conformal import (
    USUAL_LEVEL,
    check_level,
    coverage_warnings,
    interval_records,
    recorded_errors,
)
from agiqa.heads.evaluation.leaks import author_warnings, leak_warnings
from agiqa.heads.evaluation.metrics import evaluate_scores
from agiqa.heads.evaluation.mos_mappings import Mappings
from agiqa.heads.evaluation.runs import METRICS, Run
from agiqa.heads.evaluation.spreads import spread_fields
from agiqa.heads.model.pooling import check_roles
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.settings.labels import by_label, labelled_pairs, of_each_label, without_label_axis

_ITEMS_AT_ONCE = 512
PARTS = ("test", "validation", "train", "all")
_TRAINING_PARTS = ("train", "validation", "val")
_ALIASES = {"val": "validation"}


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The predictions of a head for some items."""

    mos: NDArray[np.float64]
    """(items, labels)."""
    spread: NDArray[np.float64] | None
    """Standard deviations on the MOS scale, (items, labels); None for a head that predicts none."""


def predict(
    run: Run,
    source: FeatureSource,
    items: Sequence[int] | NDArray[Any] | None = None,
    *,
    variant: str | None = None,
    device: str = "auto",
    batch_size: int = 32,
) -> NDArray[np.float64]:
    """The predicted MOS of `items`, in their order; None is every item of the store.

    (items,) for a head with one label; (items, labels) for several labels, in the order of `run.train.labels`.

    `items` are positions in the store, whole numbers from 0. The store is read as `variant`, by default that of the
    run's settings, see `as_variant`. Raises HeadError where the head cannot read the store's
    features, ConfigError for an absent device, DataError for anything but positions.
    """
    source = as_variant(source, variant or run.train.variant)
    chosen = np.arange(len(source.items.names)) if items is None else positions_of(items, source)
    return without_label_axis(run_moments(run, source, chosen, device=device, batch_size=batch_size).mos)


def evaluate(
    run: Run,
    source: FeatureSource,
    part: str = "test",
    *,
    variant: str | None = None,
    interval: float = USUAL_LEVEL,
    device: str = "auto",
    batch_size: int = 32,
) -> dict[str, Any]:
    """Metrics with intervals on one part of a store: `test`, `validation`, `train` or `all`.

    The store is read as `variant`, by default that of the run's settings, see `as_variant`. On the store of the run the
    parts are those of its training; on another store the split column gives them.
    `warnings` in the result count items and prompts that the head was trained on, count items with a teacher's rating
    words, name MOS scales that are converted or unknown, and images whose intervals hold too few MOS. `logistic` is the
    recorded mapping behind `plcc_logistic4` and the like, or why there is none. `mos_range` is the scale of the head
    and of errors such as RMSE, if known. `intervals` says how many MOS the intervals of the level `interval` hold, of
    all items and of each generator (see conformal.py), and `spread` how good predicted spreads are (see spreads.py).
    For a head with several labels all but `warnings` is given for each label, under its name.
    Raises as `predict`, UnknownName for the part or a label that the store lacks, DataError for an empty part or
    missing labels.
    """
    source = as_variant(source, variant or run.train.variant)
    items = part_items(run, source, part)
    names, learned = run.train.labels, run.scales
    of_store, labels = scales_of(source, names), read_labels(source, items, label=run.train.label)
    check_level(interval)
    predicted = run_moments(run, source, items, device=device, batch_size=batch_size)
    mappings = _mappings(run, source, items)
    truth = convert_columns(labels, of_store, learned)
    scores = scores_of_labels(source, items, truth, predicted, mappings=mappings, names=names, scales=learned)
    for score, record in zip(scores, _interval_records(run, source, items, truth, predicted, interval), strict=True):
        score["intervals"] = record
    results = [{**score, "logistic": fitted.record()} for score, fitted in zip(scores, mappings, strict=True)]
    for result, scale in zip(results, scales_record(names, learned).values(), strict=True):
        result |= {} if scale is None else {"mos_range": scale}
    warnings = [
        f"The MOS of {location_of(source)} are converted to the scale of this head: {line}."
        for line in conversions(names, of_store, learned)
    ]
    if base_of(source).id != run.store_id or learned != of_store:
        warnings += unknown_scales(f"the head {run.path}", learned, source, names, labels)
    warnings += [] if part in _TRAINING_PARTS else leak_warnings(run, source, items)
    warnings += author_warnings(source, {part: items})
    for name, score, mos, ours, theirs in zip(names, scores, labels.T, learned, of_store, strict=True):
        if not on_another_scale(mos, ours, theirs):  # intervals on one scale hold no MOS of another
            warnings += coverage_warnings(name, score["intervals"])
    return {**by_label(run.train.labels, results), "warnings": warnings}


def scores_of_labels(
    source: FeatureSource,
    items: NDArray[np.int64],
    labels: NDArray[np.float64],
    predicted: Moments,
    *,
    mappings: Sequence[Mappings] | None,
    names: Sequence[str],
    scales: Scales,
) -> list[dict[str, Any]]:
    """`evaluate_scores` and `calibration_fields` of each label, and `spread_fields` where spreads are predicted.

    `labels` are (items, labels), called `names`, and on the `scales` of the predictions. An item counts for the labels
    that it has. `mappings` has an entry for each label. Raises DataError for a label that no item has.
    """
    prompts = np.array([source.items.prompts[k] for k in items], dtype=object)
    pairs = labelled_pairs(predicted.mos, labels)
    applied = [None] * len(pairs) if mappings is None else [each.fitted for each in mappings]
    _refuse_unlabelled(source, items, labels)
    scores = [
        {
            **evaluate_scores(guesses, truth, prompts[has].tolist(), mappings=fitted),
            **calibration_fields(guesses, truth),
        }
        for (guesses, truth), has, fitted in zip(pairs, ~np.isnan(labels).T, applied, strict=True)
    ]
    if predicted.spread is not None:
        slopes = [slope for slope, _ in lines_between(scales_of(source, names), scales)]
        known = known_deviations(source, items, names) * np.array(slopes)
        for number, (score, (guesses, truth)) in enumerate(zip(scores, pairs, strict=True)):
            has = ~np.isnan(labels[:, number])
            spread, deviations = predicted.spread[has, number], known[has, number]
            score["spread"] = spread_fields(guesses, spread, truth, deviations)
    return scores


def _interval_records(
    run: Run,
    source: FeatureSource,
    items: NDArray[np.int64],
    truth: NDArray[np.float64],
    predicted: Moments,
    level: float,
) -> list[dict[str, Any]]:
    """The `interval_record` of each label; absent for items that were trained on or made the intervals."""
    seen = int(run.parts().contain(source, items, "train", "validation").sum())
    if seen:
        why = f"{seen} of {len(items)} items are training or validation items, and intervals are for new ones"
        return [{"level": level, "absent": why} for _ in run.train.labels]
    try:
        errors = recorded_errors(run)
    except HeadError as error:
        return [{"level": level, "absent": str(error)} for _ in run.train.labels]
    generators = [source.items.generators[k] for k in items]
    return interval_records(errors, predicted.mos, predicted.spread, truth, generators, level=level)


def _refuse_unlabelled(source: FeatureSource, items: NDArray[np.int64], labels: NDArray[np.float64]) -> None:
    """Raise DataError where none of the items has some label."""
    if len(items) and np.isnan(labels).all(axis=0).any():
        message = (
            f"{location_of(source)}: of {len(items)} items to score none has one of the labels. Join it with "
            "`agiqa store labels`, or train on the other labels."
        )
        raise DataError(message)


def part_items(run: Run, source: FeatureSource, part: str) -> NDArray[np.int64]:
    """The items of a part as in `evaluate`, ascending, one at least."""
    part = _ALIASES.get(part, part)
    if part not in PARTS:
        kind = "part"
        raise UnknownName.of(kind, part, PARTS)
    if part == "all" or base_of(source).id != run.store_id:
        return split_items(source, {"validation": "val"}.get(part, part))
    everything = np.arange(len(source.items.names))
    items = everything[run.parts().contain(source, everything, part)]
    if not len(items):
        message = f"{location_of(source)}: no item is in the part {part!r} of the run {run.path}."
        raise DataError(message)
    return items


def positions_of(items: Sequence[int] | NDArray[Any], source: FeatureSource) -> NDArray[np.int64]:
    """`items` as positions. Raises DataError for names, fractions, a mask of booleans, or numbers beyond the items."""
    given, count = np.asarray(items), len(source.items.names)
    if not given.size:
        return np.empty(0, dtype=np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu" or not ((given >= 0) & (given < count)).all():
        message = (
            f"{location_of(source)}: items are a list of positions, whole numbers from 0 to {count - 1}; got "
            f"{items!r}. Of a mask, give numpy.flatnonzero(mask); of a name, store.items.names.index(name)."
        )
        raise DataError(message)
    return given.astype(np.int64)


def run_moments(run: Run, source: FeatureSource, items: NDArray[np.int64], *, device: str, batch_size: int) -> Moments:
    """The predictions of a run for `items`, which are positions. Raises as `predict`."""
    head = run.load_head(source, device=resolve_device(device))
    return predict_moments(head, run.features_of(source), items, batch_size=batch_size)


def _mappings(run: Run, source: FeatureSource, items: NDArray[np.int64]) -> list[Mappings]:
    """The recorded mappings of each label; none for items that they were fitted to. Raises HeadError."""
    recorded, labels = run.metrics.get("logistic"), run.train.labels
    if recorded is None:
        return [Mappings.none("the run recorded no fit; it was made before agiqa fitted them")] * len(labels)
    seen = int(run.parts().contain(source, items, "validation").sum())
    if seen:
        why = f"{seen} of {len(items)} items are validation items, which the mappings were fitted to"
        return [Mappings.none(why)] * len(labels)
    try:
        return [Mappings.from_record(record) for record in of_each_label(labels, recorded)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{run.path / METRICS}: `logistic` is not what a training writes ({error!r})."
        raise HeadError(message) from error


def predict_items(
    head: AnyHead,
    source: FeatureSource,
    items: NDArray[np.int64],
    *,
    batch_size: int,
    kept: tuple[FeatureSet, NDArray[np.int64]] | None = None,
) -> NDArray[np.float64]:
    """The predicted MOS (items, labels); see `predict_moments`."""
    return predict_moments(head, source, items, batch_size=batch_size, kept=kept).mos


def predict_moments(
    head: AnyHead,
    source: FeatureSource,
    items: NDArray[np.int64],
    *,
    batch_size: int,
    kept: tuple[FeatureSet, NDArray[np.int64]] | None = None,
) -> Moments:
    """Predict with a head in evaluation mode, with the features of 512 items in memory at a time.

    `kept` is a FeatureSet with all `items` and the position of each in it, which saves reading and gives the same
    numbers. Raises DataError, naming the items, if they have no token of the role that the head pools.
    """
    if isinstance(head, ClosedHead):
        return Moments(
            mos=head.predict(source, items, kept=None if kept is None else Kept(features=kept[0])), spread=None
        )
    if isinstance(head, MixedHead):
        store = base_of(source)  # members may read other layers than each other
        found = [predict_items(one.head, one.reads(store), items, batch_size=batch_size) for one in head.members]
        return Moments(mos=head.mix(found), spread=None)
    of = partial(predict_items, source=source, items=items, batch_size=batch_size, kept=kept)
    if isinstance(head, ResidualHead):
        return Moments(mos=of(head.closed) + of(head.network), spread=None)
    device = next(head.parameters()).device
    predicted = np.empty((len(items), head.label_count))
    spreads = np.empty_like(predicted) if head.predicts_spread else None
    with torch.no_grad():
        for start in range(0, len(items), _ITEMS_AT_ONCE):
            piece = slice(start, start + _ITEMS_AT_ONCE)
            if kept is None:
                features = FeatureSet.from_store(source, items[piece])
                check_roles(source, features, head.pooling_name)
                positions = np.arange(len(features))
            else:
                features, positions = kept[0], kept[1][piece]
            place = {position: start + k for k, position in enumerate(positions.tolist())}
            for batch in BatchLoader(features, positions, batch_size=batch_size):
                mos, spread = head.moments(*batch.to(device).inputs)
                places = [place[k] for k in batch.positions.tolist()]
                predicted[places] = mos.double().cpu().numpy()
                if spreads is not None and spread is not None:
                    spreads[places] = spread.double().cpu().numpy()
    return Moments(mos=predicted, spread=spreads)
