"""Baselines: each against a computation of its own, on real stores; what cannot be had is said, never guessed."""

import csv
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold

from agiqa.bench.baseline_predictors import STRENGTHS, MeanFeatures, fit_ridge
from agiqa.bench.baseline_words import RatingWords
from agiqa.bench.baselines import run_baselines
from agiqa.errors import ConfigError, DataError
from agiqa.heads import TrainConfig
from agiqa.heads.metrics import evaluate_scores
from agiqa.heads.splits import make_partition
from tests.store.conftest import make_content, make_store

NAMES = ["generator", "prompt", "generator + prompt", "text", "rating word", "mean hidden state"]
COUNT = 60
WORDS = ("poor", "fair", "good")
WORTH = {"one": 1.0, "two": 2.0, "three": 4.0}
"""What each generator adds to the MOS."""


def make(folder: Path, **changes):
    """A store of 60 items and 12 prompts, whose MOS follows the generator, a word of the text, and the features."""
    random = np.random.default_rng(3)
    content = make_content(random.integers(3, 9, COUNT).tolist(), width=6, logical_dtype="float32")
    places = np.arange(COUNT)
    generators = [list(WORTH)[k] for k in random.integers(0, 3, COUNT)]
    words = random.integers(0, 3, COUNT)
    inner = np.array([rows.mean(0)[0] for rows in content.hidden])
    items = replace(
        content.items,
        prompts=[f"Prompt  {k % 12}" for k in places],
        splits=["test" if k % 3 == 0 else "train" for k in random.permutation(COUNT)],
        generators=generators,
        descriptions=[f"the picture is {WORDS[k]} to look at" for k in words],
        labels={"quality": np.array([WORTH[name] for name in generators]) + words + 0.2 * inner, "beauty": inner},
    )
    return make_store(folder / "set.agiqa", replace(content, items=replace(items, **changes)))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make(tmp_path_factory.mktemp("baselines"))


def talks(store, path: Path, own, word="good"):
    """A conversation file over all items, with `own(k)` as the model's own word of item k, or None."""
    turns = [("user", "Describe it."), ("assistant", "A picture."), ("user", "Rate it."), ("assistant", "excellent")]
    lines = [
        {
            "id": str(k),
            "image": f"set/images/{name}",
            "conversations": [{"role": role, "content": text} for role, text in turns],
            **({} if own(k) is None else {"response_0": "A picture.", "response_1": own(k)}),
        }
        for k, name in enumerate(store.items.names)
    ]
    path.write_text(json.dumps(lines))
    return path


def run(store, out, *configs, words=(), **options):
    """The lines by name."""
    lines = run_baselines(
        store, configs or [TrainConfig()], protocol="published", out=out, words=RatingWords(words), **options
    )
    return {line["row"]: line for line in lines}


def predictions(path: Path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def parts(store, config=None):
    found = make_partition(store, config or TrainConfig())
    return np.concatenate([found.train, found.validation]), found.test


def test_every_baseline_has_a_line_and_its_predictions(store, tmp_path):
    file = talks(store, tmp_path / "quality_words.json", lambda k: ["bad", "Good.", "no idea"][k % 3])
    lines = run(store, tmp_path / "out", words=[file], store_name="mine")
    assert list(lines) == NAMES
    _, test = parts(store)
    for name, line in lines.items():
        assert line["kind"] == "baseline"
        assert line["settings"] == {"baseline": name}
        assert (line["store_name"], line["protocol"], line["label"]) == ("mine", "published", "quality")
        assert (line["runs"], line["seeds"], line["failed"], line["validation"], line["against"]) == (
            1,
            1,
            0,
            None,
            None,
        )
        rows = predictions(tmp_path / "out" / line["predictions"])
        assert [row["name"] for row in rows] == [store.items.names[k] for k in test]
        predicted = np.array([float(row["predicted"]) for row in rows])
        truth = np.array([float(row["mos"]) for row in rows])
        assert np.array_equal(truth, store.items.labels["quality"][test])
        assert line["test"] == evaluate_scores(predicted, truth, [row["prompt"] for row in rows])
    words = predictions(tmp_path / "out" / "baselines" / "mine" / "published" / "rating-word.csv")
    assert [float(row["predicted"]) for row in words] == [[0.0, 3.0, 2.0][k % 3] for k in test]
    assert lines["text"]["test"]["srcc"] > 0.3
    assert lines["generator"]["test"]["srcc"] > 0.5


@pytest.mark.parametrize(("name", "column"), [("generator", "generators"), ("prompt", "prompts")])
def test_means_are_those_of_the_training_items(store, tmp_path, name, column):
    train, test = parts(store)
    keys, mos = getattr(store.items, column), store.items.labels["quality"]
    by_key = defaultdict(list)
    for k in train:
        by_key[keys[k]].append(mos[k])
    line = run(store, tmp_path)[name]
    told = [float(row["predicted"]) for row in predictions(tmp_path / line["predictions"])]
    assert told == pytest.approx([np.mean(by_key[keys[k]]) for k in test])


def ridge(known, mos, unknown, strength):
    """In closed form, the intercept free of the penalty."""
    centre, mean = known.mean(0), mos.mean()
    matrix = (known - centre).T @ (known - centre) + strength * np.eye(known.shape[1])
    return (unknown - centre) @ np.linalg.solve(matrix, (known - centre).T @ (mos - mean)) + mean


def test_ridge_is_the_closed_form_at_the_strength_that_unknown_groups_choose():
    random = np.random.default_rng(0)
    known, unknown = random.normal(size=(40, 30)), random.normal(size=(9, 30))
    groups = np.repeat(np.arange(10), 4)
    mos = known[:, 0] + random.normal(size=10)[groups] + 0.5 * random.normal(size=40)
    errors = [
        sum(
            np.square(ridge(known[kept], mos[kept], known[held], strength) - mos[held]).sum()
            for kept, held in GroupKFold(5).split(known, groups=groups)
        )
        for strength in STRENGTHS
    ]
    chosen = STRENGTHS[int(np.argmin(errors))]
    assert STRENGTHS[0] < chosen < STRENGTHS[-1]
    assert fit_ridge(known, mos, groups, unknown) == pytest.approx(ridge(known, mos, unknown, chosen))
    with pytest.raises(DataError, match="one prompt only"):
        fit_ridge(known, mos, np.zeros(40, np.int64), unknown)


def test_ridge_on_mean_features_knows_only_the_training_items(store, tmp_path):
    train, test = parts(store)
    rows = [store.read([k]).float32().astype(np.float64).mean(0) for k in range(COUNT)]
    known, unknown = np.stack([rows[k] for k in train]), np.stack([rows[k] for k in test])
    scale = known.std(0)
    line = run(store, tmp_path)["mean hidden state"]
    told = [float(row["predicted"]) for row in predictions(tmp_path / line["predictions"])]
    candidates = [ridge(known / scale, store.items.labels["quality"][train], unknown / scale, s) for s in STRENGTHS]
    assert any(np.allclose(told, one) for one in candidates)


def test_no_prediction_depends_on_a_test_mos(store, tmp_path):
    _, test = parts(store)
    mos = store.items.labels["quality"].copy()
    mos[test] = np.random.default_rng(1).permutation(mos[test])
    (tmp_path / "other").mkdir()
    other = make(tmp_path / "other", labels={"quality": mos})
    before, after = run(store, tmp_path / "a"), run(other, tmp_path / "b")
    for name in set(NAMES) - {"rating word"}:
        told = [
            [row["predicted"] for row in predictions(tmp_path / k / line["predictions"])]
            for k, line in (("a", before[name]), ("b", after[name]))
        ]
        assert told[0] == told[1]
        assert before[name]["test"]["rmse"] != after[name]["test"]["rmse"]


def test_a_constant_prediction_has_no_correlation(store, tmp_path):
    test = run(store, tmp_path, TrainConfig(split="grouped"))["prompt"]["test"]
    assert (test["srcc"], test["plcc"], test["krcc"]) == (None, None, None)
    assert test["undefined"] == "all predictions are equal"
    assert test["rmse"] > 0


def test_folds_are_put_together_and_constants_of_each_correlate_with_nothing(store, tmp_path):
    configs = [TrainConfig(split="folds", folds=3, fold=fold, seed=seed) for fold in range(3) for seed in range(2)]
    lines = {line["row"]: line for line in run_baselines(store, configs, protocol="grouped", out=tmp_path)}
    rows = predictions(tmp_path / lines["generator"]["predictions"])
    assert sorted(row["name"] for row in rows) == sorted(store.items.names)
    assert lines["generator"]["runs"] == 3
    assert lines["generator"]["test"]["n"] == COUNT
    prompt = lines["prompt"]["test"]
    assert len({row["predicted"] for row in predictions(tmp_path / lines["prompt"]["predictions"])}) == 3
    assert [prompt[name] for name in ("srcc", "plcc", "krcc")] == [None] * 3
    assert [prompt["ci"][name] for name in ("srcc", "plcc", "krcc")] == [None] * 3
    assert "all predictions of each test part are equal" in prompt["undefined"]
    assert prompt["rmse"] > 0
    unknown = {generator: TrainConfig(split="generator", held_out=generator) for generator in WORTH}
    held = {line["row"]: line for line in run_baselines(store, list(unknown.values()), protocol="g", out=tmp_path)}
    assert held["generator"]["test"]["srcc"] is None
    assert held["prompt"]["test"]["srcc"] is not None


def test_labels_of_several_heads_have_lines_and_files_of_their_own(store, tmp_path):
    configs = [TrainConfig(label="quality+beauty", seed=seed) for seed in range(2)] + [TrainConfig(epochs=3)]
    lines = run_baselines(store, configs, protocol="published", out=tmp_path)
    assert [(line["row"], line["label"]) for line in lines] == [
        (n, label) for label in ("quality", "beauty") for n in NAMES
    ]
    assert {line.get("runs", 1) for line in lines} == {1}
    texts = [line["predictions"] for line in lines if line["row"] == "text"]
    assert texts == [f"baselines/published/text_{label}.csv" for label in ("quality", "beauty")]
    alone = run(store, tmp_path / "alone")["text"]["test"]
    assert alone == next(line["test"] for line in lines if line["row"] == "text")


def test_what_is_lacking_is_said(tmp_path):
    nothing = [None] * COUNT
    bare = make(tmp_path, generators=nothing, descriptions=["a description", *nothing[1:]])
    lines = run(bare, tmp_path / "out")
    said = {name: line["left_out"] for name, line in lines.items() if "left_out" in line}
    assert list(said) == ["generator", "generator + prompt", "text", "rating word"]
    assert "have no generator; join them with `agiqa store labels`" in said["generator"]
    assert "have no description" in said["text"]
    assert said["rating word"] == "no files with rating words were given"
    assert not {"test", "predictions"} & lines["text"].keys()
    unknown = run(bare, tmp_path / "out", TrainConfig(label="beuaty"))
    assert {line["left_out"] for line in unknown.values()} == {unknown["text"]["left_out"]}
    assert "Did you mean 'beauty'" in unknown["text"]["left_out"]


def test_words_of_the_teacher_or_on_another_aspect_are_no_answer(store, tmp_path):
    file = talks(store, tmp_path / "words.json", lambda k: None if k % 2 else "good")
    said = run(store, tmp_path, words=[file])["rating word"]["left_out"]
    assert "have no rating word of the model's own on quality; the teacher's words" in said
    own = talks(store, tmp_path / "correspondence_test.json", lambda k: "good")
    assert "20 of the 20 items" in run(store, tmp_path, words=[own])["rating word"]["left_out"]
    twice = run(store, tmp_path, words=[file, talks(store, tmp_path / "quality.json", lambda k: "fair")])
    assert "has a rating word of the model's own already" in twice["rating word"]["left_out"]
    (tmp_path / "bad.json").write_text('[{"image": "0.png"}]')
    with pytest.raises(DataError, match=r"rating words: 1 problem\n.*bad\.json"):
        run(store, tmp_path, words=[tmp_path / "bad.json"])


def test_words_about_other_prompts_are_no_answer(store, tmp_path):
    """As the answers of another data set whose images have the same names."""
    file = talks(store, tmp_path / "words.json", lambda k: "good")
    entries = json.loads(file.read_text())
    for k, entry in enumerate(entries):
        entry["conversations"][0]["content"] = f"Describe another thing, of kind {k}."
    file.write_text(json.dumps(entries))
    said = run(store, tmp_path, words=[file])["rating word"]["left_out"]
    assert said.startswith("the conversations with rating words: 20 problems")
    assert "(the store), and its question does not name it: 'Describe another thing, of kind" in said


def test_test_parts_that_overlap_are_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="give them one split_seed"):
        run(store, tmp_path, TrainConfig(), TrainConfig(split="grouped", test_share=0.5))


class Counting:
    """A store that counts the items that are read."""

    def __init__(self, store):
        self._store, self.read_items = store, 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read(self, items):
        self.read_items += len(items)
        return self._store.read(items)


def test_mean_features_are_computed_once(store, tmp_path):
    counting = Counting(store)
    means = MeanFeatures(counting)
    configs = [TrainConfig(label="quality+beauty")]
    run_baselines(counting, configs, protocol="published", out=tmp_path, means=means)
    assert counting.read_items == COUNT
    run_baselines(counting, [TrainConfig(split="grouped")], protocol="grouped", out=tmp_path, means=means)
    assert counting.read_items == COUNT


def test_raw_logits_are_too_wide(store, tmp_path):
    counting = Counting(store)
    counting.encoding = "logits"
    assert "raw logits" in run(counting, tmp_path)["mean hidden state"]["left_out"]
