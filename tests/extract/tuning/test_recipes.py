"""Recipes: those that are shipped, a user's own, single changes, and everything that is refused."""

import pytest

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.tuning.recipes import recipe_of, summaries


def test_the_published_recipe_is_that_of_paper_and_adapters():
    recipe = recipe_of("published").as_dict()
    expected = {"rank": 64, "alpha": 64, "dropout": 0.05, "lr": 2e-6, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
    expected |= {"schedule": "cosine", "warmup": 0.01, "batch_size": 2, "adapts": "attention"}
    expected |= {"trains": ["vision", "projector", "embeddings"]}
    assert {key: recipe[key] for key in expected} == expected


def test_every_shipped_recipe_can_be_made():
    trains = {name: recipe_of(name).trains for name in summaries()}
    assert trains == {
        "published": ("vision", "projector", "embeddings"),
        "no-embeddings": ("vision", "projector"),
        "light": (),
    }


def test_a_file_with_a_base_and_changes_for_one_run(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: light\nlr: 3e-5\nepochs: 2\n")
    recipe = recipe_of(str(path), {"rank": 8, "steps": 5})
    assert (recipe.name, recipe.lr, recipe.rank, recipe.steps, recipe.epochs) == ("mine", 3e-5, 8, 5, None)
    assert recipe_of(str(path)).epochs == 2
    assert recipe_of(str(path)).steps is None


@pytest.mark.parametrize(
    ("text", "error", "expected"),
    [
        ("base: lite\n", UnknownName, "Did you mean 'light'"),
        ("learning_rate: 1\nadapts: attention\n", UnknownName, "No setting of a recipe is called 'learning_rate'"),
        ("rank: 4\nsteps: 3\n", ConfigError, "says nothing of `adapts`"),
        ("base: light\nrank: many\n", ConfigError, "rank is 'many'; expected int"),
        ("base: light\nrank: true\n", ConfigError, "rank is True; expected int"),
        ("base: light\nrank: 2.5\n", ConfigError, "rank is 2.5; expected int"),
        ("base: light\ntrains: vision\n", ConfigError, "trains is 'vision'; expected a list of names"),
        ("base: light\nsteps: null\n", ConfigError, "needs either steps or epochs"),
        ("base: light\nsteps: 3\nepochs: 1\n", ConfigError, "needs either steps or epochs"),
        ("- light\n", ConfigError, "found list"),
        ("a: [\n", ConfigError, "cannot be read as YAML"),
    ],
)
def test_files_that_are_refused(tmp_path, text, error, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(error, match=expected):
        recipe_of(str(path))


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"ranc": 4}, UnknownName, "Did you mean 'rank'"),
        ({"name": "x"}, UnknownName, "No setting of a recipe"),
        ({"lr": 0}, ConfigError, "lr is 0.0; it must be more than 0"),
        ({"lr": float("inf")}, ConfigError, "lr is inf; it must be more than 0"),
        ({"adapts": "(["}, ConfigError, "no regular expression"),
        ({"trains": ["vision", "(["]}, ConfigError, "no regular expression"),
        ({"dropout": 1}, ConfigError, "at least 0 and below 1"),
        ({"clip": -1}, ConfigError, "more than 0, or null"),
        ({"schedule": "cosin"}, UnknownName, "Did you mean 'cosine'"),
        ({"checkpointing": "everything"}, UnknownName, "No checkpointing"),
    ],
)
def test_changes_that_are_refused(changes, error, expected):
    with pytest.raises(error, match=expected):
        recipe_of("published", changes)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'published'"):
        recipe_of("publishd")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        recipe_of("absent.yaml")
