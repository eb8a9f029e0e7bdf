"""Flipped bits, cut and missing files, foreign settings: nothing is lost, and nothing is silently wrong."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import AgiqaError, DamagedStore, DataError, SchemaError, SettingsConflict
from agiqa.store import (
    UnitWriter,
    basis_from,
    create_store,
    open_store,
    repair,
    seal,
    sketch_store,
    store_summary,
    verify,
)
from tests.store import golden
from tests.store.conftest import fill, make_content, plan_of, unit_features


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


def test_sound_objects_in_each_others_places_are_never_served(stored):
    first, second = (stored.layout.features_object(unit) for unit in (0, 1))
    assert first.stat().st_size != second.stat().st_size
    aside = stored.path / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    with pytest.raises(DamagedStore, match=r"unit 0 .*MANIFEST.json lists"):
        open_store(stored.path).read(stored.items_of(0))


def test_an_object_that_a_sealed_store_does_not_list_is_never_served(stored):
    manifest = json.loads(stored.layout.manifest.read_text())
    listed = stored.layout.features_object(0).relative_to(stored.path).as_posix()
    manifest["objects"] = [entry for entry in manifest["objects"] if entry["path"] != listed]
    stored.layout.manifest.write_text(json.dumps(manifest))
    with pytest.raises(DamagedStore, match=r"unit 0 .*MANIFEST.json does not list it"):
        open_store(stored.path).read(stored.items_of(0))


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
    """They serve resumption only, and a copy may leave them out; what the work took is unknown then, not nothing."""
    assert store_summary(stored)["seconds_of_work"] is not None
    shutil.rmtree(stored.layout.commit(0).parent)
    again = open_store(stored.path)
    assert again.committed_units() == list(range(again.geometry.units))
    summary = store_summary(again)
    assert summary["state"] == "complete"
    assert summary["bytes_features"] > 0
    assert summary["seconds_of_work"] is None


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


def test_a_finished_store_that_lacks_an_object_is_not_called_complete(stored, content):
    """The run that made it said that it was there; `repair` and the same run bring it back."""
    stored.layout.features_object(2).unlink()
    with pytest.raises(DamagedStore, match=r"features/c/2/0 is missing.*agiqa store repair"):
        create_store(stored.path, plan_of(content))
    repair(open_store(stored.path))
    fill(create_store(stored.path, plan_of(content)), content)
    assert seal(open_store(stored.path, allow_partial=True)).state == "complete"
    assert create_store(stored.path, plan_of(content)).is_sealed


def test_a_plan_with_other_tokens_is_not_taken_up(tmp_path, content):
    """Such plans came from stores made from a partial store: they have zeros for its tokens."""
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    other = replace(plan_of(content), roles=[np.zeros_like(roles) for roles in content.roles])
    with pytest.raises(SettingsConflict, match=r"planned with other tokens/roles in unit 0"):
        create_store(store.path, other)


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


def everything_read(path):
    """All that readers ask of a store, as plain values."""
    store = open_store(path)
    items, rows = store.items, store.read(range(len(store.n_tokens)))
    values = {
        "items": [items.names, items.prompts, items.splits, items.generators, items.descriptions],
        "labels": {aspect: np.nan_to_num(mos, nan=-1.0).tolist() for aspect, mos in items.labels.items()},
        "index": [part.tolist() for part in (store.n_tokens, store.item_keys, store.status)],
        "rows": [part.tolist() for part in (rows.rows, rows.roles, rows.offsets)],
        "head": store.lm_head_sha256,
    }
    if store.encoding in ("hidden", "int8"):
        values["lm_head"] = store.lm_head().tolist()
    if store.encoding == "sketch":
        basis = store.basis()
        values["basis"] = [basis.id, basis.method, basis.lm_head_sha256, basis.calibration]
        values["basis arrays"] = [part.tolist() for part in (basis.map, basis.q, basis.energy, basis.mean)]
    if store.keeps_logits:
        spans = list(enumerate(store.n_tokens.tolist()))
        values["logits"] = [store.rows_of(item, 0, count, array="logits").tolist() for item, count in spans]
    return values


def harmed(raw, seed, flips):
    """The bytes of a file cut off at three places, and with one bit flipped at `flips` places."""
    moments = random.Random(seed)
    yield from (raw[:0], raw[: len(raw) // 2], raw[:-1])
    for _ in range(flips):
        flipped = bytearray(raw)
        flipped[moments.randrange(len(raw))] ^= 1 << moments.randrange(8)
        yield bytes(flipped)


def one_of_each_kind(path):
    """One file of every kind that a store has: an object and the metadata of every array, records and tables."""
    kinds = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.name != "README.md"):
        name = file.relative_to(path).as_posix()
        kind = name.partition("/c/")[0] if "/c/" in name else "unit" if name.startswith("commits/0") else name
        kinds.setdefault(kind, file)
    return kinds


def names_of(name):
    """How a message may call the file: by its path, or by the array that it is an object of."""
    if "/c/" in name:
        return name, name.removeprefix("store.zarr/").partition("/c/")[0]
    return (name, "the manifest") if name == "MANIFEST.json" else (name,)


def read_or_told(path):
    """What everything_read gives and no message, or nothing and what agiqa says of the damage."""
    try:
        return everything_read(path), ""
    except AgiqaError as error:
        return None, str(error)


def problems(path):
    """What `agiqa store verify --level full` says of the store."""
    try:
        return [damage.problem for damage in verify(open_store(path, allow_partial=True), "full").damage]
    except AgiqaError as error:
        return [str(error)]


@pytest.mark.parametrize(
    ("kind", "parts"), [("kept-logits", ""), ("sketch", "store.zarr/basis"), ("int8", "store.zarr/scale")]
)
def test_any_damage_is_named_by_verify_and_never_read(tmp_path, kind, parts):
    """Cut and flipped files of every kind: readers get the right values, or an error that says what is damaged."""
    path = golden.write(kind, tmp_path / "s.agiqa").path
    right = everything_read(path)
    for part, file in one_of_each_kind(path).items():
        if not part.startswith(parts):
            continue
        name, raw = file.relative_to(path).as_posix(), file.read_bytes()
        flips = 16 if name in ("MANIFEST.json", "store.zarr/zarr.json") else 4
        for number, bad in enumerate(harmed(raw, f"{kind} {name}", flips)):
            file.write_bytes(bad)
            told = problems(path)
            harmless = name.startswith("commits/") and as_json(bad).get("objects") == as_json(raw)["objects"]
            assert harmless or any(name in problem for problem in told), (name, number, told)
            values, message = read_or_told(path)
            assert values in (right, None), (name, number)
            assert values or any(called in message for called in names_of(name)), (name, number, message)
        file.write_bytes(raw)
    assert everything_read(path) == right


def as_json(raw):
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def test_a_missing_object_is_not_taken_for_zeros(tmp_path):
    path = golden.write("int8", tmp_path / "s.agiqa").path
    right = everything_read(path)
    for name in ("index/n_tokens", "index/item_key", "index/status", "scale/mean", "lm_head/weight", "features"):
        file = next(file for file in sorted((path / "store.zarr" / name / "c").rglob("*")) if file.is_file())
        raw = file.read_bytes()
        file.unlink()
        with pytest.raises(DamagedStore, match=name):
            everything_read(path)
        file.write_bytes(raw)
    assert everything_read(path) == right


def test_damage_of_a_record_and_of_a_unit_are_both_named_before_the_seal(tmp_path, content):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content)
    store.layout.commit(3).write_bytes(store.layout.commit(3).read_bytes()[:-1])
    flip_a_bit(store.layout.features_object(5), 1)
    assert {damage.where: damage.unit for damage in verify(store, "full").damage} == {
        "commits/00000003.json": 3,
        "store.zarr/features/c/5/0": 5,
    }
    with pytest.raises(DamagedStore, match=r"00000003\.json.*agiqa store repair"):
        seal(store)


@pytest.mark.parametrize("name", ["tokens/ids", "index/status", "tokens/roles/zarr.json", "lm_head/weight"])
def test_what_all_units_share_is_hashed_before_it_is_sealed(tmp_path, content, name):
    store = create_store(tmp_path / "s.agiqa", replace(plan_of(content), truncated=[True] * len(content.items)))
    fill(store, content)
    place = store.layout.zarr / name
    file = place if place.is_file() else next(file for file in sorted((place / "c").rglob("*")) if file.is_file())
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DamagedStore, match=rf"cannot be sealed:\n.*{name}"):
        seal(store)
    assert not store.layout.manifest.exists()
