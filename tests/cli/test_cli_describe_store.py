"""`agiqa describe --store`: one command in place of two, killed at any moment, and what it refuses."""

import json

import numpy as np
import pytest

from agiqa.store import open_store
from tests.cli.refusals import misuse, refuse
from tests.extract.small_sets import write_set, write_talks
from tests.extract.tiny_models import roomy, write_text_checkpoint, write_vision_checkpoint

ITEMS = 24
SHORT = ("--max-new-tokens", 12, "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return roomy(write_vision_checkpoint(tmp_path_factory.mktemp("vision")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), ITEMS, images=True)


@pytest.fixture(scope="module")
def two_commands(agiqa, data, model, tmp_path_factory):
    """The lines of `describe`, by name, and the store of `extract`."""
    folder = tmp_path_factory.mktemp("two")
    out, path = folder / "out.jsonl", folder / "s.agiqa"
    assert agiqa("describe", data, out, "--model", model, *SHORT).code == 0
    done = agiqa("extract", data, path, "--model", model, "--conversations", out, "--device", "cpu", "--json")
    assert done.json["state"] == "complete"
    return answers_of(out), open_store(path)


def answers_of(out):
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return {line["name"]: (line["description"], line["answer"]) for line in lines}


def compare(out, path, two_commands):
    answers, separate = two_commands
    assert answers_of(out) == answers
    store = open_store(path)
    assert store.items.names == separate.items.names
    np.testing.assert_array_equal(store.item_keys, separate.item_keys)
    here, there = (one.read(range(ITEMS)).float32() for one in (store, separate))
    assert np.linalg.norm(here - there) / np.linalg.norm(there) < 1e-5
    assert sorted(file.name for file in path.parent.iterdir()) == ["out.jsonl", "out.provenance.json", "s.agiqa"]


def test_one_command_in_place_of_two(agiqa, data, model, two_commands, tmp_path):
    out, path = tmp_path / "out.jsonl", tmp_path / "s.agiqa"
    outcome = agiqa("describe", data, out, "--store", path, "--model", model, *SHORT, "--json")
    printed = outcome.json["extraction"]
    assert (outcome.json["described"], printed["items"], printed["state"]) == (ITEMS, ITEMS, "complete")
    assert (printed["filled"]["reused"], printed["filled"]["tokens"]) == (ITEMS, 0)
    assert f"one pass: {ITEMS} conversations are not read again" in outcome.err
    compare(out, path, two_commands)
    again = agiqa("describe", data, out, "--store", path, "--model", model, *SHORT)
    assert "described     0" in again.out
    assert "state         complete" in again.out
    assert agiqa("store", "verify", path, "--level", "full").code == 0
    assert "kept_while_describing" in agiqa("store", "info", path, "--json").out


def test_killed_while_it_describes_and_while_it_fills(agiqa, data, model, two_commands, tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    out, path, spool = folder / "out.jsonl", folder / "s.agiqa", folder / "s.agiqa.spool"
    arguments = ("describe", data, out, "--store", path, "--model", model, *SHORT, "--batch-size", 2)

    def kept():
        return len(list(spool.glob("*.rows")))

    def commits():
        return len(list((path / "commits").glob("0*.json")))

    moments = [lambda: kept() >= 1, lambda: kept() >= 9, lambda: path.exists(), lambda: commits() >= 2]
    codes = [agiqa.killed(*arguments, when=when).code for when in moments]
    assert codes.count(-9) >= 3
    last = agiqa(*arguments, "--json").json
    assert last["extraction"]["state"] == "complete"
    compare(out, path, two_commands)
    assert last["extraction"]["filled"]["reused"] == last["extraction"]["filled"]["items"]


def test_what_is_refused(agiqa, data, model, tmp_path):
    out, path = tmp_path / "out.jsonl", tmp_path / "s.agiqa"
    usual = ("describe", data, out, "--model", model, *SHORT)
    misuse(agiqa(*usual, "--rank", 4), "--rank is for a store; leave it out, or give --store")
    misuse(agiqa(*usual, "--variant", "full"), "--variant is for a store")
    server = ("--server", "http://localhost:9/v1", "--store", path)
    misuse(agiqa("describe", data, out, "--model", "m", *server), "--store is for a model that agiqa runs itself")
    refuse(
        agiqa(*usual, "--store", path, "--variant", "no_id"), "--variant no_id is another conversation", "agiqa extract"
    )
    refuse(agiqa(*usual, "--store", path, "--layers", "0,last"), "--layers names 0,last", "agiqa extract")
    refuse(agiqa(*usual, "--store", path, "--encoding", "sketch"), "--encoding sketch needs either --rank R")
    assert not list(tmp_path.iterdir())


def test_bad_labels_are_told_before_the_model_runs(agiqa, model, tmp_path):
    data = write_set(tmp_path / "set", 4, images=True)
    table = data / "data.csv"
    lines = table.read_text().splitlines()
    cells = lines[2].split(",")
    lines[2] = ",".join([*cells[:2], "9.5", *cells[3:]])
    table.write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    refuse(agiqa("describe", data, out, "--store", tmp_path / "s.agiqa", "--model", model, *SHORT), "9.5")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert agiqa("describe", data, out, "--model", model, *SHORT).code == 0  # which needs no MOS


def test_a_sketch_of_a_text_model_about_the_items_of_a_conversation_file(agiqa, data, tmp_path):
    model = roomy(write_text_checkpoint(tmp_path / "text"))
    options = ("--encoding", "sketch", "--rank", 6, "--variant", "full", "--on-bad-item", "skip", "--json")
    labels = ("--labels", data / "data.csv")
    usual = ("describe", write_talks(data), tmp_path / "out.jsonl", *labels, "--model", model, *SHORT)
    printed = agiqa(*usual, "--store", tmp_path / "s.agiqa", *options).json
    store = open_store(tmp_path / "s.agiqa")
    assert printed["extraction"]["filled"]["reused"] == len(store.items)
    assert (store.encoding, store.width) == ("sketch", 6)
    assert "mos_quality" in (tmp_path / "s.agiqa" / "items.parquet").read_bytes().decode("latin-1")
    assert store.provenance["prefixes"] == ["question", "described", "id"]
