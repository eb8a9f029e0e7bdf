"""Descriptions and their store in one pass, against describing and then extracting: the same items, ids, roles and rows."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import zarr

from agiqa.errors import ConfigError, DataError, ModelError, SettingsConflict, UnknownName
from agiqa.extract import (
    DescriptionSettings,
    ExtractionSettings,
    GenerationSettings,
    LengthRule,
    load_data_set,
    open_backbone,
    run_descriptions,
    run_extraction,
    run_stored_descriptions,
)
from agiqa.extract.describing.items import described_items
from agiqa.extract.describing.spool import Spool
from agiqa.extract.filling.kept import KEPT
from agiqa.heads.evaluation.rating_words import parse_rating_word
from agiqa.progress import said_to
from agiqa.store import open_store, verify
from tests.extract.small_sets import read_table, write_set, write_table
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import (
    roomy,
    write_softcapped_checkpoint,
    write_text_checkpoint,
    write_tiled_checkpoint,
    write_vision_checkpoint,
)
from tests.extract.tiny_vision_models import write_qwen25

SETTINGS = DescriptionSettings(
    describe=GenerationSettings(max_new_tokens=14),
    rate=GenerationSettings(max_new_tokens=6),
    batch_size=3,
    on_bad_item="skip",
)
WRITERS = {
    "text": write_text_checkpoint,
    "vision": write_vision_checkpoint,
    "tiled": write_tiled_checkpoint,
    "rows and columns": write_qwen25,
    "minicpm": write_minicpm_checkpoint,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), 7, images=True)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return roomy(write_text_checkpoint(tmp_path_factory.mktemp("text") / "model", seed=11))


def data_of(folder, backbone):
    return load_data_set(folder, variant="no_id", images=backbone.reads_images, on_bad_item="skip")


def in_one_pass(folder, model, out, *, settings=SETTINGS, variant="id", backbone=None, **options):
    """The result, the store beside `out`, and what was said."""
    backbone, said = backbone or open_backbone(str(model), device="cpu"), []
    extraction = ExtractionSettings(variant=variant, device="cpu", **options)
    with said_to(said.append):
        result = run_stored_descriptions(
            data_of(folder, backbone),
            backbone,
            out,
            out.with_suffix(".agiqa"),
            settings,
            extraction,
            rating_of=parse_rating_word,
            opener=partial(open_backbone, str(model)),
        )
    assert result.extraction.store.is_sealed
    assert not Spool(out.with_suffix(".agiqa"), backbone, variant).folder.exists()
    return result, result.extraction.store, said


def apart(folder, model, out, path, *, variant="id", length=None, **options):
    """The store that is extracted from the descriptions `out`."""
    backbone = open_backbone(str(model), device="cpu")
    about = {"variant": variant, "images": backbone.reads_images, "on_bad_item": "skip"}
    data_set = load_data_set(folder, conversations=[str(out)], **about)
    settings = ExtractionSettings(variant=variant, device="cpu", length=length or LengthRule(), **options)
    return run_extraction(data_set, backbone, path, settings).store


def compare(one, two, *, tolerance):
    """All but the rows is equal, and each row differs by at most `tolerance` of its norm."""
    kept = dict(one.provenance)
    assert kept.pop(KEPT) is True
    assert kept == two.provenance
    assert (one.path / "items.parquet").read_bytes() == (two.path / "items.parquet").read_bytes()
    assert one.geometry == two.geometry
    for name in ("n_tokens", "row_starts", "item_keys"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    here, there = one.read(range(len(one.items))), two.read(range(len(two.items)))
    for name in ("roles", "offsets"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    ids = [zarr.open_group(store.path / "store.zarr", mode="r")["tokens/ids"][:] for store in (one, two)]
    np.testing.assert_array_equal(*ids)
    found, expected = here.float32(), there.float32()
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() <= tolerance
    assert verify(one, "full").sound
    assert verify(one, "numeric").sound


@pytest.mark.parametrize("name", WRITERS)
def test_every_row_is_kept_and_is_the_row_of_a_separate_extraction(name, folder, tmp_path):
    model = roomy(WRITERS[name](tmp_path / "model"))
    for variant in ("id", "full") if name in ("vision", "minicpm") else ("id",):
        out = tmp_path / f"{variant}.jsonl"
        result, store, _ = in_one_pass(folder, model, out, variant=variant)
        assert result.extraction.fill.reused == result.extraction.fill.items == len(store.items) > 3
        assert result.extraction.fill.tokens == 0
        compare(store, apart(folder, model, out, tmp_path / f"{variant}-2.agiqa", variant=variant), tolerance=1e-5)


@pytest.mark.parametrize("variant", ["question", "described", "id", "full"])
def test_every_variant_that_ends_where_describing_does(variant, folder, text_model, tmp_path):
    result, store, _ = in_one_pass(folder, text_model, tmp_path / "o.jsonl", variant=variant)
    assert result.extraction.fill.reused == len(store.items)
    two = apart(folder, text_model, tmp_path / "o.jsonl", tmp_path / "two.agiqa", variant=variant)
    compare(store, two, tolerance=1e-5)
    if variant == "full":
        assert store.provenance["prefixes"] == ["question", "described", "id"]
        one = apart(folder, text_model, tmp_path / "o.jsonl", tmp_path / "id.agiqa").read([0, 1])
        view = store.variant("id").read([0, 1])
        np.testing.assert_allclose(view.float32(), one.float32(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"encoding": "logits"}, {"keep_logits": True}, {"pool_tokens": "mean@answer,last"}]
)
def test_other_rows_than_hidden_states(options, folder, text_model, tmp_path):
    result, store, _ = in_one_pass(folder, text_model, tmp_path / "o.jsonl", **options)
    assert result.extraction.fill.reused == len(store.items)
    two = apart(folder, text_model, tmp_path / "o.jsonl", tmp_path / "two.agiqa", **options)
    compare(store, two, tolerance=1e-5)


@pytest.mark.parametrize("options", [{"encoding": "sketch", "rank": 8}, {"encoding": "int8"}])
def test_a_calibration_reads_training_items_and_the_rows_are_kept_ones(options, folder, text_model, tmp_path):
    result, store, _ = in_one_pass(folder, text_model, tmp_path / "o.jsonl", **options)
    assert result.extraction.fill.reused == len(store.items)
    two = apart(folder, text_model, tmp_path / "o.jsonl", tmp_path / "two.agiqa", **options)
    compare(store, two, tolerance=1e-3 if "rank" in options else 1e-2)  # one step of float16, or of 255


def test_in_bfloat16_rows_differ_by_rounding(folder, tmp_path):
    model = roomy(write_vision_checkpoint(tmp_path / "model", dtype=torch.bfloat16))
    _, store, _ = in_one_pass(folder, model, tmp_path / "o.jsonl")
    assert store.logical_dtype == "bfloat16"
    compare(store, apart(folder, model, tmp_path / "o.jsonl", tmp_path / "two.agiqa"), tolerance=0.03)


def test_rows_that_are_missing_or_damaged_are_computed(folder, tmp_path, monkeypatch):
    model, usual = roomy(write_vision_checkpoint(tmp_path / "model")), Spool.read

    def after_an_accident(spool, item, token_ids):
        for number, path in enumerate(sorted(spool.folder.iterdir())[:2]):
            if spool.folder.with_name("done").exists():
                break
            path.unlink() if number else path.write_bytes(path.read_bytes()[:-1])
        spool.folder.with_name("done").touch()
        return usual(spool, item, token_ids)

    monkeypatch.setattr(Spool, "read", after_an_accident)
    result, store, _ = in_one_pass(folder, model, tmp_path / "o.jsonl")
    assert result.extraction.fill.reused == len(store.items) - 2
    assert result.extraction.fill.tokens > 0
    compare(store, apart(folder, model, tmp_path / "o.jsonl", tmp_path / "two.agiqa"), tolerance=1e-5)


def test_prompts_that_cannot_be_derived_are_read_by_the_model(folder, tmp_path, monkeypatch):
    model = roomy(write_vision_checkpoint(tmp_path / "model"))
    monkeypatch.setattr("agiqa.extract.describing.talks.next_prompt", lambda *_args, **_options: None)
    result, store, _ = in_one_pass(folder, model, tmp_path / "o.jsonl")
    assert result.extraction.fill.reused == 0
    compare(store, apart(folder, model, tmp_path / "o.jsonl", tmp_path / "two.agiqa"), tolerance=1e-5)


def test_items_are_those_that_the_file_gives_to_extract(folder, text_model, tmp_path):
    backbone = open_backbone(str(text_model), device="cpu")
    items, out = data_of(folder, backbone), tmp_path / "o_test.jsonl"  # a name with a split, which items with one beat
    run_descriptions(items, backbone, out, SETTINGS, rating_of=parse_rating_word)
    for variant in ("question", "described", "id", "full"):
        expected = load_data_set(folder, conversations=[str(out)], variant=variant, images=False, on_bad_item="skip")
        found = described_items(items, out, variant=variant, aspect="quality", on_bad_item="skip")
        assert found.items == expected.items
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    lines[2] |= {"answer": "", "response_1": None}
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    name = lines[2]["name"]
    with pytest.raises(DataError, match=f"{name}.*no rating word, which the variant full needs"):
        described_items(items, out, variant="full", aspect="quality")
    left = described_items(items, out, variant="full", aspect="quality", on_bad_item="skip")
    assert name not in [item.name for item in left.items]
    assert len(left.items) == len(lines) - 1
    assert name in left.skipped[-1]


def test_descriptions_of_an_earlier_run_are_read_by_the_model(folder, text_model, tmp_path):
    backbone, out = open_backbone(str(text_model), device="cpu"), tmp_path / "o.jsonl"
    run_descriptions(data_of(folder, backbone), backbone, out, SETTINGS, rating_of=parse_rating_word)
    result, store, _ = in_one_pass(folder, text_model, out)
    assert (result.described, result.extraction.fill.reused) == (0, 0)
    compare(store, apart(folder, text_model, out, tmp_path / "two.agiqa"), tolerance=0.0)


def test_a_store_that_extract_began_stays_one(folder, text_model, tmp_path, monkeypatch):
    out = tmp_path / "o.jsonl"
    in_one_pass(folder, text_model, out)
    first = open_store(out.with_suffix(".agiqa"))
    shutil.rmtree(first.path)
    two = apart(folder, text_model, out, first.path)
    (two.path / "MANIFEST.json").unlink()
    for record in list((two.path / "commits").glob("0*.json"))[:3]:
        record.unlink()
    for name in (out.name, "o.provenance.json"):
        out.with_name(name).unlink()
    monkeypatch.setattr(Spool, "keep", None)  # nothing is kept that will not be read
    result, store, said = in_one_pass(folder, text_model, out)
    assert (result.described, KEPT in store.provenance, result.extraction.fill.reused) == (7, False, 0)
    assert [line for line in said if "was begun by `agiqa extract`, and is finished so" in line]
    assert not [line for line in said if line.startswith("one pass")]


def test_extract_finishes_what_describing_began_and_data_sets_grow(text_model, tmp_path):
    folder, out = write_set(tmp_path / "set", 8, images=True), tmp_path / "o.jsonl"
    whole = read_table(folder)
    write_table(folder, [list(row.values()) for row in whole[:5]])
    _, store, _ = in_one_pass(folder, text_model, out)
    (store.path / "MANIFEST.json").unlink()
    next((store.path / "commits").glob("0*.json")).unlink()
    again = apart(folder, text_model, out, store.path)
    assert again.is_sealed
    assert again.id == store.id
    write_table(folder, [list(row.values()) for row in whole])
    result, grown, _ = in_one_pass(folder, text_model, out)
    assert (result.described, len(grown.items), result.extraction.fill.reused) == (3, 8, 3)
    assert grown.provenance["data_set"]["grown"] == [5]
    rows = apart(folder, text_model, out, tmp_path / "two.agiqa").read(range(8)).float32()
    np.testing.assert_allclose(grown.read(range(8)).float32(), rows, rtol=0, atol=1e-4)


def test_a_store_of_other_settings_is_refused_before_anything_is_described(folder, text_model, tmp_path):
    out = tmp_path / "o.jsonl"
    in_one_pass(folder, text_model, out)
    for name in (out.name, "o.provenance.json"):
        out.with_name(name).unlink()
    other = roomy(write_text_checkpoint(tmp_path / "other", seed=12))
    for model, options, words in (
        (text_model, {"variant": "full"}, "conversation.variant: stored 'id', asked 'full'"),
        (text_model, {"encoding": "logits"}, "encoding: stored 'hidden', asked 'logits'"),
        (text_model, {"encoding": "sketch", "rank": 4}, "rank: stored None, asked 4"),
        (other, {}, "model.files"),
    ):
        with pytest.raises(SettingsConflict, match=f"(?s)o.agiqa exists and was made with .*{words}.*Nothing was desc"):
            in_one_pass(folder, model, out, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.agiqa", "other"]


@pytest.mark.parametrize("left_out", ["image", "rating"])
def test_extract_also_finishes_a_store_without_the_bad_items(left_out, tmp_path):
    folder, out, variant = write_set(tmp_path / "set", 6, images=True), tmp_path / "o.jsonl", "id"
    model = roomy(write_vision_checkpoint(tmp_path / "model"))
    if left_out == "image":
        (folder / "images" / "002.png").write_bytes(b"no image")
    else:
        in_one_pass(folder, model, out)
        shutil.rmtree(out.with_suffix(".agiqa"))
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        lines[2] |= {"answer": "", "response_1": None}
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        variant = "full"
    _, store, _ = in_one_pass(folder, model, out, variant=variant, length=LengthRule(on_bad_item="skip"))
    assert len(store.items) == 5
    (store.path / "MANIFEST.json").unlink()
    next((store.path / "commits").glob("0*.json")).unlink()
    again = apart(folder, model, out, store.path, variant=variant, length=LengthRule(on_bad_item="skip"))
    assert (again.is_sealed, again.id) == (True, store.id)


@pytest.mark.parametrize("before", [3, 7])
def test_the_estimate_leaves_out_what_is_described_already(before, folder, text_model, tmp_path):
    backbone, out = open_backbone(str(text_model), device="cpu"), tmp_path / "o.jsonl"
    data_set = data_of(folder, backbone)
    items = replace(data_set, items=data_set.items[:before])
    run_descriptions(items, backbone, out, SETTINGS, rating_of=parse_rating_word)
    result, _, said = in_one_pass(folder, text_model, out)
    assert result.described == 7 - before
    told = [line.partition(" are not read again")[0] for line in said if line.startswith("one pass")]
    assert told == (["one pass: 4 conversations"] if before == 3 else [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "no_id"}, "--variant no_id is another conversation"),
        ({"variant": "id:quality+correspondence"}, "conversations OUT.jsonl --variant id:quality\\+correspondence`"),
        ({"variant": "fulll"}, "No conversation variant is called 'fulll'. Did you mean 'full'"),
        ({"layers": "1,last"}, "--layers names 1,last"),
        ({"devices": 2}, "on one device"),
        ({"rank": 4}, "--rank and --basis belong to --encoding sketch"),
    ],
)
def test_what_needs_a_second_pass_is_refused(options, words, folder, text_model, tmp_path):
    with pytest.raises((ConfigError, UnknownName), match=words):
        in_one_pass(folder, text_model, tmp_path / "o.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_answers_in_batches_is_refused(folder, tmp_path):
    model = roomy(write_softcapped_checkpoint(tmp_path / "model"))
    with pytest.raises(ModelError, match="cannot hand out its hidden states while it describes: it cannot answer in"):
        in_one_pass(folder, model, tmp_path / "o.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_worker_processes_serve_both_parts(folder, tmp_path):
    model = roomy(write_vision_checkpoint(tmp_path / "model"))
    result, store, _ = in_one_pass(folder, model, tmp_path / "o.jsonl", workers=2)
    assert result.extraction.fill.reused == len(store.items)
    compare(store, apart(folder, model, tmp_path / "o.jsonl", tmp_path / "two.agiqa"), tolerance=1e-5)
