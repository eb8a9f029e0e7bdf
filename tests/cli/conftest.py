"""One tiny data set, its stores and a trained head, made once by the command line itself; and a data set to spoil."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.extract.small_sets import write_set, write_talks

ITEMS = 40
SMALL_HEAD = ("--width", 8, "--encoder", "gru", "--epochs", 2, "--batch-size", 8, "--device", "cpu")


@dataclass(frozen=True, kw_only=True)
class Example:
    """Paths of the files that the commands made, and the JSON that each command printed."""

    data: Path
    talks: Path
    model: Path
    store: Path
    sketch: Path
    run: Path
    predictions: Path
    printed: dict[str, dict[str, Any]]

    def extract(self, store: Path, *options: object) -> tuple[object, ...]:
        """The arguments that made `store`, with another path and further options."""
        given = ("--model", self.model, "--conversations", self.talks, "--device", "cpu")
        return ("extract", self.data, store, *given, *options)


@pytest.fixture(scope="session")
def example(agiqa, tiny_text_checkpoint, tmp_path_factory) -> Example:
    folder = tmp_path_factory.mktemp("example")
    data = write_set(folder / "set", ITEMS)
    made = Example(
        data=data,
        talks=write_talks(data),
        model=tiny_text_checkpoint,
        store=folder / "hidden.agiqa",
        sketch=folder / "sketch.agiqa",
        run=folder / "run",
        predictions=folder / "scores.csv",
        printed={},
    )
    commands = {
        "extract": made.extract(made.store),
        "info": ("store", "info", made.store),
        "verify": ("store", "verify", made.store, "--level", "numeric"),
        "seal": ("store", "seal", made.store),
        "sketch": ("store", "sketch", made.store, made.sketch, "--rank", 16),
        "train": ("train", made.store, made.run, *SMALL_HEAD),
        "evaluate": ("evaluate", made.run, made.store),
        "predict": ("predict", made.run, made.store, made.predictions),
    }
    for name, arguments in commands.items():
        made.printed[name] = agiqa(*arguments, "--json").json
    return made


@pytest.fixture
def texts(tmp_path):
    return write_set(tmp_path / "texts", 6)


@pytest.fixture
def new(tmp_path):
    """Where no store may be after a refusal."""
    return tmp_path / "new.agiqa"
