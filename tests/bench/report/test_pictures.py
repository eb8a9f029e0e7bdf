from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import curve_fit

from agiqa.bench.report.pictures import Curve, Panel, draw, scatter
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
    assert "<!-- logistic fit -->" in text


def test_constant_predictions_are_drawn_and_said_to_have_no_correlation(tmp_path: Path) -> None:
    scatter(tmp_path / "p.svg", [Panel(title="c", true=np.arange(4.0), predicted=np.ones(4))], title="t")
    assert "<!-- no correlation: constant -->" in (tmp_path / "p.svg").read_text(encoding="utf-8")


def wave(place: np.ndarray, low: float, rise: float, centre: float, width: float) -> np.ndarray:
    """The four-parameter logistic of VQEG."""
    return low + rise / (1 + np.exp(-(place - centre) / width))


def test_the_curve_is_the_least_squares_logistic_of_scipy() -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 5, 200)
    predicted = wave(true, 1.0, 3.0, 2.5, 0.6) + rng.normal(0, 0.2, 200)
    found = Curve.fit(true, predicted)
    assert found is not None
    best, _ = curve_fit(wave, true, predicted, p0=(1, 3, 2.5, 1))
    assert (found.across[0], found.across[-1]) == (true.min(), true.max())
    assert found.heights == pytest.approx(wave(found.across, *best), abs=1e-5)
    assert (np.diff(found.heights) > 0).all()


def test_the_logistic_never_falls_where_the_quartic_does() -> None:
    rng = np.random.default_rng(3)
    true = rng.beta(0.4, 0.4, 40) * 5
    predicted = np.clip(2 * true, 0, 4) + rng.normal(0, 0.8, 40)
    curve, quartic = Curve.fit(true, predicted), Curve.fit(true, predicted, quartic=True)
    assert curve is not None
    assert quartic is not None
    assert (np.diff(curve.heights) >= 0).all()
    assert (np.diff(quartic.heights) < 0).any()
    assert quartic.heights == pytest.approx(np.polyval(np.polyfit(true, predicted, 4), quartic.across))


def test_few_distinct_true_values_lower_the_degree_of_the_quartic_and_falling_points_have_no_logistic() -> None:
    true = np.repeat([1.0, 2.0, 3.0], 5)
    quartic = Curve.fit(true, true + 0.1, quartic=True)
    assert quartic is not None
    assert quartic.name == "fit, degree 2"
    assert Curve.fit(true, -true) is None
    assert Curve.fit(np.ones(15), true) is None
    assert Curve.fit(np.ones(15), true, quartic=True) is None


def test_a_picture_for_a_paper_is_a_vector_pdf_of_one_column() -> None:
    picture = draw("p", "t", alt="a", caption="c", height=2.0, paint=lambda figure: figure.add_subplot().plot([0, 1]))
    content = picture.pdf()
    assert content == picture.pdf()
    assert b"/MediaBox [ 0 0 234 " in content  # 3.25 inches of 72 points
    assert b"/Subtype /Image" not in content
    assert b"/FontFile2" in content  # TrueType, as publishers ask for


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
