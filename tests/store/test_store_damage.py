"""Kills, flipped bits, missing files and lies: nothing is lost, and nothing is silently wrong."""

import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from agiqa.errors import DamagedStore, DataError, SchemaError, SettingsConflict
from agiqa.store import UnitWriter, basis_from, create_store, open_store, seal, sketch_store, store_summary, verify
from tests.store.conftest import fill, make_content, make_store, plan_of, unit_features

REPOSITORY = Path(__file__).resolve().parents[2]


def flip_a_bit(path, seed):
    raw = bytearray(path.read_bytes())
    position = random.Random(seed).randrange(len(raw))
    raw[position] ^= 1 << random.Random(seed).randrange(8)
    path.write_bytes(raw)


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_in_features_is_named_and_never_served(stored, seed):
    unit = seed % stored.geometry.units
    flip_a_bit(stored.layout.features_object(unit), seed)
    report = verify(stored, "full")
    assert not report.sound
    assert [damage.unit for damage in report.damage] == [unit]
    assert set(report.damage[0].items) == {stored.items.names[item] for item in stored.items_of(unit)}


def test_a_flipped_bit_in_a_chunk_stops_the_reader(stored):
    path = stored.layout.features_object(0)
    raw = bytearray(path.read_bytes())
    raw[40] ^= 4  # inside the first inner chunk
    path.write_bytes(raw)
    with pytest.raises(DamagedStore, match="unit 0"):
        stored.read(stored.items_of(0))


@pytest.mark.parametrize("kind", ["features", "tokens/ids", "tokens/roles", "index/n_tokens", "lm_head/weight"])
@pytest.mark.parametrize("harm", ["truncate", "remove", "flip"])
def test_damage_of_every_kind_of_object_is_found(stored, kind, harm):
    path = next(path for path in sorted((stored.layout.zarr / kind / "c").rglob("*")) if path.is_file())
    if harm == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "remove":
        path.unlink()
    else:
        flip_a_bit(path, 3)
    level = "full" if harm == "flip" else "quick"
    problems = [damage.problem for damage in verify(stored, level).damage]
    assert any(path.relative_to(stored.path).as_posix() in problem for problem in problems)


def test_labels_and_strays_are_checked_too(stored):
    (stored.layout.zarr / "features" / "c" / "99").mkdir()
    (stored.layout.zarr / "features" / "c" / "99" / "0").write_bytes(b"stray")
    flip_a_bit(stored.layout.items, 1)
    where = {damage.where for damage in verify(stored, "full").damage}
    assert where == {"store.zarr/features/c/99/0", "items.parquet"}


def rolled(path, content):
    """A sealed store whose hidden states are not those that its probe logits were made from."""
    store = create_store(path, plan_of(content))
    writer = UnitWriter(store)
    fill(store, content, units=[])
    for unit in writer.pending():
        writer.write_unit(unit, np.roll(unit_features(store, content, unit), 1, axis=1), seconds=0.0)
    return seal(store)


def test_hidden_states_of_another_layer_fail_the_numeric_check(tmp_path, content):
    report = verify(rolled(tmp_path / "s.agiqa", content), "numeric")
    assert not report.sound
    assert report.probe_error is not None
    assert report.probe_error > 0.5


@pytest.mark.parametrize("rank", [2, 16])
def test_a_sketch_of_other_hidden_states_fails_the_numeric_check(stored, tmp_path, content, rank):
    """At a low rank too, where a sound sketch is far from the logits."""
    assert verify(sketch_store(stored, tmp_path / "sound.agiqa", basis=basis_from(stored, rank)).store, "numeric").sound
    wrong = rolled(tmp_path / "wrong.agiqa", content)
    sketch = sketch_store(wrong, tmp_path / "sketch.agiqa", basis=basis_from(wrong, rank)).store
    report = verify(sketch, "numeric")
    assert not report.sound
    assert report.probe_error is not None
    assert report.probe_error > 0.5


def test_a_sealed_store_without_its_commit_records_is_whole(stored):
    """They serve resumption only, and a copy may leave them out."""
    shutil.rmtree(stored.layout.commit(0).parent)
    again = open_store(stored.path)
    assert again.committed_units() == list(range(again.geometry.units))
    summary = store_summary(again)
    assert summary["state"] == "complete"
    assert summary["bytes_features"] > 0


def test_a_sound_store_passes_every_level(stored):
    for level in ("quick", "full", "numeric"):
        assert verify(stored, level).sound


def test_a_nan_is_refused_with_item_unit_and_remedy(tmp_path, content):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    rows = unit_features(store, content, 1)
    items = store.items_of(1)
    last = int(items[-1])
    rows[int(store.row_starts[last]) - store.geometry.unit_rows + 2, 3] = 0x7FC0
    with pytest.raises(DataError, match=rf"{content.items.names[last]}.*unit 1.*token 2.*float32"):
        UnitWriter(store).write_unit(1, rows, seconds=0.0)
    assert store.committed_units() == []


def test_features_of_another_shape_are_refused(tmp_path, content):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    with pytest.raises(DataError, match="the plan expects"):
        UnitWriter(store).write_unit(0, np.zeros((3, 16), np.uint16), seconds=0.0)


def test_other_settings_are_refused_and_named(stored, content):
    with pytest.raises(SettingsConflict, match=r"model\.revision: stored 'a', asked 'b'"):
        create_store(stored.path, plan_of(content, model={"name": "made up", "revision": "b"}))


def test_a_folder_with_other_things_is_not_touched(tmp_path, content):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingsConflict, match="not a feature store"):
        create_store(tmp_path, plan_of(content))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_new_labels_reach_an_unfinished_store_but_not_a_finished_one(tmp_path, content):
    relabelled = make_content([len(rows) for rows in content.hidden])
    relabelled.items.labels["quality"][0] = 1.25
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    assert create_store(store.path, plan_of(relabelled)).items.labels["quality"][0] == 1.25
    create_store(store.path, plan_of(content))
    fill(store, content)
    seal(store)
    with pytest.raises(SettingsConflict, match="labels"):
        create_store(store.path, plan_of(relabelled))


def test_a_foreign_version_is_refused_by_name(stored):
    path = stored.layout.zarr / "zarr.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(SchemaError, match=r"agiqa\.features v7; this agiqa reads agiqa\.features v1"):
        open_store(stored.path)


WORKER = """
    import sys
    from pathlib import Path
    from tests.store.conftest import fill, make_content, plan_of
    from agiqa.store import create_store, seal
    content = make_content([37] * 300, width=64)
    store = create_store(Path(sys.argv[1]), plan_of(content))
    print("planned", flush=True)
    fill(store, content)
    store = seal(store)
"""


def start_worker(path):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER), str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE
    )


def test_killed_at_random_moments_and_resumed_equals_an_uninterrupted_store(tmp_path):
    content = make_content([37] * 300, width=64)
    whole = make_store(tmp_path / "whole.agiqa", content)
    path = tmp_path / "killed.agiqa"
    moments = random.Random(0)
    kills = 0
    for _ in range(40):
        worker = start_worker(path)
        assert worker.stdout is not None
        worker.stdout.readline()  # planned, or died before
        time.sleep(moments.uniform(0.0, 0.03))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        kills += worker.returncode == -signal.SIGKILL
        if (path / "MANIFEST.json").exists():
            break
    assert kills >= 2
    last = start_worker(path)
    last.communicate()
    assert last.returncode == 0
    killed = open_store(path)
    assert verify(killed, "numeric").sound
    everything = np.arange(300)
    np.testing.assert_array_equal(killed.read(everything).rows, whole.read(everything).rows)
    assert killed.id == whole.id
    left_over = [p for p in tmp_path.rglob("*") if p.name.endswith(".partial") or ".plan-" in p.name]
    assert left_over == []


def test_two_runs_at_once_share_the_work(tmp_path):
    path = tmp_path / "shared.agiqa"
    workers = [start_worker(path) for _ in range(3)]
    for worker in workers:
        worker.communicate()
    store = create_store(path, plan_of(make_content([37] * 300, width=64)))
    assert verify(seal(store), "full").sound
    recorded = {(store.layout.commit(unit)).read_text() for unit in range(store.geometry.units)}
    assert len(recorded) == store.geometry.units
