"""Searches over small stores in memory."""

from collections.abc import Callable

import pytest

pytest.importorskip("optuna", reason="optuna, the extra `search`, is not installed")

from agiqa.heads import HeadConfig, TrainConfig
from agiqa.heads.searching.search import SearchSettings
from agiqa.heads.searching.space import read_space

HEAD = HeadConfig(projection="sketch", encoder="none", width=4, regressor_hidden=4)
TRAIN = TrainConfig(
    split="grouped", validation=0.4, epochs=3, batch_size=32, lr=1e-2, device="cpu", threads=1, save_seconds=0.0
)
SPACE = """
encoder: [none, gru]
pooling: [mean, max]
width: [4, 8]
lr: {from: 1.0e-6, to: 3.0e-2, log: true}
dropout: {from: 0.0, to: 0.4, step: 0.1}
"""
SettingsMaker = Callable[..., SearchSettings]


@pytest.fixture
def settings_for(tmp_path) -> SettingsMaker:
    """Builds the settings of a search on a store."""

    def make(store, *, space: str = SPACE, train=TRAIN, head=HEAD, **changes) -> SearchSettings:
        file = tmp_path / "space.yaml"
        file.write_text(space)
        given = {"trials": 4, "workers": 1, "pruner": "none", **changes}
        return SearchSettings(head=head, train=train, space=read_space(file, store, head, train), **given)

    return make
