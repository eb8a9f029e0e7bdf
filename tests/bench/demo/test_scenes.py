import numpy as np
import pytest

from agiqa.bench.demo.scenes import COLOURS, KINDS, SCENES, SIDE, STYLES, Scene, choose_scenes, draw, with_errors
from agiqa.errors import ConfigError


def test_every_scene_has_a_prompt_of_its_own() -> None:
    assert len({scene.prompt() for scene in SCENES}) == len(SCENES)


def test_chosen_scenes_are_distinct_and_varied() -> None:
    scenes = choose_scenes(80, seed=1)
    assert len({scene.prompt() for scene in scenes}) == 80
    assert {scene.kind for scene in scenes} == set(KINDS)
    assert {scene.style for scene in scenes} == set(STYLES)
    assert len({scene.colour for scene in scenes}) == len(COLOURS)
    pairs = {(scene.kind, scene.style) for scene in scenes}
    assert len(pairs) == len(KINDS) * len(STYLES)


def test_all_scenes_can_be_chosen() -> None:
    assert len({scene.prompt() for scene in choose_scenes(len(SCENES), seed=0)}) == len(SCENES)


def test_more_prompts_than_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"has {len(SCENES)} different prompts"):
        choose_scenes(len(SCENES) + 1, seed=0)


def test_prompts_are_english() -> None:
    prompts = [scene.prompt() for scene in SCENES]
    assert "an orange sailboat on a calm sea at sunset, photograph" in prompts
    assert "three red sailboats on a calm sea at dawn, watercolour style" in prompts


def test_content_errors_grow_with_their_severity() -> None:
    scene = choose_scenes(1, seed=0)[0]
    rng = np.random.default_rng(0)
    fields = ("count", "colour", "sky")
    wrong = [
        sum(getattr(with_errors(scene, severity, rng), field) != getattr(scene, field) for field in fields)
        for severity in (0.0, 0.1, 0.3, 0.5, 0.8)
    ]
    assert wrong == [0, 0, 1, 2, 3]
    assert with_errors(scene, 0.95, rng).count == 0


def drawn_scene(kind: str, colour: str = "red", style: str = "photo", seed: int = 0) -> np.ndarray:
    scene = Scene(kind=kind, count=2, colour=colour, sky="at dawn", style=style)
    return draw(scene, np.random.default_rng(seed)).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_obeys_its_scene_and_its_seed(kind: str) -> None:
    red, blue = drawn_scene(kind, "red"), drawn_scene(kind, "blue")
    assert np.array_equal(red, drawn_scene(kind, "red"))
    assert not np.array_equal(red, drawn_scene(kind, "red", seed=1))
    # The same strokes in another colour: what was red is now blue.
    difference = (red - blue).mean((0, 1))
    assert difference[0] > 0.3
    assert difference[2] < -0.3


def test_every_style_draws_in_its_own_way() -> None:
    versions = [drawn_scene("hills", style=style) for style in STYLES]
    for index, one in enumerate(versions):
        assert one.shape == (SIDE, SIDE, 3)
        assert 0 <= one.min() < one.max() <= 255
        for other in versions[:index]:
            assert np.abs(one - other).mean() > 2
