"""Damaged, unfitting and missing stores: one clear message, exit 1, and nothing trained on them or written over."""

import shutil

import numpy as np
import pytest

from tests.cli.conftest import SMALL_HEAD
from tests.cli.refusals import extract, refuse, truncate
from tests.store.conftest import make_content, make_store


def test_a_store_made_with_other_settings(agiqa, example, texts):
    before = (example.store / "MANIFEST.json").read_bytes()
    refuse(agiqa(*example.extract(example.store, "--variant", "full")), example.store, "stored 'id', asked 'full'")
    refuse(extract(agiqa, texts, example.store, example.model), "data_set.items: stored 40, asked 6")
    assert (example.store / "MANIFEST.json").read_bytes() == before
    assert agiqa("store", "verify", example.store, "--level", "full").code == 0


def test_a_path_that_holds_something_else(agiqa, example, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        refuse(agiqa(*example.extract(path)), path, "not a feature store")
    refuse(agiqa("store", "sketch", example.store, tmp_path, "--rank", 4), tmp_path, "not a feature store")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", ["verify", "seal", "repair", "gc", "export", "push"])
def test_commands_that_work_on_a_folder_say_to_pull_a_url(agiqa, command, tmp_path):
    further = [tmp_path / "out"] if command in ("export", "push") else []
    outcome = agiqa("store", command, "https://example.org/s.agiqa", *further)
    assert outcome.code == 2
    assert "`agiqa store pull` it first" in outcome.err


def test_a_folder_that_a_pull_was_cut_off_in(agiqa, example, tmp_path):
    copy = shutil.copytree(example.store, tmp_path / "copy.agiqa")
    (copy / "MANIFEST.json").rename(copy / "PULLING.json")
    for arguments in (example.extract(copy), ("store", "export", copy, tmp_path / "s.h5")):
        outcome = agiqa(*arguments)
        assert (outcome.code, outcome.out) == (1, "")
        assert "agiqa store pull" in outcome.err


def test_ranks_that_a_model_does_not_have(agiqa, example, new):
    refuse(agiqa("store", "sketch", example.store, new, "--rank", 33), "33", "1..32")
    refuse(agiqa(*example.extract(new, "--encoding", "sketch", "--rank", 33)), "33", "1..32")
    refuse(
        agiqa("store", "sketch", example.sketch, new, "--rank", 4), example.sketch, "needs the store of hidden states"
    )
    refuse(agiqa("store", "sketch", example.store, new), "--rank", "--basis")
    refuse(agiqa("store", "sketch", example.store, example.store, "--rank", 4), "give another path")
    assert not new.exists()


def test_folders_that_are_no_run_and_no_store(agiqa, example, tmp_path):
    refuse(agiqa("evaluate", tmp_path, example.store), tmp_path, "no run folder")
    refuse(agiqa("evaluate", example.run, tmp_path), tmp_path, "not a feature store")
    refuse(agiqa("store", "info", tmp_path), tmp_path, "not a feature store")
    refuse(agiqa("store", "verify", example.run), example.run, "not a feature store")


@pytest.fixture
def damaged(example, tmp_path):
    """A copy of the hidden store, and a function that flips one bit in the middle of its object."""
    copy = tmp_path / "damaged.agiqa"
    shutil.copytree(example.store, copy)

    def flip(part):
        path = copy / part
        files = [path] if path.is_file() else sorted(file for file in (path / "c").rglob("*") if file.is_file())
        raw = bytearray(files[0].read_bytes())
        raw[len(raw) // 3] ^= 16
        files[0].write_bytes(raw)
        return copy

    return flip


@pytest.mark.parametrize(
    "part", ["features", "tokens/roles", "lm_head/weight", "index/n_tokens", "index/unit", "index/row_start"]
)
def test_a_flipped_bit_is_never_trained_on(agiqa, damaged, tmp_path, part):
    store = damaged(f"store.zarr/{part}")
    outcome = agiqa("train", store, tmp_path / "run", *SMALL_HEAD)
    refuse(outcome, store, "store verify")
    assert not (tmp_path / "run").exists()
    assert agiqa("store", "verify", store, "--level", "full").code == 1


@pytest.mark.parametrize("part", ["items.parquet", "store.zarr/zarr.json"])
def test_torn_files_outside_the_arrays_are_named(agiqa, damaged, tmp_path, part):
    store = damaged(part)
    truncate(store / part)
    refuse(agiqa("train", store, tmp_path / "run", *SMALL_HEAD), store / part)


def test_verify_names_a_torn_manifest(agiqa, damaged):
    store = damaged("MANIFEST.json")
    truncate(store / "MANIFEST.json")
    refuse(agiqa("store", "verify", store), store / "MANIFEST.json")


def test_changed_labels_are_never_trained_on(agiqa, damaged, tmp_path):
    store = damaged("items.parquet")
    for position in range(100, (store / "items.parquet").stat().st_size, 97):
        raw = bytearray((store / "items.parquet").read_bytes())
        raw[position] ^= 2
        (store / "items.parquet").write_bytes(raw)
        outcome = agiqa("train", store, tmp_path / "run", *SMALL_HEAD)
        refuse(outcome, store / "items.parquet")
        raw[position] ^= 2
        (store / "items.parquet").write_bytes(raw)


def test_nan_features_that_another_program_has_stored(agiqa, tmp_path, monkeypatch):
    """Ours refuses them when it writes; a store made elsewhere may hold them under right checksums."""
    content = make_content([5] * 12)
    content.hidden[3][2, 1] = 0x7FC0
    content.items.labels["quality"][:] = range(12)
    monkeypatch.setattr("agiqa.store.writing.filling.finite_rows", lambda rows, _dtype: np.ones(len(rows), bool))
    store = make_store(tmp_path / "s.agiqa", content)
    outcome = agiqa("train", store.path, tmp_path / "run", *SMALL_HEAD)
    refuse(outcome, "1 problem", "'image_3.png' holds NaN or inf features")
    assert [path.name for path in tmp_path.iterdir()] == ["s.agiqa"]
