"""Stacks of closed forms: their weights against scipy on predictions of folds made by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import lsq_linear
from sklearn.model_selection import GroupKFold

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads import HeadConfig, TrainConfig, load_run, make_partition, train_head
from agiqa.heads.closed.stack import Mixture
from agiqa.heads.data.prompt_groups import prompt_groups
from tests.heads.label_stores import BOTH, with_correspondence

GROUPED = TrainConfig(split="grouped", device="cpu", inner_folds=3)


@pytest.fixture
def store(make_store):
    """90 items of 30 prompts, whose token ids say something of the MOS too."""
    made = with_correspondence(make_store(90, prompts=30, width=5))
    mos = made.items.labels["quality"]
    ids = [np.full(len(rows), int(4 * value) % 7, np.int32) for rows, value in zip(made.features, mos, strict=True)]
    return replace(made, ids=ids)


def test_weights_are_the_bounded_least_squares_of_scipy():
    random = np.random.default_rng(0)
    predicted, weights = random.normal(size=(60, 4)) + 3, random.uniform(0.1, 2, size=60)
    mos = predicted @ [0.7, 0.0, 0.4, -0.5] + 2 + 0.1 * random.normal(size=60)
    found = Mixture.fit(predicted, mos, weights)
    design = np.column_stack([predicted, np.ones(60)]) * np.sqrt(weights)[:, None]
    expected = lsq_linear(design, mos * np.sqrt(weights), bounds=([0] * 4 + [-np.inf], np.inf)).x
    assert [*found.weights, found.intercept] == pytest.approx(expected, abs=1e-5)
    assert found.weights[3] == 0
    hopeless = Mixture.fit(-predicted[:, :1].repeat(2, axis=1), predicted[:, 0])
    assert (hopeless.weights.tolist(), hopeless.intercept) == ([0.5, 0.5], 0.0)


def chosen(run):
    """The settings of the only fit of a closed form."""
    fit = run.config["closed"]["fits"][0]
    return {"strength": fit["strength"], "kernel_width": fit.get("width")}


def test_a_stack_is_the_sum_of_its_members_weighted_by_unknown_prompts(store, tmp_path):
    heads = {name: HeadConfig(encoder=name) for name in ("ridge", "krr", "tfidf")}
    config = GROUPED.model_copy(update={"validation": 0.0})
    stack = train_head(store, tmp_path / "stack", head=HeadConfig(encoder="stack"), train=config)
    train = make_partition(store, config).train
    groups, mos = prompt_groups([store.items.prompts[k] for k in train]), store.items.labels["quality"][train]
    members = {name: train_head(store, tmp_path / name, head=head, train=config) for name, head in heads.items()}
    settled = {name: head.model_copy(update=chosen(members[name])) for name, head in heads.items()}
    folded = np.empty((len(train), 3))
    for number, (kept, held) in enumerate(GroupKFold(3).split(train, groups=groups)):
        splits = np.full(90, "none", dtype=object)
        splits[train[kept]], splits[train[held]] = "train", "test"
        part = replace(store, items=replace(store.items, splits=splits.tolist()), id=f"fold {number}")
        published = config.model_copy(update={"split": "published"})
        for column, (name, head) in enumerate(settled.items()):
            member = train_head(part, tmp_path / f"{name} {number}", head=head, train=published)
            folded[held, column] = member.predict(store, train[held])
    mixture = Mixture.fit(folded, mos)
    assert list(stack.config["closed"]["fits"][0]["weights"].values()) == pytest.approx(mixture.weights, abs=1e-6)
    expected = mixture.of(np.stack([member.predict(store) for member in members.values()], axis=1))
    assert load_run(stack.path).predict(store) == pytest.approx(expected, abs=1e-6)


def test_a_stack_has_the_named_members(store, tmp_path):
    both = GROUPED.model_copy(update={"label": BOTH})
    run = train_head(store, tmp_path / "both", head=HeadConfig(encoder="stack", members="ridge+tfidf"), train=both)
    fits = run.config["closed"]["fits"]
    assert [list(fit["weights"]) for fit in fits] == [["ridge", "tfidf"]] * 2
    assert run.predict(store).shape == (90, 2)


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ("ridge+rigde", UnknownName, "Did you mean 'ridge'"),
        ("ridge+ridge", ConfigError, "each once"),
        ("stack+ridge", ConfigError, "each once"),
    ],
)
def test_members_that_are_none_are_refused(store, tmp_path, members, error, message):
    with pytest.raises(error, match=message):
        train_head(store, tmp_path / "run", head=HeadConfig(encoder="stack", members=members), train=GROUPED)
