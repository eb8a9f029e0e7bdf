"""The comparison of intervals: its quantiles and scores by other means, its worlds, and its tables in the log."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mean_pinball_loss

from agiqa.bench.measurements.intervals import (
    WORLDS,
    Predicted,
    TextFeatures,
    head_lines,
    interval_tables,
    intervals,
    judged,
    level_quantile,
    made_up,
    simulated_lines,
)
from agiqa.bench.recording.tables import read_results
from agiqa.store import Items

BENCH = Path(__file__).resolve().parents[3] / "bench"
LEVELS = np.linspace(0.0, 5.0, 5)


def test_quantiles_of_levels_are_those_of_the_middle_of_each_share():
    """The median of a symmetric distribution is its centre, and the ends are the outer levels."""
    shares = np.array([[0.1, 0.2, 0.4, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0, 1.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
    assert level_quantile(shares, LEVELS, 0.5) == pytest.approx([2.5, 5.0, 2.5])
    assert level_quantile(shares, LEVELS, 0.01)[0] == 0.0
    # by hand: below 1.25 lie .1 / 2 at 0 and .1 + .2 / 2 at 1.25, and .1 is a third of the way
    assert level_quantile(shares, LEVELS, 0.1)[0] == pytest.approx(1.25 / 3)
    assert level_quantile(shares, LEVELS, 0.6)[2] == pytest.approx(2.5 + 0.5 * 1.25)


def test_the_ways_cover_and_the_score_is_two_pinball_losses():
    random = np.random.default_rng(0)
    count, level = 4000, 0.8
    mos = random.uniform(1, 4, count)
    shares = stats.binom.pmf(np.arange(5), 4, np.clip(mos[:, None] / 5 + random.normal(0, 0.05, (count, 1)), 0, 1))
    guess = shares @ LEVELS
    spread = np.sqrt(shares @ LEVELS**2 - guess**2)
    items = Predicted(mos=mos, guess=guess, spread=spread, by=guess, shares=shares, levels=LEVELS)
    making = np.arange(count) < count // 2
    for way in ("absolute", "scaled", "quantile", "levels"):
        new = items.of(~making)
        low, high = intervals(way, items.of(making), new, level)
        found = judged((low, high), new, level)
        inside = (low <= new.mos) & (new.mos <= high)
        assert found["coverage"] == pytest.approx(inside.mean())
        assert abs(found["coverage"] - level) < 0.03
        tail = (1 - level) / 2
        losses = [mean_pinball_loss(new.mos, end, alpha=share) for end, share in ((low, tail), (high, 1 - tail))]
        assert found["score"] == pytest.approx(sum(losses) / tail)
        assert 0 <= found["least"] <= found["coverage"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_is_what_its_name_says(world):
    items = made_up(world, np.random.default_rng(1), 20_000)
    true = items.by
    assert ((items.mos - items.guess) / true).std() == pytest.approx(1.0, abs=0.02)
    ratio = items.spread / true
    wanted = {"right": (1.0, 0.0), "4 times too large": (4.0, 0.0), "roughly": (1.0, 0.5), "unrelated": (1.0, None)}
    middle, deviation = wanted[world]
    assert np.median(ratio) == pytest.approx(middle, rel=0.05)
    if deviation is None:
        assert abs(np.corrcoef(items.spread, true)[0, 1]) < 0.03
    else:
        assert np.log(ratio).std() == pytest.approx(deviation, abs=0.02)


def test_heads_of_a_data_set_are_compared_and_kept(tmp_path):
    random = np.random.default_rng(2)
    count = 120
    words = random.integers(0, 3, count)
    items = Items(
        names=[f"{k}.png" for k in range(count)],
        prompts=[f"prompt {k // 3}" for k in range(count)],
        splits=["train"] * count,
        generators=[None] * count,
        descriptions=[f"the picture is {('bad', 'fair', 'good')[word]} {random.integers(9)}" for word in words],
        labels={"quality": words + random.uniform(0.5, 1.5, count)},
        mos_ranges={"quality": (0.0, 5.0)},
    )
    source = TextFeatures.of("made-up", items)
    lines = list(head_lines(source, "quality", tmp_path, draws=2))
    assert {(line["loss"], line["way"]) for line in lines} == {
        ("mse", "absolute"),
        *(("nll", way) for way in ("absolute", "scaled", "quantile")),
    }
    made = sorted(path.name for path in tmp_path.iterdir())
    assert list(head_lines(source, "quality", tmp_path, draws=2)) == lines
    assert (
        sorted(path.name for path in tmp_path.iterdir())
        == made
        == [f"made-up-quality-{loss}-{fold}" for loss in ("mse", "nll") for fold in range(3)]
    )


def test_simulated_lines_are_of_every_world_level_and_way():
    lines = list(simulated_lines(1))
    assert len({(line["spread"], line["level"], line["way"]) for line in lines}) == len(lines) == 24


@pytest.mark.parametrize("path", sorted((BENCH / "results" / "intervals").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_tables_of_the_log_are_those_of_the_lines(path):
    log = (BENCH / "LOG.md").read_text(encoding="utf-8")
    rows = [row for row in interval_tables(read_results(path)).splitlines() if row.startswith("| ")]
    assert len(rows) > 10
    assert [row for row in rows if row not in log] == []
