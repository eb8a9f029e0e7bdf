"""What a sketch keeps: the share of the logits' energy, and the SRCC of heads, against its rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from agiqa.bench.report.figures import (
    COLOURS,
    MUTED,
    SMALL,
    Picture,
    draw,
    safe,
    shortened,
    styles,
    tidy,
    whiskered_line,
)
from agiqa.bench.report.naming import kin_titles, plural, protocol_name, row_titles, slug
from agiqa.bench.report.reading import Results, Row, spelled
from agiqa.bench.report.row_tables import score_cell
from agiqa.bench.report.tables import Cell, Column, Table

_HEADS = 6
_OF_THE_RANK = {"rank", "store"}
"""Settings that differ between the rows of one head at several ranks."""
Points = dict[str, list[tuple[int, Row]]]
"""Of each head its rows by rank, ascending."""


def rank_of(results: Results, row: Row) -> int | None:
    """The rank behind a row: its setting, or the width of its store where that is a sketch."""
    asked = row.settings.get("rank")
    if isinstance(asked, int) and not isinstance(asked, bool):
        return asked
    store = results.store(row.store_name)
    return store.width if store.encoding == "sketch" else None


def rank_points(results: Results, label: str, protocol: str) -> Points:
    """The rows of every head or baseline at two ranks or more."""
    found: Points = {}
    for row in results.of(label, protocol):
        rank = rank_of(results, row)
        if rank is not None and row.value("srcc") is not None:
            found.setdefault(_apart_from_rank(row), []).append((rank, row))
    points = {name: sorted(rows, key=lambda one: one[0]) for name, rows in found.items()}
    return {name: rows for name, rows in points.items() if _only_ranks_differ(rows) and _depends(rows)}


def _only_ranks_differ(rows: Sequence[tuple[int, Row]]) -> bool:
    """Whether there are several rows, each of another rank: where two share one, their stores differ in more."""
    return 1 < len(rows) == len({rank for rank, _ in rows})


def energy_share(results: Results, rank: int) -> float | None:
    """The share of the energy that the leading `rank` directions keep, of the first store that tells its spectrum."""
    energy = next(iter(_spectra(results).values()), None)
    return None if energy is None or rank > len(energy) else float(energy[:rank].sum() / energy.sum())


def rank_table(results: Results, label: str, protocol: str) -> Table | None:
    """Rank, energy kept where a store tells its spectrum, and the scores of each head."""
    points, spectra = rank_points(results, label, protocol), _spectra(results)
    if not points:
        return None
    columns = [
        Column(key="row", title="Row", kind="text"),
        Column(key="rank", title="Rank", kind="count"),
        *([Column(key="energy", title="Energy kept", kind="paper")] if spectra else []),
        Column(key="srcc", title="SRCC", interval=True),
        Column(key="plcc", title="PLCC", interval=True),
    ]
    titles = _titles(points)
    body = [
        [
            Cell(value=titles[name], tag="baseline" if row.kind == "baseline" else None),
            Cell(value=rank),
            *([Cell(value=energy_share(results, rank))] if spectra else []),
            score_cell(row, "srcc"),
            score_cell(row, "plcc"),
        ]
        for name, rows in points.items()
        for rank, row in rows
    ]
    title = results.titled(f"by rank, {label}, {protocol_name(protocol)}")
    note = "Energy kept: the share of the second moment of the logits that the leading directions of the sketch hold."
    return Table(
        name=slug(results.prefix, "rank", label, protocol),
        title=title,
        columns=columns,
        rows=body,
        notes=[note] if spectra else [],
    )


def rank_chart(results: Results, label: str, protocol: str) -> Picture | None:
    """Energy against rank above, SRCC against rank below; either alone where the other is not known."""
    points, spectra = rank_points(results, label, protocol), _spectra(results)
    if not points and not spectra:
        return None
    shown = dict(list(points.items())[:_HEADS])
    titles = _titles(points)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(bool(shown) + bool(spectra), 1, sharex=True, squeeze=False)[:, 0]
        if spectra:
            _energies(panels[0], spectra, _ranks(results))
        if shown:
            for (name, rows), (colour, marker) in zip(shown.items(), styles(list(shown)).values(), strict=True):
                line = [(rank, row.value("srcc"), row.interval("srcc")) for rank, row in rows]
                head = safe(shortened(titles[name]))
                whiskered_line(panels[-1], line, colour=colour, marker=marker, label=head, size=4, width=1.4)
            panels[-1].set_ylabel("test SRCC")
        for axes in panels:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            tidy(axes)
        panels[-1].set_xlabel("rank")
        if shown:
            figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL)

    panels = [*(["energy"] if spectra else []), *([f"SRCC ({label}, {protocol_name(protocol)})"] if shown else [])]
    parts = ["share of the logits' energy that a rank keeps, ranks in use marked"] if spectra else []
    parts += ["test SRCC with 95% intervals"] if shown else []
    told = f"Above: {parts[0]}. Below: {parts[1]}." if len(parts) == 2 else f"{parts[0][:1].upper()}{parts[0][1:]}."
    more = f" {len(points) - len(shown)} further rows are in the table only." if len(points) > len(shown) else ""
    return draw(
        slug(results.prefix, "energy", label, protocol),
        results.titled(f"{' and '.join(panels)} against rank"),
        alt=_told(results, points, titles),
        caption=told + more,
        height=2.0 * (bool(shown) + bool(spectra)) + 0.6 + 0.1 * len(shown),
        paint=paint,
    )


def _depends(rows: Sequence[tuple[int, Row]]) -> bool:
    """Whether a row looks at the features: a baseline that does not has the same score at every rank."""
    return rows[0][1].kind == "head" or len({row.value("srcc") for _, row in rows}) > 1


def _spectra(results: Results) -> dict[str, np.ndarray]:
    """The eigenvalues that stores tell, once for each data set and model."""
    found: dict[str, np.ndarray] = {}
    for name, store in results.about.stores.items():
        energy = np.asarray(store.energy or [], dtype=np.float64)
        if len(energy) and (energy >= 0).all() and energy.sum() > 0:
            found.setdefault(" ".join((store.data_name, store.model_name)).strip() or name, energy)
    return found


def _ranks(results: Results) -> set[int]:
    """The ranks behind the rows."""
    return {rank for row in results.rows for rank in [rank_of(results, row)] if rank is not None}


def _apart_from_rank(row: Row) -> str:
    """The name of a row without its rank, so that the rows of one head are known as such."""
    if not row.settings.keys() & _OF_THE_RANK:
        return row.kin
    return spelled(_without_rank(row)) or "head"


def _without_rank(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.settings.items() if name not in _OF_THE_RANK}


def _titles(points: Points) -> dict[str, str]:
    """A title for each head, which does not name the rank, and for each baseline."""
    heads = [
        rows[0][1].model_copy(update={"settings": _without_rank(rows[0][1]), "row": name})
        for name, rows in points.items()
        if rows[0][1].kind == "head"
    ]
    baselines = [row for rows in points.values() for _, row in rows if row.kind == "baseline"]
    return {**row_titles(heads), **kin_titles(baselines)}


def _energies(axes: Axes, spectra: Mapping[str, np.ndarray], ranks: set[int]) -> None:
    for (name, energy), (colour, _) in zip(spectra.items(), styles(list(spectra)).values(), strict=True):
        kept = np.cumsum(energy) / energy.sum()
        axes.plot(np.arange(1, len(energy) + 1), kept, color=MUTED if len(spectra) == 1 else colour, linewidth=1.4)
        used = [rank for rank in sorted(ranks) if rank <= len(energy)]
        axes.plot(
            used,
            kept[[rank - 1 for rank in used]],
            "o",
            color=COLOURS[1] if len(spectra) == 1 else colour,
            markersize=4,
        )
        if len(spectra) > 1:
            axes.annotate(
                safe(shortened(name)), (len(energy), kept[-1]), ha="right", va="top", fontsize=SMALL, color=colour
            )
    axes.set_ylabel("energy kept")


def _told(results: Results, points: Points, titles: Mapping[str, str]) -> str:
    parts = ["Lines against rank."]
    ranks = sorted({rank for rows in points.values() for rank, _ in rows})
    kept = [(rank, energy_share(results, rank)) for rank in ranks]
    told = [f"{share:.3f} at rank {rank}" for rank, share in kept if share is not None]
    parts += [f"Energy kept: {', '.join(told)}."] if told else []
    for name, rows in list(points.items())[:_HEADS]:
        ends = [f"{row.value('srcc'):.3f} at rank {rank}" for rank, row in (rows[0], rows[-1])]
        parts.append(f"SRCC of {titles[name]}: {' and '.join(ends)}.")
    return (
        " ".join(parts)
        if points
        else f"The share of energy kept against rank, of {plural(len(_spectra(results)), 'data set')}."
    )
