"""`agiqa runs` and `agiqa report` on single trainings, by real processes; tables on a real terminal."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
import torch

from agiqa.commands.report import COLUMNS
from agiqa.commands.runs import SORTS
from agiqa.heads import load_run, train_head
from tests.bench.report import made
from tests.bench.report.conftest import BASE, stored
from tests.cli.refusals import misuse, refuse

GIVEN = {"gru-0": ("gru", 0), "gru-1": ("gru", 1), "none-0": ("none", 0), "none-1": ("none", 1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder `runs` with four trainings: two encoders, two seeds."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    store = stored(folder.parent / "faces.agiqa", "faces", 3)
    before = torch.get_num_threads()
    for name, (encoder, seed) in GIVEN.items():
        head, train = made.configs({**BASE, "encoder": encoder, "seed": seed, "split": "published"})
        train_head(store, folder / name, head=head, train=train)
    torch.set_num_threads(before)
    return folder


def test_names_that_the_help_lists_are_those_of_the_code():
    from agiqa.bench.recording.trained_runs import SORTS as KNOWN
    from agiqa.bench.report.tables import SWITCHES

    assert tuple(SWITCHES) == COLUMNS
    assert KNOWN == SORTS


def test_runs_are_listed_with_what_differs_and_their_scores(agiqa, runs):
    told = agiqa("runs", runs, "--json").json
    assert told["settings_that_differ"] == ["encoder"]
    assert told["problems"] == []
    assert "paired" not in told
    listed = {one["run"].rpartition("/")[2]: one for one in told["runs"]}
    assert listed.keys() == GIVEN.keys()
    for name, (encoder, seed) in GIVEN.items():
        run, one = load_run(runs / name), listed[name]
        assert (one["settings"]["encoder"], one["settings"]["seed"]) == (encoder, seed)
        assert (one["test"], one["validation"]) == (run.metrics["test"], run.metrics["validation"])
        assert (one["location"], one["store"]) == (str(runs.parent / "faces.agiqa"), run.store_id)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", one["trained_at"])
    text = agiqa("runs", runs).out
    assert text.startswith("| run | settings that differ | seed | test SRCC | test PLCC |")
    low, high = listed["gru-0"]["test"]["ci"]["srcc"]
    assert f"| encoder=gru | 0 | {listed['gru-0']['test']['srcc']:.4f} [{low:.3f}, {high:.3f}] |" in text
    assert text.count("| faces.agiqa |") == len(GIVEN)


@pytest.mark.parametrize("sort", SORTS)
def test_the_order_is_the_one_asked_for(agiqa, runs, sort):
    found = agiqa("runs", runs, "--sort", sort, "--json").json["runs"]
    values = {
        "name": lambda one: one["run"],
        "date": lambda one: one["trained_at"],
        "rmse": lambda one: one["test"]["rmse"],
        "validation": lambda one: -one["validation"]["srcc"],
    }
    values = [values.get(sort, lambda one: -one["test"][sort])(one) for one in found]
    assert values == sorted(values)


def test_runs_are_tested_in_pairs_over_seeds_and_prompts(agiqa, runs):
    told = agiqa("runs", runs / "gru-0", runs / "gru-1", runs / "none-0", runs / "none-1", "--paired", "--json").json
    rows = {row["row"]: row for row in told["paired"]}
    assert rows.keys() == {"encoder=gru", "encoder=none"}
    (other,) = [row for row in rows.values() if row["against"]]
    assert other["against"]["seeds"] == [2, 2]
    best = rows[other["against"]["row"]]
    assert other["against"]["difference"]["srcc"] == pytest.approx(other["test"]["srcc"] - best["test"]["srcc"])
    alone = agiqa("runs", runs / "gru-0", runs / "gru-1", "--paired").out
    assert "Nothing was compared" in alone


def test_only_runs_of_different_test_images_are_said_not_to_compare(agiqa, runs, tmp_path):
    """Two stores of the same images have the same test part."""
    store = stored(tmp_path / "other.agiqa", "faces", 4)
    before = torch.get_num_threads()
    for split in ("published", "grouped"):
        head, train = made.configs({**BASE, "encoder": "none", "split": split})
        train_head(store, tmp_path / f"a|b {split}", head=head, train=train)
    torch.set_num_threads(before)
    alike = agiqa("runs", runs, tmp_path / "a|b published").out
    assert "different test parts" not in alike
    assert rf"| {tmp_path}/a\|b published |" in alike
    assert "2 different test parts" in agiqa("runs", runs, tmp_path).out


def test_runs_of_older_versions_are_compared_and_damaged_ones_named(agiqa, runs, tmp_path):
    copies = {name: shutil.copytree(runs / name, tmp_path / name) for name in GIVEN}
    config, metrics = (json.loads((copies["gru-0"] / name).read_text()) for name in ("config.json", "metrics.json"))
    older = {name: config[name] for name in ("format", "version", "head", "train", "features")}
    (copies["gru-0"] / "config.json").write_text(json.dumps(older))
    for name in ("trained_at", "chosen_by"):
        del metrics[name]
    (copies["gru-0"] / "metrics.json").write_text(json.dumps(metrics))
    del metrics["test"]
    (copies["none-0"] / "metrics.json").write_text(json.dumps(metrics))
    told = agiqa("runs", tmp_path, "--paired", "--json").json
    assert [problem.split(" is in no table: ")[0] for problem in told["problems"]] == [str(copies["none-0"])]
    assert "'test'" in told["problems"][0]
    assert sorted(row["seeds"] for row in told["paired"]) == [1, 2]
    assert agiqa("report", tmp_path, "--json").json["problems"] == told["problems"]


def test_what_cannot_be_listed_is_refused(agiqa, runs, tmp_path):
    refuse(agiqa("runs", tmp_path), "No run of `agiqa train` is in", tmp_path)
    refuse(agiqa("runs", runs, "--label", "qualty"), "'qualty'", "Did you mean 'quality'?")
    misuse(agiqa("runs", runs, "--sort", "scc"), "scc", "srcc")
    misuse(agiqa("runs", tmp_path / "nowhere"), "nowhere")


def test_single_runs_are_reported_together_and_again(agiqa, runs):
    given = [runs / name for name in GIVEN]
    for again in range(3):
        told = agiqa("report", *([runs] if again == 2 else given), *([runs / "report"] * (again == 1)), "--json").json
        assert told["page"] == str(runs / "report" / "index.html")
        assert told["problems"] == []
    page = (runs / "report" / "index.html").read_text(encoding="utf-8")
    document = (runs / "report" / "report.md").read_text(encoding="utf-8")
    assert "<h1>runs</h1>" in page
    assert "Data: faces.agiqa." in document
    assert "- Compared: 2 heads" in document
    assert {"quality-published.csv", "by-generator-quality-published.csv"} <= {
        path.name for path in (runs / "report" / "tables").iterdir()
    }
    assert any("scatter-quality-published" in path for path in told["pictures"])


def on_terminal(width, *arguments):
    """What a command writes to a terminal of `width` columns, without its colours."""
    own, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "agiqa", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=subprocess.PIPE, env={**environment, "TERM": "xterm"}
    )
    os.close(its)
    text = b""
    while True:
        try:
            more = os.read(own, 65536)
        except OSError:  # Linux ends a terminal so
            break
        if not more:
            break
        text += more
    os.close(own)
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, errors
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode()).replace("\r\n", "\n")


def test_tables_on_a_terminal_fit_it_and_never_break_a_number(agiqa, runs):
    """Other widths: test_terminal_tables.py."""
    text = on_terminal(90, "runs", runs)
    assert "|" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 90
    for one in agiqa("runs", runs, "--json").json["runs"]:
        for metric in ("srcc", "plcc", "krcc", "rmse"):
            assert re.search(rf"(?<![\d.]){one['test'][metric]:.4f}(?!\d)", text)
        low, high = one["test"]["ci"]["srcc"]
        assert f"[{low:.3f}, {high:.3f}]" in text
        assert one["trained_at"][:10] in text
    assert text.count("test SRCC") == 1
