"""The state of a training under way, so that one that was killed goes on and ends with the same numbers.

It lies beside the run folder RUN, and is removed once that is written:

.RUN.state/key.json     what is trained: settings, the head it starts from, store, items and labels of every part,
                        versions
.RUN.state/state.ckpt   Lightning's checkpoint after an epoch, replaced as a whole; see `Learner.on_save_checkpoint`
.RUN.state/tensorboard  event files, copied into the run folder at the end
.RUN.state/run          the run folder, until it is whole
.RUN.state/lock         held by the process at work

A checkpoint holds the weights up to four times over (now, averaged, of the best epoch; AdamW's two moments), which
for the vocabulary projection of an 8B model is 1.05 GB and more, and 1 to 3 s on a plain disk. It is written at the
end of an epoch, and not before `save_seconds` have passed since the last one, or since the start: a kill costs that
much work and an epoch, and a training shorter than that writes none.
"""

import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from agiqa.errors import HeadError
from agiqa.heads.data.features import FeatureSource, items_identity, read_labels
from agiqa.heads.data.splits import Partition
from agiqa.heads.evaluation.runs import EVENTS
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.training.events import EventLog
from agiqa.heads.training.learner import LEARNER
from agiqa.heads.training.outcome import Outcome
from agiqa.progress import say
from agiqa.store.disk.files import canonical_json, sync_file, telling_disk_errors, write_text_atomically
from agiqa.store.disk.locks import exclusive_lock
from agiqa.version import agiqa_version

KEY, CHECKPOINT, LOCK = "key.json", "state.ckpt", "lock"
WITHOUT_EFFECT = ("device", "keep", "memory", "save_seconds", "tensorboard")
"""Training settings that change no number, given the device that is meant."""
OF_THE_MACHINE = (*WITHOUT_EFFECT, "threads")
"""Training settings of where it ran: a training that is done stands for the same one elsewhere. How many `threads`
share a sum moves its last digits, as a device does, so one that is under way goes on only with as many."""


class TrainingState:
    """What is kept of a training, and how much of it is done already."""

    def __init__(self, folder: Path, *, save_seconds: float) -> None:
        """Use `training_state`. Raises HeadError for a checkpoint that cannot be read."""
        self.folder = folder
        self.selection: Outcome | None = None
        """Of the fit that chose the epoch, once a refit is under way."""
        self.seconds = 0.0
        """That the epochs took which are done already."""
        self._save_seconds = save_seconds
        self._saved_at = time.monotonic()
        self._stage: str | None = None
        self._learner: Mapping[str, Any] = {}
        if self.path.exists():
            self._read()

    @property
    def path(self) -> Path:
        """The checkpoint, there or not."""
        return self.folder / CHECKPOINT

    def learner_of(self, stage: str) -> Mapping[str, Any] | None:
        """What the learner of this stage had kept; None when the stage has to begin."""
        return self._learner if self._stage == stage else None

    def events(self, stage: str, *, after: int | None) -> EventLog:
        """The event files of a stage; see `EventLog`. Where it begins anew, those of a lost attempt are removed."""
        folder = self.folder / EVENTS / stage
        if after is None:
            shutil.rmtree(folder, ignore_errors=True)
        return EventLog(folder, after=after)

    def save_if_due(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint, if `save_seconds` have passed since the last."""
        if time.monotonic() - self._saved_at < self._save_seconds:
            return
        with telling_disk_errors(f"saving the training to {self.path}", "the epochs saved before are kept"):
            trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()

    def _read(self) -> None:
        try:
            checkpoint = read_checkpoint(self.path)
            self._stage, self._learner = checkpoint["stage"], checkpoint[LEARNER]
            selection = checkpoint["selection"]
            self.selection = None if selection is None else Outcome.from_record(selection)
        except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, EOFError) as error:
            message = f"{self.path} cannot be read ({error}). --restart trains afresh."
            raise HeadError(message) from error
        epochs = self._learner["curves"]
        rows = [*epochs, *(selection["curves"] if selection else [])]
        self.seconds = sum(row["seconds"] for row in rows)
        say(f"going on after epoch {len(epochs)} of the stage {self._stage!r}, kept in {self.folder}")


class StateKeeper(Checkpoint):
    """Lightning's hook: saves the state after an epoch, when every other hook of the epoch has run."""

    def __init__(self, state: TrainingState, stage: str) -> None:
        """Save epochs of `stage` to `state`."""
        self._state = state
        self._stage = stage

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, if it is time."""
        del pl_module
        self._state.save_if_due(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the stage, and what the stage before it chose."""
        del trainer, pl_module
        selection = self._state.selection
        checkpoint["stage"] = self._stage
        checkpoint["selection"] = None if selection is None else selection.record()


class StateFile(CheckpointIO):
    """Lightning's way to the disk: streamed, whole or not at all, and nothing but tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Replace `path`; a kill or an OSError on the way leaves the old file."""
        del storage_options
        path = Path(path)
        temporary = path.with_name(f"{path.name}.new")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            temporary.unlink()
            if isinstance(error.__context__, OSError):  # torch puts a RuntimeError in the place of a full disk
                raise error.__context__ from None
            raise
        temporary.replace(path)
        sync_file(path.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = None,
        weights_only: bool | None = None,  # noqa: FBT001  (Lightning's own signature)
    ) -> dict[str, Any]:
        """The checkpoint, its tensors on the CPU."""
        del map_location, weights_only
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file."""
        Path(path).unlink()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, mapped: a tensor is read when it is used."""
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint


@contextmanager
def training_state(
    run: Path, key: Mapping[str, Any], *, save_seconds: float, restart: bool = False
) -> Generator[TrainingState]:
    """The state of the training that `key` describes, held alone; removed when all inside is done.

    An error or a kill inside leaves it, once an epoch is saved. Raises HeadError where another process trains
    `run`, or another training was broken off there, unless `restart` throws it away.
    """
    folder = state_folder(run)
    run.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / LOCK) as held:
        if not held:
            message = f"Another process trains {run} now and holds {folder / LOCK}. Choose another run folder."
            raise HeadError(message)
        _claim(folder, key, restart=restart)
        state = TrainingState(folder, save_seconds=save_seconds)
        try:
            yield state
        except BaseException as error:
            if state.path.exists():
                say(f"kept in {folder}: the same command goes on after the last epoch saved, --restart starts afresh")
            else:
                shutil.rmtree(folder)
                if isinstance(error, KeyboardInterrupt):
                    say(f"no epoch was kept: the first is saved after {save_seconds:g} s (save_seconds)")
            raise
        shutil.rmtree(folder)


def state_folder(run: Path) -> Path:
    """Where the state of a training for the folder `run` is kept."""
    return run.with_name(f".{run.name}.state")


def training_key(
    source: FeatureSource,
    partition: Partition,
    head: HeadConfig,
    train: TrainConfig,
    *,
    device: torch.device,
    start: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Everything that the numbers of a training depend on, in plain values; `start` as of `start_record`.

    Raises as `read_labels`.
    """
    labels = {name: read_labels(source, items, label=train.label) for name, items in partition.parts().items()}
    settings = train.model_dump(mode="json")
    return {
        "head": head.model_dump(mode="json"),
        "train": {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT},
        "start": None if start is None else start["sha256"],
        "store": source.id,
        "items": {name: items_identity(source, items) for name, items in partition.parts().items()},
        "labels": {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in labels.items()},
        "on": {"device": device.type, "agiqa": agiqa_version(), "torch": torch.__version__},
    }


def data_of(key: Mapping[str, Any]) -> dict[str, Any]:
    """What a `training_key` says of its data: a sha256 of the items and of the labels of every part."""
    return {name: key[name] for name in ("items", "labels")}


def _claim(folder: Path, key: Mapping[str, Any], *, restart: bool) -> None:
    """Make `folder` that of the training `key`. Raises HeadError where it keeps epochs of another."""
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not restart:
        differences = _differences(folder, key)
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            message = (
                f"{folder} keeps another training that was broken off:\n{lines}\n"
                f"Go on with its settings, choose another run folder, or throw it away with --restart."
            )
            raise HeadError(message)
        return
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(folder / EVENTS, ignore_errors=True)
    write_text_atomically(folder / KEY, canonical_json(key))


def _differences(folder: Path, key: Mapping[str, Any]) -> list[str]:
    """What differs between the training kept in `folder` and `key`, a line each."""
    try:
        kept: dict[str, Any] = json.loads((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{KEY} cannot be read ({error})"]
    before, now = _flat(kept), _flat(key)
    names = [*now, *(name for name in before if name not in now)]
    return [
        f"{name} are not those kept"
        if name.startswith(("items of", "labels of"))
        else f"{name}: kept {before.get(name)!r}, asked for {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _flat(key: Mapping[str, Any]) -> dict[str, Any]:
    """`key` without its nesting."""
    flat: dict[str, Any] = {}
    for name, value in key.items():
        if name in ("head", "train", "on"):
            flat |= value
        elif isinstance(value, dict):
            flat |= {f"{name} of {part}": content for part, content in value.items()}
        else:
            flat[name] = value
    return flat
