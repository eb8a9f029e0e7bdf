"""The report of what `run_ablation` itself leaves: several stores, every protocol, and the bias of choosing on test."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from agiqa.bench.ablation.ablation import run_ablation
from agiqa.bench.ablation.grids import read_grid
from agiqa.bench.ablation.protocols import generators_of
from agiqa.bench.report.findings import METHOD, findings, limits
from agiqa.bench.report.reading import read_all
from agiqa.bench.report.row_tables import bias_table, leak, main_tables, optimism_tables
from agiqa.bench.report.writing import write_report
from agiqa.store import basis_from, sketch_store
from tests.bench.report import made
from tests.bench.report.made import cells_of
from tests.store.conftest import make_content, make_store

ITEMS = 60
GENERATORS = ("one", "two", "three")
BASE = {
    "projection": "sketch",
    "encoder": "none",
    "width": 4,
    "epochs": 3,
    "batch_size": 8,
    "lr": 0.01,
    "device": "cpu",
}
GRID = {
    "base": {**BASE, "paper_compatible": True},
    "grid": {"store": ["main", "r2"]},
    "seeds": [0, 1],
    "protocols": ["published", {"grouped": {"folds": 2, "seed_per_fold": True}}, "leave-one-generator-out"],
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An ablation of one head on sketches of rank 4 (main) and 2, whose prompts every generator drew."""
    folder = tmp_path_factory.mktemp("ablation")
    rng = np.random.default_rng(1)
    content = make_content(rng.integers(3, 6, ITEMS).tolist(), seed=1, logical_dtype="float32")
    items = replace(
        content.items,
        prompts=[f"prompt {k // 3}" for k in range(ITEMS)],
        splits=["test" if k % 4 == 0 else "train" for k in range(ITEMS)],
        generators=[GENERATORS[k % 3] for k in range(ITEMS)],
        labels={"quality": rng.uniform(0, 5, ITEMS)},
    )
    hidden = make_store(folder / "hidden.agiqa", replace(content, items=items))
    stores = {
        name: sketch_store(hidden, folder / f"{name}.agiqa", basis=basis_from(hidden, rank)).store
        for name, rank in (("main", 4), ("r2", 2))
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    plan = read_grid(folder / "grid.yaml", stores=list(stores), generators=lambda: generators_of(stores["main"]))
    done = run_ablation(stores, plan, folder / "out", grid=folder / "grid.yaml", workers=1)
    assert not done.failed
    return folder / "out"


def table_of(out, protocol):
    (found,) = read_all([out])
    tables = dict(zip(found.groups(), main_tables(found), strict=True))
    table = tables["quality", protocol]
    return cells_of(table), " ".join(table.notes)


@pytest.mark.parametrize("protocol", ["published", "grouped", "leave-one-generator-out"])
def test_stores_of_the_same_items_have_one_reference(out, protocol):
    lines = [line for line in made.read_lines(out / "rows.jsonl") if line["protocol"] == protocol]
    (other,) = [line for line in lines if line["kind"] == "head" and line["against"]]
    rows, _ = table_of(out, protocol)
    assert [row["store"] for row in rows if row["tag"] == "reference"] == [other["against"]["store_name"]]
    (told,) = [row for row in rows if row["srcc_difference"] and row["tag"] != "baseline"]
    assert (told["store"], told["tag"]) == (other["store_name"], "")
    baselines = [line for line in lines if line["kind"] == "baseline" and line.get("against")]
    assert {line["store_name"] for line in baselines} == {"main", "r2"}
    (found,) = read_all([out])
    ((reference, others),) = found.references("quality", protocol)
    assert (reference.row, reference.store_name) == (other["against"]["row"], other["against"]["store_name"])
    assert [(row.row, row.store_name) for row in others] == [
        (line["row"], line["store_name"]) for line in (other, *baselines)
    ]


def test_a_head_on_another_store_is_a_rival(out):
    (found,) = read_all([out])
    told = findings(found)
    assert len(told) == 3
    tested = {
        label: "The other head does" in sentence or "The other head differs" in sentence
        for (_, label), sentence in zip(found.groups(), told, strict=True)
    }
    assert tested == {"published": True, "grouped": False, "leave-one-generator-out": True}
    assert sum("1 other head was not tested: the test needs two seeds or more" in sentence for sentence in told) == 1


def test_prompts_that_leak_are_counted_over_all_held_out_generators(out):
    (found,) = read_all([out])
    everywhere = leak(found, "leave-one-generator-out")
    assert (everywhere.items, everywhere.tested, everywhere.verbatim) == (ITEMS, ITEMS, ITEMS)
    _, notes = table_of(out, "leave-one-generator-out")
    assert f"leaks prompts: {ITEMS} of {ITEMS} test images" in notes
    assert "images of a new generator for known prompts" in notes
    assert f"{ITEMS} test images. Heads are means over 2 seeds." in notes
    assert "do not say what a further generator would change" in notes
    assert any("Leave one generator out" in sentence for sentence in METHOD)
    grouped = leak(found, "grouped")
    assert (grouped.items, grouped.tested) == (0, ITEMS)


def test_a_seed_for_each_fold_is_not_told_as_a_mean_over_seeds(out):
    _, notes = table_of(out, "grouped")
    assert "means over" not in notes
    assert "Each part of the split has a seed of its own (2 seeds in all), so there is no sd." in notes
    (found,) = read_all([out])
    assert any("only 1 seed for each test image" in note for note in limits([found]))


def test_the_bias_of_choosing_on_test_is_in_the_result_lines_and_needs_no_run_folder(out, tmp_path):
    for line in made.read_lines(out / "results.jsonl"):
        metrics = json.loads((out / "runs" / line["name"] / "metrics.json").read_text())
        assert line["paper_compatible"] == metrics["paper_compatible"]
        told = line["paper_compatible"]
        assert told["srcc"] - told["bias"]["srcc"] == pytest.approx(line["test"]["srcc"])
    whole, bare = out, shutil.copytree(out, tmp_path / "bare", ignore=shutil.ignore_patterns("runs"))
    tables = [bias_table(read_all([folder])[0]) for folder in (whole, bare)]
    assert tables[0].csv() == tables[1].csv()
    rows = cells_of(tables[1])
    assert {(row["protocol"], row["runs"]) for row in rows} == {
        ("published split", "2"),
        ("grouped by prompt", "2"),
        ("leave one generator out", "6"),
    }
    page = write_report([bare], tmp_path / "page").page.read_text()
    assert "best epoch on test beside the honest number" in page.casefold()


def test_tables_of_networks_speak_of_networks(out):
    (heads,) = read_all([out])
    networks = replace(heads, about=heads.about.model_copy(update={"kind": "networks"}))
    tables = [*main_tables(networks), *optimism_tables(networks)]
    notes = " ".join(note for table in tables for note in table.notes)
    assert "Networks are means over 2 seeds." in notes
    assert "scored by a network that saw no image of its generator" in notes
    assert re.search(r"\b[Hh]eads?\b", notes) is None


def test_one_seed_is_one_seed(results):
    (found,) = read_all([results.ranks])
    notes = " ".join(note for table in main_tables(found) for note in table.notes)
    assert "Heads are of 1 seed." in notes
    assert "1 seeds" not in " ".join([notes, *limits([found])])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"seconds": 1000.0}, "(quality, published split: runs were repeated)"),
        ({"name": "store=main,seed=2", "seed": 2}, "(quality, published split: 5 runs done, but the rows cover 4)"),
        ({"error": "no room"}, "(quality, published split: 3 runs done, but the rows cover 4)"),
    ],
    ids=["the same", "made again", "added", "lost"],
)
def test_rows_that_are_older_than_the_runs_are_told_with_what_to_do(out, tmp_path, changes, said):
    folder = shutil.copytree(out, tmp_path / "copy", ignore=shutil.ignore_patterns("runs"))
    line = next(line for line in made.read_lines(folder / "results.jsonl") if line["protocol"] == "published")
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({**line, **changes}) + "\n")
    about = json.loads((folder / "about.json").read_text())
    about["runs"].append(changes.get("name", line["name"]))  # as `agiqa ablate` of the larger grid had begun
    (folder / "about.json").write_text(json.dumps(about))
    report = write_report([folder], tmp_path / "page")
    told = [problem for problem in report.problems if "after rows.jsonl was computed" in problem]
    if said is None:
        assert told == []
        return
    (problem,) = told
    assert f"{said}: run the same `agiqa ablate` again" in problem
    assert said in report.page.read_text()
