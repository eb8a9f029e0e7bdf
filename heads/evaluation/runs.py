"""The run folder of a trained head: its files, how they are written atomically, and which stores the head can read.

head.safetensors  weights and constants of the head, without W_lm
config.json       head and training settings, the store and its location, its kind of features and what made them
                  (model, adapter, conversation), the identity of items and labels, the scale of the labels, the kind
                  of the scores that make intervals, versions, kernels
metrics.json      validation and test metrics with intervals, the chosen epoch, the split, the authors of the texts of
                  its parts (`text_authors`), warnings and notes, when the training ended (`trained_at`, UTC); for
                  several stores read as one also the metrics of each, and what was converted
predictions.csv   name, prompt, split, item, mos, predicted and, if the head has one, spread of the validation (and
                  calibration) and test items; `item` is its number in the store, or in several stores joined
members           of a stack of runs: the run folder of each, 0, 1, ...
curves.csv        a row per epoch; with `paper_compatible` also its test scores
parts.json        name and prompt of every training, validation and test item, and under `items` the id of each store
                  with their numbers in it
tensorboard       event files of the stages `train` and `refit`, if the setting `tensorboard` is on

For a head with several labels, `validation`, `test` and `logistic` of metrics.json hold an entry per label,
predictions.csv has the columns mos_LABEL and predicted_LABEL (and spread_LABEL) of each, and curves.csv has means over
the labels.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import ConfigError, HeadError, UnknownName
from agiqa.heads.closed.choosing import load_closed
from agiqa.heads.closed.combined import AnyHead, Member, MixedHead, ResidualHead
from agiqa.heads.closed.heads import ClosedHead, below
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.data.layers import LAST, provenance_of
from agiqa.heads.data.scales import Scales, read_scales
from agiqa.heads.evaluation.own_parts import remedies, warn_of_other_code
from agiqa.heads.evaluation.recorded_parts import RecordedParts
from agiqa.heads.evaluation.run_files import read_csv, read_json, read_tensors, write_csv, write_json, write_weights
from agiqa.heads.model.encoders.base import encoder_settings
from agiqa.heads.model.head import Head, build_head, check_parts
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.model.reading import features_for, mismatch, other_model
from agiqa.heads.model.readouts import VALUE, check_readout
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.labels import of_each_label
from agiqa.notebooks import html_table, one_line
from agiqa.store import open_store
from agiqa.store.disk.files import telling_disk_errors
from agiqa.version import agiqa_version

FORMAT = "agiqa.head"
FORMAT_VERSION = 1
WEIGHTS, CONFIG, METRICS = "head.safetensors", "config.json", "metrics.json"
PREDICTIONS, CURVES, PARTS = "predictions.csv", "curves.csv", "parts.json"
EVENTS = "tensorboard"
MEMBERS = "members"
"""The folder of a stack of runs with copies of their folders."""
SCORE_KIND = "interval_scores"
"""The entry of config.json with the scores that make conformal intervals (see conformal.py); old runs have none."""
CLOSED = "closed"
"""The entry of config.json with the facts of a closed form."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained head on disk."""

    path: Path
    head: HeadConfig
    train: TrainConfig
    store_id: str
    """The store that it was trained on."""
    spec: FeatureSpec
    """The features that it was trained on."""
    config: Mapping[str, Any]
    """config.json."""
    metrics: Mapping[str, Any]
    """metrics.json."""

    @property
    def origin(self) -> Mapping[str, Any]:
        """`origin_of` the store; empty in old runs, which did not record it."""
        origin: Mapping[str, Any] = self.config.get("origin", {})
        return origin

    @property
    def readout(self) -> str:
        """What the outputs of the head mean (readouts.py); `value` in old runs, which had no other."""
        return str(self.config.get("readout", VALUE))

    @property
    def predicts_spread(self) -> bool:
        """Whether the head predicts a spread beside each MOS."""
        return self.readout != VALUE

    @property
    def scales(self) -> Scales:
        """The scale of each label and of its predictions, in the order of `train.labels`. Raises HeadError.

        None where the store had none, and in old runs, which did not record it.
        """
        try:
            return read_scales(self.config.get("mos_ranges", {}), self.train.labels)
        except (AttributeError, ConfigError, TypeError, ValueError) as error:
            message = f"{self.path / CONFIG}: `mos_ranges` is not what a training writes ({error})."
            raise HeadError(message) from error

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """The rows of predictions.csv: `name`, `prompt`, `split`, `item`, `mos` and `predicted`.

        Both are on the scale of the head. With several labels, `mos_LABEL` and `predicted_LABEL` of each.
        `pandas.DataFrame` makes a table of them. Raises HeadError for a missing or damaged file.
        """
        return read_csv(self.path / PREDICTIONS)

    @property
    def curves(self) -> list[dict[str, Any]]:
        """The rows of curves.csv, one per epoch, see `agiqa.heads.training.curves.Epoch`; None for an empty cell.

        Raises HeadError for a missing or damaged file.
        """
        return read_csv(self.path / CURVES)

    def predict(
        self,
        store: "str | Path | FeatureSource",
        items: Sequence[int] | NDArray[Any] | None = None,
        *,
        variant: str | None = None,
        device: str = "auto",
        batch_size: int = 32,
    ) -> NDArray[np.float64]:
        """The predicted MOS of `items` of a store, or of all, as `agiqa.heads.predict`.

        `store` is a path, a URL or an open store.
        """
        from agiqa.heads.evaluation.scoring import predict  # it imports this module

        run: Any = self  # pyright sees this class twice: here, and through the link agiqa/heads
        return predict(run, _opened(store), items, variant=variant, device=device, batch_size=batch_size)

    def evaluate(
        self,
        store: "str | Path | FeatureSource",
        part: str = "test",
        *,
        variant: str | None = None,
        device: str = "auto",
        batch_size: int = 32,
    ) -> dict[str, Any]:
        """Metrics with intervals on one part of a store, as `agiqa.heads.evaluate`."""
        from agiqa.heads.evaluation.scoring import evaluate

        run: Any = self
        return evaluate(run, _opened(store), part, variant=variant, device=device, batch_size=batch_size)

    def __repr__(self) -> str:
        """What the run is, in one line."""
        return one_line(f"Run {self.path}", self._shown())

    def _repr_html_(self) -> str:
        """What the run is, for notebooks."""
        return html_table(f"Run {self.path}", self._shown())

    def _shown(self) -> dict[str, object]:
        shown: dict[str, object] = {
            "encoder": self.head.encoder,
            "pooling": self.head.pooling,
            "projection": self.head.projection,
            "label": self.train.label,
            "split": self.train.split,
        }
        for part in ("validation", "test"):
            if scores := self.metrics.get(part):
                shown[part] = "; ".join(map(_scores_text, of_each_label(self.train.labels, scores)))
        return shown

    def parts(self) -> RecordedParts:
        """The training, validation and test items. Raises HeadError."""
        recorded = read_json(self.path, PARTS)
        try:
            return RecordedParts.from_record(recorded)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            message = f"{self.path / PARTS} is not what a training writes ({what}). Bring the file back from a copy."
            raise HeadError(message) from error

    def features_of(self, source: FeatureSource) -> FeatureSource:
        """What this head reads of a store: its layer, and its pooled row of a store of pooled rows.

        Raises UnknownName for a layer that the store lacks, and HeadError for such a pooled row.
        """
        try:
            return features_for(source, self.head, self.spec.layer)
        except (UnknownName, HeadError) as error:
            error.add_note(f"The head {self.path} reads layer {self.spec.layer}.")
            raise

    def check(self, source: FeatureSource) -> FeatureSpec:
        """The spec of what this head reads of `source`. Raises HeadError where it cannot, and as `features_of`."""
        read = self.features_of(source)
        found = FeatureSpec.of(read)
        problem = mismatch(self.head, self.spec, found) or other_model(self.spec, self.origin.get("model") or {}, read)
        if problem is not None:
            message = f"The head {self.path} cannot read the store {location_of(source)}: {problem}"
            raise HeadError(message)
        return found

    def load_head(self, source: FeatureSource, *, device: torch.device) -> AnyHead:
        """The head in evaluation mode; W_lm comes from `source`. Raises HeadError."""
        spec = self.check(source)
        if (self.path / MEMBERS).is_dir():
            return self._load_mixed(source, device)
        if self.head.is_closed:
            return self._load_closed("").to(device).eval()
        with torch.inference_mode(mode=False):  # weights made in inference mode cannot be trained or cached
            with torch.random.fork_rng(devices=[]):
                head = build_head(self.head, spec, labels=len(self.train.labels), readout=self.readout)
            warn_of_other_code(self.path, self.config, self.head)
            self.give_weights(head)
            if self.head.init is not None:
                return ResidualHead(self._load_closed("closed."), head).to(device).eval()
            return head.to(device).eval()

    def _load_mixed(self, source: FeatureSource, device: torch.device) -> MixedHead:
        """The stack of the runs in MEMBERS. Raises HeadError."""
        tensors = read_tensors(self.path / WEIGHTS)
        try:
            facts = dict(self.config[CLOSED])
            runs = [load_run(self.path / MEMBERS / f"{number}") for number in range(len(facts["members"]))]
            members = [Member(head=run.load_head(source, device=device), reads=run.features_of) for run in runs]
            return MixedHead(members, tensors, facts).eval()
        except (KeyError, TypeError) as error:
            message = f"{self.path / CONFIG} does not describe a stack of runs ({error!r}). Make the stack anew."
            raise HeadError(message) from error

    def _load_closed(self, prefix: str) -> ClosedHead:
        """The closed form whose tensors have names with this prefix. Raises HeadError for files without one."""
        tensors = read_tensors(self.path / WEIGHTS)
        try:
            return load_closed(below(tensors, prefix), self.config[CLOSED])
        except (KeyError, TypeError, ValueError) as error:
            message = f"{self.path / WEIGHTS} does not hold the closed form that {CONFIG} describes: {error!r}"
            raise HeadError(message) from error

    def give_weights(self, head: Head) -> None:
        """Load the weights and constants of this run into `head`. Raises HeadError for other shapes or a bad file."""
        tensors = read_tensors(self.path / WEIGHTS)
        try:
            head.load_state_dict(tensors if self.head.init is None else below(tensors, "network."))
        except RuntimeError as error:
            message = f"{self.path / WEIGHTS} does not hold the weights that {self.path / CONFIG} describes: {error}"
            raise HeadError(message) from error


def load_run(path: str | Path) -> Run:
    """Open the run folder `path`.

    Raises HeadError for anything else, another version of the format, unknown settings or parts of the head, and files
    with other content than a training writes.
    """
    path = Path(path)
    config = read_json(path, CONFIG)
    found = (config.get("format"), config.get("version"))
    if found != (FORMAT, FORMAT_VERSION):
        message = f"{path / CONFIG} is {found[0]} v{found[1]}; this agiqa reads {FORMAT} v{FORMAT_VERSION}."
        raise HeadError(message)
    try:
        features = config["features"]
        head = HeadConfig(**complete_settings(config["head"]))
        check_parts(head)
        check_readout(config.get("readout", VALUE))
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
                layer=features.get("layer", LAST),
                pooled=tuple(features.get("pooled", ())),
                tap=features.get("tap"),
            ),
            config=config,
            metrics=read_json(path, METRICS),
        )
    except (UnknownName, ConfigError) as error:
        missing = remedies(config)
        message = f"{path / CONFIG}: {missing or error}"
        if not missing:
            message += (
                f" The head was trained by agiqa {config.get('agiqa')}, and this is {agiqa_version()}: read it with "
                "that one."
            )
        raise HeadError(message) from error
    except (KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        message = (
            f"{path / CONFIG} is not what a training writes ({what}). Bring the file back from a copy, or train the "
            "head anew."
        )
        raise HeadError(message) from error


def complete_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings of a head, with `residual` added for old runs, whose `lstm` and `gru` had plain layers.

    Raises TypeError where `settings` is no mapping.
    """
    completed = {"residual": False, **settings}
    read = encoder_settings(str(completed.get("encoder")))
    return {**settings} if read is not None and "residual" not in read else completed


def origin_of(source: FeatureSource) -> dict[str, Any]:
    """The entries `model` and `conversation` of a store's provenance, if it has them."""
    provenance = provenance_of(source)
    return {key: provenance[key] for key in ("model", "conversation") if key in provenance}


def refuse_taken(path: Path) -> None:
    """Raise HeadError unless `path` is absent or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        message = f"{path} exists and is not empty. Choose another run folder, or remove it first."
        raise HeadError(message)


def write_run(
    path: Path,
    *,
    head: AnyHead,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
    parts: Mapping[str, Any],
    partial: Path,
    events: Path | None = None,
    members: Sequence[Path] = (),
) -> None:
    """Write the folder at `partial`, then rename it to `path`, so that a killed process leaves no incomplete run.

    `parts` comes from `record_parts`. `partial` is on the same file system; leftovers of a killed process there are
    replaced. `events` is a folder of TensorBoard event files to copy, `members` are the run folders of the heads that a
    stack adds up; they become MEMBERS/0, MEMBERS/1 and so on. Raises OSError as `telling_disk_errors`.
    """
    with telling_disk_errors(f"writing {path}", "the epochs that were saved are kept"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write_weights(partial / WEIGHTS, head)
            write_csv(partial / PREDICTIONS, predictions)
            write_csv(partial / CURVES, curves)
            write_json(partial / PARTS, parts)
            write_json(partial / METRICS, metrics)
            if events is not None:
                shutil.copytree(events, partial / EVENTS)
            for number, member in enumerate(members):
                shutil.copytree(member, partial / MEMBERS / f"{number}", ignore=shutil.ignore_patterns(EVENTS))
            write_json(partial / CONFIG, {"format": FORMAT, "version": FORMAT_VERSION, **config})
            refuse_taken(path)
            if path.exists():
                path.rmdir()
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial)
            raise


def _opened(store: "str | Path | FeatureSource") -> FeatureSource:
    return open_store(store) if isinstance(store, str | Path) else store


def _scores_text(scores: Mapping[str, Any]) -> str:
    """SRCC and PLCC of one label, with the number of items."""
    values = {metric.upper(): scores[metric] for metric in ("srcc", "plcc")}
    shown = [f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in values.items()]
    return f"{', '.join(shown)} (n {scores['n']})"
