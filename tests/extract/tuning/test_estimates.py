"""Estimates of memory, against parameters counted by hand and the numbers of method.md for the real shape."""

import pytest

from agiqa.bench.measurements.random_models import SHAPES
from agiqa.extract.tuning.adapting import adapt
from agiqa.extract.tuning.estimates import (
    Counts,
    Load,
    chosen_checkpointing,
    estimate,
    recipes_that_fit,
)
from agiqa.extract.tuning.recipes import recipe_of, summaries
from tests.extract.tuning.talks import opener_for, quick

LOAD = Load(tokens=512, labels=200, patches=3 * 1024)


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
    found = estimate(real, recipe_of(name), LOAD, checkpointing="all")
    assert found.counts.trained == pytest.approx(trained, rel=1e-3)
    assert lowest < found.total / 1e9 < highest
    kept = [estimate(real, recipe_of(name), LOAD, checkpointing=which).total for which in ("all", "vision", "none")]
    assert kept == sorted(kept)


def test_recipes_that_fit(real):
    assert list(recipes_that_fit(real, LOAD, 24e9)) == ["light"]
    assert list(recipes_that_fit(real, LOAD, 32e9)) == ["no-embeddings", "light"]
    assert list(recipes_that_fit(real, LOAD, None)) == list(summaries())
    assert list(recipes_that_fit(real, LOAD, 8e9)) == []


def test_a_text_model_has_fewer_recipes(llama):
    assert list(recipes_that_fit(opener_for(llama)(device="cpu"), LOAD, None)) == ["light"]


def test_nothing_is_recomputed_on_a_cpu_unless_asked_for(minicpm):
    backbone = opener_for(minicpm)(device="cpu")
    assert chosen_checkpointing(backbone, recipe_of("published"), LOAD) == "none"
    assert chosen_checkpointing(backbone, recipe_of("published", {"checkpointing": "all"}), LOAD) == "all"
