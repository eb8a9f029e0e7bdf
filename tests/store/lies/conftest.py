"""A store to tell lies with, and processes to read it in."""

import pytest

from tests.store import golden
from tests.store.lies.liar import Liar
from tests.store.workers import Workers


@pytest.fixture(scope="module")
def workers():
    started = Workers()
    yield started
    started.close()


@pytest.fixture
def liar(tmp_path):
    return Liar(golden.write("kept-logits", tmp_path / "s.agiqa").path)
