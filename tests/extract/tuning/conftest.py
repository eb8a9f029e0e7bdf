"""Data sets and checkpoints that the tests of tuning share."""

import pytest

from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import roomy, write_text_checkpoint, write_vision_checkpoint
from tests.extract.tuning.talks import load_talks, write_talks


@pytest.fixture(scope="session")
def minicpm(tmp_path_factory):
    """A tiny MiniCPM-Llama3-V-2.5 in its published layout."""
    return write_minicpm_checkpoint(tmp_path_factory.mktemp("minicpm"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A tiny Llava with room for whole conversations."""
    return roomy(write_vision_checkpoint(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama with room for whole conversations."""
    return roomy(write_text_checkpoint(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session")
def talks(tmp_path_factory):
    """A folder with ten pictures and conversations about their quality and correspondence."""
    return write_talks(tmp_path_factory.mktemp("talks"), aspects=("quality", "correspondence"))


@pytest.fixture(scope="session")
def data(talks):
    """Its eight items that are not in the split test."""
    found = load_talks(talks)
    assert len(found.items) == 8
    return found
