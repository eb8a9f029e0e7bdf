"""The head that is trained where no settings of a network are given."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.preprocessing import StandardScaler

import agiqa
from agiqa.errors import DataError
from agiqa.heads import HeadConfig, TrainConfig, load_run, load_settings, train_head
from agiqa.heads.closed import regressions
from agiqa.heads.data.layers import spread_layers
from agiqa.heads.model.reading import default_settings_of, usual_settings
from tests.heads.conftest import MemoryStore
from tests.heads.layered_stores import made_states, mos_of, pooled_states, write_store

ROWS = ("mean@question", "mean@answer")
STATES = made_states(80)
MOS = mos_of(STATES["16"])
GROUPED = TrainConfig(split="grouped", device="cpu", inner_folds=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("default") / "tokens.agiqa", STATES, MOS)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    path = tmp_path_factory.mktemp("default") / "pooled.agiqa"
    return write_store(path, pooled_states(STATES, ROWS), MOS, pooled=ROWS)


def predicted(run):
    return [row["predicted"] for row in run.predictions]


def test_it_is_a_stack_of_all_layers_where_there_are_few(store, tmp_path):
    run = train_head(store, tmp_path / "default", train=GROUPED)
    assert (run.head.encoder, run.train.layer) == ("stack", "+".join(store.layers))
    named = GROUPED.model_copy(update={"layer": run.train.layer})
    same = train_head(store, tmp_path / "named", head=HeadConfig(encoder="stack"), train=named)
    assert predicted(run) == predicted(same)


@pytest.mark.parametrize("given", [{}, {"label": "quality"}, {"strength": 1.0}, {"members": "ridge+krr"}, {"seed": 3}])
def test_settings_that_a_stack_reads_leave_it(store, pooled, given):
    for source in (store, pooled):
        head, train = load_settings(None, given, usual=default_settings_of(source))
        assert (head.encoder, train.layer) == ("stack", "+".join(source.layers))


@pytest.mark.parametrize(
    "given", [{"epochs": 3}, {"width": 8}, {"pooling": "max"}, {"loss": "plcc"}, {"init": "ridge"}]
)
def test_settings_of_networks_ask_for_a_network(store, pooled, given):
    head, train = load_settings(None, given, usual=default_settings_of(store))
    assert (head.encoder, train.layer) == ("xlstm", None)
    head, train = load_settings(None, {**given, "layer": "8"}, usual=default_settings_of(pooled))
    assert (head.encoder, train.layer) == ("none", "8")


@pytest.mark.parametrize("preset", ["paper", "published"])
def test_presets_are_networks(store, preset):
    head, _ = load_settings(None, {}, preset=preset, usual=default_settings_of(store))
    assert head.encoder == "xlstm"


def test_in_python_the_settings_of_a_training_count_too(make_store, tmp_path):
    run = train_head(make_store(40), tmp_path / "run", train=TrainConfig(split="grouped", epochs=1, device="cpu"))
    assert run.head.encoder == "xlstm"


def test_stored_logits_are_read_by_a_network(make_store):
    stored = replace(make_store(10), encoding="logits")
    assert default_settings_of(stored)({}) == {"projection": "logits"}


def test_a_named_layer_is_read_alone(store):
    _, train = load_settings(None, {"layer": "8"}, usual=default_settings_of(store))
    assert train.layer == "8"


@pytest.mark.parametrize(("encoder", "several"), [("ridge", True), ("krr", True), ("tfidf", False), ("gru", False)])
def test_closed_forms_on_states_read_several_layers(store, encoder, several):
    assert ("layer" in usual_settings(store)({"encoder": encoder})) is several


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ([*map(str, range(30)), "last"], "6+12+18+24+last"),
        (["8", "16", "24", "last"], "8+16+24+last"),
        (["last"], "last"),
        ([*map(str, range(5)), "last"], "1+2+3+4+last"),
    ],
)
def test_layers_are_evenly_spaced_up_to_the_last(stored, read):
    assert spread_layers(stored) == read


def test_layers_are_those_that_all_stores_have():
    assert spread_layers(("2", "4", "last"), ("1", "4", "last")) == "4+last"


def test_members_that_the_data_do_not_allow_are_left_out(make_store, tmp_path, monkeypatch):
    made = make_store(60)
    silent = replace(made, items=replace(made.items, prompts=[""] * 30 + made.items.prompts[30:]))
    whole = train_head(silent, tmp_path / "whole", train=GROUPED)
    assert list(whole.config["closed"]["fits"][0]["weights"]) == ["ridge", "krr", "tfidf"]
    monkeypatch.setattr(regressions, "MOST_ITEMS", 40)
    run = train_head(silent, tmp_path / "run", train=GROUPED)
    assert list(run.config["closed"]["fits"][0]["weights"]) == ["ridge", "tfidf"]
    assert [note for note in run.metrics["notes"] if "without krr" in note and "at most 40 training items" in note]
    named = HeadConfig(encoder="stack", members="ridge+krr")
    with pytest.raises(regressions.ConfigError, match="at most 40 training items"):
        train_head(silent, tmp_path / "named", head=named, train=GROUPED)


@dataclass(frozen=True, kw_only=True)
class OfImages(MemoryStore):
    """Features of a vision tower."""

    tap: str = "vision"


def test_a_store_without_ids_and_texts_does_without_tfidf(make_store, tmp_path):
    made = make_store(60, published=True)
    silent = OfImages(**{**vars(made), "items": replace(made.items, prompts=[""] * 60)})
    published = TrainConfig(device="cpu", inner_folds=3, validation=0.0)
    run = train_head(silent, tmp_path / "run", train=published)
    assert list(run.config["closed"]["fits"][0]["weights"]) == ["ridge", "krr"]
    assert [note for note in run.metrics["notes"] if "without tfidf" in note and "neither token ids nor texts" in note]
    assert [row["predicted"] for row in run.predictions] == pytest.approx(run.predict(silent, range(0, 60, 5)))


def test_items_of_one_prompt_are_folded_one_by_one(make_store, tmp_path):
    made = make_store(60, published=True)
    alike = replace(made, items=replace(made.items, prompts=["a cat"] * 60))
    config = TrainConfig(device="cpu", validation=0.0)
    ridge = train_head(alike, tmp_path / "ridge", head=HeadConfig(encoder="ridge", pooling="mean"), train=config)
    train = np.array([k for k in range(60) if k % 5])
    rows = np.stack([one.astype(np.float64).mean(0) for one in made.features])[train]
    mos, errors = made.items.labels["quality"][train], {}
    rows = StandardScaler().fit_transform(rows)
    for strength in regressions.STRENGTHS:
        held = cross_val_predict(Ridge(alpha=strength), rows, mos, cv=GroupKFold(5), groups=np.arange(48))
        errors[strength] = np.square(held - mos).mean()
    assert ridge.config["closed"]["fits"][0]["strength"] == min(errors, key=errors.get)


def weights_of(run):
    return [list(fit["weights"]) for fit in run.config["closed"]["fits"]]


def with_columns(store, **columns):
    return replace(store, items=replace(store.items, **columns))


@pytest.mark.parametrize("init", [None, "stack"])
def test_members_that_cannot_be_fitted_are_left_out_with_the_reason(make_store, tmp_path, init):
    made = make_store(60, published=True)
    alike = replace(made, features=[made.features[0] if k % 4 else rows for k, rows in enumerate(made.features)])
    head = None if init is None else HeadConfig(projection="sketch", encoder="none", init=init, width=4)
    epochs = {} if init is None else {"epochs": 1}
    run = train_head(alike, tmp_path / "alike", head=head, train=TrainConfig(device="cpu", **epochs))
    assert weights_of(run) == [["ridge", "tfidf"]]
    assert [note for note in run.metrics["notes"] if "without krr" in note and "equal features" in note]
    assert run.predict(alike) == pytest.approx(load_run(run.path).predict(alike))
    named = HeadConfig(encoder="stack", members="ridge+krr")
    with pytest.raises(DataError, match="equal features"):
        train_head(alike, tmp_path / "named", head=named, train=TrainConfig(device="cpu"))


def test_the_kernel_may_have_no_width_in_one_fold_only(make_store, tmp_path):
    """All items allow a kernel ridge, and those of some fold do not: a third of the pairs are equal, then more."""
    made = make_store(40, published=True)
    train = [k for k in range(40) if k % 5]
    alike = set(train[:22])
    prompts = [f"alike {k % 7}" if k in alike else "others" if k in train[22:28] else f"own {k}" for k in range(40)]
    features = [made.features[0] if k in alike else rows for k, rows in enumerate(made.features)]
    store = replace(with_columns(made, prompts=prompts), features=features)
    run = train_head(store, tmp_path / "run", train=TrainConfig(device="cpu", validation=0.0, inner_folds=4))
    assert weights_of(run) == [["ridge", "tfidf"]]
    ridge = train_head(store, tmp_path / "krr", head=HeadConfig(encoder="krr"), train=run.train)
    assert np.isfinite(ridge.predict(store)).all()


def test_tfidf_without_a_token_to_count_is_left_out(make_store, tmp_path):
    made = make_store(60, published=True)
    images = replace(made, roles=[np.ones(len(rows), np.uint8) for rows in made.features])
    run = train_head(images, tmp_path / "run", train=TrainConfig(device="cpu"))
    assert weights_of(run) == [["ridge", "krr"]]
    assert [note for note in run.metrics["notes"] if "without tfidf" in note and "nothing to count" in note]


@pytest.mark.parametrize("encoder", ["ridge", "stack"])
def test_one_prompt_is_enough_beside_that_of_the_validation_items(make_store, tmp_path, encoder):
    made = make_store(60, prompts=2, published=True)
    head = HeadConfig(encoder=encoder, pooling="mean")
    assert train_head(made, tmp_path / "two", head=head, train=TrainConfig(device="cpu")).metrics["test"]["srcc"]
    train = np.array([k for k in range(60) if k % 5])
    ones = made.items.labels["quality"].copy()
    ones[train[24:]] = np.nan
    prompts = ["a cat" if k in train[:24] else f"Prompt {k}" for k in range(60)]
    gaps = with_columns(made, prompts=prompts, labels={**made.items.labels, "correspondence": ones})
    both = TrainConfig(device="cpu", validation=0.0, label="quality+correspondence")
    assert len(train_head(gaps, tmp_path / "gaps", head=head, train=both).config["closed"]["fits"]) == 2


def test_three_items_are_enough_and_two_are_refused_by_their_number(make_store, tmp_path):
    made = make_store(5)
    config = TrainConfig(device="cpu", validation=0.0)
    parts = {"splits": ["train", "train", "train", "test", "test"], "prompts": ["a", "a", "b", "c", "d"]}
    three = with_columns(made, **parts)
    assert weights_of(train_head(three, tmp_path / "three", train=config)) == [["ridge", "krr", "tfidf"]]
    two = with_columns(made, **{**parts, "splits": ["train", None, "train", "test", "test"]})
    with pytest.raises(DataError, match="2 of 2 training items have one"):
        train_head(two, tmp_path / "two", train=config)
    assert train_head(two, tmp_path / "ridge", head=HeadConfig(encoder="ridge"), train=config).predict(two).size


@pytest.mark.parametrize("encoder", ["ridge", "krr", "tfidf", "stack"])
def test_equal_labels_are_refused_as_for_networks(make_store, tmp_path, encoder):
    made = with_columns(make_store(60, published=True), labels={"quality": np.full(60, 3.0)})
    with pytest.raises(DataError, match=r"48 training items have the label 3\.0: there is nothing to learn"):
        train_head(
            made,
            tmp_path / "run",
            head=HeadConfig(encoder=encoder),
            train=TrainConfig(device="cpu", validation=0.0),
        )


@pytest.mark.parametrize(
    ("given", "encoder"),
    [
        ({"layer_mix": "softmax"}, "xlstm"),
        ({"tensorboard": True}, "xlstm"),
        ({"paper_compatible": True}, "xlstm"),
        ({"tensorboard": False, "paper_compatible": False}, "stack"),
    ],
)
def test_what_only_networks_have_asks_for_one(store, given, encoder):
    head, _ = load_settings(None, given, usual=default_settings_of(store))
    assert head.encoder == encoder


def test_settings_without_effect_are_named(make_store, tmp_path, capsys):
    made = make_store(60, published=True)
    agiqa.train(made, tmp_path / "stack", encoder="stack", epochs=5, device="cpu")
    assert "note: the closed form 'stack' does not read `epochs`, which has no effect" in capsys.readouterr().err
    agiqa.train(made, tmp_path / "gru", encoder="gru", width=8, epochs=1, members="ridge+krr", device="cpu")
    assert "does not read `members`" in capsys.readouterr().err
    agiqa.train(made, tmp_path / "plain", device="cpu", strength=1.0)
    assert "no effect" not in capsys.readouterr().err
