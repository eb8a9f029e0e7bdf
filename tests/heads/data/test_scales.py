"""The scale of the labels of a head: recorded, and what becomes of it where the head meets labels of another scale."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from agiqa.errors import HeadError
from agiqa.heads import HeadConfig, TrainConfig, evaluate, load_run, predict, train_head
from agiqa.heads.data.scales import lines_between
from agiqa.heads.evaluation.mos_mappings import fit_mappings
from agiqa.heads.model.head import Regressor
from agiqa.store.reading.union import union
from tests.heads.conftest import MemoryItems, MemoryStore
from tests.heads.label_stores import BOTH, GRU, QUICK, with_correspondence
from tests.store.conftest import make_content
from tests.store.conftest import make_store as write_store
from tests.store.reading.test_union import named

FIVE, HUNDRED, ODD = (0.0, 5.0), (0.0, 100.0), (1.0, 9.0)
CONFIG = TrainConfig(split="grouped", epochs=2, lr=1e-2, batch_size=16)


@dataclass(frozen=True, kw_only=True)
class ScaledItems(MemoryItems):
    """An item table that says which scale its labels are on."""

    mos_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


def on(store: MemoryStore, scale, *, recorded=True) -> MemoryStore:
    """The store, whose quality is on 0 to 5, with it on `scale`."""
    low, high = scale
    quality = low + store.items.labels["quality"] / 5 * (high - low)
    changes = {
        "labels": {**store.items.labels, "quality": quality},
        "mos_ranges": {"quality": scale} if recorded else {},
    }
    items = ScaledItems(**{**vars(store.items), **changes})
    return replace(store, items=items)


def elsewhere(make_store, store, **changes):
    """A store of other items and prompts that the heads of `store` can read."""
    made = make_store(30, published=True, seed=9, weights=store.weights, id="other", **changes)
    texts = {column: [f"b/{text}" for text in getattr(made.items, column)] for column in ("names", "prompts")}
    return replace(made, items=replace(made.items, **texts))


@pytest.fixture
def trained(make_store, tmp_path):
    """A store on 0 to 5 and a head of it."""
    store = on(make_store(150), FIVE)
    run = train_head(store, tmp_path / "run", head=GRU, train=CONFIG.model_copy(update={"validation": 0.3}))
    return store, run


def test_a_run_records_the_scale_of_each_label(make_store, tmp_path, trained):
    _, run = trained
    assert run.config["mos_ranges"] == {"quality": [0.0, 5.0]}
    assert load_run(run.path).scales == (FIVE,)
    store = on(with_correspondence(make_store(60)), ODD)
    both = train_head(store, tmp_path / "both", head=GRU, train=QUICK.model_copy(update={"label": BOTH}))
    assert both.config["mos_ranges"] == {"quality": [1.0, 9.0], "correspondence": None}
    assert both.scales == (ODD, None)


def test_a_scale_that_is_none_is_told_with_its_file(trained):
    _, run = trained
    for record in [{"quality": [5, 0]}, {"quality": "0 to 5"}, {"quality": [0]}, {"quality": [[0], 5]}, [0, 5]]:
        (run.path / "config.json").write_text(json.dumps({**run.config, "mos_ranges": record}))
        with pytest.raises(HeadError, match=r"config\.json: `mos_ranges` is not what a training writes"):
            _ = load_run(run.path).scales


def test_labels_of_another_scale_are_converted_to_that_of_the_head(make_store, trained):
    store, run = trained
    other = elsewhere(make_store, store)
    same = evaluate(run, on(other, FIVE))
    assert (same["mos_range"], same["warnings"]) == ([0.0, 5.0], [])
    for scale in (HUNDRED, ODD):
        scaled = evaluate(run, on(other, scale))
        for metric in ("srcc", "plcc", "krcc", "rmse", "plcc_linear", "rmse_linear"):
            assert scaled[metric] == pytest.approx(same[metric], rel=1e-9)
            if same["ci"][metric] is None:  # RMSE of fewer than 20 prompts
                assert scaled["ci"][metric] is None
            else:
                assert scaled["ci"][metric] == pytest.approx(same["ci"][metric], rel=1e-9)
        assert scaled["mos_range"] == [0.0, 5.0]
        (line,) = scaled["warnings"]
        assert line.endswith(f"to the scale of this head: quality from {scale[0]:g} to {scale[1]:g} to 0 to 5.")


def test_a_scale_that_is_not_known_is_warned_of_once(make_store, trained):
    store, run = trained
    other = elsewhere(make_store, store)
    unknown, far = (evaluate(run, on(other, scale, recorded=False)) for scale in (FIVE, HUNDRED))
    assert [line.split(". `agiqa")[0] for line in unknown["warnings"]] == [
        "The scale of the quality MOS of other is not recorded; it is taken to be 0 to 5"
    ]
    assert unknown["rmse"] == pytest.approx(evaluate(run, on(other, FIVE))["rmse"])
    (line,) = far["warnings"]
    assert f"while the head {run.path} is on 0 to 5: errors such as RMSE mean nothing" in line
    silent = replace(run, config={**run.config, "mos_ranges": {"quality": None}})
    line, coverage = evaluate(silent, on(other, HUNDRED))["warnings"]
    assert coverage.startswith("90 % intervals of quality hold only")
    assert line.startswith(
        f"The scale of the quality MOS of the head {run.path} is not recorded; it is taken to be 0 to 1"
    )
    (line,) = evaluate(silent, on(other, FIVE, recorded=False))["warnings"]
    assert f"of the head {run.path} is not recorded, nor is that of other;" in line
    assert evaluate(silent, on(store, FIVE, recorded=False))["warnings"] == []
    assert "mos_range" not in evaluate(silent, other)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_head_predicts_on_another_scale_by_its_mean_and_deviation(labels):
    regressor = Regressor(HeadConfig(), 6, labels=labels)
    regressor.standardise(torch.rand(20, labels, dtype=torch.float64) * 5)
    pooled = torch.randn(10, 6)
    before = regressor(pooled).double()
    scales = [FIVE, (2.0, 3.0)][:labels]
    regressor.rescale(lines_between(tuple(scales), (HUNDRED,) * labels))
    lows = torch.tensor([low for low, _ in scales])
    spans = torch.tensor([high - low for low, high in scales])
    torch.testing.assert_close(regressor(pooled).double(), (before - lows) / spans * 100, rtol=1e-5, atol=1e-4)
    again = regressor(pooled)
    regressor.rescale(lines_between((None,) * labels, (FIVE,) * labels))
    torch.testing.assert_close(regressor(pooled), again)


def test_a_mapping_on_another_scale_is_the_same_mapping():
    random = np.random.default_rng(0)
    predicted = random.uniform(0, 5, 120)
    mappings = fit_mappings(predicted, 5 / (1 + np.exp(2.5 - predicted)) + random.normal(0, 0.1, 120))
    assert set(mappings.fitted) == {"logistic4"}
    ((slope, offset),) = lines_between((FIVE,), ((-3.0, 7.0),))
    for kind, moved in mappings.rescaled(slope, offset).fitted.items():
        expected = mappings.fitted[kind](predicted) * slope + offset
        np.testing.assert_allclose(moved(predicted * slope + offset), expected, rtol=1e-12)


def test_a_head_that_goes_on_elsewhere_goes_on_in_the_scale_of_the_labels_there(make_store, trained, tmp_path):
    """As if all labels had been converted to the scale of the head, and the predictions back."""
    store, first = trained
    other = elsewhere(make_store, store)
    config = CONFIG.model_copy(update={"split": "published"})
    same = train_head(on(other, FIVE), tmp_path / "same", train=config, start=first)
    scaled = train_head(on(other, HUNDRED), tmp_path / "scaled", train=config, start=first)
    expected = predict(same, on(other, FIVE)) * 20
    np.testing.assert_allclose(predict(scaled, on(other, HUNDRED)), expected, rtol=1e-3)
    for metric, factor in [("srcc", 1), ("plcc", 1), ("rmse", 20)]:
        assert scaled.metrics["test"][metric] == pytest.approx(same.metrics["test"][metric] * factor, rel=1e-3)
    assert (same.scales, scaled.scales) == ((FIVE,), (HUNDRED,))
    told = "What run, the head that this one starts from, predicts is converted: quality from 0 to 5 to 0 to 100."
    assert told in scaled.metrics["warnings"]
    assert not any("convert" in line for line in same.metrics["warnings"])


@pytest.fixture
def mixed(tmp_path):
    """Two stores of noise, the MOS of one on 0 to 5 and of the other on 0 to 100."""
    contents = [make_content([4 + k % 5 for k in range(40)], seed=seed) for seed in range(2)]
    contents[1] = replace(named(contents[1], "b/"), lm_head=contents[0].lm_head)
    stores = []
    for number, (content, scale) in enumerate(zip(contents, (FIVE, HUNDRED), strict=True)):
        labels = {"quality": np.random.default_rng(number).uniform(*scale, 40)}
        items = replace(content.items, labels=labels, mos_ranges={"quality": scale})
        path = tmp_path / f"{number}.agiqa"
        stores.append(write_store(path, replace(content, items=items), data_set={"name": str(number)}))
    return union(stores)


def test_stores_of_two_scales_are_learned_on_one_and_told_of_one_by_one(mixed, tmp_path, capsys):
    """Without conversion, a head that only distinguishes the stores gets SRCC .7 on noise."""
    head = HeadConfig(projection="hidden", encoder="none", width=8)
    config = TrainConfig(split="published", epochs=15, lr=1e-2, batch_size=16)
    run = train_head(mixed, tmp_path / "run", head=head, train=config)
    first, second = mixed.stores
    note = f"the quality MOS of {second.path} are converted from 0 to 100 to 0 to 5, the scale of {first.path}"
    assert run.metrics["notes"] == [note]
    assert f"note: {note}" in capsys.readouterr().err
    assert run.scales == (FIVE,)
    assert abs(run.metrics["test"]["srcc"]) < 0.5
    assert run.metrics["test"]["rmse"] < 5
    for store, told in zip(mixed.stores, run.metrics["stores"], strict=True):
        assert (told["store"], told["name"]) == (store.id, store.path.name)
        alone = evaluate(run, store)
        assert told["test"]["n"] == alone["n"] == 10
        for metric in ("srcc", "plcc", "rmse"):
            assert told["test"][metric] == pytest.approx(alone[metric], abs=1e-4)


@pytest.mark.parametrize("variants", [("id", "id"), ("id", "full")])
def test_what_is_said_of_scales_leaves_what_is_said_of_teachers(mixed, tmp_path, variants):
    """The teachers' texts of each store count by its own conversations, though those of the two differ."""
    stores = []
    for number, (store, variant) in enumerate(zip(mixed.stores, variants, strict=True)):
        content = named(make_content([4] * 40, seed=number), f"{number}/")
        labels = {"labels": store.items.labels, "mos_ranges": store.items.mos_ranges}
        items = replace(content.items, **labels, text_authors=["teacher"] * 40)
        content = replace(content, lm_head=np.asarray(mixed.lm_head()), items=items)
        conversation = {"variant": variant, "aspect": ("quality", "correspondence")[number]}
        stores.append(write_store(tmp_path / f"told{number}.agiqa", content, conversation=conversation))
    head = HeadConfig(projection="hidden", encoder="none", width=8)
    run = train_head(union(stores), tmp_path / "run", head=head, train=CONFIG.model_copy(update={"split": "published"}))
    notes, warnings = run.metrics["notes"], run.metrics["warnings"]
    spoiled = 10 * variants.count("full")
    assert sum(f"{20 - spoiled} of 20 test items read the text of a teacher" in line for line in notes) == 1
    assert sum("are converted from 0 to 100 to 0 to 5" in line for line in notes) == 1
    of_words = [line for line in warnings if "its rating word included" in line and " test items" in line]
    assert [line.split(" test")[0] for line in of_words] == (["10 of 20"] if spoiled else [])
