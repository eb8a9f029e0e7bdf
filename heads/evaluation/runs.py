"""The run folder: what it holds, how it is written at one go, and which stores its head can read.

head.safetensors  weights and constants of the head, without W_lm
config.json       head and training settings, the store, what its features mean and what made them (model, adapter,
                  conversation), the identity of items and labels, the scale of the labels, versions, kernels
metrics.json      validation and test metrics with intervals, the chosen epoch, the split, who wrote the texts of its
                  parts (`text_authors`), warnings and notes; of several stores read as one also the metrics of each,
                  and what was converted
predictions.csv   name, prompt, split, item, mos, predicted for the validation and test items; `item` is its number in
                  the store, or where several are read as one in all of them, one after the other
curves.csv        a row per epoch; with `paper_compatible` also its test scores
parts.json        name and prompt of every item that trained the head, chose its epoch, and was tested on, and under
                  `items` their numbers in each store, beside its id
tensorboard       event files of the stages `train` and `refit`, where they were asked for

For a head with several labels `validation`, `test` and `logistic` of metrics.json hold an entry per label under its
name, predictions.csv has the columns mos_LABEL and predicted_LABEL of each, and curves.csv means over the labels.
"""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agiqa.errors import ConfigError, HeadError, UnknownName
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.data.scales import Scales, read_scales
from agiqa.heads.evaluation.recorded_parts import RecordedParts
from agiqa.heads.model.encoders.base import encoder_settings
from agiqa.heads.model.head import Head, build_head, check_parts
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.store.disk.files import telling_disk_errors
from agiqa.version import agiqa_version

FORMAT = "agiqa.head"
FORMAT_VERSION = 1
WEIGHTS, CONFIG, METRICS = "head.safetensors", "config.json", "metrics.json"
PREDICTIONS, CURVES, PARTS = "predictions.csv", "curves.csv", "parts.json"
EVENTS = "tensorboard"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained head on disk."""

    path: Path
    head: HeadConfig
    train: TrainConfig
    store_id: str
    """The store that it was trained on."""
    spec: FeatureSpec
    """What the features meant that it was trained on."""
    config: Mapping[str, Any]
    """config.json."""
    metrics: Mapping[str, Any]
    """metrics.json."""

    @property
    def origin(self) -> Mapping[str, Any]:
        """As `origin_of` the store; empty in runs of an agiqa that did not record it."""
        origin: Mapping[str, Any] = self.config.get("origin", {})
        return origin

    @property
    def scales(self) -> Scales:
        """The scale of each label, and so of what the head predicts, in the order of `train.labels`. Raises HeadError.

        None where the store had none, and in runs of an agiqa that did not record it.
        """
        try:
            return read_scales(self.config.get("mos_ranges", {}), self.train.labels)
        except (AttributeError, ConfigError, TypeError, ValueError) as error:
            message = f"{self.path / CONFIG}: `mos_ranges` is not what a training writes ({error})."
            raise HeadError(message) from error

    def parts(self) -> Mapping[str, frozenset[tuple[str, str]]]:
        """Name and prompt of the items that trained the head, chose its epoch, and were tested on. Raises HeadError."""
        return self.recorded_parts().pairs

    def recorded_parts(self) -> RecordedParts:
        """The items that trained the head, chose its epoch, and were tested on. Raises HeadError."""
        recorded = _read_json(self.path, PARTS)
        try:
            return RecordedParts.from_record(recorded)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            message = f"{self.path / PARTS} is not what a training writes ({what}). Bring the file back from a copy."
            raise HeadError(message) from error

    def check(self, source: FeatureSource) -> FeatureSpec:
        """The spec of `source`. Raises HeadError, naming both sides, when its features mean nothing to this head."""
        found, expected = FeatureSpec.of(source), self.spec
        problem = _mismatch(expected, found)
        if problem is not None:
            message = f"The head {self.path} cannot read the store {location_of(source)}: {problem}"
            raise HeadError(message)
        return found

    def load_head(self, source: FeatureSource, *, device: torch.device) -> Head:
        """The head in evaluation mode, W_lm taken from `source` where needed. Raises HeadError."""
        spec = self.check(source)
        with torch.inference_mode(mode=False):  # else a caller's mode makes weights that cannot be trained or cached
            with torch.random.fork_rng(devices=[]):
                head = build_head(self.head, spec, labels=len(self.train.labels))
            self.give_weights(head)
            return head.to(device).eval()

    def give_weights(self, head: Head) -> None:
        """Overwrite weights and constants of `head`. Raises HeadError when those of this run are not of its shapes."""
        path = self.path / WEIGHTS
        try:
            head.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            message = f"{path} does not hold the weights that {self.path / CONFIG} describes: {error}"
            raise HeadError(message) from error


def load_run(path: Path) -> Run:
    """Open a run folder.

    Raises HeadError when it is none, of a version that this agiqa does not read, of settings or parts that this agiqa
    does not know, or its files do not say what a training writes.
    """
    config = _read_json(path, CONFIG)
    found = (config.get("format"), config.get("version"))
    if found != (FORMAT, FORMAT_VERSION):
        message = f"{path / CONFIG} is {found[0]} v{found[1]}; this agiqa reads {FORMAT} v{FORMAT_VERSION}."
        raise HeadError(message)
    try:
        features = config["features"]
        head = HeadConfig(**as_recorded(config["head"]))
        check_parts(head)
        return Run(
            path=path,
            head=head,
            train=TrainConfig(**config["train"]),
            store_id=features["store"],
            spec=FeatureSpec(
                encoding=features["encoding"],
                width=features["width"],
                lm_head_sha256=features["lm_head_sha256"],
                basis_id=features["basis_id"],
            ),
            config=config,
            metrics=_read_json(path, METRICS),
        )
    except (UnknownName, ConfigError) as error:
        message = (
            f"{path / CONFIG}: {error} The head was trained by agiqa {config.get('agiqa')}, and this is "
            f"{agiqa_version()}: read it with that one, and import the module that registers parts of your own."
        )
        raise HeadError(message) from error
    except (KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        message = (
            f"{path / CONFIG} is not what a training writes ({what}). Bring the file back from a copy, or train the "
            "head anew."
        )
        raise HeadError(message) from error


def as_recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as an agiqa recorded them, and `residual` where it had no such setting.

    Its `lstm` and `gru` were plain. Raises TypeError where `settings` are no mapping.
    """
    completed = {"residual": False, **settings}
    read = encoder_settings(str(completed.get("encoder")))
    return {**settings} if read is not None and "residual" not in read else completed


def origin_of(source: FeatureSource) -> dict[str, Any]:
    """What the provenance of a store says of the `model` and the `conversation` behind its features, if it has one."""
    provenance: Mapping[str, Any] = getattr(source, "provenance", {})
    return {key: provenance[key] for key in ("model", "conversation") if key in provenance}


def refuse_taken(path: Path) -> None:
    """Raise HeadError when something is at `path` that is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        message = f"{path} is there already and not empty. Choose another run folder, or remove it first."
        raise HeadError(message)


def write_run(
    path: Path,
    *,
    head: Head,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
    parts: Mapping[str, Any],
    partial: Path,
    events: Path | None = None,
) -> None:
    """Write the folder at `partial`, then move it to its place: a run that was killed is never taken for a run.

    `parts` is what `record_parts` made. `partial` is on the same file system, and what a killed process left there is
    replaced. `events` is a folder of TensorBoard event files to copy. An OSError is told of as `telling_disk_errors`
    does.
    """
    with telling_disk_errors(f"writing {path}", "the epochs that were saved are kept"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write_weights(partial / WEIGHTS, head)
            _write_csv(partial / PREDICTIONS, predictions)
            _write_csv(partial / CURVES, curves)
            _write_json(partial / PARTS, parts)
            _write_json(partial / METRICS, metrics)
            if events is not None:
                shutil.copytree(events, partial / EVENTS)
            _write_json(partial / CONFIG, {"format": FORMAT, "version": FORMAT_VERSION, **config})
            refuse_taken(path)
            if path.exists():
                path.rmdir()
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial)
            raise


def _mismatch(expected: FeatureSpec, found: FeatureSpec) -> str | None:
    """Why features of spec `found` mean nothing to a head for `expected`; None when they are the same."""
    if found.encoding != expected.encoding:
        return (
            f"it reads {expected.encoding!r} features, and the store holds {found.encoding!r}. "
            f"A sketch of hidden states is made with `agiqa store sketch STORE OUT --basis TRAINED_STORE`."
        )
    if found.basis_id != expected.basis_id:
        return (
            f"it was trained on the sketch basis {expected.basis_id}, and the store has {found.basis_id}. Sketch "
            f"the hidden store anew in the same basis: `agiqa store sketch STORE OUT --basis TRAINED_STORE`."
        )
    if found.lm_head_sha256 != expected.lm_head_sha256:
        return (
            f"it was trained with the language-model head {expected.lm_head_sha256}, and the store has "
            f"{found.lm_head_sha256}. Extract with the same model, or train a head on this store."
        )
    if found.width != expected.width:
        return f"features have width {found.width}, expected {expected.width}."
    return None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    """One JSON file of a run folder, an object. Raises HeadError."""
    try:
        content: Any = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path} is no run folder of a trained head: {name} cannot be read ({error})."
        raise HeadError(message) from error
    if not isinstance(content, dict):
        message = f"{path} is no run folder of a trained head: {name} holds no JSON object."
        raise HeadError(message)
    return cast("dict[str, Any]", content)


def _write_weights(path: Path, head: Head) -> None:
    """The weights as safetensors; an error of the disk is an OSError as of any other file."""
    try:
        save_file({name: value.contiguous().cpu() for name, value in head.state_dict().items()}, path)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON; NaN is refused."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows under the keys of the first; None and nothing look the same."""
    write_table: Callable[..., Any] = csv.DictWriter
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = write_table(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
