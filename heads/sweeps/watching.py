"""What a sweep shows while it runs: the heads under way with their epochs, how many have ended, and the time left.

The time left counts the finished share of every head under way, so there is an estimate before the first head ends.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.training.curves import Epoch
from agiqa.heads.training.progress import LineProgress
from agiqa.progress import Clock, Tracker, duration_text, track

_SHOWN = 4
"""Names of heads under way in one line."""
_SECONDS_BETWEEN_STATES = 1.0


@dataclass(frozen=True, kw_only=True)
class HeadState:
    """How far a head is."""

    stage: str
    epoch: int
    """Under way, from 1."""
    epochs: int
    share: float
    """Of its whole training, 0 to 1."""
    before: float
    """The part of `share` that an earlier run trained."""


class StateProgress(LineProgress):
    """Passes the lines of a training to one function and its state to another, at most once per second."""

    def __init__(
        self,
        write: Callable[[str], None],
        show: Callable[[HeadState], None],
        config: TrainConfig,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        """`config` says whether there is a refit, which counts as half of the training."""
        super().__init__(write, clock=clock)
        self._show, self._refit, self._state_clock = show, config.refit, clock
        self._stage, self._shown, self._before = "", 0.0, 0.0
        self._plan = (1, 1)
        self._place = (0, 0)

    def begin(self, stage: str, *, epochs: int, steps: int, done: int) -> None:
        """Show the beginning."""
        super().begin(stage, epochs=epochs, steps=steps, done=done)
        self._stage, self._plan, self._place = stage, (epochs, steps), (done, 0)
        if stage != "refit" or done:
            self._before = self._share()
        self._tell_state()

    def step(self) -> None:
        """Show it, if the last time was long enough ago."""
        super().step()
        self._place = (self._place[0], self._place[1] + 1)
        if self._state_clock() - self._shown >= _SECONDS_BETWEEN_STATES:
            self._tell_state()

    def epoch(self, epoch: Epoch) -> None:
        """Show it."""
        super().epoch(epoch)
        self._place = (epoch.epoch, 0)
        self._tell_state()

    def _share(self) -> float:
        (epochs, steps), (epoch, step) = self._plan, self._place
        share = min(1.0, (epoch + step / steps) / epochs)
        return share if not self._refit else 0.5 * share + (0.5 if self._stage == "refit" else 0.0)

    def _tell_state(self) -> None:
        self._shown = self._state_clock()
        epochs = self._plan[0]
        self._show(
            HeadState(
                stage=self._stage,
                epoch=min(self._place[0] + 1, epochs),
                epochs=epochs,
                share=self._share(),
                before=self._before,
            )
        )


class SweepWatch:
    """The state of a sweep, shown by a tracker."""

    def __init__(self) -> None:
        """Use `watching`."""
        self._states: dict[str, HeadState] = {}
        self._tracker: Tracker | None = None

    def attach(self, tracker: Tracker) -> None:
        """Show the state by `tracker` from now on."""
        self._tracker = tracker

    def running(self, name: str, state: HeadState) -> None:
        """The head `name` is at `state`."""
        tracker = self._shown_by
        if name not in self._states and state.before:
            tracker.meter.skip(state.before)
        self._states[name] = state
        self._update()

    def ended(self, name: str, *, there: bool = False) -> None:
        """The head `name` has ended; `there` if it existed before."""
        self._states.pop(name, None)
        if there:
            self._shown_by.meter.skip(1)
        self._shown_by.meter.done += 1
        self._update()

    def pulse(self) -> None:
        """Show the state, if a line is due."""
        self._shown_by.pulse()

    @property
    def left(self) -> str:
        """The time left for people."""
        left = self._shown_by.meter.left
        return "unknown time" if left is None else duration_text(left)

    def note(self) -> str:
        """The heads under way."""
        shown = [
            f"{name} ({'' if state.stage == 'train' else f'{state.stage}, '}epoch {state.epoch}/{state.epochs})"
            for name, state in list(self._states.items())[:_SHOWN]
        ]
        more = len(self._states) - len(shown)
        return f"running: {', '.join(shown)}{f' and {more} more' if more else ''}" if shown else ""

    @property
    def _shown_by(self) -> Tracker:
        assert self._tracker is not None  # `watching` attaches it
        return self._tracker

    def _update(self) -> None:
        tracker = self._shown_by
        tracker.meter.under_way = sum(state.share for state in self._states.values())
        tracker.pulse()


@contextmanager
def watching(
    label: str, total: int, unit: str = "heads", *, done: int = 0, clock: Clock = time.monotonic
) -> Generator[SweepWatch]:
    """Watch a sweep of `total` heads, of which `done` ended before."""
    watch = SweepWatch()
    with track(label, total, unit, done=done, note=watch.note, clock=clock) as tracker:
        watch.attach(tracker)
        yield watch
