from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agiqa.bench.report.pictures import FIT_DEGREE, Panel, scatter
from agiqa.errors import DataError


def panel(title: str = "a head", items: int = 60, *, grouped: bool = False) -> Panel:
    rng = np.random.default_rng(items)
    true = rng.uniform(0, 5, items)
    groups = [f"generator {index % 5}" for index in range(items)] if grouped else None
    return Panel(title=title, true=true, predicted=0.8 * true + rng.normal(0, 0.3, items), groups=groups)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_picture_is_written_with_points_and_lines(tmp_path: Path) -> None:
    scatter(tmp_path / "deep" / "one.png", [panel()], title="quality")
    pixels = pixels_of(tmp_path / "deep" / "one.png")
    assert pixels.shape[0] > 700
    assert pixels.shape[1] > 700
    assert pixels.std() > 15
    coloured = np.ptp(pixels, axis=2) > 60
    assert coloured.sum() > 500


def test_panels_stand_side_by_side_and_wrap(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 2, 3, 4):
        path = tmp_path / f"{count}.png"
        scatter(path, [panel(f"head {index}") for index in range(count)], title="heads")
        sizes.append(pixels_of(path).shape[:2])
    assert sizes[0][1] < sizes[1][1] < sizes[2][1] == sizes[3][1]
    assert sizes[0][0] == sizes[1][0] == sizes[2][0] < sizes[3][0]


def test_the_same_numbers_give_the_same_picture_and_others_another(tmp_path: Path) -> None:
    for name, items in (("a", 40), ("b", 40), ("c", 41)):
        scatter(tmp_path / f"{name}.png", [panel(items=items)], title="t")
    first, second, third = (pixels_of(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_groups_have_colours_and_a_legend(tmp_path: Path) -> None:
    scatter(tmp_path / "plain.png", [panel()], title="t")
    scatter(tmp_path / "grouped.png", [panel(grouped=True)], title="t")
    colours = [
        {tuple(colour) for colour in (pixels_of(tmp_path / name)[::2, ::2] // 32).reshape(-1, 3)}
        for name in ("plain.png", "grouped.png")
    ]
    assert len(colours[1]) > len(colours[0]) + 10


def test_vector_formats_say_what_the_picture_says(tmp_path: Path) -> None:
    true = np.arange(10.0) / 2
    drawn = Panel(title="perfect", true=true, predicted=true**2 / 5)
    scatter(tmp_path / "p.svg", [drawn], title="t")
    text = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert "<!-- perfect -->" in text
    assert "<!-- SRCC 1.000 -->" in text
    assert f"<!-- PLCC {np.corrcoef(true, true**2)[0, 1]:.3f} -->" in text
    assert f"<!-- fit, degree {FIT_DEGREE} -->" in text


def test_constant_predictions_are_drawn_and_said_to_have_no_correlation(tmp_path: Path) -> None:
    scatter(tmp_path / "p.svg", [Panel(title="c", true=np.arange(4.0), predicted=np.ones(4))], title="t")
    assert "<!-- no correlation: constant -->" in (tmp_path / "p.svg").read_text(encoding="utf-8")


def test_few_distinct_true_values_lower_the_degree_of_the_fit(tmp_path: Path) -> None:
    true = np.array([1.0, 1, 2, 2, 3, 3])
    scatter(tmp_path / "p.svg", [Panel(title="c", true=true, predicted=true + 0.1)], title="t")
    assert "<!-- fit, degree 2 -->" in (tmp_path / "p.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("true", "predicted", "groups", "message"),
    [
        (np.zeros(4), np.zeros(5), None, "one value of each kind per item"),
        (np.zeros(4), np.zeros(4), ["a"] * 3, "one value of each kind per item"),
        (np.zeros((4, 1)), np.zeros((4, 1)), None, "one value of each kind per item"),
        (np.zeros(2), np.zeros(2), None, "at least 3"),
        (np.array([0, 1, np.nan, 2]), np.zeros(4), None, "1 of 4 items"),
        (np.zeros(4), np.array([0, np.inf, np.nan, 2]), None, "2 of 4 items"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(tmp_path, true, predicted, groups, message) -> None:
    bad = Panel(title="x", true=true, predicted=predicted, groups=groups)
    with pytest.raises(DataError, match=message):
        scatter(tmp_path / "p.png", [panel(), bad], title="t")
    assert not (tmp_path / "p.png").exists()


def test_no_panels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to draw"):
        scatter(tmp_path / "p.png", [], title="t")
