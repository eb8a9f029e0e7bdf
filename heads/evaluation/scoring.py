"""Prediction and evaluation: of a head in memory while it is trained, and of a run folder on any fitting store."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import DataError, HeadError, UnknownName
from agiqa.heads.data.batches import BatchLoader
from agiqa.heads.data.features import FeatureSet, FeatureSource, location_of, read_labels
from agiqa.heads.data.prompt_groups import KnownPrompts, PromptOverlap
from agiqa.heads.data.scales import conversions, convert_columns, scales_of, scales_record, unknown_scales
from agiqa.heads.data.splits import split_items
from agiqa.heads.evaluation.authors import author_warnings
from agiqa.heads.evaluation.calibration import calibration_fields
from agiqa.heads.evaluation.logistic import Mappings
from agiqa.heads.evaluation.metrics import evaluate_scores
from agiqa.heads.evaluation.runs import METRICS, Run
from agiqa.heads.model.head import Head
from agiqa.heads.model.pooling import check_roles
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.settings.labels import by_label, columns, of_each_label, plain

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
    """The predicted MOS of each item, in the order asked for; None is every item of the store.

    (items,) for a head with one label; (items, labels) for one with several, in the order of `run.train.labels`.

    Raises HeadError when the store's features mean nothing to the head, ConfigError for an absent device.
    """
    chosen = np.arange(len(source.items.names)) if items is None else np.asarray(items, dtype=np.int64)
    return plain(_predict(run, source, chosen, device=device, batch_size=batch_size))


def evaluate(
    run: Run, source: FeatureSource, part: str = "test", *, device: str = "auto", batch_size: int = 32
) -> dict[str, Any]:
    """Metrics with intervals on one part of a store: `test`, `validation`, `train` or `all`.

    On the store of the run the parts are those of its training; on another store they are its split column's.
    `warnings` in the result count the items and prompts that the head was trained on and the items that read a
    teacher's rating words, and name scales of MOS that are converted or not known; `logistic` is the recorded mapping
    behind each `plcc_logistic4` and the like, or why there is none; `mos_range` is the scale of the head, which errors
    such as RMSE are on, where it is known. For a head with several labels all but `warnings` stands once per label,
    under its name.
    Raises as `predict`, UnknownName for the part or a label that the store has not, DataError for an empty part or
    missing labels.
    """
    items = part_items(run, source, part)
    names, learned = run.train.labels, run.scales
    there, labels = scales_of(source, names), read_labels(source, items, label=run.train.label)
    predicted = _predict(run, source, items, device=device, batch_size=batch_size)
    mappings = _mappings(run, source, items)
    truth = convert_columns(labels, there, learned)
    scores = scores_of_labels(source, items, truth, predicted, mappings=mappings)
    told = [{**score, "logistic": fitted.record()} for score, fitted in zip(scores, mappings, strict=True)]
    for score, scale in zip(told, scales_record(names, learned).values(), strict=True):
        score |= {} if scale is None else {"mos_range": scale}
    warnings = [
        f"The MOS of {location_of(source)} are converted to the scale of this head: {line}."
        for line in conversions(names, there, learned)
    ]
    if source.id != run.store_id or learned != there:
        warnings += unknown_scales(f"the head {run.path}", learned, source, names, labels)
    warnings += [] if part in _TRAINING_PARTS else _leaks(run, source, items)
    warnings += author_warnings(source, {part: items})
    return {**by_label(run.train.labels, told), "warnings": warnings}


def scores_of_labels(
    source: FeatureSource,
    items: NDArray[np.int64],
    labels: NDArray[np.float64],
    predicted: NDArray[np.float64],
    *,
    mappings: Sequence[Mappings] | None,
) -> list[dict[str, Any]]:
    """`evaluate_scores` of each label: of its column of `labels` and `predicted` (items, labels), and its mappings.

    With the `slope` and `intercept` of its MOS on its predictions, as of `calibration_fields`.
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
    """The items of a part, never empty, ascending; see `evaluate`."""
    part = _ALIASES.get(part, part)
    if part not in PARTS:
        kind = "part"
        raise UnknownName.of(kind, part, PARTS)
    if part == "all" or source.id != run.store_id:
        return split_items(source, {"validation": "val"}.get(part, part))
    everything = np.arange(len(source.items.names))
    items = everything[run.recorded_parts().hold(source, everything, part)]
    if not len(items):
        message = f"{location_of(source)}: no item is in the part {part!r} of the run {run.path}."
        raise DataError(message)
    return items


def _predict(
    run: Run, source: FeatureSource, items: NDArray[np.int64], *, device: str, batch_size: int
) -> NDArray[np.float64]:
    head = run.load_head(source, device=resolve_device(device))
    return predict_items(head, source, items, batch_size=batch_size)


def _mappings(run: Run, source: FeatureSource, items: NDArray[np.int64]) -> list[Mappings]:
    """The mappings that the run recorded for each label; none for items that they were fitted to. Raises HeadError."""
    recorded, labels = run.metrics.get("logistic"), run.train.labels
    if recorded is None:
        return [Mappings.none("the run recorded no fit; it was made before agiqa fitted them")] * len(labels)
    seen = int(run.recorded_parts().hold(source, items, "validation").sum())
    if seen:
        why = f"{seen} of {len(items)} items are validation items, which the mappings were fitted to"
        return [Mappings.none(why)] * len(labels)
    try:
        return [Mappings.from_record(record) for record in of_each_label(labels, recorded)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{run.path / METRICS}: `logistic` is not what a training writes ({error!r})."
        raise HeadError(message) from error


def _leaks(run: Run, source: FeatureSource, items: NDArray[np.int64]) -> list[str]:
    """Warnings about items and prompts that the head was trained on, or that chose its epoch."""
    seen, prompts = count_known(run, source, items)
    counts = {
        "were in the training of this head": seen,
        f"have a prompt that occurs in its training{prompts.note()}": prompts.same,
    }
    return [f"{count} of {len(items)} items {what}." for what, count in counts.items() if count]


def count_known(run: Run, source: FeatureSource, items: NDArray[np.int64]) -> tuple[int, PromptOverlap]:
    """How many of `items` are among those that the head of `run` was trained on, or have a prompt that is.

    Those that chose its epoch count too. An item of a store that the run did not read is the same as one that it did
    read where both have the same name and prompt. Raises HeadError.
    """
    parts, trained = run.recorded_parts(), ("train", "validation")
    known = KnownPrompts(prompt for part in trained for _, prompt in parts.pairs[part])
    seen = int(parts.hold(source, items, *trained).sum())
    return seen, known.count(source.items.prompts[item] for item in items)


def predict_items(
    head: Head,
    source: FeatureSource,
    items: NDArray[np.int64],
    *,
    batch_size: int,
    kept: tuple[FeatureSet, NDArray[np.int64]] | None = None,
) -> NDArray[np.float64]:
    """Predict (items, labels) with a head in evaluation mode, holding the features of 512 items at a time.

    `kept` is a FeatureSet that holds all `items` already, and the position of each in it; the numbers are the same.
    Raises DataError, naming the items, when the head pools a role of which they have no token.
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
