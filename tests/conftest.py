"""Fixtures that tests of several rooms share: tiny checkpoints in the official layout."""

import gc
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Shapes in annotations are checked wherever tests run the heads; the hook must come before their first import.
install_import_hook("agiqa.heads", "beartype.beartype")

# Tiny matrices gain nothing from threads, and on a busy machine threads that wait for each other cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Collection makes a million objects that stay: looking through them for garbage, then and in every test, finds none.
gc.disable()

FIRST = (
    *("test_pages.py", "test_kill.py", "test_cli_reproduce.py", "test_pipeline.py", "test_search.py"),
    *("test_cli_ablate.py", "test_overlapping.py", "test_workers.py"),
)
"""Files that take long: the run ends with short ones, so that no process is left with a long one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the long files first, and keep the order otherwise."""
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Leave what there is out of all searches for garbage, which begin again, also where others run the tests."""
    gc.freeze()
    gc.enable()


def pytest_sessionstart() -> None:
    """Where processes share all tests, start the fork server of each now, with what the tests of any room fork from it.

    A fork server imports the modules of those who started it. Without this, the processes of other rooms' tests would
    import theirs anew, each time.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        from agiqa.workers import MODULES_TO_PREPARE_ITEMS, start_fork_server

        start_fork_server((*MODULES_TO_PREPARE_ITEMS, "agiqa.extract.filling.engines", "agiqa.heads.sweeps.head_jobs"))


@pytest.fixture(scope="session")
def tiny_text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of width 32, its tokenizer and a chat template that writes BOS."""
    from tests.extract.tiny_models import write_text_checkpoint  # transformers: only for tests that ask for it

    return write_text_checkpoint(tmp_path_factory.mktemp("tiny-text"))


@pytest.fixture(scope="session")
def tiny_vision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llava (CLIP tower, 16 image tokens, Llama of width 32) and its processor."""
    from tests.extract.tiny_models import write_vision_checkpoint

    return write_vision_checkpoint(tmp_path_factory.mktemp("tiny-vision"))


@pytest.fixture
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions on a GPU keep all bits of float32; by default they round their inputs to TF32."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def agiqa():
    """Calls the command line in processes of its own: `agiqa("store", "info", path)`."""
    from tests.command_line import CommandLine

    command_line = CommandLine()
    yield command_line
    command_line.close()
