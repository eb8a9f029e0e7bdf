"""Progress: what is shown and when, by a clock that the tests turn."""

import sys
from io import StringIO

import pytest
from rich.console import Console

from agiqa.progress import Meter, duration_text, rate_text, said_to, track, tracked


class Clock:
    """Seconds that stand still until a test moves them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines():
    """The lines that are said during a test."""
    found = []
    with said_to(found.append):
        yield found


def test_a_line_comes_every_half_minute_at_least_and_the_last_one_has_the_whole_time(clock, lines):
    with track("read", 100, "items", clock=clock) as advance:
        for _ in range(10):
            clock.now += 10.0
            advance(10)
    assert lines == [
        "read: 20/100 items, 1.0/s, 1 min 20 s left",
        "read: 40/100 items, 1.0/s, 1 min 0 s left",
        "read: 60/100 items, 1.0/s, 40 s left",
        "read: 80/100 items, 1.0/s, 20 s left",
        "read: 100/100 items, 1.0/s, 0 s left",
        "read: 100/100 items in 100.0 s",
    ]


def test_what_an_earlier_run_did_is_shown_and_is_no_part_of_the_rate(clock, lines):
    with track("extract", 1000, "items", done=900, clock=clock) as advance:
        clock.now += 50.0
        advance(50)
    assert lines == ["extract: 950/1000 items, 1.0/s, 50 s left", "extract: 950/1000 items in 50.0 s"]


def test_a_brief_job_says_nothing_and_a_long_one_does(clock, lines):
    with track("read", 2, "items", brief=True, clock=clock) as advance:
        advance(2)
    assert lines == []
    with track("read", 2, "items", brief=True, clock=clock) as advance:
        clock.now += 20.0
        advance(1)
    assert lines == ["read: 1/2 items, 3.0/min, 20 s left", "read: 1/2 items in 20.0 s"]


def test_a_job_that_fails_is_not_said_to_have_ended(clock, lines):
    with pytest.raises(ZeroDivisionError), track("read", 2, "items", clock=clock):
        _ = 1 / 0
    assert lines == []


def test_the_time_left_counts_what_is_under_way_and_not_what_was_there(clock):
    meter = Meter(24, done=4, clock=clock)
    assert (meter.rate, meter.left) == (None, None)
    clock.now += 60.0
    meter.under_way = 0.6 + 0.4 + 0.5
    meter.skip(0.5)  # half of the third was trained before
    assert meter.rate == pytest.approx(1 / 60)
    assert meter.left == pytest.approx(18.5 * 60)
    assert meter.text("heads", "") == "4/24 heads, 1.0/min, 18 min 30 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7800, "2 h 10 min")]
)
def test_durations_are_spelled(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(12.34, "12.3/s"), (0.5, "30.0/min"), (1 / 3600, "1.0/h")])
def test_rates_are_numbers_of_1_or_more(rate, text):
    assert rate_text(rate) == text


def test_loops_of_a_user_are_tracked_with_and_without_a_length(lines):
    assert list(tracked([3, 4], "mine", "batches")) == [3, 4]
    assert list(tracked(iter("abc"), "letters")) == ["a", "b", "c"]
    assert [line.split(" in ")[0] for line in lines] == ["mine: 2/2 batches", "letters: 3 items"]


def test_a_terminal_shows_one_bar_with_the_rest_above_it(clock, monkeypatch):
    """A job inside another writes lines: a terminal holds one bar only."""
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    errors = StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    note = "[running: a]"
    with track("heads", 4, "runs", done=1, note=lambda: note, console=console, clock=clock) as outer:
        clock.now += 10.0
        outer(1)
        with track("read", 2, "items", clock=clock) as inner:
            inner(2)
    shown = out.getvalue()
    assert "2/4 runs, 6.0/min, 20 s left" in shown
    assert "[running: a]" in shown
    assert "2/4 runs in 10 s" in shown
    assert "read: 2/2 items in 0.0 s" in errors.getvalue() + shown
