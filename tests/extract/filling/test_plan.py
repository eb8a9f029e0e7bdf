"""What a plan fixes before anything is computed: tokens, roles, lengths, and what may not change afterwards."""

import json
import shutil

import numpy as np
import pytest

from agiqa.errors import ConfigError, DataError, SettingsConflict, UnknownName
from agiqa.extract import LengthRule
from agiqa.extract.filling.plan import fit, tokenise
from agiqa.store import ITEM_STATUS, TOKEN_ROLES, open_store
from agiqa.store.deriving.labelling import join_labels
from tests.extract import tiny_models
from tests.extract.jobs import extract, inputs
from tests.extract.oracle import expected
from tests.extract.small_sets import read_table, save_noise, write_set, write_table, write_talks


@pytest.fixture
def texts(tmp_path):
    folder = write_set(tmp_path / "texts", 10)
    write_talks(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = write_set(tmp_path / "pictures", 6, images=True)
    write_talks(folder)
    return folder


def test_a_sketch_is_not_planned_without_its_basis(texts, tiny_text_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="a sketch with --basis STORE"):
        extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", plan_only=True, encoding="sketch", rank=4)
    assert not (tmp_path / "s.agiqa").exists()


def test_plan_only_stores_all_tokens_and_no_features(texts, tiny_text_checkpoint, tmp_path):
    result = extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", plan_only=True)
    store = result.store
    assert not store.is_sealed
    assert result.fill is None
    assert store.committed_units() == []
    assert not (store.layout.zarr / "lm_head").exists()
    data_set, backbone = inputs(texts, tiny_text_checkpoint)
    assert store.items.names == [row["name"] for row in read_table(texts)]
    for position, item in enumerate(data_set.items):
        rows = slice(int(store.row_starts[position]), int(store.row_ends[position]))
        ids, roles = store.array("tokens/ids")[rows], store.array("tokens/roles")[rows]
        np.testing.assert_array_equal(ids, expected(tiny_text_checkpoint, item).token_ids)
        answer = backbone.renderer.tokenizer.decode(ids[roles == TOKEN_ROLES["answer"]].tolist())
        assert answer.strip() == item.description
    assert extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa").store.is_sealed


def test_too_long_items_are_all_named_with_the_limit_and_nothing_is_written(texts, tiny_text_checkpoint, tmp_path):
    lengths = extract(texts, tiny_text_checkpoint, tmp_path / "all.agiqa", plan_only=True).store.n_tokens
    limit = int(np.median(lengths))
    names = [row["name"] for row in read_table(texts)]
    long = [name for name, length in zip(names, lengths, strict=True) if length > limit]
    assert 0 < len(long) < len(names)
    with pytest.raises(DataError) as caught:
        extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", length=LengthRule(max_tokens=limit))
    message = str(caught.value)
    assert [name for name in names if name in message] == long
    assert f"{lengths.max()} tokens, the limit is {limit}" in message
    assert not (tmp_path / "s.agiqa").exists()


def test_the_models_own_positions_are_a_limit(tmp_path, tiny_text_checkpoint):
    folder = write_table(tmp_path / "long", [["long.png", "very " * 600, 1.0]], ["name", "prompt", "mos"])
    with pytest.raises(DataError, match=r"long\.png: \d+ tokens, the limit is 512"):
        extract(folder, tiny_text_checkpoint, tmp_path / "s.agiqa", variant="no_id")
    rule = LengthRule(max_tokens=2000, truncate=True)
    cut = extract(folder, tiny_text_checkpoint, tmp_path / "s.agiqa", variant="no_id", length=rule)
    assert cut.store.n_tokens.tolist() == [512]


def test_skipped_items_are_listed_and_left_out(texts, tiny_text_checkpoint, tmp_path):
    lengths = extract(texts, tiny_text_checkpoint, tmp_path / "all.agiqa", plan_only=True).store.n_tokens
    limit = int(np.median(lengths))
    rule = LengthRule(max_tokens=limit, on_bad_item="skip")
    result = extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", length=rule)
    kept = [row["name"] for row, length in zip(read_table(texts), lengths, strict=True) if length <= limit]
    assert result.store.items.names == kept
    assert result.store.is_sealed
    assert len(result.skipped) == len(lengths) - len(kept)
    assert result.store.provenance["data_set"]["skipped"] == len(result.skipped)
    assert all("tokens, the limit is" in line for line in result.skipped)


def test_nothing_left_after_skipping_is_an_error(texts, tiny_text_checkpoint, tmp_path):
    rule = LengthRule(max_tokens=3, on_bad_item="skip")
    with pytest.raises(DataError, match="10 problems"):
        extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", length=rule)
    assert not (tmp_path / "s.agiqa").exists()


def test_truncation_is_counted_and_stored(texts, tiny_text_checkpoint, tmp_path):
    lengths = extract(texts, tiny_text_checkpoint, tmp_path / "all.agiqa", plan_only=True).store.n_tokens
    limit = int(np.median(lengths))
    result = extract(
        texts, tiny_text_checkpoint, tmp_path / "s.agiqa", length=LengthRule(max_tokens=limit, truncate=True)
    )
    cut = lengths > limit
    assert result.truncated == int(cut.sum()) > 0
    np.testing.assert_array_equal(result.store.n_tokens, np.minimum(lengths, limit))
    np.testing.assert_array_equal(result.store.status == ITEM_STATUS["truncated"], cut)
    data_set, _ = inputs(texts, tiny_text_checkpoint)
    position = int(np.argmax(lengths))
    own = expected(tiny_text_checkpoint, data_set.items[position], limit=limit)
    np.testing.assert_allclose(result.store.read([position]).float32(), own.hidden, rtol=1e-4, atol=1e-4)


def test_a_cut_through_the_image_is_refused_even_with_truncate(pictures, tiny_vision_checkpoint, tmp_path):
    data_set, backbone = inputs(pictures, tiny_vision_checkpoint)
    prepared = backbone.prepare(data_set.items[0].conversation, data_set.items[0].image)
    last = int(np.flatnonzero(prepared.roles == TOKEN_ROLES["image"])[-1])
    whole = fit(prepared, last + 1, truncate=True)
    assert int((whole.roles == TOKEN_ROLES["image"]).sum()) == 16
    with pytest.raises(DataError, match=f"a cut at {last} would go through the image"):
        fit(prepared, last, truncate=True)
    rule = LengthRule(max_tokens=last, truncate=True)
    with pytest.raises(DataError, match=r"000\.png: \d+ tokens, and a cut at"):
        extract(pictures, tiny_vision_checkpoint, tmp_path / "s.agiqa", length=rule)


def test_progress_counts_every_item(texts, tiny_text_checkpoint):
    data_set, backbone = inputs(texts, tiny_text_checkpoint)
    counted: list[int] = []
    tokenise(data_set, backbone, LengthRule(max_tokens=85, on_bad_item="skip"), advance=counted.append)
    assert sum(counted) == len(data_set.items)


def change_conversation(folder):
    talks = json.loads((folder / "talks.json").read_text())
    talks[2]["conversations"][1]["content"] += "!"
    (folder / "talks.json").write_text(json.dumps(talks))


def change_image(folder):
    save_noise(folder / "images" / "002.png", seed=99)


def drop_a_row(folder):
    write_table(folder, [list(row.values()) for row in read_table(folder)][:-1])
    write_talks(folder)


@pytest.mark.parametrize("change", [change_conversation, change_image, drop_a_row])
def test_changed_items_are_refused_at_the_same_path(pictures, tiny_vision_checkpoint, tmp_path, change):
    path = tmp_path / "s.agiqa"
    extract(pictures, tiny_vision_checkpoint, path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    change(pictures)
    with pytest.raises(SettingsConflict, match=r"data_set\.plan_sha256: stored '"):
        extract(pictures, tiny_vision_checkpoint, path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_other_settings_are_refused_and_named(texts, tiny_text_checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    extract(texts, tiny_text_checkpoint, path, plan_only=True)
    with pytest.raises(SettingsConflict, match=r"conversation\.variant: stored 'id', asked 'full'"):
        extract(texts, tiny_text_checkpoint, path, variant="full")
    with pytest.raises(SettingsConflict, match=r"tokens\.max_tokens: stored None, asked 500"):
        extract(texts, tiny_text_checkpoint, path, length=LengthRule(max_tokens=500))
    other = tiny_models.write_text_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(SettingsConflict, match=r"model\.files\.model\.safetensors: stored"):
        extract(texts, other, path)
    with pytest.raises(SettingsConflict, match="encoding: stored 'hidden', asked 'sketch'"):
        extract(texts, tiny_text_checkpoint, path, encoding="sketch", rank=4)


def test_a_checkpoint_that_moved_is_the_same_model(texts, tiny_text_checkpoint, tmp_path):
    extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", plan_only=True)
    moved = shutil.copytree(tiny_text_checkpoint, tmp_path / "elsewhere" / tiny_text_checkpoint.name)
    assert extract(texts, moved, tmp_path / "s.agiqa").store.is_sealed


def test_corrected_labels_reach_an_unfinished_store(texts, tiny_text_checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    extract(texts, tiny_text_checkpoint, path, plan_only=True)
    rows = [list(row.values()) for row in read_table(texts)]
    rows[0][2] = 1.25
    write_table(texts, rows)
    extract(texts, tiny_text_checkpoint, path)
    assert open_store(path).items.labels["quality"][0] == 1.25


def test_corrected_labels_of_a_finished_store_are_answered_with_what_stores_them(texts, tiny_text_checkpoint, tmp_path):
    path, table = tmp_path / "s.agiqa", texts / "data.csv"
    extract(texts, tiny_text_checkpoint, path)
    rows = [list(row.values()) for row in read_table(texts)]
    rows[0][2], rows[1][3] = 1.25, "val"
    write_table(texts, rows)
    with pytest.raises(SettingsConflict, match=r"differ from those given now \(mos_quality, split\)\.") as caught:
        extract(texts, tiny_text_checkpoint, path)
    assert f"`agiqa store labels {path} {table}` stores what {table} has of them" in str(caught.value)
    join_labels(open_store(path), table)
    found = extract(texts, tiny_text_checkpoint, path).store
    assert found.is_sealed
    assert (found.items.labels["quality"][0], found.items.splits[1]) == (1.25, "val")
    rows[1][3] = ""  # which a table cannot say: empty cells leave what is there
    write_table(texts, rows)
    with pytest.raises(SettingsConflict, match=r"\(split\)\. Extract to another path, or give those"):
        extract(texts, tiny_text_checkpoint, path)


def test_an_unknown_encoding_is_refused_before_any_item_is_tokenised(texts, tiny_text_checkpoint, tmp_path):
    too_short = LengthRule(max_tokens=3)
    with pytest.raises(UnknownName, match=r"No encoding is called 'hiden'.*'hidden'"):
        extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", length=too_short, encoding="hiden")
