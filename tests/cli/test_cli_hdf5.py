"""`agiqa store export` and `agiqa store import`, as a user calls them."""

import functools
import json

import h5py
import numpy as np
import pytest

from agiqa.store import open_store
from tests.command_line import in_time
from tests.store.conftest import make_content, make_store


def same_features(found, expected):
    everything = np.arange(len(expected.items))
    here, there = found.read(everything), expected.read(everything)
    return np.array_equal(here.rows, there.rows) and np.array_equal(here.roles, there.roles)


@pytest.mark.parametrize("kind", ["store", "sketch"])
def test_a_store_goes_out_and_comes_back(agiqa, example, tmp_path, kind):
    source, out, again = getattr(example, kind), tmp_path / "s.h5", tmp_path / "again.agiqa"
    written = agiqa("store", "export", source, out, "--json").json
    assert written["path"] == str(out)
    assert written["compression"] == "zstd"
    assert written["bytes"] == out.stat().st_size
    made = agiqa("store", "import", out, again, "--json").json
    assert made["id"] == written["id"] == open_store(source).id
    assert made["state"] == "complete"
    assert same_features(open_store(again), open_store(source))
    assert open_store(again).items.same_as(open_store(source).items)
    assert agiqa("store", "verify", again, "--level", "numeric", "--json").json["sound"]


def test_a_killed_export_begins_anew_and_a_killed_import_goes_on(agiqa, example, tmp_path):
    out, again, partial = tmp_path / "s.h5", tmp_path / "again.agiqa", tmp_path / ".s.h5.partial"
    export = ("store", "export", example.store, out, "--compression", "gzip")
    kill = functools.partial(agiqa.killed, when=lambda: partial.exists() and partial.stat().st_size > 10_000)
    assert in_time(lambda: kill(*export), out).code == -9
    assert not out.exists()
    assert partial.exists()
    assert agiqa(*export).code == 0
    kill = functools.partial(agiqa.killed, when=(again / "commits" / "00000002.json").exists)
    assert in_time(lambda: kill("store", "import", out, again), again).code == -9
    assert not (again / "MANIFEST.json").exists()
    assert agiqa("store", "import", out, again).code == 0
    assert same_features(open_store(again), open_store(example.store))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.agiqa", "s.h5"]


def test_ctrl_c_stops_an_export(agiqa, tmp_path):
    store = make_store(tmp_path / "s.agiqa", make_content([4000] * 48, width=64))
    out, begun = tmp_path / "s.h5", tmp_path / ".s.h5.partial"
    export = ("store", "export", store.path, out, "--compression", "gzip")
    stop = functools.partial(agiqa.interrupted, when=lambda: begun.exists() and begun.stat().st_size > 0)
    outcome = in_time(lambda: stop(*export), out)
    assert outcome.code == 130
    assert outcome.err.strip() == "interrupted; finished work is kept: run the same command again to resume"
    assert not out.exists()
    assert not begun.exists()
    assert agiqa(*export).code == 0


def test_the_second_export_says_that_it_is_there(agiqa, example, tmp_path):
    out = tmp_path / "s.h5"
    assert not agiqa("store", "export", example.store, out, "--json").json["already_there"]
    again = agiqa("store", "export", example.store, out, "--json")
    assert again.json["already_there"]
    assert "already holds this store" in again.err
    other = agiqa("store", "export", example.sketch, out)
    assert (other.code, other.out) == (1, "")
    assert "not an export of this store" in other.err


def test_mistakes_are_one_message(agiqa, example, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["mine"] = 1
    for arguments, code, message in (
        (("export", example.store, tmp_path / "s.h5", "--compression", "gzp"), 2, "Did you mean 'gzip'?"),
        (("import", tmp_path / "notes.txt", tmp_path / "s.agiqa"), 1, "no HDF5 file"),
        (("import", tmp_path / "other.h5", tmp_path / "s.agiqa"), 1, "no feature store"),
    ):
        outcome = agiqa("store", *arguments)
        assert (outcome.code, outcome.out) == (code, "")
        assert message in outcome.err
        assert "Traceback" not in outcome.err
    assert not (tmp_path / "s.agiqa").exists()


def test_options_can_stand_in_a_config_file(agiqa, example, tmp_path):
    config = tmp_path / "export.yaml"
    config.write_text("compression: none\n")
    made = agiqa("store", "export", example.store, tmp_path / "s.h5", "--options", config, "--json")
    assert json.loads(made.out)["compression"] == "none"
