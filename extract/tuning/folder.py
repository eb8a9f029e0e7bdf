"""The folder of an adapter while it is trained and afterwards.

| file | meaning |
|---|---|
| adapter_config.json, adapter_model.safetensors | the adapter, once it is finished |
| tuning.json | how it was made; written last |
| curves.csv | a line per step |
| training/settings.json | what is being trained, to resume no other training |
| training/state.safetensors | trained parameters and moments of the last checkpoint |
| training/best/ | the adapter of the best validation so far |
| training/last-good/ | the adapter before a step whose loss was not finite |
"""

import csv
import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from agiqa.errors import BusyStore, DamagedStore, SettingsConflict, first_line
from agiqa.extract.models.adapters import CONFIG, UNFINISHED, WEIGHTS
from agiqa.store.disk.files import (
    append_durably,
    canonical_json,
    read_json,
    removed_on_failure,
    safetensors_errors,
    sync_file,
    telling_disk_errors,
    write_text_atomically,
)
from agiqa.store.disk.locks import exclusive_lock
from agiqa.store.format.metadata import differing

RECORD = "tuning.json"
CURVES = "curves.csv"
COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "seconds", "validation_loss", "word_accuracy")
_KEPT = "the last checkpoint is kept"
_OWN = (".lock", "training", CURVES, "tensorboard")
"""What a training leaves, besides the adapter, when somebody removes its checkpoint."""
_FREE = ("agiqa", "commit")
"""Settings that may differ between two runs of one training."""


def refuse_adapter(path: Path) -> None:
    """Raise SettingsConflict if the folder `path` holds an adapter whose training has ended."""
    written = any((path / name).exists() for name in (CONFIG, *WEIGHTS)) and not (path / UNFINISHED).exists()
    if written or (path / RECORD).exists():
        message = f"{path} holds an adapter already. Choose another ADAPTER, or remove that folder."
        raise SettingsConflict(message)


class AdapterFolder:
    """The files of one training."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Look at `path`, and change nothing.

        Raises SettingsConflict if an adapter is there already, other files, or a training of other `settings`.
        """
        self.path = path
        self.training = path / UNFINISHED
        self.settings = {"format": "agiqa.tuning", "version": 1, **settings}
        self._check()

    @property
    def _state(self) -> Path:
        return self.training / "state.safetensors"

    @property
    def _settings(self) -> Path:
        return self.training / "settings.json"

    @property
    def best(self) -> Path:
        """The adapter of the best validation so far."""
        return self.training / "best"

    @property
    def last_good(self) -> Path:
        """The adapter before the step that failed."""
        return self.training / "last-good"

    @contextmanager
    def writing(self) -> Generator[None]:
        """Allow writing inside. Raises BusyStore while another run writes there, and as the constructor."""
        self.path.mkdir(parents=True, exist_ok=True)
        with telling_disk_errors(f"writing {self.path}", _KEPT), exclusive_lock(self.path / ".lock") as mine:
            if not mine:
                message = f"Another run is training {self.path}. Wait for its end, or choose another ADAPTER."
                raise BusyStore(message)
            self._check()
            self.training.mkdir(exist_ok=True)
            if not (self._settings.exists() and self._begun()):
                write_text_atomically(self._settings, _text(self.settings))
            yield

    def save_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one step."""
        _save(self._state, tensors, {"facts": canonical_json(facts)})

    def load_state(self, device: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and facts of the checkpoint; None if there is none yet. Raises DamagedStore."""
        facts = self.state_facts()
        if facts is None:
            return None
        with self._telling_damage():
            return load_file(self._state, device=device), facts

    def state_facts(self) -> dict[str, Any] | None:
        """The facts of the checkpoint; None if there is none yet. Raises DamagedStore."""
        if not self._state.exists():
            return None
        with self._telling_damage(), safe_open(self._state, "pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            return facts

    @contextmanager
    def _telling_damage(self) -> Generator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            message = f"{self._state} is damaged ({first_line(error)}). Remove {self.training} to begin again."
            raise DamagedStore(message) from error

    def save_adapter(self, folder: Path, tensors: Mapping[str, Tensor], config: Any) -> None:
        """Write an adapter to `folder`, which is complete once its weights are there."""
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        _save(folder / WEIGHTS[0], tensors, {"format": "pt"})

    def finish(self, record: Mapping[str, Any]) -> None:
        """Make the best adapter the result, write its record, and remove what only the training needed."""
        for name in (WEIGHTS[0], CONFIG):
            shutil.copyfile(self.best / name, self.path / f".{name}")
            sync_file(self.path / f".{name}")
            (self.path / f".{name}").replace(self.path / name)
        write_text_atomically(self.path / RECORD, _text(record))
        shutil.rmtree(self.training)
        (self.path / ".lock").unlink(missing_ok=True)

    def begin_curves(self, done: int | None) -> None:
        """Keep the title of curves.csv and the lines of the first `done` steps; None keeps no line."""
        rows = [] if done is None else [row for row in self.curves() if int(row["step"]) <= done]
        lines = [",".join(COLUMNS), *(",".join(row[name] for name in COLUMNS) for row in rows)]
        write_text_atomically(self.path / CURVES, "".join(f"{line}\n" for line in lines))

    def add_curve(self, values: Mapping[str, Any]) -> None:
        """Append a line to curves.csv."""
        cells = ("" if values.get(name) is None else format(values[name], ".8g") for name in COLUMNS)
        append_durably(self.path / CURVES, f"{','.join(cells)}\n".encode())

    def curves(self) -> list[dict[str, str]]:
        """The whole lines of curves.csv."""
        path = self.path / CURVES
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def _begun(self) -> bool:
        """Whether there is anything to go on with."""
        return self._state.exists() or self.best.exists()

    def _check(self) -> None:
        if not self.path.exists():
            return
        refuse_adapter(self.path)
        if not self._settings.exists():
            if any(found.name not in _OWN for found in self.path.iterdir()):
                message = f"{self.path} holds other files. Choose another ADAPTER, an empty folder or a new one."
                raise SettingsConflict(message)
            return
        if not self._begun():
            return
        was, now = read_json(self._settings, remedy=f"Remove {self.path}."), json.loads(canonical_json(self.settings))
        for name, before, after in differing(was, {**now, **{key: was.get(key) for key in _FREE}}):
            message = (
                f"{self.path} is being trained with other settings: {name} was {before!r}, and is {after!r} now. "
                "Choose another ADAPTER, or go on with the settings that it began with."
            )
            raise SettingsConflict(message)


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with removed_on_failure(temporary, of=path):
        with safetensors_errors(path):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        sync_file(temporary)
        temporary.replace(path)
    sync_file(path.parent)


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
