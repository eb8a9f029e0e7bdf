"""The baseline on mean features: against scikit-learn by hand, on real stores of hidden states and sketches of them."""

import csv
import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GroupKFold

from agiqa.bench.baselines.baselines import run_baselines
from agiqa.bench.baselines.evidence import MeanFeatures
from agiqa.bench.baselines.predictors import features_title
from agiqa.errors import DataError
from agiqa.heads import TrainConfig
from agiqa.heads.closed.regressions import KERNEL_STRENGTHS, STRENGTHS, WIDTHS
from agiqa.heads.data.splits import make_partition
from agiqa.store import StoreUnion, basis_from, sketch_store
from tests.store.conftest import Content, make_content, make_store

COUNT = 60


def spoken(folder: Path, *, name="spoken.agiqa", silent=None, order=None):
    """A store of 60 items whose MOS is a curved function of the mean of the answer's tokens; item `silent` has none.

    The items stand in `order`.
    """
    random = np.random.default_rng(7)
    content = make_content([6] * COUNT, width=4, logical_dtype="float32", seed=7)
    roles = [np.array([0, 1, 2, 3, 3, 3], np.uint8) if k != silent else np.full(6, 2, np.uint8) for k in range(COUNT)]
    inner = random.normal(size=(COUNT, 4)).astype(np.float32)
    noise = random.normal(size=(COUNT, 6, 4)).astype(np.float32)
    hidden = [np.where((of == 3)[:, None], inner[k], 3 * noise[k]) for k, of in enumerate(roles)]
    items = replace(
        content.items,
        prompts=[f"prompt {k % 15}" for k in range(COUNT)],
        splits=["test" if k % 4 == 0 else "train" for k in range(COUNT)],
        labels={"quality": 2 + np.abs(inner[:, 0]) + 0.1 * inner[:, 1]},
    )
    places = list(range(COUNT)) if order is None else order
    columns = {
        field: [getattr(items, field)[k] for k in places]
        for field in ("names", "prompts", "splits", "generators", "descriptions")
    }
    return make_store(
        folder / name,
        replace(
            content,
            hidden=[hidden[k] for k in places],
            roles=[roles[k] for k in places],
            token_ids=[content.token_ids[k] for k in places],
            items=replace(items, **columns, labels={"quality": items.labels["quality"][places]}),
        ),
    )


def run(store, out, **options):
    """The line of the baseline."""
    lines = run_baselines(store, [TrainConfig()], protocol="published", out=out, **options)
    (line,) = [line for line in lines if line["settings"]["baseline"] == "features"]
    return line


def predicted(path: Path):
    """Names and predictions."""
    with path.open(newline="") as file:
        return {row["name"]: float(row["predicted"]) for row in csv.DictReader(file)}


def parts(store):
    found = make_partition(store, TrainConfig())
    return np.concatenate([found.train, found.validation]), found.test


def by_hand(store, tokens):
    """Every closed form on the means over `tokens` by scikit-learn: inner RMSE and predictions by kind and settings."""
    train, test = parts(store)
    blocks = [store.read([k]) for k in range(COUNT)]
    rows = [block.float32().astype(np.float64)[(block.roles == 3) | (tokens == "all")].mean(0) for block in blocks]
    means = (np.stack(rows) - np.mean([rows[k] for k in train], 0)) / np.std([rows[k] for k in train], 0)
    mos, prompts = store.items.labels["quality"][train], [store.items.prompts[k] for k in train]
    median = np.median(pdist(means[train]))
    models = {("ridge", strength, None): Ridge(alpha=strength) for strength in STRENGTHS}
    for width, strength in itertools.product(WIDTHS, KERNEL_STRENGTHS):
        gamma = 1 / (2 * (width * median) ** 2)
        alpha = strength * (1 - rbf_kernel(means[train], gamma=gamma).mean())
        models["kernel ridge", strength, width] = KernelRidge(alpha=alpha, kernel="rbf", gamma=gamma)
    known, found = means[train], {}
    for settings, model in models.items():
        missed = np.zeros(len(train))
        for kept, held in GroupKFold(5).split(known, groups=prompts):
            mean = mos[kept].mean()
            missed[held] = model.fit(known[kept], mos[kept] - mean).predict(known[held]) + mean - mos[held]
        told = model.fit(known, mos - mos.mean()).predict(means[test]) + mos.mean()
        found[settings] = np.sqrt(np.square(missed).mean()), told
    return found


def test_features_are_read_by_the_closed_form_that_training_prompts_choose(tmp_path):
    store = spoken(tmp_path)
    line = run(store, tmp_path / "out")
    tried = {tokens: by_hand(store, tokens) for tokens in ("all", "answer")}

    def best(tokens, kind):
        found = tried[tokens]
        return min((settings for settings in found if settings[0] == kind), key=lambda settings: found[settings][0])

    chosen = [(tokens, best(tokens, kind)) for tokens in tried for kind in ("ridge", "kernel ridge")]
    (fit,) = line["fits"]
    assert [
        (one["tokens"], (one["regression"], one["strength"], one.get("width")), pytest.approx(one["inner_rmse"]))
        for one in fit["candidates"]
    ] == [(tokens, settings, tried[tokens][settings][0]) for tokens, settings in chosen]
    tokens, settings = min(chosen, key=lambda one: tried[one[0]][one[1]][0])
    assert (tokens, settings[0]) == ("answer", "kernel ridge")
    assert (fit["tokens"], (fit["regression"], fit["strength"], fit["width"])) == (tokens, settings)
    told = list(predicted(tmp_path / "out" / line["predictions"]).values())
    assert told == pytest.approx(tried[tokens][settings][1])
    assert line["row"] == "kernel ridge (hidden states, mean of the answer's tokens)"
    assert (line["reads"], line["features_store"]) == ("hidden states", store.id)


def test_tokens_of_the_answer_are_read_only_where_every_item_has_some(tmp_path):
    line = run(spoken(tmp_path, silent=4), tmp_path / "out")
    assert {one["tokens"] for one in line["fits"][0]["candidates"]} == {"all"}
    assert line["row"].endswith("(hidden states, mean of all tokens)")
    means = MeanFeatures(spoken(tmp_path, name="other.agiqa", silent=4))
    assert list(means.of(np.array([3, 5]))) == ["all", "answer"]
    assert list(means.of(np.array([3, 4]))) == ["all"]


def test_parts_that_choose_otherwise_are_all_told():
    fits = [{"regression": kind, "tokens": tokens} for kind, tokens in [("ridge", "all"), ("kernel ridge", "answer")]]
    told = features_title("sketch of rank 8", fits)
    assert told == "ridge or kernel ridge (sketch of rank 8, mean of all tokens or of the answer's tokens)"
    assert features_title("hidden states", fits[:1] * 2) == "ridge (hidden states, mean of all tokens)"


def test_features_beside_a_sketch_are_those_of_the_store_it_was_made_from(tmp_path):
    """Its items may stand in another order, and be some of more."""
    hidden = spoken(tmp_path)
    sketch = sketch_store(hidden, tmp_path / "sketch.agiqa", basis=basis_from(hidden, 2)).store
    alone = run(sketch, tmp_path / "alone")
    assert "(sketch of rank 2, mean of " in alone["row"]
    assert any("reads a sketch of rank 2 only" in note for note in alone["notes"])
    mixed = spoken(tmp_path, name="mixed.agiqa", order=np.random.default_rng(0).permutation(COUNT).tolist())
    beside = run(sketch, tmp_path / "beside", means=MeanFeatures(mixed))
    own = run(hidden, tmp_path / "own")
    assert beside["row"] == "kernel ridge (hidden states, mean of the answer's tokens)"
    assert (beside["store"], beside["features_store"]) == (sketch.id, mixed.id)
    told = predicted(tmp_path / "beside" / beside["predictions"])
    assert told == pytest.approx(predicted(tmp_path / "own" / own["predictions"]))
    assert not any("sketch" in note for note in beside["notes"])


class Again(Content):
    """Other conversations about images of the same names."""

    @property
    def keys(self) -> list[bytes]:
        return [hashlib.sha256(f"again {name}".encode()).digest() for name in self.items.names]


def test_a_baseline_store_must_have_every_item_once(tmp_path):
    hidden, fewer = spoken(tmp_path), spoken(tmp_path, name="fewer.agiqa", order=list(range(1, COUNT)))
    with pytest.raises(DataError, match=r"1 problem\n  'image_0.png' with the prompt 'prompt 0' is not there"):
        run(hidden, tmp_path / "out", means=MeanFeatures(fewer))
    one = make_content([3], width=4, logical_dtype="float32")
    again = Again(**vars(replace(one, items=replace(one.items, prompts=["prompt 1"], names=["image_1.png"]))))
    twice = StoreUnion([hidden, make_store(tmp_path / "again.agiqa", replace(again, lm_head=hidden.lm_head()))])
    with pytest.raises(DataError, match=r"1 problem\n  'image_1.png' with the prompt 'prompt 1' is there 2 times"):
        run(hidden, tmp_path / "out", means=MeanFeatures(twice))
    assert run(fewer, tmp_path / "out", means=MeanFeatures(hidden))["features_store"] == hidden.id


class Counting:
    """A store that counts the items that are read."""

    def __init__(self, store):
        self._store, self.read_items = store, 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read(self, items):
        self.read_items += len(items)
        return self._store.read(items)


def test_mean_features_are_computed_once(tmp_path):
    counting = Counting(spoken(tmp_path))
    means = MeanFeatures(counting)
    run_baselines(counting, [TrainConfig()], protocol="published", out=tmp_path, means=means)
    assert counting.read_items == COUNT
    run_baselines(counting, [TrainConfig(split="grouped")], protocol="grouped", out=tmp_path, means=means)
    assert counting.read_items == COUNT
    before = means.of(np.array([3]))
    means.forget()
    np.testing.assert_array_equal(means.of(np.array([3]))["all"], before["all"])
    assert counting.read_items == COUNT + 1


def test_a_kernel_matrix_that_memory_cannot_hold_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("agiqa.heads.closed.regressions.available_memory", lambda device: 1000)
    line = run(spoken(tmp_path), tmp_path / "out")
    assert {one["regression"] for one in line["fits"][0]["candidates"]} == {"ridge"}
    assert any("kernel matrix of 45 training items needs" in note for note in line["notes"])


def test_raw_logits_are_too_wide(tmp_path):
    counting = Counting(spoken(tmp_path))
    counting.encoding = "logits"
    assert "raw logits" in run(counting, tmp_path)["left_out"]
