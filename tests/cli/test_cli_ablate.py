"""`agiqa ablate` by real processes: results, resumption after kills and Ctrl-C, failures, and files of something else."""

import csv
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import yaml

from agiqa.commands.output import failures
from agiqa.store import open_store
from agiqa.store.disk.files import FOLDER_LOCK
from agiqa.store.disk.locks import exclusive_lock
from tests.cli.refusals import refuse
from tests.store.conftest import make_content
from tests.store.conftest import make_store as write_store

BASE = {
    "projection": "hidden",
    "width": 8,
    "split": "grouped",
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.01,
    "device": "cpu",
}
GRID = {"encoder": ["gru", "none"], "seed": [0, 1]}


def stored(folder, seed):
    random = np.random.default_rng(seed)
    content = make_content(random.integers(30, 60, 60).tolist(), seed=seed)
    labels = {"quality": random.uniform(0, 5, 60), "alignment": random.uniform(0, 5, 60)}
    return write_store(folder / f"{seed}.agiqa", replace(content, items=replace(content.items, labels=labels))).path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("ablate"), 5)


@pytest.fixture
def ablate(tmp_path, store):
    """Arguments of a sweep into tmp_path/out with the given sections of a grid."""

    def arguments(*options, at=None, **sections):
        file = tmp_path / "grid.yaml"
        file.write_text(yaml.safe_dump({"base": BASE, "grid": GRID, **sections}, sort_keys=False))
        return ("ablate", at or store, tmp_path / "out", "--grid", file, *options)

    return arguments


def lines_of(out):
    """The result lines by name, without what the clock says."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {
        line["name"]: {key: value for key, value in line.items() if key not in ("seconds", "trained_at")}
        for line in lines
    }


def test_a_grid_is_trained_and_summed_up(agiqa, ablate, store, tmp_path):
    runs = [{"encoder": "none", "label": "alignment", "name": "aligned"}]
    done = agiqa(*ablate("--train-workers", 1, "--json", runs=runs))
    names = ["encoder=gru,seed=0", "encoder=gru,seed=1", "encoder=none,seed=0", "encoder=none,seed=1", "aligned"]
    assert (done.json["runs"], done.json["trained"], done.json["failed"]) == (5, 5, [])
    lines = lines_of(tmp_path / "out")
    assert list(lines) == names
    assert sorted(path.name for path in (tmp_path / "out" / "runs").iterdir()) == sorted(names)
    for name, line in lines.items():
        run = tmp_path / "out" / "runs" / name
        config, metrics = (json.loads((run / f"{file}.json").read_text()) for file in ("config", "metrics"))
        assert line["config"] == {**config["head"], **config["train"]}
        assert (line["store"], line["kernels"]) == (config["features"]["store"], config["kernels"])
        assert (line["validation"], line["test"]) == (metrics["validation"], metrics["test"])
        assert line["config"]["threads"] == 1
    heads = [row for row in done.json["table"] if row["kind"] == "head"]
    values = [lines[name]["test"]["srcc"] for name in names[:2]]
    assert heads[0]["test"]["srcc"] == pytest.approx(np.mean(values))
    assert heads[0]["test"]["sd"]["srcc"] == pytest.approx(np.std(values, ddof=1))
    assert [row["row"] for row in heads] == ["encoder=gru", "encoder=none", "aligned"]
    written = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert written == done.json["table"]
    baselines = {(row["settings"]["baseline"], row["label"]) for row in written if row["kind"] == "baseline"}
    assert {("features", "quality"), ("features", "alignment"), ("text", "quality")} <= baselines
    told = [line for line in done.err.splitlines() if line.startswith("[")]
    assert [line.split(":")[0] for line in told] == [f"[{k}/5] {name}" for k, name in enumerate(names, 1)]
    assert all(line.endswith(" left") and "validation SRCC" in line for line in told)

    single = [
        word
        for key, value in {**BASE, "encoder": "gru", "seed": 1, "threads": 1}.items()
        for word in (f"--{key.replace('_', '-')}", value)
    ]
    assert agiqa("train", store, tmp_path / "single", *single).code == 0
    for name in ("head.safetensors", "predictions.csv", "config.json"):
        assert (tmp_path / "single" / name).read_bytes() == (tmp_path / "out" / "runs" / names[1] / name).read_bytes()

    again = agiqa(*ablate("--train-workers", 1, runs=runs))
    assert again.code == 0
    assert "5 of 5 runs exist already" in again.err
    assert again.out.startswith("| run | label | seeds |"), again.out
    assert lines_of(tmp_path / "out") == lines


LONG = {"base": {**BASE, "save_seconds": 0, "epochs": 20, "encoder": "gru"}, "grid": {"seed": [0, 1]}}


@pytest.fixture(scope="module")
def undisturbed(agiqa, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "grid.yaml").write_text(yaml.safe_dump(LONG))
    assert agiqa("ablate", store, folder / "out", "--grid", folder / "grid.yaml", "--train-workers", 1).code == 0
    return lines_of(folder / "out")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["kill", "Ctrl-C", "as a cluster stops jobs"],
)
def test_a_sweep_that_is_broken_off_goes_on_at_once(agiqa, ablate, undisturbed, tmp_path, number, code):
    """Workers train when the program ends, and it is run again before anything else happens."""
    out = tmp_path / "out"
    states = [out / "runs" / f".seed={seed}.state" / "state.ckpt" for seed in range(2)]
    broken = agiqa.interrupted(
        *ablate("--train-workers", 2, **LONG), when=lambda: any(state.exists() for state in states), number=number
    )
    assert broken.code == code
    if number != signal.SIGKILL:
        assert "run the same command again" in broken.err
        assert "Traceback" not in broken.err
    assert any(state.exists() for state in states)
    with (out / "results.jsonl").open("a") as file:
        file.write('{"name": "seed')
    assert agiqa(*ablate("--train-workers", 1, **LONG)).code == 0
    assert lines_of(out) == undisturbed
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["seed=0", "seed=1"]


def test_runs_that_fail_are_kept_with_their_error_and_tried_again(agiqa, ablate, tmp_path):
    taken = tmp_path / "out" / "runs" / "encoder=none,seed=1"
    taken.mkdir(parents=True)
    (taken / "letter.txt").write_text("mine")
    sections = {"runs": [{"encoder": "transformer", "lr": 1e30}]}
    failed = agiqa(*ablate("--train-workers", 1, "--json", **sections))
    assert failed.code == 1
    assert json.loads(failed.out)["trained"] == 3
    assert "error: 2 of 5 runs failed; run the same command again to retry:" in failed.err
    assert "  encoder=transformer,lr=1e+30: " in failed.err
    assert "Traceback" not in failed.err
    lines = lines_of(tmp_path / "out")
    assert "letter" not in lines["encoder=none,seed=1"]["error"]
    assert "is no run folder" in lines["encoder=none,seed=1"]["error"]
    (taken / "letter.txt").unlink()
    again = agiqa(*ablate("--train-workers", 1, **sections))
    assert again.code == 1
    assert "1 of 5 runs failed" in again.err
    assert "3 of 5 runs exist already" in again.err
    with (taken / "predictions.csv").open(newline="") as file:
        assert next(csv.DictReader(file))
    assert lines_of(tmp_path / "out")["encoder=none,seed=1"]["validation"]["n"] > 0


def test_many_failures_with_one_error_are_one_line():
    failed = {"a": "no room\nand more", "b": "no label", "c": "no room", "d": "no room", "e": ""}
    assert failures(failed).splitlines() == ["  a and 2 more: no room", "  b: no label", "  e: no reason was recorded"]


def test_what_no_run_can_be_trained_on_is_one_message(agiqa, ablate, tmp_path):
    refuse(agiqa(*ablate(base={**BASE, "label": "beauty"})), "No label of", "a run of this grid; nothing was trained")
    refuse(agiqa(*ablate(base={**BASE, "projection": "sketch"})), "Make a sketch of hidden states", "first of 4 runs")
    base = {name: value for name, value in BASE.items() if name != "split"}
    folds = [{"grouped": {"folds": 100}}]
    told = agiqa(*ablate("--json", base=base, protocols=folds))
    refuse(told, "100 folds need as many different prompts", "the first of 400 runs")
    assert (told.out, told.err.count("folds need")) == ("", 1)
    told = agiqa(*ablate("--json", base=base, protocols=["published", *folds]))
    refuse(told, "100 folds need as many", "the first of 400 runs of the protocol grouped", "or leave it out")
    assert told.err.count("folds need") == 1
    assert not (tmp_path / "out").exists()


def test_results_of_something_else_are_refused(agiqa, ablate, store, tmp_path):
    small = {"grid": {"seed": [0, 1]}, "base": {**BASE, "encoder": "none"}}
    assert agiqa(*ablate("--train-workers", 1, **small)).code == 0
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    other = tmp_path / "sketch.agiqa"
    assert agiqa("store", "sketch", store, other, "--rank", 4).code == 0
    refuse(
        agiqa(*ablate(at=other, **small)),
        "results.jsonl, line 1: a run on the store",
        f"{store} (",
        f"{other} (",
        "Choose another OUT",
    )
    refuse(agiqa(*ablate(at=stored(tmp_path, 6), **small)), "seed=0 holds another training", "labels of train are not")
    changed = {**small, "base": {**small["base"], "width": 4}}
    refuse(agiqa(*ablate(**changed)), "had width 8, and this grid has 4")
    with exclusive_lock(tmp_path / "out" / FOLDER_LOCK) as held:
        assert held
        refuse(agiqa(*ablate(**small)), "Another ablation is at work", tmp_path / "out")
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    more = {**small, "grid": {"seed": [0, 1, 2]}}
    assert agiqa(*ablate("--train-workers", 1, "--json", **more)).json["trained"] == 1


NAMES = [
    ({"encoder": "grru"}, "No encoder is called 'grru'. Did you mean 'gru'?"),
    ({"pooling": "maxx"}, "No pooling is called 'maxx'. Did you mean 'max'?"),
    ({"pooling": "mean@answr"}, "'answr'"),
    ({"projection": "hiden"}, "Did you mean 'hidden'?"),
    ({"loss": "mse+plc"}, "No loss is called 'plc'. Did you mean 'plcc'?"),
    ({"label": "qualty"}, "Did you mean 'quality'?"),
]


@pytest.mark.parametrize(("wrong", "said"), NAMES, ids=[str(wrong) for wrong, _ in NAMES])
def test_every_name_of_a_grid_is_checked_before_anything_is_trained(agiqa, ablate, tmp_path, wrong, said):
    refuse(agiqa(*ablate("--train-workers", 1, runs=[{"encoder": "lstm"}, wrong])), said)
    assert not (tmp_path / "out").exists()


def test_a_grid_that_lost_runs_goes_on_without_them(agiqa, ablate, tmp_path):
    """Their lines stay in the file, and neither rows nor the report count them."""
    first = {"grid": {"seed": [0, 1]}, "base": {**BASE, "encoder": "none"}, "runs": [{"encoder": "gru", "seed": 7}]}
    assert agiqa(*ablate("--train-workers", 1, **first)).code == 0
    del first["runs"]
    again = agiqa(*ablate("--train-workers", 1, "--json", **{**first, "base": {**BASE, "encoder": "none"}}))
    assert again.json["trained"] == 0
    assert "results.jsonl also has 1 results that this command does not plan; they are ignored" in again.err
    assert len(lines_of(tmp_path / "out")) == 3
    assert {row["row"] for row in again.json["table"] if row["kind"] == "head"} == {"base"}
    reported = agiqa("report", tmp_path / "out", "--json")
    assert reported.code == 0, reported.err
    assert "was computed" not in (tmp_path / "out" / "report" / "report.md").read_text()


def test_the_closed_form_reads_the_store_that_is_named_for_it(agiqa, ablate, store, tmp_path):
    sketch, grid = tmp_path / "sketch.agiqa", {"base": {**BASE, "projection": "sketch"}, "grid": {"encoder": ["none"]}}
    assert agiqa("store", "sketch", store, sketch, "--rank", 4).code == 0
    done = agiqa(*ablate("--train-workers", 1, "--json", "--baseline-store", store, at=sketch, **grid))
    (row,) = [row for row in done.json["table"] if row["settings"].get("baseline") == "features"]
    assert "(hidden states, mean of " in row["row"]
    assert row["features_store"] == open_store(store).id != row["store"]


def test_stores_that_a_grid_compares_must_be_given(agiqa, store, tmp_path):
    said = "This grid compares the stores main, one, two, three: STORE is main, give the others by --store NAME=STORE."
    refuse(agiqa("ablate", store, tmp_path / "out", "--grid", "table-iii-stores"), said)
    idle = agiqa("ablate", store, tmp_path / "out", "--grid", "heads", "--store", f"r16={store}")
    refuse(idle, "No run of this grid uses the store 'r16' given by --store")
    assert not (tmp_path / "out").exists()


def test_grids_that_cannot_be_run_are_refused_before_anything_is_written(agiqa, ablate, store, tmp_path):
    refuse(agiqa(*ablate(grid={})), "grid.yaml", "nothing to run")
    refuse(agiqa(*ablate(grid={"sead": [1]})), "grid.yaml", "Did you mean 'seed'")
    refuse(agiqa(*ablate(grid={"keep": ["ram", "memmap"]})), "`keep` must be the same")
    assert agiqa("ablate", store, tmp_path / "out").code == 2
    assert agiqa(*ablate("--train-workers", 0)).code == 2
    assert not (tmp_path / "out" / "results.jsonl").exists()
