"""A store to tell lies with."""

import pytest

from tests.store import golden
from tests.store.format.liar import Liar


@pytest.fixture
def liar(tmp_path):
    return Liar(golden.write("kept-logits", tmp_path / "s.agiqa").path)
