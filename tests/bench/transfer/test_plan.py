"""Transfers: which heads and lines a plan has, and which settings are refused."""

import math
from pathlib import Path

import pytest
import yaml

import agiqa
from agiqa.bench.ablation.grids import find_grid, read_grid
from agiqa.bench.transfer.plan import plan_transfer, read_transfer_settings
from agiqa.errors import ConfigError, UnknownName
from agiqa.heads import HeadConfig, TrainConfig, load_settings

BENCH = Path(agiqa.__file__).resolve().parent.parent / "bench"


@pytest.fixture
def settings(tmp_path):
    """A function that reads settings from sections."""

    def read(overrides=None, *, preset=None, **sections):
        file = tmp_path / "transfer.yaml"
        file.write_text(yaml.safe_dump(sections))
        return read_transfer_settings(file, overrides, preset=preset)

    return read


def test_few_shot_settings_stand_above_those_of_the_training(settings):
    found = settings(
        {"label": "beauty", "split": None},
        head={"width": 8},
        train={"epochs": 3, "lr": 0.1, "patience": 2, "gradient_clip": None, "device": "cpu"},
        few_shot={"epochs": 9, "batch_size": 4},
    )
    shared = {"lr": 0.1, "gradient_clip": None, "device": "cpu", "label": "beauty", "threads": 1}
    assert found.head == HeadConfig(width=8)
    assert found.train == TrainConfig(epochs=3, patience=2, **shared)
    assert found.few_shot == TrainConfig(epochs=9, batch_size=4, validation=0.0, **shared)
    assert read_transfer_settings(None).head == HeadConfig()


def test_a_preset_stands_below_every_section(settings):
    found = settings(preset="published", head={"encoder": "gru"}, train={"lr": 2e-5, "device": "cpu", "threads": 2})
    chosen = {"encoder": "gru", "lr": 2e-5, "device": "cpu", "threads": 2}
    assert (found.head, found.train) == load_settings(overrides=chosen, preset="published")
    assert found.preset == "published"
    assert found.few_shot == found.train.model_copy(update={"validation": 0.0})


def test_the_file_for_real_data_sets_says_what_its_comments_say():
    found = read_transfer_settings(BENCH / "agiqa-transfer.yaml")
    chosen = next(
        run
        for run in read_grid(find_grid("heads"))
        if (run.head.encoder, run.head.pooling, run.protocol) == ("mamba2", "max", "published")
    )
    assert found.head == chosen.head
    whole, few = found.train, found.few_shot
    assert whole == chosen.train.model_copy(update={"refit": False})
    assert [few.epochs * math.ceil(n / few.batch_size) for n in (10, 1800, 2385)] == [68, 7650, 10166]
    assert few.lr == pytest.approx(whole.lr * math.sqrt(few.batch_size / whole.batch_size), rel=0.02)
    assert (few.ema, few.validation, few.patience, few.refit) == (None, 0.0, None, False)
    changed = {"epochs": whole.epochs, "batch_size": whole.batch_size, "lr": whole.lr, "ema": whole.ema}
    assert (whole.calibrate, few.calibrate) == (True, False)
    assert few.model_copy(update={**changed, "validation": whole.validation, "calibrate": True}) == whole


@pytest.mark.parametrize(
    ("sections", "kind", "said"),
    [
        ({"fewshot": {}}, UnknownName, "Did you mean 'few_shot'"),
        ({"train": {"epoch": 3}}, ConfigError, "Did you mean 'epochs'"),
        ({"few_shot": {"width": 3}}, ConfigError, "No setting is called 'width'"),
        ({"few_shot": {"epochs": 0}}, ConfigError, "epochs: Input should be greater"),
        ({"few_shot": {"validation": 0.1}}, ConfigError, "`validation` cannot be set in `few_shot`"),
        ({"few_shot": {"seed": 3}}, ConfigError, "`seed` cannot be set in `few_shot`"),
        ({"few_shot": {"training_seed": 3}}, ConfigError, "`training_seed` cannot be set in `few_shot`"),
        ({"few_shot": {"split_seed": 3}}, ConfigError, "`split_seed` cannot be set in `few_shot`"),
        ({"train": {"training_items": 3}}, ConfigError, "given by --shots"),
        ({"train": {"split": "folds"}}, ConfigError, "the split is published or grouped, not 'folds'"),
        ({"train": [3]}, ConfigError, "Expected keys and values in section 'train'"),
    ],
)
def test_settings_that_make_no_transfer_are_refused(settings, sections, kind, said):
    with pytest.raises(kind) as caught:
        settings(**sections)
    assert said in str(caught.value)
    assert "transfer.yaml" in "".join(caught.value.__notes__)


def test_every_direction_has_every_way_and_heads_are_trained_once(settings):
    plan = plan_transfer(("a", "b"), settings(), seeds=2, shots=(30, 10))
    assert len(plan.lines) == 2 * 2 * (3 + 2 * 3)
    names = [head.name for sweep in plan.sweeps for head in sweep]
    assert len(names) == len(set(names)) == 2 * 2 + 2 * 2 * 2 * 3
    assert {line.head for line in plan.lines} == set(names)
    by_row = {line.row: line for line in plan.lines if line.seed == 0}
    assert list(by_row)[:5] == [
        "from=a,to=a,way=within,training_items=all",
        "from=a,to=b,way=apply,training_items=all",
        "from=a,to=b,way=tp,training_items=all",
        "from=a,to=b,way=fresh,training_items=10",
        "from=a,to=b,way=fresh,training_items=30",
    ]
    assert (
        by_row["from=a,to=b,way=tp,training_items=all"].head == by_row["from=b,to=b,way=within,training_items=all"].head
    )
    assert (
        by_row["from=a,to=b,way=apply,training_items=all"].head
        == by_row["from=a,to=a,way=within,training_items=all"].head
    )


def test_what_a_head_starts_from_is_trained_before_it(settings):
    for one_way in (False, True):
        plan = plan_transfer(("a", "b"), settings(), seeds=2, shots=(10,), one_way=one_way)
        there = set()
        for sweep in plan.sweeps:
            assert len({head.on for head in sweep}) == 1
            assert {head.start for head in sweep} - {None} <= there
            there |= {head.name for head in sweep}
        assert {line.head for line in plan.lines} == there
        assert {(line.source, line.target) for line in plan.lines if line.way == "apply"} == (
            {("a", "b")} if one_way else {("a", "b"), ("b", "a")}
        )


@pytest.mark.parametrize("split", ["published", "grouped"])
@pytest.mark.parametrize(("given", "drawn"), [({}, [3, 4]), ({"training_seed": 11}, [11, 12])])
def test_few_items_are_drawn_by_the_seed_and_the_test_part_is_not(settings, split, given, drawn):
    found = settings(train={"split": split, "split_seed": 3, "seed": 7, **given})
    plan = plan_transfer(("a", "b"), found, seeds=2, shots=(10,))
    heads = [head.train for sweep in plan.sweeps for head in sweep]
    few = [one for one in heads if one.training_items == 10]
    assert [(one.seed, one.training_seed) for one in few] == [(7, drawn[0]), (8, drawn[1])] * 4
    assert {one.validation for one in few} == {0.0}
    assert {one.split_seed for one in heads} == {3}


@pytest.mark.parametrize(
    ("names", "shots", "said"),
    [
        (("a", "a"), (10,), "need two names"),
        (("a b", "a/b"), (10,), "need two names"),
        (("", "b"), (10,), "need two names"),
        (("a", "b"), (10, 10), "different numbers of items"),
        (("a", "b"), (0,), "from 1"),
    ],
)
def test_plans_without_sense_are_refused(settings, names, shots, said):
    with pytest.raises(ConfigError, match=said):
        plan_transfer(names, settings(), seeds=1, shots=shots)


@pytest.mark.parametrize("head", [{"encoder": "ridge"}, {"encoder": "gru", "init": "ridge"}])
def test_closed_forms_are_fitted_anew_and_start_from_no_other_head(settings, head):
    plan = plan_transfer(("a", "b"), settings(head=head, train={"device": "cpu"}), seeds=1, shots=[10])
    assert {line.way for line in plan.lines} == {"within", "apply", "tp", "fresh"}
    assert all(one.start is None for sweep in plan.sweeps for one in sweep)
