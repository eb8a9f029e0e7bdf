"""Exports and imports stopped, killed or led to a taken path: what a quiet run makes, and what was there stays."""

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import h5py
import pytest

from agiqa.errors import BusyStore, DamagedStore, IncompleteStore, SchemaError, SettingsConflict, UnknownName
from agiqa.store import UnitWriter, create_store, open_store
from agiqa.store.disk.locks import exclusive_lock
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.files import writing_hdf5
from agiqa.store.hdf5.importing import import_hdf5
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.crash_points import REPOSITORY
from tests.store.hdf5_files import assert_same_store, content_of


class Stop(Exception):
    """Ends a run from inside, at a place that the test chooses."""


def stop_after(units):
    counts = []

    def advance(tokens):
        counts.append(tokens)
        if len(counts) == units:
            raise Stop

    return advance


def test_a_stopped_export_leaves_nothing_and_the_next_one_is_whole(stored, tmp_path):
    expected = export_hdf5(stored, tmp_path / "whole.h5", compression="gzip").path
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Stop):
        export_hdf5(stored, tmp_path / "s.h5", compression="gzip", advance=stop_after(3))
    assert sorted(tmp_path.iterdir()) == before
    done = []
    export_hdf5(stored, tmp_path / "s.h5", compression="gzip", advance=done.append)
    assert len(done) == stored.geometry.units
    assert content_of(tmp_path / "s.h5") == content_of(expected)


@pytest.mark.parametrize("other", ["compression", "store"])
def test_what_another_export_left_is_not_used(stored, tmp_path, other):
    export_hdf5(stored, tmp_path / "s.h5", compression="gzip").path.rename(tmp_path / ".s.h5.partial")
    lengths = stored.n_tokens.tolist()
    changed = stored if other == "compression" else make_store(tmp_path / "o.agiqa", make_content(lengths, seed=5))
    compression = "none" if other == "compression" else "gzip"
    export_hdf5(changed, tmp_path / "s.h5", compression=compression)
    export_hdf5(changed, tmp_path / "fresh.h5", compression=compression)
    assert content_of(tmp_path / "s.h5") == content_of(tmp_path / "fresh.h5")


def test_an_export_that_is_there_is_left_as_it_is(stored, tmp_path):
    first = export_hdf5(stored, tmp_path / "s.h5", compression="gzip")
    before = first.path.stat().st_mtime_ns
    assert export_hdf5(stored, tmp_path / "s.h5") == replace(first, already_there=True)
    with pytest.raises(SettingsConflict, match="already, compressed with gzip"):
        export_hdf5(stored, tmp_path / "s.h5", compression="zstd")
    assert first.path.stat().st_mtime_ns == before


@pytest.mark.parametrize("there", ["text", "hdf5", "relabelled", "folder"])
def test_anything_else_at_the_path_is_not_touched(stored, content, tmp_path, there):
    out = tmp_path / "s.h5"
    if there == "text":
        out.write_text("mine")
    elif there == "folder":
        out.mkdir()
    elif there == "hdf5":
        with h5py.File(out, "w") as file:
            file["mine"] = 1
    else:
        relabelled = make_content([len(rows) for rows in content.hidden])
        relabelled.items.labels["quality"][0] = 1.25
        export_hdf5(make_store(tmp_path / "o.agiqa", relabelled), out)
    before = None if there == "folder" else out.read_bytes()
    with pytest.raises(SettingsConflict, match="other labels" if there == "relabelled" else "not an export"):
        export_hdf5(stored, out)
    assert before is None or out.read_bytes() == before
    assert not (tmp_path / ".s.h5.partial").exists()


def test_a_link_in_the_place_of_the_partial_file_is_not_followed(stored, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".s.h5.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(SettingsConflict, match=r"\.s\.h5\.partial is a link"):
        export_hdf5(stored, tmp_path / "s.h5")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("other", [False, True])
def test_an_export_that_ended_just_before_the_lock_was_free_stays(stored, tmp_path, monkeypatch, other):
    """Both found no file at OUT; the second holds the lock once the first has given OUT its name."""
    first = make_store(tmp_path / "o.agiqa", make_content([3, 4])) if other else stored
    out, lock, written = tmp_path / "s.h5", exclusive_lock, []

    def late_lock(path, *, keeps_name):
        monkeypatch.undo()
        written.append(export_hdf5(first, out).path.read_bytes())
        return lock(path, keeps_name=keeps_name)

    monkeypatch.setattr("agiqa.store.hdf5.export.exclusive_lock", late_lock)
    if other:
        with pytest.raises(SettingsConflict, match="exists and is "):
            export_hdf5(stored, out)
    else:
        assert export_hdf5(stored, out).already_there
    assert written == [out.read_bytes()]
    assert not (tmp_path / ".s.h5.partial").exists()


def test_an_unfinished_store_a_busy_path_and_an_unknown_compression_are_refused(stored, content, tmp_path):
    unfinished = create_store(tmp_path / "u.agiqa", plan_of(content))
    fill(unfinished, content, units=[0])
    with pytest.raises(IncompleteStore, match="only finished stores"):
        export_hdf5(unfinished, tmp_path / "s.h5")
    with pytest.raises(UnknownName, match="'zstd'"):
        export_hdf5(stored, tmp_path / "s.h5", compression="zst")
    with pytest.raises(SettingsConflict, match="inside the store"):
        export_hdf5(stored, stored.path / "s.h5")
    with exclusive_lock(tmp_path / ".s.h5.partial"), pytest.raises(BusyStore, match="Another process"):
        export_hdf5(stored, tmp_path / "s.h5")


@pytest.mark.parametrize("harm", ["remove", "flip"])
def test_a_damaged_store_is_not_exported(stored, tmp_path, harm):
    path = stored.layout.features_object(2)
    if harm == "remove":
        path.unlink()
    else:
        raw = bytearray(path.read_bytes())
        raw[40] ^= 4
        path.write_bytes(raw)
    with pytest.raises(DamagedStore, match="features/c/2/0 is missing" if harm == "remove" else "'features'"):
        export_hdf5(stored, tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()


def test_a_text_that_hdf5_would_shorten_is_refused(tmp_path):
    content = make_content([3, 4])
    content.items.prompts[1] = "ends in NUL\0"
    with pytest.raises(SchemaError, match="'prompt'"):
        export_hdf5(make_store(tmp_path / "s.agiqa", content), tmp_path / "s.h5")


WORKER = """
    import sys, time
    from pathlib import Path
    from agiqa.store import open_store
    from agiqa.store.hdf5.export import export_hdf5
    from agiqa.store.hdf5.importing import import_hdf5
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    def advance(tokens):
        print(tokens, flush=True)
        time.sleep(0.02)
    if source.suffix == ".h5":
        import_hdf5(source, out, advance=advance)
    else:
        export_hdf5(open_store(source), out, compression="gzip", advance=advance)
"""


def run_with_kills(source, out, *, seed):
    """Run until it ends by itself, killed before at six random moments at most; the number of kills."""
    moments, kills = random.Random(seed), 0
    command = [sys.executable, "-c", textwrap.dedent(WORKER), source, out]
    while True:
        worker = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert worker.stdout is not None
        if kills < 6:
            for _ in range(moments.randrange(1, 4)):
                worker.stdout.readline()
            time.sleep(moments.uniform(0.0, 0.04))
            worker.send_signal(signal.SIGKILL)
        worker.communicate()
        if worker.returncode == 0:
            return kills
        assert worker.returncode == -signal.SIGKILL
        kills += 1


def test_exports_and_imports_killed_at_random_moments_end_as_if_never_killed(tmp_path):
    store = make_store(tmp_path / "s.agiqa", make_content([37] * 300, width=64))
    whole = export_hdf5(store, tmp_path / "whole.h5", compression="gzip").path
    killed = tmp_path / "killed.h5"
    assert run_with_kills(store.path, killed, seed=1) >= 2
    assert content_of(killed) == content_of(whole)
    assert run_with_kills(killed, tmp_path / "killed.agiqa", seed=2) >= 2
    assert_same_store(open_store(tmp_path / "killed.agiqa"), store)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"s.agiqa", "whole.h5", "killed.h5", "killed.agiqa"}


def test_an_import_beside_another_one_says_which_unit_is_at_work(stored, content, tmp_path):
    path = export_hdf5(stored, tmp_path / "s.h5").path
    begun = create_store(tmp_path / "again.agiqa", plan_of(content))
    with UnitWriter(begun).claim(1), pytest.raises(BusyStore, match="at work on unit 1"):
        import_hdf5(path, begun.path)
    assert_same_store(import_hdf5(path, begun.path), stored)


def test_an_import_to_a_finished_store_leaves_it_and_to_another_one_is_refused(stored, tmp_path):
    path = export_hdf5(stored, tmp_path / "s.h5").path
    before = json.loads(stored.layout.manifest.read_text())
    assert import_hdf5(path, stored.path).id == stored.id
    assert json.loads(stored.layout.manifest.read_text()) == before
    other = make_store(tmp_path / "o.agiqa", make_content([3, 4, 5]), model={"name": "other"})
    with pytest.raises(SettingsConflict, match="made with other settings"):
        import_hdf5(path, other.path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_hdf5_has_closed_the_file_or_is_between_two_steps(tmp_path, number):
    """Its handler raises, and a library that sees its file fail crashes the process."""

    def handler(_number, _frame):
        raise Stop

    def write(path, *, asks):
        with writing_hdf5(path) as (file, check):
            signal.raise_signal(number)
            file["values"] = range(1000)
            if asks:
                check()
            file["more"] = range(10)

    before = signal.signal(number, handler)
    try:
        for asks in (True, False):
            path = tmp_path / f"{asks}.h5"
            with pytest.raises(Stop):
                write(path, asks=asks)
            assert signal.getsignal(number) is handler
            with h5py.File(path) as file:
                assert set(file) == ({"values"} if asks else {"values", "more"})
                assert file["values"][...].sum() == 499500
    finally:
        signal.signal(number, before)
