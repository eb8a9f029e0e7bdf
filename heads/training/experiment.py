"""An experiment: one head to train, its items, the head that it starts from, and the key that identifies it.

It starts from a fresh head or from the head of another run, for example to retrain on few items of another data set. In
the second case it takes over weights, constants of the features, and mean and deviation of the labels, so before the
first step it predicts what the run predicts. If the labels of the store are on another scale than those of the run,
mean and deviation, and so the predictions, are converted.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError, HeadError
from agiqa.heads.closed.choosing import check_form
from agiqa.heads.closed.words import WORDS
from agiqa.heads.data.features import FeatureSource, items_identity, location_of, read_labels
from agiqa.heads.data.layers import LAST, base_of, layer_of, stored_layers
from agiqa.heads.data.scales import conversions, scales_of, unknown_scales
from agiqa.heads.data.soft_labels import counted_levels, label_deviations
from agiqa.heads.data.splits import Partition, make_partition
from agiqa.heads.evaluation.leaks import count_known
from agiqa.heads.evaluation.own_parts import CODE, code_of, own_parts
from agiqa.heads.evaluation.runs import WEIGHTS, Run, refuse_taken
from agiqa.heads.model.encoders.base import completed
from agiqa.heads.model.head import check_sizes
from agiqa.heads.model.losses import check_loss, check_weights, get_loss, readout_of
from agiqa.heads.model.projection import check_encoding
from agiqa.heads.model.reading import check_mix
from agiqa.heads.model.readouts import VALUE
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.device import check_precision, resolve_device
from agiqa.heads.training.progress import check_tensorboard
from agiqa.parts import OwnPart
from agiqa.version import agiqa_version

WITHOUT_EFFECT = ("device", "keep", "memory", "save_seconds", "tensorboard")
"""Training settings that change no number on a given device."""
OF_THE_MACHINE = (*WITHOUT_EFFECT, "threads")
"""Training settings of the machine: a finished training counts as the same one on any machine. An interrupted
training resumes only with the same number of `threads`, which changes the last digits of sums, as a device does."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One head to train."""

    source: FeatureSource
    """What the head reads, from `features_for`."""
    run: Path
    """The run folder to write."""
    head: HeadConfig
    train: TrainConfig
    preset: str | None = None
    """The name of the settings."""
    start: Run | None = None
    """The run whose head the training starts from; None for a fresh head."""
    drawn: Partition | None = None
    """The `partition`, where it has been drawn before."""

    @cached_property
    def partition(self) -> Partition:
        """The items of each part. Raises as `make_partition`."""
        return self.drawn or make_partition(self.source, self.train)

    @cached_property
    def recorded_head(self) -> dict[str, Any]:
        """The settings of the head, ready for JSON, its encoder's own settings completed. Raises as `completed`."""
        return completed(self.head).model_dump(mode="json")

    @cached_property
    def own_parts(self) -> list[OwnPart]:
        """The parts of the head, and its losses, that agiqa does not have itself. Raises UnknownName."""
        return own_parts(self.head, self.train.loss)

    @cached_property
    def device(self) -> torch.device:
        """Where the head is trained."""
        return resolve_device(self.train.device)

    @cached_property
    def start_record(self) -> dict[str, str] | None:
        """The entry `start` of config.json: run folder's name, store id, sha256 of the weights. Raises HeadError."""
        if self.start is None:
            return None
        path = self.start.path / WEIGHTS
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            message = f"{path} cannot be read ({error})."
            raise HeadError(message) from error
        return {"run": self.start.path.absolute().name, "store": self.start.store_id, "sha256": digest}

    def check(self) -> None:
        """Raise every error that shows before features are read: HeadError, ConfigError, UnknownName or DataError."""
        refuse_taken(self.run)
        check_settings(self.source, self.head, self.train)
        check_precision(self.train)
        if self.train.tensorboard:
            check_tensorboard()
        if self.start is not None:
            check_start(self.start, self)
        for part, items in self.partition.parts().items():
            _check_labelled(self.source, part, items, self.train)
        if get_loss(self.train.loss).reads_levels:
            check_soft_labels(self.source, self.partition.train, self.train)

    def settings(self) -> dict[str, Any]:
        """Settings of head and training, the store and the beginning, ready for JSON. Raises as `start_record`."""
        return {
            "head": self.recorded_head,
            "train": {**self.train.model_dump(mode="json"), "layer": layer_of(self.source)},
            "start": None if self.start_record is None else self.start_record["sha256"],
            "store": base_of(self.source).id,
            **code_of(self.own_parts),
        }

    @cached_property
    def data(self) -> dict[str, Any]:
        """The entry `data` of config.json: sha256 of the items and of the labels of every part. As `read_labels`."""
        parts = self.partition.parts()
        labels = {name: read_labels(self.source, items, label=self.train.label) for name, items in parts.items()}
        return {
            "items": {name: items_identity(self.source, items) for name, items in parts.items()},
            "labels": {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in labels.items()},
        }

    def key(self) -> dict[str, Any]:
        """Everything that the numbers depend on, ready for JSON. Raises as `settings` and `data`."""
        settings = self.settings()
        settings["train"] = {name: value for name, value in settings["train"].items() if name not in WITHOUT_EFFECT}
        on = {"device": self.device.type, "agiqa": agiqa_version(), "torch": torch.__version__}
        return {**settings, **self.data, "on": on}


def layer_to_read(train: TrainConfig, start: Run | None) -> str | None:
    """The layer that the settings name, or else that of the head that the training starts from."""
    return start.spec.layer if train.layer is None and start is not None else train.layer


def _check_labelled(source: FeatureSource, part: str, items: NDArray[np.int64], config: TrainConfig) -> None:
    """Raise DataError if no item of a part has one of several labels, or as `read_labels`."""
    lacks: NDArray[np.bool_] = np.isnan(read_labels(source, items, label=config.label))
    for name in (name for name, column in zip(config.labels, lacks.T, strict=True) if len(items) and column.all()):
        message = (
            f"{location_of(source)}: none of {len(items)} {part} items has a {name} MOS. Change the split, or leave "
            "the label out."
        )
        raise DataError(message)


def check_settings(source: FeatureSource, head: HeadConfig, train: TrainConfig) -> None:
    """Raise what is wrong with settings for `source` on any machine: UnknownName, ConfigError or HeadError.

    `source` is from `features_for`. As `check_sizes`, `check_form`, `check_answers`, `check_encoding`, `check_mix` and
    `check_loss`. A closed form reads any encoding.
    """
    check_sizes(head)
    check_form(head)
    if head.encoder == WORDS:
        check_answers(source)
    if not head.is_closed:
        check_encoding(source, head.projection)
        check_mix(source, head)
    check_loss(train)
    check_weights(train)
    if head.init is not None and readout_of(train) != VALUE:
        message = (
            f"The loss {train.loss!r} predicts a spread, and `init` {head.init!r} predicts the MOS alone: they cannot "
            "be added. Use mse, mae, huber or a loss that compares items, or leave `init` out."
        )
        raise ConfigError(message)


def check_answers(source: FeatureSource) -> None:
    """Raise HeadError where `rating-words` cannot compute logits of `source`, which is not the output of the model."""
    location, layer, stored = location_of(source), layer_of(source), stored_layers(base_of(source))
    if layer != LAST:
        remedy = "leave `layer` out" if LAST in stored else f"extract with `--layers {','.join([*stored, LAST])}`"
        message = (
            f"{WORDS!r} reads the logits of the rating words, which W_lm computes from the layer {LAST!r} alone, and "
            f"here it would read layer {layer} of {location}: {remedy}."
        )
        raise HeadError(message)
    if source.encoding != "logits" and not source.lm_head_sha256:
        message = (
            f"{WORDS!r} reads the logits of the rating words, and {location} holds states of a model without W_lm. "
            "Extract the states of a language model, without `--tap`."
        )
        raise HeadError(message)


def check_soft_labels(source: FeatureSource, items: NDArray[np.int64], train: TrainConfig) -> None:
    """Raise DataError where these items have no soft labels."""
    if train.soft_labels == "gaussian":
        label_deviations(source, items, train)
        return
    for name in train.labels:
        counted_levels(source, items, name)


def differences(
    kept: Mapping[str, Any], wanted: Mapping[str, Any], *, verb: str, without: Collection[str] = ()
) -> list[str]:
    """A line for each entry of two keys that differs, but for those named in `without`.

    `verb` introduces the kept value, as in `lr: kept 0.01, asked for 0.5`.
    """
    before, now = _flat(kept), _flat(wanted)
    return [
        f"{name} {'is not that' if name.startswith(CODE) else 'are not those'} that it was trained with"
        if name.startswith(("items of", "labels of", CODE))
        else f"{name}: {verb} {before.get(name)!r}, asked for {now.get(name)!r}"
        for name in dict.fromkeys([*now, *before])
        if name not in without and before.get(name) != now.get(name)
    ]


def _flat(key: Mapping[str, Any]) -> dict[str, Any]:
    """`key` without its nesting."""
    flat: dict[str, Any] = {}
    for name, value in key.items():
        if name in ("items", "labels"):
            flat |= {f"{name} of {part}": sha for part, sha in value.items()}
        else:
            flat |= value if isinstance(value, dict) else {name: value}
    return flat


def check_start(start: Run, experiment: Experiment) -> None:
    """Raise HeadError unless the experiment can begin with the head of `start`.

    Head settings, the readout and the meaning of the features must be the same. A head of one label may learn another
    label; several labels must be the same in the same order.
    """
    if experiment.head.is_closed or experiment.head.init is not None:
        message = f"{experiment.run}: closed forms, also as `init`, are fitted anew. Leave out the start {start.path}."
        raise HeadError(message)
    start.check(experiment.source)
    ours, theirs = experiment.recorded_head, completed(start.head).model_dump(mode="json")
    different = [f"{name}: {theirs[name]!r} there, {ours[name]!r} here" for name in ours if ours[name] != theirs[name]]
    labels, learned = experiment.train.labels, start.train.labels
    if labels != learned and not len(labels) == len(learned) == 1:
        different.append(f"label: {start.train.label!r} there, {experiment.train.label!r} here")
    readout = readout_of(experiment.train)
    if readout != start.readout:
        losses = f"loss: {start.train.loss!r} there, {experiment.train.loss!r} here"
        different.append(f"{losses}, whose heads have other outputs ({start.readout} and {readout})")
    if different:
        lines = "\n".join(f"  {line}" for line in different)
        message = (
            f"{experiment.run} cannot start from the head {start.path}, which is another:\n{lines}\n"
            f"Leave these settings out to take those of the head, or train from the beginning."
        )
        raise HeadError(message)


def start_warnings(experiment: Experiment, test: NDArray[np.int64]) -> list[str]:
    """Warnings about the beginning: `test` items of the first training, another label, another scale of labels."""
    start, source, train = experiment.start, experiment.source, experiment.train
    if start is None:
        return []
    name = start.path.absolute().name
    items, prompts = count_known(start, source, test)
    training = f"the training of {name}, the head that this one starts from"
    counts = {
        f"were in {training}": items,
        f"have a prompt that occurs in {training}{prompts.note()}": prompts.same,
    }
    found = [f"{count} of {len(test)} test items {what}." for what, count in counts.items() if count]
    found += [
        f"What {name}, the head that this one starts from, predicts is converted: {line}."
        for line in conversions(train.labels, start.scales, scales_of(source, train.labels))
    ]
    labels = read_labels(source, test, label=train.label)
    found += unknown_scales(f"the head {name}", start.scales, source, train.labels, labels)
    if train.label != start.train.label:
        found.append(f"{name}, the head that this one starts from, learned {start.train.label}, not {train.label}.")
    return found
