"""Another run's head as the beginning of a training, as where a head is retrained on few items of another data set.

Its weights, its constants of the features and its mean and deviation of the labels are taken as they are: before the
first step the head predicts what the run predicts. Where the labels of the store are on another scale than those of the
run, mean and deviation are converted to it, and so are the predictions.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import HeadError
from agiqa.heads.data.features import FeatureSource, read_labels
from agiqa.heads.data.scales import conversions, scales_of, unknown_scales
from agiqa.heads.evaluation.leaks import count_known
from agiqa.heads.evaluation.runs import WEIGHTS, Run
from agiqa.heads.settings.config import HeadConfig, TrainConfig


def check_start(start: Run, source: FeatureSource, run: str, head: HeadConfig, train: TrainConfig) -> None:
    """Raise HeadError unless `run`, a head of these settings on `source`, can begin as the head of `start`.

    Head settings and the meaning of the features must be the same. A head of one label may go on with another; several
    must be the same in the same order.
    """
    start.check(source)
    ours, theirs = head.model_dump(), start.head.model_dump()
    different = [f"{name}: {theirs[name]!r} there, {ours[name]!r} here" for name in ours if ours[name] != theirs[name]]
    if train.labels != start.train.labels and not len(train.labels) == len(start.train.labels) == 1:
        different.append(f"label: {start.train.label!r} there, {train.label!r} here")
    if different:
        lines = "\n".join(f"  {line}" for line in different)
        message = (
            f"{run} cannot start from the head {start.path}, which is another:\n{lines}\n"
            f"Leave these settings out to take those of the head, or train from the beginning."
        )
        raise HeadError(message)


def start_record(start: Run | None) -> dict[str, str] | None:
    """What config.json says: name of the run's folder, id of its store, sha256 of its weights. Raises HeadError."""
    if start is None:
        return None
    path = start.path / WEIGHTS
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        message = f"{path} cannot be read ({error})."
        raise HeadError(message) from error
    return {"run": start.path.absolute().name, "store": start.store_id, "sha256": digest}


def start_warnings(start: Run | None, source: FeatureSource, train: TrainConfig, test: NDArray[np.int64]) -> list[str]:
    """What a reader must know: `test` items that the first training had seen, and another label or scale of labels."""
    if start is None:
        return []
    name = start.path.absolute().name
    items, prompts = count_known(start, source, test)
    training = f"the training of {name}, the head that this one starts from"
    counts = {
        f"were in {training}": items,
        f"have a prompt that occurs in {training}{prompts.told()}": prompts.same,
    }
    found = [f"{count} of {len(test)} test items {what}." for what, count in counts.items() if count]
    found += [
        f"What {name}, the head that this one starts from, predicts is converted: {line}."
        for line in conversions(train.labels, start.scales, scales_of(source, train.labels))
    ]
    found += unknown_scales(
        f"the head {name}", start.scales, source, train.labels, read_labels(source, test, label=train.label)
    )
    if train.label != start.train.label:
        found.append(f"{name}, the head that this one starts from, learned {start.train.label}, not {train.label}.")
    return found
