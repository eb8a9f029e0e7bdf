"""Tables of conformal intervals and predicted spreads: how many MOS the intervals hold, by head and by generator."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from agiqa.bench.recording.records import Row
from agiqa.bench.report.naming import on_store, protocol_name, row_titles
from agiqa.bench.report.reading import Results
from agiqa.bench.report.tables import Cell, Column, Table, make_table
from agiqa.heads.evaluation.conformal import clopper_pearson

_ALL = "all"
_SPREAD = {"nll": "NLL", "rating_nll": "NLL of ratings", "srcc": "SRCC with std"}


@dataclass(frozen=True, kw_only=True)
class _Covered:
    """A head on all test images, or on those of one generator."""

    head: str
    images: str
    n: int
    """Images."""
    share: float
    """Of their MOS that are inside the intervals, the mean over seeds."""
    width: float | None
    """Mean width of the intervals."""
    spread: Mapping[str, float]
    """Means over runs of the metrics of predicted spreads."""

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share, as if every image were covered or not once."""
        low, high = clopper_pearson(round(self.share * self.n), self.n)
        return low, high


def coverage_table(results: Results, label: str, protocol: str) -> Table | None:
    """The coverage of each head, and that of the first by generator; None where no run recorded any."""
    rows = [row for row in results.of(label, protocol) if row.kind == "head"]
    titles = row_titles(rows)
    recorded = [(row, found) for row in rows if (found := list(_recorded(results, row)))]
    if not recorded:
        return None
    first, of_first = max(recorded, key=lambda pair: pair[0].rank_by)
    generators = sorted({name for one in of_first for name in one["intervals"]["generators"]})
    made = [_covered(on_store(titles[row.row], row.store_name), _ALL, found) for row, found in recorded]
    named = on_store(titles[first.row], first.store_name)
    made += [_covered(named, name, of_first) for name in generators if len(generators) > 1]
    level = of_first[0]["intervals"]["level"]
    columns: list[Column[_Covered]] = [
        Column("head", "Head", lambda one: one.head, "text"),
        Column("images", "Images of", lambda one: one.images, "text"),
        Column("n", "Images", lambda one: one.n, "count"),
        Column("coverage", "Coverage", lambda one: Cell(one.share, one.interval), interval=True),
        Column("width", "Mean width", lambda one: one.width),
    ]
    if any(one.spread for one in made):
        columns += [Column(key, title, _spread_of(key)) for key, title in _SPREAD.items()]
    notes = [
        f"Coverage: the share of true MOS inside intervals that should hold {100 * level:.4g} % of them; the interval "
        "is that of Clopper and Pearson, which takes images as independent. The errors on validation images make the "
        "intervals, so they hold for images like those. For other generators, prompts or data sets nothing is promised."
    ]
    title = f"{100 * level:.4g} % intervals, {label}, {protocol_name(protocol)}"
    return make_table(results, ["coverage", label, protocol], title, columns, made, notes)


def _recorded(results: Results, row: Row) -> Iterator[Mapping[str, Any]]:
    """The test metrics of the runs of a row that have intervals."""
    for line in results.runs_of(row):
        scores: Any = line.test or {}
        scores = scores.get(row.label) or {} if len(line.labels) > 1 else scores
        if "coverage" in scores.get("intervals", {}):
            yield {**scores, "seed": line.seed}


def _covered(head: str, images: str, found: Sequence[Mapping[str, Any]]) -> _Covered:
    """Of all runs of a head: folds of one seed together are its images, and seeds are averaged."""
    parts = [
        (one["seed"], record)
        for one in found
        for record in [one["intervals"]["coverage"] if images == _ALL else one["intervals"]["generators"].get(images)]
        if record is not None
    ]
    count, seeds = sum(record["n"] for _, record in parts), {seed for seed, _ in parts}
    spreads = [one["spread"] for one in found if "spread" in one] if images == _ALL else []
    return _Covered(
        head=head,
        images=images,
        n=round(count / len(seeds)),
        share=sum(record["inside"] for _, record in parts) / count,
        width=fmean(one["intervals"]["mean_width"] for one in found) if images == _ALL else None,
        spread={
            key: fmean(values)
            for key in _SPREAD
            if (values := [one[key] for one in spreads if one.get(key) is not None])
        },
    )


def _spread_of(key: str) -> Any:
    return lambda one: one.spread.get(key)
