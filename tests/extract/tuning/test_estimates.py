"""Estimates of memory against what an H100 measured, and what is chosen by them."""

from dataclasses import replace

import pytest

from agiqa.bench.measurements.random_models import SHAPES
from agiqa.extract.tuning.estimates import GB, Load, estimate, settled
from agiqa.extract.tuning.recipes import recipe_of

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
def backbone(tmp_path_factory):
    """MiniCPM-Llama3-V-2.5 in its real shape; nothing here loads weights."""
    one = SHAPES["minicpm-8b"](tmp_path_factory.mktemp("model"), device="cpu")
    one.logical_dtype = "bfloat16"
    return one


@pytest.mark.parametrize(("case", "measured"), MEASURED.items())
def test_estimates_are_a_little_above_what_was_measured(backbone, case, measured):
    name, which, items = case
    found = estimate(backbone, recipe_of(name), ITEM.times(items), checkpointing=which).total / GB
    assert measured <= found <= 1.2 * measured


@pytest.mark.parametrize(
    ("name", "batch_size", "memory", "expected"),
    [
        ("published", 2, 85, (2, "none")),
        ("published", 16, 85, (8, "vision")),
        ("published", 2, 43, (2, "all")),
        ("light", 16, 85, (8, "none")),
        ("light", 2, 25.7, (2, "all")),
        ("published", 2, 25.7, (1, "all")),  # does not fit anyway; the least memory is tried
        ("published", 2, None, (1, "none")),
    ],
)
def test_choices_by_memory(backbone, name, batch_size, memory, expected):
    recipe = replace(recipe_of(name), batch_size=batch_size)
    chosen = settled(backbone, recipe, ITEM, steps=2000, memory=None if memory is None else memory * GB)
    assert (chosen.micro_batch, chosen.checkpointing) == expected
    assert chosen.compile == ("never" if memory is None else "always")


def test_what_the_recipe_says_is_not_chosen_again(backbone):
    recipe = replace(recipe_of("light"), micro_batch=3, checkpointing="vision", compile="never")
    assert settled(backbone, recipe, ITEM, steps=2000, memory=85 * GB) == recipe
    always = replace(recipe, compile="always")
    assert settled(backbone, always, ITEM, steps=1, memory=None) == always


def test_short_trainings_are_not_compiled(backbone):
    assert settled(backbone, recipe_of("light"), ITEM, steps=99, memory=85 * GB).compile == "never"


def test_devices_share_a_batch(backbone):
    recipe = replace(recipe_of("light"), batch_size=8)
    assert settled(backbone, recipe, ITEM, steps=9, memory=85 * GB, devices=4).micro_batch == 2
