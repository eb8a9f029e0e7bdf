"""Estimates of memory, against counted parameters and what an H100 measured; and what is chosen by them."""

from dataclasses import replace

import pytest

from agiqa.bench.measurements.random_models import SHAPES
from agiqa.extract.tuning.adapting import adapt
from agiqa.extract.tuning.estimates import (
    GB,
    Counts,
    Load,
    estimate,
    recipes_that_fit,
    settled,
)
from agiqa.extract.tuning.recipes import recipe_of, summaries
from tests.extract.tuning.talks import opener_for, quick

ITEM = Load(tokens=512, labels=160, patches=3072)
"""About that of the measurements: an image in three slices of 32 x 32 patches, three quarters of the text counted."""
MEASURED = {
    ("published", "all", 1): 35.2,
    ("published", "none", 1): 40.9,
    ("published", "all", 4): 33.2,
    ("published", "none", 4): 57.9,
    ("no-embeddings", "all", 1): 26.9,
    ("no-embeddings", "none", 1): 33.6,
    ("light", "all", 1): 18.5,
    ("light", "none", 1): 21.5,
    ("light", "all", 16): 22.3,
    ("light", "none", 16): 68.1,
}
"""GB at most that `python -m agiqa.bench.measurements.tuning` measured on an H100, eager, by recipe, recomputation and
items per forward pass (bench/LOG.md)."""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """MiniCPM-Llama3-V-2.5 in its real shape, without weights, as on a GPU."""
    backbone = SHAPES["minicpm-8b"](tmp_path_factory.mktemp("real"), device="cpu")
    backbone.logical_dtype = "bfloat16"
    return backbone


@pytest.mark.parametrize("name", list(summaries()))
def test_counts_are_those_of_the_adapted_model(minicpm, name):
    backbone = opener_for(minicpm)(device="cpu")
    backbone.load()
    recipe = quick(name)
    counts = Counts.of(backbone, recipe, backbone.empty_model())
    trained = adapt(backbone, recipe, seed=0)
    sizes = {key: weight.numel() for key, weight in trained.model.named_parameters()}
    assert counts.trained == sum(sizes[key] for key in trained.parameters)
    assert counts.lora == sum(size for key, size in sizes.items() if ".lora_" in key)
    assert counts.frozen == sum(size for key, size in sizes.items() if key not in trained.parameters)
    tables = ("llm.model.embed_tokens.weight", "vpm.embeddings.position_embedding.weight")
    assert counts.tables == sum(sizes[key] for key in tables if key in trained.parameters)


@pytest.mark.parametrize(
    ("name", "trained", "lowest", "highest"),
    [("published", 1.087e9, 35, 40), ("no-embeddings", 0.561e9, 27, 31), ("light", 0.0545e9, 19, 23)],
)
def test_the_real_shape(real, name, trained, lowest, highest):
    found = estimate(real, recipe_of(name), ITEM, checkpointing="all")
    assert found.counts.trained == pytest.approx(trained, rel=1e-3)
    assert lowest < found.total / 1e9 < highest
    kept = [estimate(real, recipe_of(name), ITEM, checkpointing=which).total for which in ("all", "vision", "none")]
    assert kept == sorted(kept)


def test_recipes_that_fit(real):
    assert list(recipes_that_fit(real, ITEM, 24e9)) == ["light"]
    assert list(recipes_that_fit(real, ITEM, 32e9)) == ["no-embeddings", "light"]
    assert list(recipes_that_fit(real, ITEM, None)) == list(summaries())
    assert list(recipes_that_fit(real, ITEM, 8e9)) == []


def test_a_text_model_has_fewer_recipes(llama):
    assert list(recipes_that_fit(opener_for(llama)(device="cpu"), ITEM, None)) == ["light"]


@pytest.mark.parametrize(("case", "measured"), MEASURED.items())
def test_estimates_are_a_little_above_what_was_measured(real, case, measured):
    name, which, items = case
    recipe = recipe_of(name, {"micro_batch": items, "batch_size": max(items, 2)})  # as in that measurement
    found = estimate(real, recipe, ITEM.times(items), checkpointing=which).total / GB
    assert measured <= found <= 1.2 * measured


@pytest.mark.parametrize(
    ("name", "batch_size", "memory", "expected"),
    [
        ("published", 2, 85, (2, "none")),
        ("published", 16, 85, (8, "vision")),
        ("published", 2, 43, (2, "all")),
        ("light", 16, 85, (16, "none")),
        ("light", 2, 25.7, (2, "all")),
        ("published", 2, 25.7, (1, "all")),  # does not fit anyway; the least memory is tried
        ("published", 2, None, (1, "none")),
    ],
)
def test_choices_by_memory(real, name, batch_size, memory, expected):
    recipe = replace(recipe_of(name), batch_size=batch_size)
    chosen = settled(real, recipe, ITEM, steps=2000, memory=None if memory is None else memory * GB)
    assert (chosen.micro_batch, chosen.checkpointing) == expected
    assert chosen.compile == ("never" if memory is None else "always")


def test_what_the_recipe_says_is_not_chosen_again(real):
    recipe = replace(recipe_of("light"), micro_batch=3, checkpointing="vision", compile="never")
    assert settled(real, recipe, ITEM, steps=2000, memory=85 * GB) == recipe
    always = replace(recipe, compile="always")
    assert settled(real, always, ITEM, steps=1, memory=None) == always


def test_short_trainings_are_not_compiled(real):
    assert settled(real, recipe_of("light"), ITEM, steps=99, memory=85 * GB).compile == "never"


def test_devices_share_a_batch(real):
    recipe = replace(recipe_of("light"), batch_size=8)
    assert settled(real, recipe, ITEM, steps=9, memory=85 * GB, devices=4).micro_batch == 2
