"""What the published protocol would have told, beside the honest number: the epoch chosen by its own test score.

The released code evaluates on the test items after every epoch and keeps the best one, so its number is the largest of
as many draws as there are epochs. A setting of the same name follows the test scores of every epoch, tells the best,
and by how much it is better than the number of the run, whose choices hear nothing of it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.heads.data.features import FeatureSet, FeatureSource, read_labels
from agiqa.heads.evaluation.metrics import score
from agiqa.heads.evaluation.scoring import predict_items
from agiqa.heads.model.head import Head
from agiqa.heads.settings.labels import by_label, column_names, columns, of_each_label, parse_labels
from agiqa.heads.training.outcome import Epoch

_FOLLOWED = ("srcc", "plcc")


class PaperTrace:
    """SRCC and PLCC of a head on the test items, as its epochs go by."""

    def __init__(
        self,
        source: FeatureSource,
        items: NDArray[np.int64],
        *,
        label: str,
        batch_size: int,
        kept: tuple[FeatureSet, NDArray[np.int64]] | None,
    ) -> None:
        """Of `items`, in batches as the run's own prediction has them; `kept` as of `predict_items`.

        Raises as `read_labels`.
        """
        self._source = source
        self._items = items
        self._names = parse_labels(label)
        self._labels = read_labels(source, items, label=label)
        self._batch_size = batch_size
        self._kept = kept

    def __call__(self, head: Head) -> dict[str, float]:
        """The columns that an epoch adds to curves.csv: `test_srcc` and `test_plcc`, or those of each of the labels.

        NaN where not defined. `head` and the random state stay as they are.
        """
        was_training = head.training
        head.eval()
        try:
            # what training compiles would be compiled once more, without gradients
            with torch.compiler.set_stance("force_eager"):
                predicted = predict_items(head, self._source, self._items, batch_size=self._batch_size, kept=self._kept)
        finally:
            head.train(was_training)
        scores = [score(*pair) for pair in zip(columns(predicted), columns(self._labels), strict=True)]
        return {
            column: scores[number][metric]
            for metric in _FOLLOWED
            for number, column in enumerate(column_names(self._names, f"test_{metric}"))
        }


def best_on_test(curves: Sequence[Epoch], honest: Any, label: str) -> Any:
    """What metrics.json tells under `paper_compatible`, of the epochs of a fit and the test metrics of the run.

    `{"chosen_by", "epoch", "srcc", "plcc", "bias": {"srcc", "plcc"}}`, or that of each label under its name: one epoch
    for all labels, chosen by their mean SRCC. `bias` is the best epoch's metric minus the `honest` one. Null where
    nothing is defined.
    """
    names = parse_labels(label)
    followed = {metric: _followed(curves, names, metric) for metric in _FOLLOWED}
    means = followed["srcc"].mean(axis=1)
    best = int(np.nanargmax(means)) if np.isfinite(means).any() else None
    what = "test SRCC" if len(names) == 1 else f"mean test SRCC of {', '.join(names)}"
    told: list[dict[str, Any]] = []
    for number, own in enumerate(of_each_label(names, honest)):
        values = {metric: None if best is None else _number(followed[metric][best, number]) for metric in _FOLLOWED}
        told.append(
            {
                "chosen_by": f"highest {what}" if best is not None else f"none, as the {what} was never defined",
                "epoch": None if best is None else curves[best].epoch,
                **values,
                "bias": {metric: _difference(values[metric], own[metric]) for metric in _FOLLOWED},
            }
        )
    return by_label(names, told)


def bias_warnings(best: Any, honest: Any, label: str) -> list[str]:
    """A line for each label that tells the two numbers side by side; `best` as of `best_on_test`."""
    names = parse_labels(label)
    pairs = zip(names, of_each_label(names, best), of_each_label(names, honest), strict=True)
    return [
        f"paper-compatible{'' if len(names) == 1 else f', {name}'}: the best epoch on the test part itself "
        f"({theirs['epoch']}) has test {_spelled(theirs)}; this run, which chose without the test part, has "
        f"{_spelled(own)}. The difference, {_spelled(theirs['bias'], sign='+')}, is bias."
        for name, theirs, own in pairs
    ]


def _followed(curves: Sequence[Epoch], names: Sequence[str], metric: str) -> NDArray[np.float64]:
    """A metric (epochs, labels)."""
    titles = column_names(names, f"test_{metric}")
    return np.array([[epoch.test[title] for title in titles] for epoch in curves], dtype=np.float64)


def _number(value: float) -> float | None:
    """The value, or None for NaN, which JSON has no word for."""
    return None if math.isnan(value) else float(value)


def _difference(best: float | None, honest: float | None) -> float | None:
    return None if best is None or honest is None else best - honest


def _spelled(scores: Mapping[str, Any], sign: str = "") -> str:
    """SRCC and PLCC for people."""
    return " ".join(
        f"{metric.upper()} {'undefined' if scores[metric] is None else format(scores[metric], f'{sign}.4f')}"
        for metric in _FOLLOWED
    )
