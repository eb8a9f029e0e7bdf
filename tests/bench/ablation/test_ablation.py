"""An ablation as a whole: what is trained again, what stands beside heads, and what is refused before any training."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from agiqa.bench.ablation.ablation import run_ablation
from agiqa.bench.ablation.grids import read_grid
from agiqa.bench.ablation.protocols import generators_of
from agiqa.errors import ConfigError, DataError
from agiqa.heads import TrainConfig
from agiqa.heads.data.splits import make_partition
from agiqa.store import basis_from, sketch_store
from tests.store.conftest import make_content, make_store

BASE = {"projection": "hidden", "encoder": "none", "width": 4, "epochs": 2, "batch_size": 8, "device": "cpu"}


@pytest.fixture
def ablate(tmp_path, store):
    """Runs the grid of the given sections in tmp_path/out."""

    def run(words=(), **sections):
        file = tmp_path / "grid.yaml"
        file.write_text(yaml.safe_dump({"base": BASE, **sections}, sort_keys=False))
        plan = read_grid(file, generators=lambda: generators_of(store))
        return run_ablation({"": store}, plan, tmp_path / "out", grid=file, words=words, workers=1)

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_whose_folder_was_removed_is_trained_again(ablate, tmp_path):
    grid = {"grid": {"pooling": ["mean", "max"]}}
    first = ablate(**grid)
    shutil.rmtree(tmp_path / "out" / "runs" / "pooling=max")
    again = ablate(**grid)
    assert (first.trained, again.trained, again.failed) == (2, 1, {})
    assert [row.get("test") for row in again.rows] == [row.get("test") for row in first.rows]
    assert [line["name"] for line in lines_of(tmp_path / "out" / "results.jsonl")] == [
        "pooling=mean",
        "pooling=max",
        "pooling=max",
    ]


def test_baselines_have_the_training_items_of_the_heads_beside_them(ablate, store, tmp_path):
    done = ablate(grid={"training_items": [12, None]}, protocols=["published"])
    mos = store.items.labels["quality"]
    for count, name in ((12, "generator, training_items=12"), (None, "generator, training_items=all")):
        (row,) = [row for row in done.rows if row["row"] == name]
        assert row["settings"] == {"baseline": "generator", "training_items": count}
        parts = make_partition(store, TrainConfig(training_items=count))
        known = np.concatenate([parts.train, parts.validation])
        of = {made: np.mean([mos[k] for k in known if store.items.generators[k] == made]) for made in ("one", "two")}
        with (tmp_path / "out" / row["predictions"]).open(newline="") as file:
            told = {line["name"]: float(line["predicted"]) for line in csv.DictReader(file)}
        assert sorted(told) == sorted(store.items.names[k] for k in parts.test)
        for k in parts.test:
            made = store.items.generators[k]
            if made in of:
                assert told[store.items.names[k]] == pytest.approx(of[made])
    files = [row["predictions"] for row in done.rows if "predictions" in row]
    assert len(set(files)) == len(files)


def test_a_run_that_asks_for_no_possible_split_costs_the_others_nothing(ablate, store, tmp_path):
    done = ablate(runs=[{"name": "fine"}, {"name": "lost", "split": "generator"}])
    assert list(done.failed) == ["lost"]
    assert "needs `held_out`" in done.failed["lost"]
    rows = lines_of(tmp_path / "out" / "rows.jsonl")
    assert next(row for row in rows if row["row"] == "fine")["test"]["n"] == len(store.items.names) // 4
    lost = [row for row in rows if row["kind"] == "baseline" and row["protocol"] == "leave-one-generator-out"]
    assert lost
    assert all("needs `held_out`" in row["left_out"] for row in lost)


def test_words_that_cannot_be_read_are_refused_before_anything_is_trained(ablate, tmp_path):
    (tmp_path / "quality.json").write_text('[{"image": "0.png"}]')
    with pytest.raises(DataError, match="rating words"):
        ablate(words=[tmp_path / "quality.json"], grid={"pooling": ["mean"]})
    assert not (tmp_path / "out").exists()


def test_lines_name_the_commit_that_the_environment_says(ablate, tmp_path, monkeypatch):
    grid = {"grid": {"pooling": ["mean"]}}
    monkeypatch.setenv("AGIQA_COMMIT", "HEAD")
    with pytest.raises(ConfigError, match="AGIQA_COMMIT is 'HEAD'"):
        ablate(**grid)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("AGIQA_COMMIT", "fedcba9-dirty")
    assert ablate(**grid).failed == {}
    assert lines_of(tmp_path / "out" / "results.jsonl")[0]["commit"] == "fedcba9-dirty"


def test_baselines_are_compared_with_the_best_head(ablate, tmp_path):
    """Of the published split and of folds, whose parts are put together in an order of their own."""
    protocols = ["published", {"grouped": {"folds": 2}}]
    done = ablate(grid={"pooling": ["mean", "max"]}, seeds=[0, 1], protocols=protocols)
    for protocol in ("published", "grouped"):
        rows = [row for row in done.rows if row["protocol"] == protocol and row.get("test") is not None]
        (best,) = [row for row in rows if row["kind"] == "head" and row["against"] is None]
        (mean,) = [row for row in rows if row["settings"].get("baseline") == "features"]
        assert mean["against"]["row"] == best["row"]
        gap = mean["test"]["srcc"] - best["test"]["srcc"]
        assert mean["against"]["difference"]["srcc"] == pytest.approx(gap)
        others = [row["against"] for row in rows if row["against"] and row["against"]["p"]["srcc"] is not None]
        least = min(others, key=lambda against: against["p"]["srcc"])
        assert least["p_holm"]["srcc"] == pytest.approx(min(1.0, least["p"]["srcc"] * len(others)))
    written = lines_of(tmp_path / "out" / "baselines.jsonl")
    assert written == [row for row in done.rows if row["kind"] == "baseline"]


def test_baselines_that_exist_are_not_fitted_again(ablate, store, tmp_path):
    """With more heads beside them: the files keep their times, and the lines all but the comparison."""
    first = ablate(grid={"pooling": ["mean"]})
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "baselines").rglob("*.csv")}
    again = ablate(grid={"pooling": ["mean", "max"]})
    assert times
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (first.trained, again.trained) == (1, 1)
    kept = [
        [
            {name: value for name, value in row.items() if name != "against"}
            for row in done.rows
            if row["kind"] == "baseline"
        ]
        for done in (first, again)
    ]
    assert kept[0] == kept[1]
    assert all(row["seconds"] > 0 for row in kept[0] if "test" in row)


def test_a_teachers_words_in_any_test_part_are_told_once(store, tmp_path):
    """Of 48 items 12 are tested on; each of two folds tests on half of all of them."""
    items = replace(store.items, text_authors=["teacher"] * 12 + ["model"] * 36)
    content = replace(make_content([3] * 48, width=6), items=items)
    authored = make_store(tmp_path / "authored.agiqa", content, conversation={"variant": "full", "aspect": "quality"})
    file, said = tmp_path / "grid.yaml", []
    for protocols, count in [(["published"], "3 of 12"), ([{"grouped": {"folds": 2}}], "12 of 48")]:
        file.write_text(yaml.safe_dump({"base": BASE, "runs": [{"seed": 0}], "protocols": protocols}))
        run_ablation({"": authored}, read_grid(file), tmp_path / count, grid=file, workers=1, tell=said.append)
        told = [line for line in said if "read the text of a teacher" in line and " test items" in line]
        assert [line.split(" test")[0] for line in told] == [f"warning: {count}"]
        said.clear()


def test_an_ablation_of_a_sketch_reads_hidden_states_for_its_baseline_when_they_are_given(store, tmp_path):
    sketch = sketch_store(store, tmp_path / "sketch.agiqa", basis=basis_from(store, 2)).store
    fewer = make_store(tmp_path / "fewer.agiqa", make_content([3] * 47, width=6))
    file, said = tmp_path / "grid.yaml", []
    file.write_text(yaml.safe_dump({"base": {**BASE, "projection": "sketch"}, "runs": [{"seed": 0}]}))

    def run(**options):
        said.clear()
        plan, out = read_grid(file), tmp_path / "out"
        done = run_ablation({"": sketch}, plan, out, grid=file, workers=1, tell=said.append, **options)
        (row,) = [row for row in done.rows if row["settings"].get("baseline") == "features"]
        return done.trained, row, json.loads((out / "about.json").read_text())

    with pytest.raises(
        DataError, match=r"fewer\.agiqa, which the baselines .*\n  'image_2\.png' with the prompt 'prompt 0' is not"
    ):
        run(baseline_store=fewer)
    assert not (tmp_path / "out").exists()
    trained, row, about = run()
    assert trained == 1
    assert sum(line.startswith("note: ") and "--baseline-store" in line for line in said) == 1
    assert (row["features_store"], "baseline_store" in about) == (sketch.id, False)
    assert "(sketch of rank 2, mean of " in row["row"]
    trained, row, about = run(baseline_store=store)
    assert trained == 0
    assert not any("--baseline-store" in line for line in said)
    assert (row["store"], row["features_store"], about["baseline_store"]["id"]) == (sketch.id, store.id, store.id)
    assert "(hidden states, mean of " in row["row"]


def test_warnings_of_trained_heads_are_told_once_for_all_of_them(store, tmp_path):
    """Also by a second call that trains nothing."""
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": {**BASE, "validation": 0.3}, "grid": {"pooling": ["mean", "max"]}}))
    for _ in range(2):
        said: list[str] = []
        run_ablation({"": store}, read_grid(file), tmp_path / "out", grid=file, workers=1, tell=said.append)
        few = [line for line in said if "validation items: too few to choose an epoch by" in line]
        assert len(few) == 1
        assert few[0].startswith("warning: 2 of 2 heads (pooling=mean, ...): There are only ")
