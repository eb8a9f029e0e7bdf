"""Conformal intervals: around each prediction, as wide as the errors on validation items, which were not trained on.

Split conformal prediction (Papadopoulos et al. 2002; Lei et al. 2018): each of n validation items gets a score, and of
the scores the number ceil((n + 1) level) in ascending order is taken. An interval with that score at its ends holds the
true MOS of a new item with a probability of `level` or more, if the new item and the validation items are exchangeable.
There are three scores of the error e of an item:

absolute  |e|, of heads that predict no spread: all intervals have one width
scaled    |e| / spread (Papadopoulos et al. 2008), of heads whose spread is that of ratings (`kl`, `ordinal`): it says
          which images are uncertain, and not by how much, so that a factor makes it fit
quantile  max(lower - MOS, MOS - upper), how far the MOS is outside the quantiles that the head predicts: conformalised
          quantile regression (CQR; Romano, Patterson and Candes 2019, arXiv 1905.03222), of heads whose spread is that
          of the MOS around its prediction (`nll`). Their quantiles are Gaussian, and get one addend

bench/LOG.md compares them (`python -m agiqa.bench.measurements.intervals`).

Exchangeable means: drawn in the same way. Images of other generators, of other prompts than the validation prompts
represent, or of another data set are not, and nothing is promised for them. `coverage` measures what holds.

The choice of the epoch on the same items, and the line of `calibrate`, make validation errors a little too small. In a
simulation (tests/heads/evaluation/test_conformal.py: 20 epochs, whose own errors are a third of those that all share)
90 % intervals lose 1.4 points of coverage with 30 validation items, .8 with 120 and .6 with 238. With the setting
`calibration_share` other items make the intervals than choose the epoch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from agiqa.errors import ConfigError, HeadError
from agiqa.heads.data.scales import Scales
from agiqa.heads.evaluation.runs import CONFIG, SCORE_KIND, Run
from agiqa.heads.model.readouts import GAUSSIAN, VALUE
from agiqa.heads.settings.labels import column_names

Array = NDArray[np.float64]
ScoreKind = Literal["absolute", "scaled", "quantile"]

USUAL_LEVEL = 0.9
"""The level of the coverage that training and evaluation report."""
_ROUNDING = 1e-9
_CONFIDENCE = 0.95


def check_level(level: float) -> float:
    """`level`. Raises ConfigError unless it is between 0 and 1."""
    if not 0.0 < level < 1.0:
        message = f"An interval needs a level between 0 and 1, such as .9 for 90 % of the images, and {level:g} is not."
        raise ConfigError(message)
    return level


def fewest_items(level: float) -> int:
    """The fewest validation items for an interval of `level`: 1 / (1 - level) - 1, rounded up."""
    return math.ceil(level / (1.0 - level) - _ROUNDING)


def kind_of_readout(readout: str) -> ScoreKind:
    """The scores that suit what a head predicts (see readouts.py)."""
    return "absolute" if readout == VALUE else "quantile" if readout == GAUSSIAN else "scaled"


def kind_of_run(run: Run) -> ScoreKind:
    """The scores that a run records. Older runs record none, and those with a spread are scaled. Raises HeadError."""
    older: ScoreKind = "scaled" if run.predicts_spread else "absolute"
    kind: ScoreKind = run.config.get(SCORE_KIND, older)
    if kind not in get_args(ScoreKind):
        message = (
            f"{run.path / CONFIG}: `{SCORE_KIND}` is {kind!r}, and this agiqa knows {', '.join(get_args(ScoreKind))}."
        )
        raise HeadError(message)
    return kind


@dataclass(frozen=True, kw_only=True)
class ConformalScores:
    """What the validation items of a run say about its errors."""

    kind: ScoreKind
    errors: Array
    """(items, labels): absolute errors; NaN where an item lacks the label."""
    spreads: Array | None
    """(items, labels): predicted spreads; None for absolute scores."""

    @classmethod
    def of(cls, kind: ScoreKind, predicted: Array, labels: Array, spreads: Array | None) -> "ConformalScores":
        """From predictions, MOS and spreads of validation items, (items, labels) each; absolute without spreads."""
        return cls(kind="absolute" if spreads is None else kind, errors=np.abs(predicted - labels), spreads=spreads)

    def quantile(self, label: int, level: float) -> tuple[float, int]:
        """The score at the ends of intervals for the label of this number, and how many items gave it.

        On the scale of the MOS; where the scores are scaled, in spreads. Raises ConfigError for a `level` outside 0 to
        1, and for too few validation items.
        """
        check_level(level)
        scores = self.errors[:, label]
        if self.spreads is not None and self.kind != "absolute":
            spread = self.spreads[:, label]
            scores = scores / spread if self.kind == "scaled" else scores - _gaussian(level) * spread
        scores = scores[np.isfinite(scores)]
        return _quantile(scores, level), len(scores)

    def check(self, level: float) -> None:
        """Raise as `quantile` of any label."""
        for label in range(self.errors.shape[1]):
            self.quantile(label, level)

    def half_widths(self, quantile: float, spread: Array | None, level: float, *, items: int) -> Array:
        """Half the width of the intervals of `items` with the predicted `spread` (items,), from `quantile`; 0 or more.

        Where CQR's ends would cross, the interval is the prediction alone.
        """
        if self.kind == "absolute" or spread is None:
            return np.full(items, quantile)
        if self.kind == "scaled":
            return np.asarray(quantile * spread)
        return np.maximum(_gaussian(level) * spread + quantile, 0.0)

    def intervals(
        self, predicted: Array, spreads: Array | None, *, level: float, scales: Scales
    ) -> tuple[Array, Array]:
        """Lowest and highest MOS for each prediction (items, labels), cut at the ends of known `scales`.

        Raises as `quantile`.
        """
        half = np.empty_like(predicted)
        for label in range(predicted.shape[1]):
            spread = None if spreads is None else spreads[:, label]
            half[:, label] = self.half_widths(self.quantile(label, level)[0], spread, level, items=len(predicted))
        low, high = predicted - half, predicted + half
        for label, scale in enumerate(scales):
            if scale is not None:
                low[:, label], high[:, label] = (np.clip(ends[:, label], *scale) for ends in (low, high))
        return low, high


def _gaussian(level: float) -> float:
    """Deviations from the mean to the quantiles of a Gaussian between which it has the probability `level`."""
    return float(stats.norm.ppf(0.5 + level / 2.0))


def _quantile(scores: Array, level: float) -> float:
    """The score number ceil((n + 1) level) of n, in ascending order. Raises ConfigError for too few."""
    count, needed = len(scores), fewest_items(level)
    if count < needed:
        message = (
            f"An interval of {level:.4g} needs {needed} validation items or more (1 / (1 - level) - 1), and this "
            f"run has {count}. Lower the level, or train with more: raise `validation`, or train on more items."
        )
        raise ConfigError(message)
    return float(np.sort(scores)[math.ceil((count + 1) * level - _ROUNDING) - 1])


def recorded_errors(run: Run) -> ConformalScores:
    """The errors on the validation items of a run, from its predictions.csv.

    Raises HeadError as `Run.predictions` and `kind_of_run`.

    With the setting `calibration_share` they are those of the items that did not choose the epoch.
    Of a refit head they are those of the head that chose the epoch, which had not learned the items.
    """
    names = run.train.labels
    part = "calibration" if run.train.calibration_share else "validation"
    rows = [row for row in run.predictions if row["split"] == part]

    def values(what: str) -> Array:
        titles = column_names(names, what)
        return np.array([[row[title] for title in titles] for row in rows], np.float64).reshape(-1, len(names))

    spreads = values("spread") if run.predicts_spread else None
    return ConformalScores.of(kind_of_run(run), values("predicted"), values("mos"), spreads)


def interval_records(
    scores: ConformalScores,
    predicted: Array,
    spreads: Array | None,
    mos: Array,
    generators: Sequence[str | None],
    *,
    level: float = USUAL_LEVEL,
) -> list[dict[str, Any]]:
    """The entry `intervals` of the metrics of each label, from values (items, labels); `generators` are of the items.

    See `_record`.
    """
    return [
        _record(
            scores,
            label,
            predicted[:, label],
            None if spreads is None else spreads[:, label],
            mos[:, label],
            generators,
            level,
        )
        for label in range(predicted.shape[1])
    ]


def _record(
    scores: ConformalScores,
    label: int,
    predicted: Array,
    spread: Array | None,
    mos: Array,
    generators: Sequence[str | None],
    level: float,
) -> dict[str, Any]:
    """The entry `intervals` of the metrics of one label, from values (items,), ready for JSON.

    `{"level", "validation_items", "scores", "quantile", "mean_width", "coverage", "generators"}`: `scores` is their
    kind, and the last two are as of `coverage`, the last by generator. `{"level", "absent": reason}` where there are
    too few validation items. Items whose MOS is NaN do not count.
    """
    has = np.isfinite(mos)
    try:
        quantile, items = scores.quantile(label, level)
    except ConfigError as error:
        return {"level": level, "absent": str(error)}
    half = scores.half_widths(quantile, spread, level, items=len(predicted))[has]
    inside = np.abs(predicted - mos)[has] <= half
    of_items = np.array([name or "" for name in generators], dtype=object)[has]
    names = sorted({name for name in of_items.tolist() if name})
    return {
        "level": level,
        "validation_items": items,
        "scores": scores.kind,
        "quantile": quantile,
        "mean_width": float(2.0 * half.mean()),
        "coverage": coverage(inside),
        "generators": {name: coverage(inside[of_items == name]) for name in names},
    }


def coverage(inside: NDArray[np.bool_]) -> dict[str, Any]:
    """How many MOS are inside their intervals: `{"n", "inside", "share", "ci"}`.

    `ci` is the interval of Clopper and Pearson (95 %) for the share. Images of one prompt are alike, so that it is
    rather too narrow.
    """
    count, hits = len(inside), int(inside.sum())
    return {"n": count, "inside": hits, "share": hits / count, "ci": clopper_pearson(hits, count)}


def clopper_pearson(hits: int, count: int, *, confidence: float = _CONFIDENCE) -> list[float]:
    """The exact interval of a binomial share (Clopper and Pearson 1934)."""
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if hits == 0 else float(stats.beta.ppf(tail, hits, count - hits + 1))
    high = 1.0 if hits == count else float(stats.beta.ppf(1.0 - tail, hits + 1, count - hits))
    return [low, high]


def coverage_warnings(name: str, record: Mapping[str, Any]) -> list[str]:
    """A warning for the images of a part, or of a generator, whose coverage is surely not the level."""
    if "absent" in record:
        return []
    level, found = record["level"], list[str]()
    groups = {"of all images": record["coverage"], **{f"of {one}": own for one, own in record["generators"].items()}}
    for whose, own in groups.items():
        low, high = own["ci"]
        if high < level:
            found.append(
                f"{100 * level:.4g} % intervals of {name} hold only {100 * own['share']:.1f} % [{100 * low:.1f}, "
                f"{100 * high:.1f}] of the {own['n']} MOS {whose}: these images are not like the validation items that "
                "the intervals were made from. Intervals promise nothing for other generators, prompts or data sets."
            )
    return found
