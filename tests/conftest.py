"""Fixtures that tests of several rooms share: tiny checkpoints in the official layout."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Shapes in annotations are checked wherever tests run the heads; the hook must come before their first import.
install_import_hook("agiqa.heads", "beartype.beartype")

# Tiny matrices gain nothing from threads, and on a busy machine threads that wait for each other cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
