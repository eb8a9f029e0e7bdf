"""Baselines: each compared with an independent computation, on real stores; what cannot be computed is reported, never guessed."""

import csv
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold

from agiqa.bench.baselines.baselines import run_baselines
from agiqa.bench.baselines.evidence import RatingWords
from agiqa.errors import ConfigError, DataError
from agiqa.heads import TrainConfig
from agiqa.heads.closed.regressions import STRENGTHS
from agiqa.heads.data.splits import make_partition
from agiqa.heads.evaluation.metrics import evaluate_scores
from tests.store.conftest import make_content, make_store

NAMES = ["generator", "prompt", "generator + prompt", "text", "rating word", "features"]
COUNT = 60
RATING_WORDS = ("poor", "fair", "good")
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
        descriptions=[f"the picture is {RATING_WORDS[k]} to look at" for k in words],
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
    return {line["settings"]["baseline"]: line for line in lines}


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
        scores = evaluate_scores(predicted, truth, [row["prompt"] for row in rows])
        if name == "rating word":  # on no known scale, so that it has no RMSE
            scores = {**scores, "rmse": None, "ci": {**scores["ci"], "rmse": None}}
        assert line["test"] == scores
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


@pytest.mark.parametrize("split", ["published", "grouped"])
def test_the_worth_of_a_prompt_is_learned_on_prompts_as_known_as_those_of_the_test_part(tmp_path, split):
    """Of the published split all are known, of grouped prompts none. The MOS is a value of the prompt and some noise."""
    random = np.random.default_rng(4)
    mos = random.normal(size=12)[np.arange(COUNT) % 12] + 0.1 * random.normal(size=COUNT)
    store, config = make(tmp_path, labels={"quality": mos}), TrainConfig(split=split)
    train, test = parts(store, config)
    prompts, made = np.array(store.items.prompts), np.array(store.items.generators)
    assert set(prompts[test]) & set(prompts[train]) == (set(prompts[test]) if split == "published" else set())
    rows = np.hstack([prompts[:, None] == np.unique(prompts[train]), made[:, None] == np.unique(made[train])]) * 1.0
    groups = np.arange(len(train)) if split == "published" else prompts[train]
    folds = list(GroupKFold(5).split(train, groups=groups))
    models = [Ridge(alpha=strength) for strength in STRENGTHS]
    errors = [
        sum(
            np.square(
                model.fit(rows[train[kept]], mos[train[kept]]).predict(rows[train[held]]) - mos[train[held]]
            ).sum()
            for kept, held in folds
        )
        for model in models
    ]
    best = int(np.argmin(errors))
    line = run(store, tmp_path / "out", config)["generator + prompt"]
    assert line["fits"][0]["strength"] == STRENGTHS[best]
    told = [float(row["predicted"]) for row in predictions(tmp_path / "out" / line["predictions"])]
    expected = models[best].fit(rows[train], mos[train]).predict(rows[test])
    assert told == pytest.approx(expected, abs=2e-3)  # that of sparse rows is iterated


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
    lines = {
        line["settings"]["baseline"]: line for line in run_baselines(store, configs, protocol="grouped", out=tmp_path)
    }
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
    assert [(line["settings"]["baseline"], line["label"]) for line in lines] == [
        (n, label) for label in ("quality", "beauty") for n in NAMES
    ]
    assert {line.get("runs", 1) for line in lines} == {1}
    texts = [line["predictions"] for line in lines if line["settings"]["baseline"] == "text"]
    assert texts == [f"baselines/published/text_{label}.csv" for label in ("quality", "beauty")]
    alone = run(store, tmp_path / "alone")["text"]["test"]
    assert alone == next(line["test"] for line in lines if line["settings"]["baseline"] == "text")


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
    assert "have no rating word by the model itself on quality; the teacher knew the MOS" in said
    own = talks(store, tmp_path / "correspondence_test.json", lambda k: "good")
    assert "20 of the 20 items" in run(store, tmp_path, words=[own])["rating word"]["left_out"]
    twice = run(store, tmp_path, words=[file, talks(store, tmp_path / "quality.json", lambda k: "fair")])
    assert "already has a rating word by the model itself" in twice["rating word"]["left_out"]
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


def test_rating_words_are_the_middles_of_their_fifths_of_the_scale(tmp_path):
    marked = make(tmp_path, mos_ranges={"quality": (0.0, 100.0)}, labels={"quality": np.linspace(0, 100, COUNT)})
    said = ["bad", "Good.", "no idea"]
    line = run(marked, tmp_path, words=[talks(marked, tmp_path / "words.json", lambda k: said[k % 3])])["rating word"]
    _, test = parts(marked)
    expected = np.array([[10.0, 70.0, 50.0][k % 3] for k in test])
    assert [float(row["predicted"]) for row in predictions(tmp_path / line["predictions"])] == expected.tolist()
    assert line["test"]["rmse"] == pytest.approx(np.sqrt(np.square(expected - np.linspace(0, 100, COUNT)[test]).mean()))
    unclear = sum(k % 3 == 2 for k in test)
    assert line["notes"] == [f"{unclear} of 20 test items have no clear rating word and count as fair"]


def test_texts_of_a_teacher_that_knew_the_mos_are_told(tmp_path):
    authored = make(tmp_path, text_authors=["teacher"] * 30 + ["model"] * 30)
    lines = run(authored, tmp_path / "out")
    count = sum(k < 30 for k in parts(authored)[1])
    (note,) = [note for note in lines["text"]["notes"] if "teacher" in note]
    assert note.startswith(f"{count} of 20 test items read the text of a teacher that knew their MOS")
    assert lines["text"]["row"] == "ridge (TF-IDF of prompt and description)"
