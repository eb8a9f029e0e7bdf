import numpy as np
import pytest

from agiqa.bench.demo.prompts import COLOURS, KINDS, STYLES, all_scenes, capacity, choose_scenes, with_errors
from agiqa.bench.demo.scenes import PAINTERS, paint
from agiqa.bench.demo.styles import STYLISTS, in_style
from agiqa.errors import ConfigError


def test_every_scene_has_a_prompt_of_its_own() -> None:
    prompts = [scene.prompt() for kind in KINDS for scene in all_scenes(kind)]
    assert len(set(prompts)) == len(prompts) == capacity()


def test_chosen_scenes_are_distinct_and_varied() -> None:
    scenes = choose_scenes(80, seed=1)
    assert len({scene.prompt() for scene in scenes}) == 80
    assert {scene.kind for scene in scenes} == set(KINDS)
    assert {scene.style for scene in scenes} == set(STYLES)
    assert len({scene.colour for scene in scenes}) == len(COLOURS)
    pairs = {(scene.kind, scene.style) for scene in scenes}
    assert len(pairs) == len(KINDS) * len(STYLES)


def test_all_scenes_can_be_chosen() -> None:
    assert len({scene.prompt() for scene in choose_scenes(capacity(), seed=0)}) == capacity()


def test_more_prompts_than_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"allow {capacity()}"):
        choose_scenes(capacity() + 1, seed=0)


def test_prompts_are_english() -> None:
    prompts = [scene.prompt() for scene in all_scenes("sea")]
    assert "an orange sailboat on a calm sea at sunset, oil painting" in prompts
    assert "three red sailboats on a calm sea at dawn, watercolour style" in prompts


def test_content_errors_grow_with_their_severity() -> None:
    scene = choose_scenes(1, seed=0)[0]
    rng = np.random.default_rng(0)
    fields = ("count", "colour", "setting")
    wrong = [
        sum(getattr(with_errors(scene, severity, rng), field) != getattr(scene, field) for field in fields)
        for severity in (0.0, 0.1, 0.3, 0.5, 0.8)
    ]
    assert wrong == [0, 0, 1, 2, 3]
    assert with_errors(scene, 0.95, rng).count == 0


@pytest.mark.parametrize("kind", sorted(PAINTERS))
def test_a_painter_obeys_its_scene_and_its_seed(kind: str) -> None:
    scenes = {(scene.count, scene.colour): scene for scene in all_scenes(kind) if scene.style == "photo"}
    red, blue = scenes[2, "red"], scenes[2, "blue"]

    def picture(scene, seed):
        return paint(scene, np.random.default_rng(seed)).astype(int)

    assert np.array_equal(picture(red, 0), picture(red, 0))
    assert not np.array_equal(picture(red, 0), picture(red, 1))
    # The same strokes in another colour: what was red is now blue.
    difference = (picture(red, 0) - picture(blue, 0)).mean((0, 1))
    assert difference[0] > 0.3
    assert difference[2] < -0.3


def test_every_style_changes_the_picture_in_its_own_way() -> None:
    scene = all_scenes("hills")[0]
    plain = paint(scene, np.random.default_rng(0))
    styled = {style: in_style(plain, style, np.random.default_rng(1)) for style in STYLISTS}
    assert set(STYLISTS) == set(STYLES)
    versions = [plain, *styled.values()]
    for index, one in enumerate(versions):
        assert one.shape == plain.shape
        assert one.dtype == np.uint8
        for other in versions[:index]:
            assert np.abs(one.astype(int) - other).mean() > 2
