"""A store whose files a test can falsify."""

import pytest

from tests.store import golden
from tests.store.format.liar import Liar


@pytest.fixture
def liar(tmp_path):
    return Liar(golden.write("kept-logits", tmp_path / "s.agiqa").path)
