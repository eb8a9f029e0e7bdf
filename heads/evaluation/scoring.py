"""Prediction and evaluation: of a head in memory during training, and of a run folder on any store that it can read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import DataError, HeadError, UnknownName
from agiqa.heads.data.batches import BatchLoader
from agiqa.heads.data.features import FeatureSet, FeatureSource, location_of, read_labels
from agiqa.heads.data.scales import conversions, convert_columns, scales_of, scales_record, unknown_scales
from agiqa.heads.data.splits import split_items
from agiqa.heads.evaluation.calibration import calibration_fields
from agiqa.heads.evaluation.leaks import author_warnings, leak_warnings
from agiqa.heads.evaluation.metrics import evaluate_scores
from agiqa.heads.evaluation.mos_mappings import Mappings
from agiqa.heads.evaluation.runs import METRICS, Run
from agiqa.heads.model.head import Head
from agiqa.heads.model.pooling import check_roles
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.settings.labels import by_label, columns, of_each_label, without_label_axis

_ITEMS_AT_ONCE = 512
PARTS = ("test", "validation", "train", "all")
_TRAINING_PARTS = ("train", "validation", "val")
_ALIASES = {"val": "validation"}


def predict(
    run: Run,
    source: FeatureSource,
    items: Sequence[int] | NDArray[Any] | None = None,
    *,
    device: str = "auto",
    batch_size: int = 32,
) -> NDArray[np.float64]:
    """The predicted MOS of `items`, in their order; None is every item of the store.

    (items,) for a head with one label; (items, labels) for several labels, in the order of `run.train.labels`.

    `items` are positions in the store, whole numbers from 0. Raises HeadError where the head cannot read the store's
    features, ConfigError for an absent device, DataError for anything but positions.
    """
    chosen = np.arange(len(source.items.names)) if items is None else _positions(items, source)
    return without_label_axis(_predict(run, source, chosen, device=device, batch_size=batch_size))


def evaluate(
    run: Run, source: FeatureSource, part: str = "test", *, device: str = "auto", batch_size: int = 32
) -> dict[str, Any]:
    """Metrics with intervals on one part of a store: `test`, `validation`, `train` or `all`.

    On the store of the run the parts are those of its training; on another store the split column gives them.
    `warnings` in the result count items and prompts that the head was trained on, count items with a teacher's rating
    words, and name MOS scales that are converted or unknown. `logistic` is the recorded mapping behind
    `plcc_logistic4` and the like, or why there is none. `mos_range` is the scale of the head and of errors such as
    RMSE, if known. For a head with several labels all but `warnings` is given for each label, under its name.
    Raises as `predict`, UnknownName for the part or a label that the store lacks, DataError for an empty part or
    missing labels.
    """
    items = part_items(run, source, part)
    names, learned = run.train.labels, run.scales
    of_store, labels = scales_of(source, names), read_labels(source, items, label=run.train.label)
    predicted = _predict(run, source, items, device=device, batch_size=batch_size)
    mappings = _mappings(run, source, items)
    truth = convert_columns(labels, of_store, learned)
    scores = scores_of_labels(source, items, truth, predicted, mappings=mappings)
    results = [{**score, "logistic": fitted.record()} for score, fitted in zip(scores, mappings, strict=True)]
    for result, scale in zip(results, scales_record(names, learned).values(), strict=True):
        result |= {} if scale is None else {"mos_range": scale}
    warnings = [
        f"The MOS of {location_of(source)} are converted to the scale of this head: {line}."
        for line in conversions(names, of_store, learned)
    ]
    if source.id != run.store_id or learned != of_store:
        warnings += unknown_scales(f"the head {run.path}", learned, source, names, labels)
    warnings += [] if part in _TRAINING_PARTS else leak_warnings(run, source, items)
    warnings += author_warnings(source, {part: items})
    return {**by_label(run.train.labels, results), "warnings": warnings}


def scores_of_labels(
    source: FeatureSource,
    items: NDArray[np.int64],
    labels: NDArray[np.float64],
    predicted: NDArray[np.float64],
    *,
    mappings: Sequence[Mappings] | None,
) -> list[dict[str, Any]]:
    """`evaluate_scores` and `calibration_fields` of each label, from the columns of `labels` and `predicted`.

    Both are (items, labels). `mappings` has an entry for each label.
    """
    prompts = [source.items.prompts[k] for k in items]
    pairs = list(zip(columns(predicted), columns(labels), strict=True))
    applied = [None] * len(pairs) if mappings is None else [each.fitted for each in mappings]
    return [
        {
            **evaluate_scores(guesses, truth, prompts, mappings=fitted),
            **calibration_fields(guesses, truth),
        }
        for (guesses, truth), fitted in zip(pairs, applied, strict=True)
    ]


def part_items(run: Run, source: FeatureSource, part: str) -> NDArray[np.int64]:
    """The items of a part as in `evaluate`, ascending, one at least."""
    part = _ALIASES.get(part, part)
    if part not in PARTS:
        kind = "part"
        raise UnknownName.of(kind, part, PARTS)
    if part == "all" or source.id != run.store_id:
        return split_items(source, {"validation": "val"}.get(part, part))
    everything = np.arange(len(source.items.names))
    items = everything[run.parts().contain(source, everything, part)]
    if not len(items):
        message = f"{location_of(source)}: no item is in the part {part!r} of the run {run.path}."
        raise DataError(message)
    return items


def _positions(items: Sequence[int] | NDArray[Any], source: FeatureSource) -> NDArray[np.int64]:
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


def _predict(
    run: Run, source: FeatureSource, items: NDArray[np.int64], *, device: str, batch_size: int
) -> NDArray[np.float64]:
    head = run.load_head(source, device=resolve_device(device))
    return predict_items(head, source, items, batch_size=batch_size)


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
    head: Head,
    source: FeatureSource,
    items: NDArray[np.int64],
    *,
    batch_size: int,
    kept: tuple[FeatureSet, NDArray[np.int64]] | None = None,
) -> NDArray[np.float64]:
    """Predict (items, labels) with a head in evaluation mode, with the features of 512 items in memory at a time.

    `kept` is a FeatureSet with all `items` and the position of each in it, which saves reading and gives the same
    numbers. Raises DataError, naming the items, if they have no token of the role that the head pools.
    """
    device = next(head.parameters()).device
    predicted = np.empty((len(items), head.label_count))
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
                outputs = head(*batch.to(device).inputs)
                predicted[[place[k] for k in batch.positions.tolist()]] = outputs.double().cpu().numpy()
    return predicted
