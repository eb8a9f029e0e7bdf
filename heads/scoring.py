"""Prediction and evaluation: of a head in memory while it is trained, and of a run folder on any fitting store."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import DataError, UnknownName
from agiqa.heads.batches import BatchLoader
from agiqa.heads.features import FeatureSet, FeatureSource, read_labels
from agiqa.heads.fitting import resolve_device
from agiqa.heads.head import Head
from agiqa.heads.metrics import evaluate_scores
from agiqa.heads.runs import Run
from agiqa.heads.splits import make_partition, split_items

_ITEMS_AT_ONCE = 512
PARTS = ("test", "validation", "train", "all")


def predict(
    run: Run,
    source: FeatureSource,
    items: Sequence[int] | NDArray[Any] | None = None,
    *,
    device: str = "auto",
    batch_size: int = 32,
) -> NDArray[np.float64]:
    """The predicted MOS of each item, in the order asked for; None is every item of the store.

    Raises HeadError when the store's features mean nothing to the head, ConfigError for an absent device.
    """
    chosen = np.arange(len(source.items.names)) if items is None else np.asarray(items, dtype=np.int64)
    head = run.load_head(source, device=resolve_device(device))
    return predict_items(head, source, chosen, batch_size=batch_size)


def evaluate(
    run: Run, source: FeatureSource, part: str = "test", *, device: str = "auto", batch_size: int = 32
) -> dict[str, Any]:
    """Metrics with intervals on one part of a store: `test`, `validation`, `train` or `all`.

    On the store of the run the parts are those of its training; on another store they are its split column's.
    Raises as `predict`, UnknownName for the part, DataError for an empty part or missing labels.
    """
    items = part_items(run, source, part)
    labels = read_labels(source, items, label=run.train.label)
    predicted = predict(run, source, items, device=device, batch_size=batch_size)
    prompts = [source.items.prompts[k] for k in items]
    return evaluate_scores(predicted, labels, prompts, seed=run.train.seed)


def part_items(run: Run, source: FeatureSource, part: str) -> NDArray[np.int64]:
    """The items of a part, never empty; see `evaluate`."""
    if part not in PARTS:
        kind = "part"
        raise UnknownName.of(kind, part, PARTS)
    if part == "all" or source.id != run.store_id:
        items = split_items(source, {"validation": "val"}.get(part, part))
    else:
        partition = make_partition(source, run.train)
        items = {"train": partition.train, "validation": partition.validation, "test": partition.test}[part]
    if not len(items):
        message = f"{source.id}: no item is in the part {part!r} of the run {run.path}."
        raise DataError(message)
    return items


def predict_items(
    head: Head, source: FeatureSource, items: NDArray[np.int64], *, batch_size: int
) -> NDArray[np.float64]:
    """Predict with a head in evaluation mode, holding the features of 512 items at a time."""
    device = next(head.parameters()).device
    predicted = np.empty(len(items))
    with torch.no_grad():
        for start in range(0, len(items), _ITEMS_AT_ONCE):
            features = FeatureSet.from_store(source, items[start : start + _ITEMS_AT_ONCE], label=None)
            for batch in BatchLoader(features, np.arange(len(features)), batch_size=batch_size):
                outputs = head(batch.features.to(device), batch.mask.to(device))
                predicted[start + batch.positions.numpy()] = outputs.double().cpu().numpy()
    return predicted
