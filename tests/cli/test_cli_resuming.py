"""`agiqa train`, killed for real at several moments and run again: the numbers are those of an uninterrupted run."""

import csv
import json
import signal
from functools import partial

import pytest

from tests.cli.conftest import SMALL_HEAD
from tests.cli.refusals import misuse
from tests.command_line import in_time

EVERY_EPOCH = ("--epochs", 8, "--refit", "--ema", 0.9, "--token-dropout", 0.2, "--validation", 0.3, "--save-seconds", 0)


def train(example, run, *options):
    return ("train", example.store, run, *SMALL_HEAD, *EVERY_EPOCH, *options)


def numbers(run):
    """Everything that a run folder says, but for the time that it took and the memory that was free."""
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["seconds"], metrics["trained_at"], metrics["features"]
    with (run / "curves.csv").open(newline="") as file:
        curves = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    files = [(run / name).read_bytes() for name in ("head.safetensors", "predictions.csv", "config.json", "parts.json")]
    return files, curves, metrics


@pytest.fixture(scope="module")
def undisturbed(agiqa, example, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert agiqa(*train(example, run)).code == 0
    return numbers(run)


class Saves:
    """True once the state of a run was saved so often."""

    def __init__(self, run, count):
        self._path = run.with_name(f".{run.name}.state") / "state.ckpt"
        self._count = count
        self._seen = set()

    def __call__(self):
        if self._path.exists():
            self._seen.add(self._path.stat().st_mtime_ns)
        return len(self._seen) >= self._count


@pytest.mark.parametrize(
    ("saves", "delay"), [((1,), 0.0), ((3, 3), 0.01), ((9,), 0.002)], ids=["1", "3 and 3", "refit"]
)
def test_killed_and_run_again(agiqa, example, undisturbed, tmp_path, saves, delay):
    run = tmp_path / "run"
    for count in saves:
        kill = partial(agiqa.killed, *train(example, run), delay=delay)
        assert in_time(lambda kill=kill, count=count: kill(when=Saves(run, count)), run).code == -9
        assert not run.exists()
    last = agiqa(*train(example, run))
    assert "going on after epoch" in last.err
    assert "epoch 1/" not in last.err.split("refit:")[0]
    assert numbers(run) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "as a cluster stops jobs"]
)
def test_stopped_and_run_again(agiqa, example, undisturbed, tmp_path, number, code):
    run = tmp_path / "run"
    stop = partial(agiqa.interrupted, *train(example, run), number=number)
    outcome = in_time(lambda: stop(when=Saves(run, 2)), run)
    assert outcome.code == code
    assert "Traceback" not in outcome.err
    assert f"kept in {tmp_path / '.run.state'}: the same command resumes" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == [".run.state"]
    assert "going on after epoch" in agiqa(*train(example, run)).err
    assert numbers(run) == undisturbed


def test_ctrl_c_before_anything_was_saved_leaves_nothing(agiqa, example, tmp_path):
    arguments = train(example, tmp_path / "run", "--save-seconds", 1000, "--epochs", 100000)
    outcome = agiqa.interrupted(*arguments, after="epoch 1/")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert "no epoch was kept: the first is saved after 1000 s" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_refused_until_restarted(agiqa, example, undisturbed, tmp_path):
    run = tmp_path / "run"
    kill = partial(agiqa.killed, *train(example, run, "--seed", 3))
    assert in_time(lambda: kill(when=Saves(run, 2)), run).code == -9
    refused = agiqa(*train(example, run))
    assert refused.code == 1
    assert refused.out == ""
    for mention in ("another, interrupted training", "seed: kept 3, asked for 0", "--restart"):
        assert mention in refused.err
    afresh = agiqa(*train(example, run, "--restart"))
    assert "going on" not in afresh.err
    assert numbers(run) == undisturbed


def test_presets_and_event_files(agiqa, example, tmp_path):
    arguments = ("train", example.store, tmp_path / "run", "--encoder", "gru", "--width", 8, "--device", "cpu")
    outcome = agiqa(*arguments, "--preset", "published", "--epochs", 1, "--tensorboard", "--json")
    assert outcome.json["epochs_run"] == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["preset"] == "published"
    assert (config["head"]["width"], config["head"]["layers"], config["head"]["pooling"]) == (8, 2, "first-last-mean")
    assert (config["train"]["batch_size"], config["train"]["seed"]) == (1, 42)
    assert list((tmp_path / "run" / "tensorboard" / "train").glob("events.out.tfevents.*"))
    refused = agiqa(*arguments[:2], tmp_path / "other", "--preset", "papr")
    misuse(refused, "Did you mean 'paper'?")
