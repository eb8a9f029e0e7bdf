"""Result lines: complete or absent, of this store and grid, and a table with their numbers."""

import json
from pathlib import Path

import pytest

from agiqa.bench.ablation.ablation import open_results, result_line
from agiqa.bench.ablation.grids import read_grid
from agiqa.bench.recording.result_folders import scores_by_label
from agiqa.errors import DataError
from agiqa.heads.sweeps.head_jobs import HeadJob, JobOutcome

STORES = {"": {"id": "s", "path": "here/set.agiqa"}}


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("grid: {encoder: [lstm, gru], seed: [0, 1, 2]}")
    return read_grid(file)


def line(run, value, **changes):
    scores = {"n": 9, "srcc": value, "plcc": value / 2}
    return {
        "name": run.name,
        "config": run.config,
        "seed": run.train.seed,
        "store": "s",
        "validation": scores,
        "test": scores,
    } | changes


def failed(run):
    job = HeadJob(run=Path(run.name), head=run.head, train=run.train)
    return result_line(run, "s", JobOutcome(job=job, status="failed", error="broken"), commit=None)


def test_lines_are_read_again_and_the_last_of_a_run_counts(tmp_path, plan):
    path = tmp_path / "results.jsonl"
    results = open_results(path, plan, stores=STORES)
    results.append(failed(plan[0]))
    assert not results.is_done(plan[0].name)
    results.append(line(plan[0], 0.5))
    results.append(failed(plan[1]))
    again = open_results(path, plan, stores=STORES)
    assert again.lines == results.lines
    assert [again.is_done(run.name) for run in plan[:3]] == [True, False, False]
    assert len(path.read_text().splitlines()) == 3


def test_errors_with_odd_ends_of_lines_are_read_again(tmp_path, plan):
    path, name = tmp_path / "results.jsonl", plan[0].name
    broken = {**line(plan[0], 0.5), "error": "one\u2028two\u0085three\nfour"}
    open_results(path, plan, stores=STORES).append(broken)
    assert open_results(path, plan, stores=STORES).lines[name]["error"] == broken["error"]


@pytest.mark.parametrize("torn", [1, 20, -1])
def test_a_line_that_was_torn_off_is_dropped(tmp_path, plan, torn):
    path = tmp_path / "results.jsonl"
    open_results(path, plan, stores=STORES).append(line(plan[0], 0.5))
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(line(plan[1], 0.5)).encode()[:torn])
    results = open_results(path, plan, stores=STORES)
    assert list(results.lines) == [plan[0].name]
    results.append(line(plan[1], 0.25))
    assert path.read_bytes().startswith(whole)
    assert list(open_results(path, plan, stores=STORES).lines) == [run.name for run in plan[:2]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"store": "other"}, "line 1: a run on the store other, and this is here/set.agiqa (s). Choose another OUT."),
        ({"config": {"width": 4}}, "had width 4, and this grid has 512"),
    ],
)
def test_lines_of_something_else_are_refused(tmp_path, plan, change, said):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line(plan[0], 0.5, **change)) + "\n")
    with pytest.raises(DataError) as caught:
        open_results(path, plan, stores=STORES)
    assert said in str(caught.value)
    assert "Choose another OUT" in str(caught.value)


def test_lines_of_runs_that_are_not_in_the_grid_are_ignored_and_kept(tmp_path, plan):
    path = tmp_path / "results.jsonl"
    other = json.dumps(line(plan[0], 0.5, name="encoder=xlstm,seed=0", store="gone")) + "\n"
    path.write_text(other * 2)
    results = open_results(path, plan, stores=STORES)
    assert (results.lines, results.ignored) == ({}, 1)
    results.append(line(plan[0], 0.5))
    assert path.read_text().startswith(other * 2)
    assert list(open_results(path, plan, stores=STORES).lines) == [plan[0].name]


def test_another_store_is_told_by_its_place_and_the_beginning_of_its_id(tmp_path, plan):
    path, old, new = tmp_path / "results.jsonl", "0123456789ab" + "c" * 52, "f" * 64
    path.write_text(json.dumps(line(plan[0], 0.5, store=old)) + "\n")
    stores = {"": {"id": new, "path": "new.agiqa"}}
    with pytest.raises(DataError, match=r"on the store 0123456789ab, and this is new\.agiqa \(f{12}\)"):
        open_results(path, plan, stores=stores)
    (tmp_path / "about.json").write_text(json.dumps({"stores": {"": {"id": old, "path": "old.agiqa"}}}))
    with pytest.raises(DataError, match=r"on the store old\.agiqa \(0123456789ab\), and this is new\.agiqa"):
        open_results(path, plan, stores=stores)


@pytest.mark.parametrize("content", [b"{}\n", b"no json\n", b"[1]\n", b"\xff\xff\n", b"3\n"])
def test_what_is_no_result_line_is_refused(tmp_path, plan, content):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"results\.jsonl.*(is no result line|is no file of result lines)"):
        open_results(path, plan, stores=STORES)
    assert path.read_bytes() == content


def test_a_head_of_several_labels_has_scores_of_each(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("base: {label: a+b}\ngrid: {encoder: [lstm]}")
    (run,) = read_grid(file)
    both = {"a": {"srcc": 0.5, "plcc": 0.4}, "b": {"srcc": 0.3, "plcc": 0.2}}
    one = line(run, 0.0, validation=both, test=both)
    assert scores_by_label(one, "test") == both


def test_lines_of_an_older_agiqa_are_of_the_defaults_that_they_lack(tmp_path, plan):
    """A setting that came later was at its default when they were made."""
    path = tmp_path / "results.jsonl"
    older = {name: value for name, value in plan[0].config.items() if name not in ("paper_compatible", "folds")}
    path.write_text(json.dumps(line(plan[0], 0.5, config=older)) + "\n")
    assert open_results(path, plan, stores=STORES).is_done(plan[0].name)


def test_an_older_agiqa_trained_lstm_and_gru_with_plain_layers(tmp_path, plan):
    """`plan` has them with the default, a norm and a residual around each layer."""
    path = tmp_path / "results.jsonl"
    older = {name: value for name, value in plan[0].config.items() if name != "residual"}
    path.write_text(json.dumps(line(plan[0], 0.5, config=older)) + "\n")
    with pytest.raises(DataError, match="had residual False, and this grid has True"):
        open_results(path, plan, stores=STORES)


def test_a_grid_is_gone_on_with_on_another_machine(tmp_path, plan):
    """Threads, device and memory differ: lines record them, but no number depends on them."""
    path = tmp_path / "results.jsonl"
    there = {**plan[0].config, "threads": 7, "device": "cuda", "memory": 1000, "keep": "memmap"}
    path.write_text(json.dumps(line(plan[0], 0.5, config=there)) + "\n")
    assert open_results(path, plan, stores=STORES).is_done(plan[0].name)
