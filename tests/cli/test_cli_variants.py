"""Stores read as shorter conversations by every command that trains or applies heads."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from agiqa.store import open_store
from tests.cli.conftest import ITEMS, SMALL_HEAD
from tests.cli.refusals import misuse, refuse
from tests.extract.small_sets import write_set, write_talks


@pytest.fixture(scope="module")
def full(agiqa, example, tmp_path_factory):
    """The store of the example's conversations with their rating words."""
    path = tmp_path_factory.mktemp("variants") / "full.agiqa"
    assert agiqa(*example.extract(path, "--variant", "full")).code == 0
    return path


def test_a_head_on_a_view_reads_both_stores(agiqa, example, full, tmp_path):
    run = tmp_path / "run"
    trained = agiqa("train", full, run, "--variant", "id", *SMALL_HEAD, "--json").json
    assert json.loads((run / "config.json").read_text())["origin"]["conversation"]["variant"] == "id"
    for store in (full, example.store):
        found = agiqa("evaluate", run, store, "--json").json
        assert found["srcc"] == pytest.approx(trained["test"]["srcc"], abs=1e-6)
        assert agiqa("predict", run, store, tmp_path / f"{store.stem}.csv").code == 0
    scores = [np.loadtxt(tmp_path / f"{stem}.csv", delimiter=",", skiprows=1, usecols=2) for stem in ("full", "hidden")]
    np.testing.assert_allclose(*scores, atol=1e-4)
    other = agiqa("evaluate", run, full, "--variant", "question", "--json").json
    assert other["srcc"] != trained["test"]["srcc"]
    # a head that was trained on the separate extraction reads the view too
    assert agiqa("evaluate", example.run, full, "--variant", "id", "--on", "all", "--json").json["n"] == 40
    shown = agiqa("store", "info", full)
    assert "question, described, id" in shown.out


def test_extracting_the_question_alone_gives_the_rows_of_the_view(agiqa, example, full, tmp_path):
    path = tmp_path / "question.agiqa"
    assert agiqa(*example.extract(path, "--variant", "question")).code == 0
    separate, view = open_store(path), open_store(full).variant("question")
    np.testing.assert_array_equal(view.n_tokens, separate.n_tokens)
    here, there = view.read(range(40)).float32(), separate.read(range(40)).float32()
    assert np.linalg.norm(here - there) <= 1e-6 * np.linalg.norm(there)


def test_a_grid_compares_variants_of_one_store(agiqa, full, tmp_path):
    file = tmp_path / "grid.yaml"
    base = {"projection": "hidden", "encoder": "none", "width": 4, "epochs": 1, "batch_size": 8, "device": "cpu"}
    file.write_text(yaml.safe_dump({"base": base, "grid": {"variant": ["question", "id", None]}}))
    done = agiqa("ablate", full, tmp_path / "out", "--grid", file, "--train-workers", 1, "--json").json
    heads = {row["row"]: row for row in done["table"] if row["kind"] == "head"}
    assert set(heads) == {"variant=question", "variant=id", "variant=none"}
    ridges = [row["row"] for row in done["table"] if row["settings"].get("baseline") == "features"]
    assert len(ridges) == 3
    assert all("variant=" in row for row in ridges)
    assert agiqa("report", tmp_path / "out", "--json").code == 0
    file.write_text(yaml.safe_dump({"base": base, "runs": [{"name": "one"}, {"name": "two", "variant": "question"}]}))
    again = agiqa("ablate", full, tmp_path / "two", "--grid", file, "--variant", "id", "--json").json
    assert {row["row"] for row in again["table"] if row["kind"] == "head"} == {"one", "two"}
    lines = [json.loads(line) for line in (tmp_path / "two" / "results.jsonl").read_text().splitlines()]
    assert {line["name"]: line["config"]["variant"] for line in lines} == {"one": "id", "two": "question"}


def test_a_view_and_a_store_of_the_same_images_make_no_transfer(agiqa, example, full, tmp_path):
    """The view has another id than the separate extraction, and the same items."""
    view, separate = open_store(full).variant("id"), open_store(example.store)
    assert view.id != separate.id
    np.testing.assert_array_equal(view.item_keys, separate.item_keys)
    asked = ("transfer", full, example.store, tmp_path / "out", "--names", "a,b", "--variant", "id")
    refuse(agiqa(*asked), "a and b have the same 40 images and conversations", str(full), str(example.store))
    refuse(agiqa("transfer", example.sketch, example.store, *asked[3:]), "have the same 40 images and conversations")
    assert not (tmp_path / "out").exists()


def test_transfers_and_searches_read_views(agiqa, example, full, tmp_path):
    data = write_set(tmp_path / "other", ITEMS, seed=1)
    other, there = replace(example, data=data, talks=write_talks(data)), tmp_path / "there.agiqa"
    assert agiqa(*other.extract(there)).code == 0
    file = tmp_path / "transfer.yaml"
    small = {"epochs": 1, "batch_size": 8, "device": "cpu"}
    file.write_text(yaml.safe_dump({"head": {"encoder": "none", "width": 4, "projection": "hidden"}, "train": small}))
    given = ("--config", file, "--seeds", 1, "--shots", "4", "--train-workers", 1, "--names", "a,b", "--one-way")
    done = agiqa("transfer", full, there, tmp_path / "out", *given, "--variant", "described", "--json")
    assert done.code == 0, done.err
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert {one["variant"] for one in about["stores"].values()} == {"described"}
    pytest.importorskip("optuna", reason="optuna, the extra `search`, is not installed")
    found = agiqa("tune-head", full, tmp_path / "tuned", "--variant", "no_id", "--dry-run", "--device", "cpu")
    refuse(found, "`no_id` asks one question in other words")


def test_variants_that_are_no_view_are_refused(agiqa, example, full, tmp_path):
    run = tmp_path / "run"
    refuse(
        agiqa("train", full, run, "--variant", "no_id"), "`no_id` asks one question in other words", "--variant no_id"
    )
    refuse(agiqa("train", example.store, run, "--variant", "full"), "'id'", "do not begin with those of 'full'")
    refuse(agiqa("train", full, run, "--variant", "idd"), "No conversation variant is called 'idd'. Did you mean 'id'?")
    assert not run.exists()
    refuse(
        agiqa("evaluate", example.run, full, "--variant", "id:quality+correspondence"), "only with question, described"
    )
    refuse(
        agiqa("ablate", full, tmp_path / "out", "--grid", "table-iii"),
        "described:quality+correspondence",
        "nothing was trained",
    )
    assert not (tmp_path / "out").exists()
    misuse(agiqa(*example.extract(tmp_path / "s.agiqa", "--variant", "questions")), "Did you mean 'question'")
