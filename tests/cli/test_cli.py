"""The command line as its users and their scripts see it: help, options, config files, JSON and exit codes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from agiqa.cli import keep_interrupts
from tests.cli.conftest import ITEMS, SMALL_HEAD
from tests.extract.small_sets import read_table, write_set, write_talks


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("extrat",), "'extract'"),
        (("store", "verfy"), "'verify'"),
        (("extract", "--prepare-wrkers", "2"), "'--prepare-workers'"),
        (("train", "--gradient-clp", "1"), "'--gradient-clip'"),
    ],
)
def test_unknown_commands_and_options_answer_with_the_nearest(agiqa, arguments, nearest):
    outcome = agiqa(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert f"Did you mean {nearest}" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("extract", "DATA", "NEW", "--model", "MODEL", "--variant", "fulll"), "full"),
        (("extract", "DATA", "NEW", "--model", "MODEL", "--aspect", "qualty"), "quality"),
        (("extract", "DATA", "NEW", "--model", "MODEL", "--dtype", "bfloat61"), "bfloat16"),
        (("store", "verify", "STORE", "--level", "ful"), "full"),
        (("train", "STORE", "NEW", "--encoder", "xlsmt"), "xlstm"),
        (("train", "STORE", "NEW", "--projection", "vocabluary"), "vocabulary"),
        (("train", "STORE", "NEW", "--pooling", "maen"), "mean"),
        (("train", "STORE", "NEW", "--loss", "msee"), "mse"),
        (("train", "STORE", "NEW", "--label", "qualiti"), "quality"),
        (("evaluate", "RUN", "STORE", "--on", "tset"), "test"),
    ],
)
def test_unknown_names_answer_with_the_nearest(agiqa, example, tmp_path, arguments, nearest):
    paths = {
        "DATA": example.data,
        "NEW": tmp_path / "new",
        "MODEL": example.model,
        "STORE": example.store,
        "RUN": example.run,
    }
    outcome = agiqa(*(paths.get(argument, argument) for argument in arguments))
    assert outcome.code == (1 if "--label" in arguments else 2), outcome.err  # the store tells which labels there are
    assert f"Did you mean {nearest!r}?" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract", "DATA", "NEW"),
        ("extract", "/no/such/folder", "NEW", "--model", "m"),
        ("extract", "DATA", "NEW", "--model", "m", "--part", "3/2"),
        ("extract", "DATA", "NEW", "--model", "m", "--batch-size", "0"),
        ("evaluate", "RUN", "STORE", "--device", "tpu"),
        ("predict", "RUN", "STORE"),
        ("store", "info", "/no/such/store"),
    ],
)
def test_wrong_usage_exits_2(agiqa, example, tmp_path, arguments):
    paths = {"DATA": example.data, "NEW": tmp_path / "new", "STORE": example.store, "RUN": example.run}
    outcome = agiqa(*(paths.get(argument, argument) for argument in arguments))
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Error: " in outcome.err
    assert not (tmp_path / "new").exists()


def test_extract_prints_one_object(example):
    printed = example.printed["extract"]
    assert printed["state"] == "complete"
    assert (printed["items"], printed["truncated"], printed["skipped"]) == (ITEMS, 0, [])
    assert printed["filled"]["items"] == ITEMS
    assert printed["tokens"] == example.printed["info"]["tokens"] > 0


def test_store_commands_print_one_object(example):
    info, sketch = example.printed["info"], example.printed["sketch"]
    assert info["splits"] == {"train": 30, "test": 10}
    assert info["labels"] == {"quality": ITEMS}
    assert info["provenance"]["model"]["name"] == example.model.name
    assert example.printed["verify"]["sound"] is True
    assert example.printed["verify"]["probe_error"] < 1e-3
    assert example.printed["seal"]["state"] == "complete"
    assert 0.9 < sketch["energy_kept"] <= 1.0
    assert sketch["logit_error"] == pytest.approx((1.0 - sketch["energy_kept"]) ** 0.5, abs=0.1)


def test_train_and_evaluate_print_the_metrics_of_the_run(example):
    trained, scores = example.printed["train"], example.printed["evaluate"]
    stored = json.loads((example.run / "metrics.json").read_text())
    assert {name: value for name, value in trained.items() if name != "run"} == stored
    assert scores["n"] == 10
    for metric in ("srcc", "plcc", "krcc", "rmse"):
        assert scores[metric] == pytest.approx(stored["test"][metric])
    low, high = scores["ci"]["srcc"]
    assert -1.0 <= low <= scores["srcc"] <= high <= 1.0
    assert sum("10 of 10 test items have a prompt that also occurs" in line for line in stored["warnings"]) == 1


def test_predict_writes_a_score_per_item(example):
    with example.predictions.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = read_table(example.data)
    assert [(row["name"], row["prompt"]) for row in rows] == [(row["name"], row["prompt"]) for row in table]
    told = {"out": str(example.predictions), "items": ITEMS, "mos_ranges": {"quality": [0.0, 5.0]}}
    assert example.printed["predict"] == told
    with (example.run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        told = {row["name"]: float(row["predicted"]) for row in csv.DictReader(file)}
    again = {row["name"]: float(row["predicted"]) for row in rows}
    assert {name: again[name] for name in told} == pytest.approx(told, abs=1e-4)


def test_without_json_people_get_lines(agiqa, example):
    shown = agiqa("evaluate", example.run, example.store)
    assert shown.code == 0
    assert shown.out.startswith("test ")
    assert f"SRCC {example.printed['evaluate']['srcc']:.4f}" in shown.out
    info = agiqa("store", "info", example.store).out
    assert f"model               {example.model.name}" in info
    assert "variant             id\naspect              quality" in info
    assert agiqa("store", "verify", example.store).out.endswith("sound\n")


def test_verbose_shows_where_an_error_was_raised(agiqa, example, tmp_path):
    arguments = ("train", example.store, tmp_path / "run", "--label", "nothing")
    assert "Traceback" not in agiqa(*arguments).err
    assert "Traceback" in agiqa(*arguments, "-v").err


def test_an_unfinished_store_verifies_with_exit_1_and_still_one_object(agiqa, example, tmp_path):
    store = tmp_path / "s.agiqa"
    assert agiqa(*example.extract(store, "--part", "1/2", "--json")).json["state"] == "unfinished"
    outcome = agiqa("store", "verify", store, "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["missing_units"]
    assert agiqa("store", "seal", store).code == 1


def test_a_config_file_gives_values_and_options_beat_it(agiqa, example, tmp_path):
    config = tmp_path / "extract.yaml"
    values = {
        "model": str(example.model),
        "conversations": str(example.talks),
        "variant": "full",
        "max_tokens": 300,
        "batch-size": 3,
        "mos-range": [0, 5],
        "part": "1/2",
    }
    config.write_text(yaml.safe_dump(values))
    store = tmp_path / "s.agiqa"
    arguments = ("extract", example.data, store, "--options", config)
    assert agiqa(*arguments, "--max-tokens", 400, "--json").json["state"] == "unfinished"
    provenance = agiqa("store", "info", store, "--json").json["provenance"]
    assert provenance["conversation"]["variant"] == "full"
    assert provenance["tokens"]["max_tokens"] == 400
    before = agiqa("extract", "--options", config, example.data, tmp_path / "t.agiqa", "--variant", "id", "--json")
    assert before.json["state"] == "unfinished"
    assert agiqa("store", "info", tmp_path / "t.agiqa", "--json").json["provenance"]["conversation"]["variant"] == "id"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-tokns: 3\n", "Did you mean 'max-tokens'?"),
        ("- model\n", "expected `option: value` lines, found a list"),
        ("model: [\n", "cannot be read as YAML"),
    ],
)
def test_config_files_that_say_nothing_known_are_refused(agiqa, example, tmp_path, text, message):
    config = tmp_path / "wrong.yaml"
    config.write_text(text)
    outcome = agiqa(*example.extract(tmp_path / "s.agiqa", "--options", config))
    assert outcome.code == 1
    assert message in outcome.err
    assert str(config) in outcome.err
    assert not (tmp_path / "s.agiqa").exists()


def test_a_config_line_without_a_value_leaves_the_default(agiqa, texts, tiny_text_checkpoint, tmp_path):
    config, store = tmp_path / "empty.yaml", tmp_path / "s.agiqa"
    config.write_text("variant:\npart:\nadapter:\nmos-range:\nprepare-workers:\ndtype: null\n")
    options = (
        "--conversations",
        write_talks(texts),
        "--model",
        tiny_text_checkpoint,
        "--device",
        "cpu",
        "--options",
        config,
    )
    assert agiqa("extract", texts, store, *options, "--json").json["state"] == "complete"
    assert agiqa("store", "info", store, "--json").json["provenance"]["conversation"]["variant"] == "id"


def test_train_options_and_config_reach_the_run(agiqa, example, tmp_path):
    config = tmp_path / "head.yaml"
    config.write_text(
        yaml.safe_dump({"head": {"width": 16, "pooling": "last"}, "train": {"epochs": 1, "lr": 0.01, "patience": None}})
    )
    arguments = ("train", example.store, tmp_path / "run", "--config", config, *SMALL_HEAD)
    further = (
        "--split",
        "grouped",
        "--no-standardise",
        "--bidirectional",
        "--validation",
        0.25,
        "--seed",
        3,
        "--refit",
    )
    metrics = agiqa(*arguments, *further, "--json").json
    said = json.loads((tmp_path / "run" / "config.json").read_text())
    head, train = said["head"], said["train"]
    assert (head["width"], head["pooling"], head["encoder"]) == (8, "last", "gru")
    assert (head["standardise"], head["bidirectional"]) == (False, True)
    assert (train["epochs"], train["lr"], train["split"], train["seed"]) == (2, 0.01, "grouped", 3)
    assert (train["validation"], train["refit"]) == (0.25, True)
    assert metrics["split"]["leak"]["test_items_with_a_training_prompt"] == 0
    config.write_text("head: {widht: 3}\n")
    outcome = agiqa("train", example.store, tmp_path / "other", "--config", config)
    assert outcome.code == 1
    assert "Did you mean 'width'?" in outcome.err
    assert str(config) in outcome.err


def test_a_head_for_an_aspect_that_the_conversations_do_not_ask_for_is_warned_of(agiqa, example, tmp_path):
    store = tmp_path / "s.agiqa"
    options = ("--model", example.model, "--variant", "no_id", "--aspect", "authenticity")
    told = agiqa("extract", example.data, store, *options).err
    assert "reads no images; these features are of the text alone, the same for all images of one prompt" in told
    outcome = agiqa("train", store, tmp_path / "run", *SMALL_HEAD, "--json")
    assert outcome.code == 0, outcome.err
    assert "ask for authenticity, and the head learns quality" in outcome.err


def test_ctrl_c_is_not_lost_in_a_finalizer(monkeypatch):
    """Python drops exceptions there, and HDF5 spends much of its time in finalizers."""

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", keep_interrupts)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        Finalized()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_a_library_turns_into_an_error_is_one(number, code):
    """As torch does when it comes while a tensor is read from a file: `could not determine the shape of ...`."""
    program = f"""
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from agiqa import cli
def turn_into_an_error(**_):
    try:
        os.kill(os.getpid(), {int(number)})
        while True: pass
    except KeyboardInterrupt:
        raise ValueError('could not determine the shape') from None
cli.cli.main = turn_into_an_error
cli.main(['demo'])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    told = "interrupted; finished work is kept: run the same command again to resume\n"
    assert (done.returncode, done.stdout, done.stderr) == (code, "", told)


@pytest.fixture(scope="module")
def long_set(tmp_path_factory):
    """Half a minute of work in batches of one, of which no test waits for the end."""
    folder = write_set(tmp_path_factory.mktemp("long") / "set", 4500)
    write_talks(folder)
    return folder


@pytest.mark.parametrize("delay", [0.5, 4.0])
def test_ctrl_c_while_workers_start_is_told_in_one_line(agiqa, long_set, example, tmp_path, delay):
    """The workers start beside the plan and the fill, which do not wait for them."""
    first: list[float] = []

    def a_moment_later():
        first.append(time.monotonic())
        return first[-1] - first[0] >= delay

    talks, options = long_set / "talks.json", ("--batch-size", 1, "--device", "cpu", "--prepare-workers", 2)
    arguments = ("extract", long_set, tmp_path / "s.agiqa", "--model", example.model, "--conversations", talks)
    outcome = agiqa.interrupted(*arguments, *options, after="reads no images", when=a_moment_later)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    told = outcome.err.strip().splitlines()[-1]
    assert told == "interrupted; finished work is kept: run the same command again to resume", outcome.err


def test_a_share_of_the_units_can_be_filled_from_the_command_line(agiqa, example, tmp_path):
    store = tmp_path / "s.agiqa"
    first = agiqa(*example.extract(store, "--part", "1/2", "--json"))
    assert first.json["state"] == "unfinished"
    assert "left to other runs" in first.err
    second = agiqa(*example.extract(store, "--part", "2/2", "--json"))
    assert second.json["state"] == "complete"
    assert second.json["id"] == example.printed["extract"]["id"]
