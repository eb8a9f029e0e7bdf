import numpy as np
import pytest
from scipy import ndimage, stats

from agiqa.bench.demo.images import (
    ASPECTS,
    DEGRADATIONS,
    FLAWS,
    GENERATORS,
    RATINGS,
    Panel,
    degrade,
    draw_severities,
    merit,
)
from agiqa.bench.demo.scenes import Scene, draw

SEVERITIES = (0.1, 0.3, 0.5, 0.7, 1.0)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    scene = Scene(kind="field", count=4, colour="red", sky="at noon", style="photo")
    return draw(scene, np.random.default_rng(0))


def fine_energy(pixels: np.ndarray) -> float:
    grey = pixels.mean(2)
    return float(np.var(grey - ndimage.gaussian_filter(grey, 1)))


def graded(picture: np.ndarray, fault: str) -> list[np.ndarray]:
    return [degrade(picture, {fault: severity}, np.random.default_rng(5)) for severity in SEVERITIES]


@pytest.mark.parametrize("fault", sorted(DEGRADATIONS))
def test_more_severe_is_farther_from_the_original(picture: np.ndarray, fault: str) -> None:
    distances = [np.abs(spoiled.astype(float) - picture).mean() for spoiled in graded(picture, fault)]
    assert distances[0] > 0
    assert distances == sorted(distances)
    assert distances[-1] > 2 * distances[0]


def test_blur_takes_fine_detail_away_and_noise_adds_it(picture: np.ndarray) -> None:
    blurred = [fine_energy(spoiled) for spoiled in [picture, *graded(picture, "blur")]]
    noisy = [fine_energy(spoiled) for spoiled in [picture, *graded(picture, "noise")]]
    assert blurred == sorted(blurred, reverse=True)
    assert blurred[-1] < 0.01 * blurred[0]
    assert noisy == sorted(noisy)


def test_compression_cuts_the_picture_into_blocks_of_eight(picture: np.ndarray) -> None:
    spoiled = graded(picture, "compression")[-1].mean(2)
    steps = np.abs(np.diff(spoiled, axis=1)).mean(0)
    inside = np.delete(steps, np.arange(7, len(steps), 8))
    assert steps[7::8].mean() > 2 * inside.mean()


def test_nothing_wrong_changes_nothing(picture: np.ndarray) -> None:
    assert np.array_equal(degrade(picture, {}, np.random.default_rng(0)), picture)
    assert np.array_equal(degrade(picture, {"content": 0.7}, np.random.default_rng(0)), picture)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_no_fault_ever_raises_a_merit(aspect: str) -> None:
    faults = [*DEGRADATIONS, "content"]
    clean = merit(aspect, {})
    for fault in faults:
        merits = [merit(aspect, {fault: severity}) for severity in SEVERITIES]
        assert [clean, *merits] == sorted([clean, *merits], reverse=True)
    worst = merit(aspect, dict.fromkeys(faults, 1.0))
    assert 0 <= worst < 1 < 4 < clean <= 5


def test_each_aspect_is_about_its_own_faults() -> None:
    losses = {
        aspect: {fault: merit(aspect, {}) - merit(aspect, {fault: 0.8}) for fault in ("blur", "content", "warp")}
        for aspect in ASPECTS
    }
    assert max(losses["quality"], key=losses["quality"].__getitem__) == "blur"
    assert max(losses["correspondence"], key=losses["correspondence"].__getitem__) == "content"
    assert max(losses["authenticity"], key=losses["authenticity"].__getitem__) == "warp"


def test_every_picture_has_one_leading_flaw_with_a_severity_in_range() -> None:
    rng = np.random.default_rng(0)
    for generator in GENERATORS.values():
        for _ in range(200):
            severities = draw_severities(generator, rng)
            assert sum(fault in FLAWS for fault in severities) == 1
            assert all(0 < severity <= 1 for severity in severities.values())


def test_generators_differ_in_quality() -> None:
    rng = np.random.default_rng(0)
    means = [
        np.mean([merit("quality", draw_severities(generator, rng)) for _ in range(400)])
        for generator in GENERATORS.values()
    ]
    assert max(means) - min(means) > 1


def test_opinions_follow_the_merit_with_the_noise_of_twenty_raters() -> None:
    rng = np.random.default_rng(0)
    panel = Panel(rng)
    merits = rng.uniform(0.3, 4.7, 400)
    opinions = np.array([panel.mean_opinion(value, rng) for value in merits])
    assert stats.spearmanr(merits, opinions).statistic > 0.98
    middle = np.array([panel.mean_opinion(2.5, rng) for _ in range(400)])
    # Scatter within and bias between raters: about .6 for one of them.
    assert 0.06 < middle.std() < 2 * 0.65 / np.sqrt(RATINGS)
    assert 0 <= opinions.min() <= opinions.max() <= 5
