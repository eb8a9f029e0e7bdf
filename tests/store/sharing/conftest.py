"""A small store, whole and behind a web server, and a cache that is the test's own."""

import shutil

import numpy as np
import pytest

from agiqa.store import open_store
from agiqa.store.sharing import remotes as remotes_module
from agiqa.store.sharing import transfers
from tests.store.conftest import make_content, make_store
from tests.store.sharing_servers import web_server


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    lengths = np.random.default_rng(7).integers(1, 60, 40).tolist()  # as the fixture `content`
    return make_store(tmp_path_factory.mktemp("original") / "small.agiqa", make_content(lengths))


@pytest.fixture
def stored(original, tmp_path):
    """A copy of one store, which costs less than making it."""
    return open_store(shutil.copytree(original.path, tmp_path / "small.agiqa"))


@pytest.fixture
def served(stored):
    with web_server(stored.path) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGIQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 1 KB, so that the objects of the small store take several requests each."""
    monkeypatch.setattr(remotes_module, "BLOCK", 1000)


@pytest.fixture
def impatient(monkeypatch):
    """Tries again at once, so that failures cost the tests no time."""
    monkeypatch.setattr(transfers, "FIRST_WAIT", 0.01)
