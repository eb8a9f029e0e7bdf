"""Stores read as shorter conversations: the rows of a separate extraction, and what is left out or refused."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from agiqa.errors import SettingsConflict, ViewRefused
from agiqa.extract import ExtractionSettings, LengthRule, open_backbone, run_extraction
from agiqa.extract.data.templates import prefixes_of
from agiqa.progress import said_to
from agiqa.store import open_store, sketch_store, union, verify
from agiqa.store.deriving.calibrating import basis_from
from tests.extract.jobs import extract, inputs
from tests.extract.small_sets import COLUMNS, read_table, write_set, write_table, write_talks
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import (
    make_tokenizer,
    roomy,
    save,
    widths,
    write_text_checkpoint,
    write_vision_checkpoint,
)
from tests.extract.tiny_vision_models import write_qwen25

SEVERAL = "full:quality+correspondence"


def rated_set(folder, count=4, *, images=False):
    """Rows with descriptions of two aspects and a rating word."""
    write_set(folder, count, images=images)
    rows = [[*row.values(), f"it fits {row['prompt']}", "good"] for row in read_table(folder)]
    return write_table(
        folder, rows, columns=[*COLUMNS[:-1], "description_quality", "description_correspondence", "rating"]
    )


def compare(view, separate, *, tolerance):
    """The relative difference of the rows in the Frobenius norm, at most `tolerance`; everything else is equal."""
    items = range(len(view.n_tokens))
    here, there = view.read(items), separate.read(items)
    np.testing.assert_array_equal(here.offsets, there.offsets)
    np.testing.assert_array_equal(here.roles, there.roles)
    np.testing.assert_array_equal(view.n_tokens, separate.n_tokens)
    assert (view.encoding, view.width, view.lm_head_sha256) == (
        separate.encoding,
        separate.width,
        separate.lm_head_sha256,
    )
    assert view.provenance["conversation"] == separate.provenance["conversation"]
    assert view.items.text_authors == separate.items.text_authors
    assert view.items.descriptions == separate.items.descriptions
    np.testing.assert_array_equal(view.item_keys, separate.item_keys)
    error = np.linalg.norm(here.float32() - there.float32()) / np.linalg.norm(there.float32())
    assert error <= tolerance
    return error


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return roomy(write_text_checkpoint(tmp_path_factory.mktemp("text") / "model"))


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    return rated_set(tmp_path_factory.mktemp("rated") / "set")


@pytest.fixture(scope="module")
def full(rated, text_model, tmp_path_factory):
    return extract(rated, text_model, tmp_path_factory.mktemp("full") / "full.agiqa", variant="full").store


@pytest.mark.parametrize("whole", ["full", SEVERAL, "id:quality+correspondence", "described"])
def test_views_hold_what_separate_extractions_hold(whole, rated, text_model, tmp_path):
    store = extract(rated, text_model, tmp_path / "whole.agiqa", variant=whole).store
    names = list(prefixes_of(whole, "quality"))
    assert store.provenance["prefixes"] == names
    for name in names:
        separate = extract(rated, text_model, tmp_path / f"{name.replace(':', '-')}.agiqa", variant=name).store
        compare(store.variant(name), separate, tolerance=1e-6)
    assert store.variant(whole) is store


@pytest.mark.parametrize("write", [write_vision_checkpoint, write_qwen25, write_minicpm_checkpoint])
def test_views_of_models_that_read_images(write, tmp_path):
    folder, model = write_set(tmp_path / "set", 3, images=True), roomy(write(tmp_path / "model"))
    write_talks(folder)
    store = extract(folder, model, tmp_path / "full.agiqa", variant="full").store
    for name in ("question", "described", "id"):
        separate = extract(folder, model, tmp_path / f"{name}.agiqa", variant=name).store
        compare(store.variant(name), separate, tolerance=1e-6 if store.logical_dtype == "float32" else 0.02)


def test_views_in_bfloat16_differ_by_rounding(rated, tmp_path):
    model = roomy(write_text_checkpoint(tmp_path / "model", dtype=torch.bfloat16))
    store = extract(rated, model, tmp_path / "full.agiqa", variant="full").store
    for name in ("question", "id"):
        separate = extract(rated, model, tmp_path / f"{name}.agiqa", variant=name).store
        compare(store.variant(name), separate, tolerance=0.01)


def test_truncated_items_have_truncated_views(rated, text_model, full, tmp_path):
    shortest = int(full.variant("question").n_tokens.min())
    rule = LengthRule(max_tokens=shortest + 5, truncate=True)
    store = extract(rated, text_model, tmp_path / "full.agiqa", variant="full", length=rule).store
    for name in ("question", "id"):
        separate = extract(rated, text_model, tmp_path / f"{name}.agiqa", variant=name, length=rule).store
        compare(store.variant(name), separate, tolerance=1e-6)


ENDS_OTHERWISE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}</s>\n{% endfor %}"
)
"""Writes an empty thought into the last answer, as Qwen3 does."""


def test_a_view_whose_tokens_the_template_changes_is_left_out(rated, tmp_path):
    model, said = roomy(write_text_checkpoint(tmp_path / "model", template=ENDS_OTHERWISE)), []
    with said_to(said.append):
        store = extract(rated, model, tmp_path / "full.agiqa", variant="full").store
    assert store.provenance["prefixes"] == ["question", "id"]
    assert [line for line in said if "cannot be read as 'described'" in line and "4 of 4 items" in line]
    with pytest.raises(ViewRefused, match="only with question, id"):
        store.variant("described")
    compare(store.variant("id"), extract(rated, model, tmp_path / "id.agiqa").store, tolerance=1e-6)


def test_a_model_that_reads_later_tokens_has_no_views(rated, tmp_path):
    tokenizer = make_tokenizer()
    config = Gemma3TextConfig(**widths(len(tokenizer)), head_dim=16, use_bidirectional_attention=True)
    model, said = roomy(save(tmp_path / "model", Gemma3ForCausalLM, config, tokenizer)), []
    with said_to(said.append):
        store = extract(rated, model, tmp_path / "full.agiqa", variant="full").store
    assert "prefixes" not in store.provenance
    assert any("does not read from left to right only" in line for line in said)
    with pytest.raises(ViewRefused, match=r"without views of shorter conversations\. Extract with --variant id"):
        store.variant("id")


def test_other_variants_are_refused_with_the_reason(full, rated, text_model, tmp_path):
    with pytest.raises(ViewRefused, match="`no_id` asks one question in other words"):
        full.variant("no_id")
    several = extract(rated, text_model, tmp_path / "several.agiqa", variant=SEVERAL).store
    with pytest.raises(ViewRefused, match="After the first description, `id` has the rating question"):
        several.variant("id")
    question = extract(rated, text_model, tmp_path / "question.agiqa", variant="question").store
    with pytest.raises(ViewRefused, match="with no shorter one"):
        question.variant("id")
    with pytest.raises(ViewRefused, match="only with question, described, id"):
        full.variant(SEVERAL)


def test_a_store_that_is_only_planned_is_filled_without_views(rated, text_model, tmp_path):
    path = tmp_path / "full.agiqa"
    extract(rated, text_model, path, variant="full", plan_only=True)
    store = extract(rated, text_model, path, variant="full").store
    with pytest.raises(ViewRefused, match="without views of shorter conversations"):
        store.variant("id")


def test_pooled_rows_have_no_views(rated, text_model, tmp_path):
    store = extract(rated, text_model, tmp_path / "full.agiqa", variant="full", pool_tokens="mean@answer").store
    with pytest.raises(ViewRefused, match="without views"):
        store.variant("id")


def test_layers_have_views(rated, text_model, tmp_path):
    store = extract(rated, text_model, tmp_path / "full.agiqa", variant="full", layers="1,last").store
    separate = extract(rated, text_model, tmp_path / "id.agiqa", variant="id", layers="1,last").store
    items = range(len(separate.n_tokens))
    for layer in ("1", "1+last"):
        view, there = store.variant("id").layer(layer), separate.layer(layer)
        assert view.width == there.width
        np.testing.assert_allclose(view.read(items).float32(), there.read(items).float32(), rtol=1e-5, atol=1e-5)
    assert store.variant("id").layer("1").id not in (store.layer("1").id, store.variant("described").layer("1").id)


def test_growing_keeps_the_views(text_model, tmp_path):
    path, folder = tmp_path / "full.agiqa", tmp_path / "set"
    extract(rated_set(folder, 3), text_model, path, variant="full")
    store = extract(rated_set(folder, 5), text_model, path, variant="full").store
    separate = extract(folder, text_model, tmp_path / "id.agiqa", variant="id").store
    order = [separate.items.names.index(name) for name in store.items.names]
    view = store.variant("id")
    np.testing.assert_array_equal(view.n_tokens, separate.n_tokens[order])
    np.testing.assert_allclose(view.read(range(5)).float32(), separate.read(order).float32(), rtol=1e-4, atol=1e-5)
    assert verify(store, "full").sound


def test_new_items_must_have_the_views_of_the_store(tmp_path):
    template = ENDS_OTHERWISE.replace("loop.last", "loop.last and message['content'][:4] == 'odd '")
    model, folder, path = tmp_path / "model", tmp_path / "set", tmp_path / "full.agiqa"
    roomy(write_text_checkpoint(model, template=template))
    extract(rated_set(folder, 4), model, path, variant="full")
    rows = [list(row.values()) for row in read_table(folder)]
    odd = ["odd.png", "a picture", 2.5, "train", "odd words", "it fits", "good"]
    header = [*COLUMNS[:-1], "description_quality", "description_correspondence", "rating"]
    write_table(folder, [*rows, odd], columns=header)
    with pytest.raises(SettingsConflict, match=r"can be read as 'described', and the first tokens of 1 of 5 items"):
        extract(folder, model, path, variant="full")


@pytest.mark.parametrize("other", ["id", "question", SEVERAL])
def test_another_variant_at_the_path_of_a_store_is_refused(other, full, rated, text_model):
    with pytest.raises(SettingsConflict, match=f"conversation.variant: stored 'full', asked '{re.escape(other)}'"):
        extract(rated, text_model, full.path, variant=other)


def test_a_tap_has_no_views(tmp_path):
    folder, model = write_set(tmp_path / "set", 3, images=True), write_vision_checkpoint(tmp_path / "model")
    write_talks(folder)
    data_set, _ = inputs(folder, model, variant="full")
    tapped = open_backbone(str(model), device="cpu", tap="projector")
    settings = ExtractionSettings(variant="full")
    store = run_extraction(data_set, tapped, tmp_path / "tap.agiqa", settings).store
    assert "prefixes" not in store.provenance
    extract(folder, model, tmp_path / "full.agiqa", variant="full")
    with pytest.raises(SettingsConflict, match="tap: stored None, asked 'projector'"):
        run_extraction(data_set, tapped, tmp_path / "full.agiqa", settings)


def test_sketches_int8_and_unions_have_views(full, rated, text_model, tmp_path):
    separate = extract(rated, text_model, tmp_path / "id.agiqa", variant="id").store
    basis, items = basis_from(full, 6), range(4)
    sketch = sketch_store(full, tmp_path / "sketch.agiqa", basis=basis).store
    there = sketch_store(separate, tmp_path / "id-sketch.agiqa", basis=basis).store
    np.testing.assert_allclose(
        sketch.variant("id").read(items).float32(), there.read(items).float32(), rtol=1e-3, atol=1e-3
    )
    small = extract(rated, text_model, tmp_path / "int8.agiqa", variant="full", encoding="int8").store
    exact = full.variant("id").read(items).float32()
    error = np.linalg.norm(small.variant("id").read(items).float32() - exact) / np.linalg.norm(exact)
    assert error < 0.02
    other = extract(rated_set(tmp_path / "other", 3), text_model, tmp_path / "other.agiqa", variant="id").store
    with pytest.raises(ValueError, match="same image and conversation"):
        union([separate, other])
    with pytest.raises(ValueError, match="same image and conversation"):
        union([full, other]).variant("id")
    others = write_set(tmp_path / "x", 3, seed=1)
    joined = union([full, extract(others, text_model, tmp_path / "x.agiqa", variant="id").store])
    view = joined.variant("id")
    assert view.parts[1][0].id == open_store(tmp_path / "x.agiqa").id
    np.testing.assert_array_equal(view.n_tokens[:4], full.variant("id").n_tokens)


def test_the_author_of_a_view_is_that_of_its_texts(text_model, tmp_path):
    folder = write_set(tmp_path / "set", 4)
    talks = write_talks(folder)
    entries = json.loads(talks.read_text())
    for entry in entries:
        entry |= {"response_0": entry["conversations"][1]["content"], "text_author": "teacher"}
    talks.write_text(json.dumps(entries))
    store = extract(folder, text_model, tmp_path / "full.agiqa", variant="full").store
    assert store.items.text_authors == ["teacher"] * 4
    assert store.variant("id").items.text_authors == ["model"] * 4
    assert store.variant("question").items.text_authors == []
