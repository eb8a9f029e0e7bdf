"""Grids: which runs a file asks for, what they are called, and which files are refused."""

import shutil
from itertools import product
from typing import ClassVar

import pytest
import torch
import yaml

from agiqa.bench.ablation.grids import read_grid, unread_settings
from agiqa.bench.ablation.protocols import generators_of
from agiqa.errors import ConfigError, UnknownName
from agiqa.heads import ENCODERS, HeadConfig, TrainConfig, load_settings
from agiqa.store import open_store
from agiqa.store.deriving.labelling import join_labels


@pytest.fixture
def grid(tmp_path):
    """A function that reads a grid from its sections or from text."""

    def read(content="", **sections):
        file = tmp_path / "grid.yaml"
        file.write_text(content or yaml.safe_dump(sections, sort_keys=False))
        return read_grid(file)

    return read


def test_every_combination_comes_in_the_order_of_the_file(grid):
    base = {"width": 8, "device": "cpu"}
    plan = grid(base=base, grid={"encoder": ["lstm", "gru"], "bidirectional": [True, False], "seed": [3, 1]})
    assert [(run.head.encoder, run.head.bidirectional, run.train.seed) for run in plan] == list(
        product(["lstm", "gru"], [True, False], [3, 1])
    )
    assert plan[0].name == "encoder=lstm,bidirectional=true,seed=3"
    assert plan[1].row == plan[0].row == "encoder=lstm,bidirectional=true"
    assert plan[0].head == HeadConfig(encoder="lstm", width=8, bidirectional=True)
    assert plan[0].train == TrainConfig(seed=3, device="cpu", threads=1)


def test_single_runs_join_the_grid_and_beat_the_base(grid):
    entries = [{"encoder": "none", "pooling": "max@answer"}, {"name": "deep", "layers": 4, "seed": 2}, {"width": 4}]
    plan = grid(base={"encoder": "gru", "width": 8, "threads": 2}, grid={"seed": [0]}, runs=entries)
    assert [run.name for run in plan] == ["seed=0", "encoder=none,pooling=max@answer", "deep", "width=4"]
    assert [run.row for run in plan] == ["base", "encoder=none,pooling=max@answer", "deep", "width=4"]
    assert (plan[1].head.width, plan[3].head.width, plan[2].head.layers, plan[2].train.seed) == (8, 4, 4, 2)
    assert {run.train.threads for run in plan} == {2}


def test_folds_of_a_grid_are_one_row(grid):
    plan = grid(base={"split": "folds"}, grid={"fold": [0, 1], "encoder": ["gru", "none"]})
    assert [run.name for run in plan][:2] == ["fold=0,encoder=gru", "fold=0,encoder=none"]
    assert [run.row for run in plan] == ["encoder=gru", "encoder=none"] * 2
    assert {run.protocol for run in plan} == {"grouped"}
    held = grid(base={"split": "generator"}, grid={"held_out": ["one", "two"]})
    assert [(run.row, run.settings) for run in held] == [("base", {})] * 2


def test_a_preset_stands_below_every_setting(grid):
    plan = grid(
        base={"preset": "published", "device": "cpu", "threads": 1},
        grid={"encoder": ["lstm", "gru"], "lr": [1e-5, 2e-5]},
    )
    for run in plan:
        chosen = {"encoder": run.head.encoder, "lr": run.train.lr, "device": "cpu", "threads": 1}
        assert (run.head, run.train) == load_settings(overrides=chosen, preset="published")
        assert run.config["preset"] == run.preset == "published"


def test_null_is_a_value(grid):
    plan = grid(base={"gradient_clip": None}, grid={"ema": [None, 0.9]})
    assert [run.train.gradient_clip for run in plan] == [None, None]
    assert [run.name for run in plan] == ["ema=none", "ema=0.9"]


def test_names_can_be_folders(grid):
    plan = grid(grid={"loss": ["mse", "mse+0.5*plcc"], "pooling": ["mean", "max"]})
    assert [run.name for run in plan][2] == "loss=mse+0.5_plcc,pooling=mean"
    assert plan[2].row == "loss=mse+0.5*plcc,pooling=mean"
    settings = {
        name: [1e-5, 1.23456789e-4] for name in ("lr", "projection_lr", "weight_decay", "warmup", "ema", "dropout")
    }
    names = [run.name for run in grid(grid={**settings, "token_dropout": [0.1, 0.2], "validation": [0.1, 0.12345678]})]
    assert len(set(names)) == len(names) == 2**8
    assert max(len(name) for name in names) <= 120


def test_threads_are_set_only_where_a_cpu_trains_and_nobody_sets_them(grid):
    assert [run.train.threads for run in grid(grid={"seed": [0, 1]})] == [None if torch.cuda.is_available() else 1] * 2
    assert grid(base={"threads": None, "device": "cpu"}, grid={"seed": [0]})[0].train.threads is None


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        ("", ConfigError, "nothing to run"),
        ("grid: {}", ConfigError, "nothing to run"),
        ("base: {width: 4}", ConfigError, "nothing to run"),
        ("grid: {seed: []}", ConfigError, "`seed` needs a list with one value or more"),
        ("grid: {seed: 3}", ConfigError, "`seed` needs a list with one value or more, found 3"),
        ("grid: {sede: [1]}", UnknownName, "No setting is called 'sede'. Did you mean 'seed'"),
        ("grid: {encoder: [gru, xlsmt]}", UnknownName, "No encoder is called 'xlsmt'. Did you mean 'xlstm'"),
        ("grid: {loss: [mse, mse+plc]}", UnknownName, "No loss is called 'plc'. Did you mean 'plcc'"),
        ("base: {encodr: gru}\ngrid: {seed: [1]}", UnknownName, "Did you mean 'encoder'"),
        ("grids: {seed: [1]}", UnknownName, "No section is called 'grids'. Did you mean 'grid'"),
        ("base: {seed: 1}\ngrid: {seed: [1, 2]}", ConfigError, "`seed` is both in `base` and in `grid`"),
        ("grid: {seed: [1, 1]}", ConfigError, "`seed` has the value 1 twice: keep it once"),
        ("grid: {seed: [1, 2]}\nruns: [{seed: 2}]", ConfigError, "The run 'seed=2' is there twice: keep it once"),
        ("grid: {seed: [1, 2]}\nruns: [{seed: 2, name: a}]", ConfigError, "'seed=2' and 'a' have the same settings"),
        ("grid: {encoder: [gru, none, gru]}", ConfigError, "`encoder` has the value gru twice"),
        ("grid: {bidirectional: [true, true]}", ConfigError, "`bidirectional` has the value true twice"),
        ("grid: {encoder: [gru]}\nseeds: [0, 3, 3]", ConfigError, "`seeds` has the value 3 twice"),
        ("base: {encoder: none}\ngrid: {layers: [1, 2]}", ConfigError, "differ in `layers`, which the encoder 'none'"),
        ("grid: {encoder: [gru, none], layers: [1, 2]}", ConfigError, "'encoder=none,layers=2' differ in `layers`"),
        ("base: {encoder: gru}\ngrid: {blocks: [1, 2]}", ConfigError, "`blocks`, which the encoder 'gru' does not"),
        ("grid: {folds: [3, 4]}", ConfigError, "differ in `folds`, which the split 'published' does not read"),
        ("grid: {test_share: [0.1, 0.2]}", ConfigError, "differ in `test_share`, which the split 'published'"),
        ("grid: {training_seed: [1, 2]}", ConfigError, "which a training without `training_items` does not read"),
        ("grid: {store: [main]}", ConfigError, "leave out the setting `store`"),
        ("grid: {loss: ['mse+plcc', 'mse + mae']}", None, ""),
        ("runs: [{seed: 1, name: a}, {seed: 2, name: a}]", ConfigError, "different settings are called 'a'"),
        ("runs: [{seed: 1, name: a/b}]", ConfigError, "'a/b' is no name of a run"),
        ("runs: [{seed: 1, name: .a}]", ConfigError, "'.a' is no name of a run"),
        ("runs: {seed: 1}", ConfigError, "`runs` needs a list"),
        ("runs: [3]", ConfigError, "Expected keys and values in an entry of runs, found 3"),
        ("grid: [3]", ConfigError, "Expected keys and values in grid"),
        ("grid: {width: [0]}", ConfigError, "width: Input should be greater than or equal to 1"),
        ("base: {preset: papper}\ngrid: {seed: [1]}", UnknownName, "Did you mean 'paper'"),
        ("grid: {seed: [1", ConfigError, "cannot be read as YAML"),
    ],
)
def test_what_is_no_grid_is_refused_with_its_file(grid, content, kind, said):
    if kind is None:
        assert len(grid(content)) == 2
        return
    with pytest.raises(kind, match=r"(?s).*") as caught:
        grid(content or "{}")
    assert said in str(caught.value)
    assert "while reading the grid" in caught.value.__notes__[-1]


class Watched(HeadConfig):
    """Notes which settings are read."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name):
        Watched.read.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("encoder", ["xlstm", "lstm", "gru", "mamba2", "transformer", "none"])
def test_what_is_said_to_be_read_is_read(encoder):
    config = Watched(encoder=encoder, width=8, num_heads=2, blocks=2)
    Watched.read.clear()
    ENCODERS.get(encoder)(config)
    parts = {"blocks", "num_heads", "layers", "state_size", "bidirectional", "dropout"}
    read = Watched.read & parts
    assert read == parts - unread_settings(config, TrainConfig()).keys()


def test_an_encoder_of_ones_own_may_read_everything():
    assert "layers" not in unread_settings(HeadConfig(encoder="mine"), TrainConfig())
    assert "folds" not in unread_settings(HeadConfig(), TrainConfig(split="folds"))
    assert "test_share" not in unread_settings(HeadConfig(), TrainConfig(split="grouped"))
    assert "training_seed" not in unread_settings(HeadConfig(), TrainConfig(training_items=3))


def test_the_same_setting_is_an_axis_of_encoders_that_read_it(grid):
    assert len(grid(grid={"encoder": ["gru", "lstm"], "layers": [1, 2]}, runs=[{"encoder": "none"}])) == 5


def test_generators_are_those_of_every_store(store, tmp_path):
    """Otherwise a store would silently be tested on some of its generators only."""
    assert generators_of(store, store) == ["one", "three", "two"]
    other = tmp_path / "other.agiqa"
    shutil.copytree(store.path, other)
    table = tmp_path / "generators.csv"
    table.write_text("name,generator\n" + "".join(f"{name},one\n" for name in store.items.names))
    join_labels(open_store(other), table)
    with pytest.raises(ConfigError, match=r"other\.agiqa has images of other generators than .*: three, two in one"):
        generators_of(store, open_store(other))


def test_a_grid_with_sizes_that_an_encoder_cannot_have_is_refused_as_a_whole(grid):
    with pytest.raises(ConfigError, match="width 18 cannot have 4 heads") as refused:
        grid(base={"encoder": "transformer", "width": 18}, grid={"num_heads": [3, 4]})
    assert any("while reading the grid" in note for note in refused.value.__notes__)


def test_settings_that_a_closed_form_does_not_read_make_no_runs(grid):
    plan = grid(
        base={"device": "cpu"}, grid={"encoder": ["ridge", "krr"], "pooling": ["mean@answer", "mean+max@answer"]}
    )
    assert [run.head.pooling for run in plan] == ["mean@answer", "mean+max@answer"] * 2
    for unread in ({"lr": [0.1, 0.2]}, {"kernel": ["rbf", "linear"]}, {"init_pooling": ["mean", "auto"]}):
        with pytest.raises(ConfigError, match=r"which (the closed form 'ridge'|a head without `init`) does not read"):
            grid(base={"device": "cpu", "encoder": "ridge"}, grid=unread)
    with pytest.raises(ConfigError, match="which a head without `init` does not read"):
        grid(base={"device": "cpu", "encoder": "gru"}, grid={"strength": [1.0, 2.0]})
    assert len(grid(base={"device": "cpu", "encoder": "gru", "init": "ridge"}, grid={"strength": [1.0, 2.0]})) == 2
