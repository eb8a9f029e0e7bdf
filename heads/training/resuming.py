"""The saved state of a training: a killed training resumes from it and ends with the same numbers.

It lies beside the run folder RUN, and is removed once RUN is complete:

.RUN.state/key.json     `Experiment.key`: settings, beginning, store, items and labels of every part, versions
.RUN.state/state.ckpt   Lightning's checkpoint after an epoch, replaced atomically; see `Learner.on_save_checkpoint`
.RUN.state/tensorboard  event files, copied into the run folder at the end
.RUN.state/run          the run folder, until it is complete
.RUN.state/lock         held by the process that trains

A checkpoint holds the weights up to four times (current, averaged, of the best epoch; AdamW's two moments), which for
the vocabulary projection of an 8B model is 1.05 GB and more, and takes 1 to 3 s on a plain disk. It is written at the
end of an epoch, once `save_seconds` have passed since the last one or since the start: a kill costs that much work and
an epoch, and a shorter training writes none.
"""

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
from agiqa.heads.evaluation.runs import EVENTS
from agiqa.heads.training.curves import Outcome
from agiqa.heads.training.experiment import differences
from agiqa.heads.training.learner import LEARNER
from agiqa.heads.training.progress import EventLog
from agiqa.progress import say
from agiqa.store.disk.files import canonical_json, sync_file, telling_disk_errors, write_text_atomically
from agiqa.store.disk.locks import exclusive_lock

KEY, CHECKPOINT, LOCK = "key.json", "state.ckpt", "lock"


class TrainingState(Checkpoint):
    """The saved state of a training, and the Lightning callback that saves it after all other hooks of an epoch."""

    def __init__(self, folder: Path, *, save_seconds: float) -> None:
        """Use `training_state`. Raises HeadError for a checkpoint that cannot be read."""
        self.folder = folder
        self.path = folder / CHECKPOINT
        """The path of the checkpoint, which may not exist yet."""
        self.selection: Outcome | None = None
        """The fit that chose the epoch, once a refit is under way."""
        self.seconds = 0.0
        """Duration of the epochs that are done already."""
        self._save_seconds = save_seconds
        self._saved_at = time.monotonic()
        self._stage = self._saved_stage = ""
        self._learner: Mapping[str, Any] = {}
        if self.path.exists():
            self._read()

    def begin(self, stage: str) -> Mapping[str, Any] | None:
        """Keep epochs of `stage` from now on; the record of its learner, None where no epoch of it has been saved."""
        self._stage = stage
        return self._learner if self._saved_stage == stage else None

    def events(self, stage: str, *, after: int | None) -> EventLog:
        """The event files of a stage; see `EventLog`. A stage that starts again removes those of the lost attempt."""
        folder = self.folder / EVENTS / stage
        if after is None:
            shutil.rmtree(folder, ignore_errors=True)
        return EventLog(folder, after=after)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the checkpoint, if `save_seconds` have passed since the last."""
        del pl_module
        if time.monotonic() - self._saved_at < self._save_seconds:
            return
        with telling_disk_errors(f"saving the training to {self.path}", "the epochs saved before are kept"):
            trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the stage, and the choice of the stage before it."""
        del trainer, pl_module
        checkpoint["stage"] = self._stage
        checkpoint["selection"] = None if self.selection is None else self.selection.record()

    def _read(self) -> None:
        try:
            checkpoint = read_checkpoint(self.path)
            self._saved_stage, self._learner = checkpoint["stage"], checkpoint[LEARNER]
            selection = checkpoint["selection"]
            self.selection = None if selection is None else Outcome.from_record(selection)
        except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, EOFError) as error:
            message = f"{self.path} cannot be read ({error}). --restart trains afresh."
            raise HeadError(message) from error
        epochs = self._learner["curves"]
        rows = [*epochs, *(selection["curves"] if selection else [])]
        self.seconds = sum(row["seconds"] for row in rows)
        say(f"going on after epoch {len(epochs)} of the stage {self._saved_stage!r}, kept in {self.folder}")


class StateFile(CheckpointIO):
    """How Lightning writes a checkpoint: streamed, atomically, with tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Replace `path`; a kill or an OSError meanwhile leaves the old file."""
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
            if isinstance(error.__context__, OSError):  # torch replaces the error of a full disk by a RuntimeError
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
    """The state of the training with this `Experiment.key`, held by this process alone, and removed at the end.

    An error or a kill inside leaves the state once an epoch is saved. Raises HeadError where another process trains
    `run`, or an interrupted training of other settings is saved there, unless `restart` discards it.
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
                say(f"kept in {folder}: the same command resumes after the last saved epoch, --restart discards it")
            else:
                shutil.rmtree(folder)
                if isinstance(error, KeyboardInterrupt):
                    say(f"no epoch was kept: the first is saved after {save_seconds:g} s (save_seconds)")
            raise
        shutil.rmtree(folder)


def state_folder(run: Path) -> Path:
    """Where the state of a training for the folder `run` is kept."""
    return run.with_name(f".{run.name}.state")


def _claim(folder: Path, key: Mapping[str, Any], *, restart: bool) -> None:
    """Claim `folder` for the training `key`. Raises HeadError if it holds epochs of another training."""
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not restart:
        different = _differences_from_kept(folder, key)
        if different:
            lines = "\n".join(f"  {line}" for line in different)
            message = (
                f"{folder} keeps another, interrupted training:\n{lines}\n"
                f"Go on with its settings, choose another run folder, or throw it away with --restart."
            )
            raise HeadError(message)
        return
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(folder / EVENTS, ignore_errors=True)
    write_text_atomically(folder / KEY, canonical_json(key))


def _differences_from_kept(folder: Path, key: Mapping[str, Any]) -> list[str]:
    try:
        kept = json.loads((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{KEY} cannot be read ({error})"]
    return differences(kept, key, verb="kept")
