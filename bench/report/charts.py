"""Charts of an ablation: rows with their intervals, validation curves, and what the rank of a sketch changes."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from agiqa.bench.recording.records import Row, spelled
from agiqa.bench.report.naming import capitalized, identity_titles, on_store, plural, protocol_name, row_titles
from agiqa.bench.report.pictures import (
    MUTED,
    PALETTE,
    PAPER,
    SMALL,
    Picture,
    draw,
    draw_line,
    safe,
    shortened,
    styled,
    tidy,
)
from agiqa.bench.report.reading import Results
from agiqa.bench.report.tables import Cell, Column, Table, make_table, score_column
from agiqa.heads.evaluation.runs import CURVES

_CURVES = 7
"""The most lines that readers can tell apart in one picture."""
_RANK_LINES = 6
_FAR, _FAR_AT_LEAST = 4.0, 0.1
"""A row is an outlier if it is this many interquartile ranges, and at least this much SRCC, below the median."""
_ROW_INCHES, _DOT_INCHES = 0.14, 0.13
_OF_THE_RANK = {"rank", "store"}
"""Settings that differ between the rows of one head at several ranks."""
Keyed = dict[tuple[str, str], Row]
"""Rows by their `identity` and store."""
Ranked = dict[str, list[tuple[int, Row]]]
"""For each head or baseline its rows by rank, ascending."""


def interval_chart(results: Results, label: str, stores: Sequence[str]) -> Picture | None:
    """The test SRCC and interval of each row of `stores`, a colour per protocol; None without numbers."""
    by_protocol: dict[str, Keyed] = {}
    for protocol in (protocol for one, protocol in results.groups() if one == label):
        keyed = {
            (row.identity, row.store_name): row
            for row in results.of(label, protocol)
            if row.store_name in stores and row.value("srcc") is not None
        }
        by_protocol |= {protocol: keyed} if keyed else {}
    rows = {key: row for keyed in by_protocol.values() for key, row in keyed.items()}
    if not rows:
        return None
    order = sorted(rows, key=lambda key: rows[key].kind == "baseline")
    titles = identity_titles(row for keyed in by_protocol.values() for row in keyed.values())
    names = [on_store(titles[name], store if len(stores) > 1 else "") for name, store in order]
    heads = sum(rows[key].is_trained for key in order)
    least = _axis_start([_srcc(row) for keyed in by_protocol.values() for row in keyed.values()])

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for k, (protocol, keyed, style) in enumerate(styled(by_protocol)):
            shift = (k - (len(by_protocol) - 1) / 2) * 0.62 / len(by_protocol)
            places = [(place + shift, keyed[key]) for place, key in enumerate(order) if key in keyed]
            _draw_dots(axes, places, protocol_name(protocol), least, style)
        if least is not None:
            axes.set_xlim(left=least)
        if 0 < heads < len(order):
            axes.axhline(heads - 0.5, color=MUTED, linewidth=0.7, linestyle=(0, (2, 3)))
        axes.set_yticks(range(len(order)), [safe(shortened(name)) for name in names])
        axes.set_ylim(len(order) - 0.5, -0.5)
        tidy(axes, x="test SRCC", grid="x")
        axes.tick_params(axis="y", length=0)
        if len(by_protocol) > 1:
            figure.legend(loc="outside upper right", ncols=min(3, len(by_protocol)), fontsize=SMALL, handletextpad=0.3)

    store = [*stores] if len(stores) == 1 else []
    outliers = "" if least is None else " Arrows: rows whose value lies further left."
    return draw(
        results.anchor("intervals", label, *store),
        results.heading(f"test SRCC of every row, {', '.join(part for part in (label, *store) if part)}"),
        alt=_describe_intervals(by_protocol, titles),
        caption="Dots: test SRCC, means over seeds. Whiskers: 95% intervals. Hollow: baselines." + outliers,
        height=0.75 + len(order) * (_ROW_INCHES + _DOT_INCHES * len(by_protocol)),
        is_wide=True,
        paint=paint,
    )


def _axis_start(values: Sequence[float]) -> float | None:
    """The left end of an axis on which outliers below do not compress the other rows; None without outliers."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    least = float(middle - max(_FAR * (high - low), _FAR_AT_LEAST))
    return least if min(values) < least else None


def _draw_dots(
    axes: Axes, rows: Sequence[tuple[float, Row]], label: str, least: float | None, style: Mapping[str, Any]
) -> None:
    """A dot and an interval for each row at its height; an arrow and the value for a row below `least`."""
    legend: Any = {"label": label}
    for height, row in rows:
        value, interval, colour = _srcc(row), row.interval("srcc"), style["color"]
        if least is not None and value < least:
            text = f" \N{LEFTWARDS ARROW} {value:.2f}".replace("-", "\N{MINUS SIGN}")
            axes.text(least, height, text, color=colour, fontsize=SMALL - 1, va="center")
            continue
        if interval is not None:
            axes.plot(interval, [height] * 2, color=colour, linewidth=1.5, solid_capstyle="round", zorder=2)
        face = colour if row.is_trained else PAPER
        dot: Any = {"linestyle": "none", "markerfacecolor": face, "markersize": 5, "zorder": 3}
        axes.plot(value, height, **style, **dot, **legend)
        legend = {}


def _describe_intervals(by_protocol: Mapping[str, Keyed], titles: Mapping[str, str]) -> str:
    parts = [f"Dots with whiskers of the test SRCC of {plural(max(map(len, by_protocol.values())), 'row')}."]
    for protocol, rows in by_protocol.items():
        low, high = (pick(rows.values(), key=_srcc) for pick in (min, max))
        chosen = max((row for row in rows.values() if row.is_trained), key=lambda row: row.rank_by, default=None)
        ends = " to ".join(f"{_srcc(row):.3f} ({titles[row.identity]})" for row in (low, high))
        best = f"; chosen by validation: {titles[chosen.identity]}, {_srcc(chosen):.3f}" if chosen is not None else ""
        parts.append(f"{protocol_name(protocol).capitalize()}: from {ends}{best}.")
    return " ".join(parts)


def _srcc(row: Row) -> float:
    value = row.value("srcc")
    return float("-inf") if value is None else value


def curves_chart(results: Results, label: str, protocol: str) -> Picture | None:
    """The validation SRCC by epoch, means over the runs of a row, of the rows with the best validation SRCC."""
    trained = [row for row in results.of(label, protocol) if row.is_trained]
    curves = [(row, curve) for row in trained[:_CURVES] if len(curve := _curve(results, row)) > 1]
    if not curves:
        return None
    titles = row_titles(row for row, _ in curves)
    stores = len({row.store_name for row, _ in curves}) > 1

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for _, (row, curve), style in styled({row.row + row.store_name: (row, curve) for row, curve in curves}):
            name = on_store(titles[row.row], row.store_name if stores else "")
            points = [(epoch, value, None) for epoch, value in enumerate(curve, 1)]
            draw_line(axes, points, name, markersize=3.5, linewidth=1.4, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes, x="epoch", y="validation SRCC")
        figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL)

    best, values = curves[0]
    left_out, noun = len(trained) - len(curves), results.trained_noun
    more = f" Left out: {plural(left_out, f'further {noun}')}." if left_out else ""
    return draw(
        results.anchor("curves", label, protocol),
        results.heading(f"validation SRCC by epoch, {label}, {protocol_name(protocol)}"),
        alt=f"Lines of the validation SRCC by epoch for {plural(len(curves), noun)}; {titles[best.row]} goes from "
        f"{values[0]:.3f} to {values[-1]:.3f}.",
        caption="Means over the runs of a row, up to the last epoch that all of them reached; the best by validation "
        f"first.{more}",
        height=3.0 + 0.12 * len(curves),
        paint=paint,
    )


def _curve(results: Results, row: Row) -> list[float]:
    """The mean validation SRCC by epoch over the runs of a row, up to the last epoch that all of them reached."""
    runs = [values for line in results.runs_of(row) if (values := _epochs(results.run_folder(line)))]
    length = min((len(run) for run in runs), default=0)
    return np.mean([run[:length] for run in runs], axis=0).tolist() if length else []


def _epochs(run: Path) -> list[float]:
    """The validation SRCC of each epoch of one run; empty where the file is missing or not readable."""
    path = run / CURVES
    try:
        with path.open(newline="", encoding="utf-8") as file:
            values = [float(row["validation_srcc"]) for row in csv.DictReader(file) if row["stage"] == "train"]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        return []
    return values if np.isfinite(values).all() else []


Point = tuple[str, int, Row]
"""The title of a head or baseline, a rank, and the row there."""


def rank_table(results: Results, label: str, protocol: str) -> Table | None:
    """The scores of each head by rank, and the energy that the rank keeps if a store records its spectrum."""
    ranked, spectra = _by_rank(results, label, protocol), _spectra(results)
    if not ranked:
        return None
    titles = _rank_titles(ranked)
    points: list[Point] = [(titles[name], rank, row) for name, rows in ranked.items() for rank, row in rows]
    energy: list[Column[Point]] = [Column("energy", "Energy kept", lambda one: energy_share(results, one[1]), "paper")]
    columns: list[Column[Point]] = [
        Column("row", "Row", lambda one: Cell(one[0], tag="baseline" if one[2].kind == "baseline" else None), "text"),
        Column("rank", "Rank", lambda one: one[1], "count"),
        *(energy if spectra else []),
        score_column("srcc", lambda one: one[2]),
        score_column("plcc", lambda one: one[2]),
    ]
    note = "Energy kept: the share of the second moment of the logits that the leading directions of the sketch hold."
    title = f"by rank, {label}, {protocol_name(protocol)}"
    return make_table(results, ["rank", label, protocol], title, columns, points, [note] if spectra else [])


def rank_chart(results: Results, label: str, protocol: str) -> Picture | None:
    """Energy against rank above, SRCC against rank below; one of them alone where the other is unknown."""
    ranked, spectra = _by_rank(results, label, protocol), _spectra(results)
    if not ranked and not spectra:
        return None
    shown = dict(list(ranked.items())[:_RANK_LINES])
    titles = _rank_titles(ranked)
    count = bool(shown) + bool(spectra)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        for axes in panels:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            tidy(axes, x="rank" if axes is panels[-1] else None)
        if spectra:
            _draw_energies(panels[0], spectra, {rank for row in results.rows if (rank := _rank_of(results, row))})
        for name, rows, style in styled(shown):
            points = [(rank, row.value("srcc"), row.interval("srcc")) for rank, row in rows]
            draw_line(panels[-1], points, titles[name], markersize=4, linewidth=1.4, **style)
        if shown:
            panels[-1].set_ylabel("test SRCC")
            figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL)

    panels = [*(["energy"] if spectra else []), *([f"SRCC ({label}, {protocol_name(protocol)})"] if shown else [])]
    parts = ["share of the logits' energy that a rank keeps, ranks in use marked"] if spectra else []
    parts += ["test SRCC with 95% intervals"] if shown else []
    caption = f"Above: {parts[0]}. Below: {parts[1]}." if count == 2 else f"{capitalized(parts[0])}."
    more = f" {len(ranked) - len(shown)} further rows are in the table only." if len(ranked) > len(shown) else ""
    return draw(
        results.anchor("energy", label, protocol),
        results.heading(f"{' and '.join(panels)} against rank"),
        alt=_describe_ranks(results, shown, titles),
        caption=caption + more,
        height=2.0 * count + 0.6 + 0.1 * len(shown),
        paint=paint,
    )


def energy_share(results: Results, rank: int) -> float | None:
    """The share of the energy that the leading `rank` directions keep, of the first store with a spectrum."""
    energy = next(iter(_spectra(results).values()), None)
    return None if energy is None or rank > len(energy) else float(energy[:rank].sum() / energy.sum())


def _rank_of(results: Results, row: Row) -> int | None:
    """The rank of a row: its setting, or the width of its store if that is a sketch."""
    setting = row.settings.get("rank")
    if isinstance(setting, int) and not isinstance(setting, bool):
        return setting
    store = results.store(row.store_name)
    return store.width if store.encoding == "sketch" else None


def _by_rank(results: Results, label: str, protocol: str) -> Ranked:
    """The rows of every head or baseline that was run at two ranks or more, once at each."""
    found: Ranked = {}
    for row in results.of(label, protocol):
        rank = _rank_of(results, row)
        if rank is not None and row.value("srcc") is not None:
            name = spelled(_without_rank(row)) or "head" if row.settings.keys() & _OF_THE_RANK else row.identity
            found.setdefault(name, []).append((rank, row))
    by_rank = {name: sorted(rows, key=lambda one: one[0]) for name, rows in found.items()}
    return {name: rows for name, rows in by_rank.items() if _compares_ranks(rows)}


def _compares_ranks(rows: Sequence[tuple[int, Row]]) -> bool:
    """Whether only the rank differs between several rows, and may change their score.

    Stores that share a rank differ in something else. A baseline of equal scores does not read the features.
    """
    differ = 1 < len(rows) == len({rank for rank, _ in rows})
    return differ and (rows[0][1].kind == "head" or len({row.value("srcc") for _, row in rows}) > 1)


def _without_rank(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.settings.items() if name not in _OF_THE_RANK}


def _rank_titles(ranked: Ranked) -> dict[str, str]:
    """A title without the rank for each head, and a title for each baseline."""
    heads = [
        rows[0][1].model_copy(update={"settings": _without_rank(rows[0][1]), "row": name})
        for name, rows in ranked.items()
        if rows[0][1].kind == "head"
    ]
    baselines = [row for rows in ranked.values() for _, row in rows if row.kind == "baseline"]
    return {**row_titles(heads), **identity_titles(baselines)}


def _spectra(results: Results) -> dict[str, NDArray[np.float64]]:
    """The eigenvalues (rank,) that stores record, one spectrum for each data set and model."""
    found: dict[str, NDArray[np.float64]] = {}
    for name, store in results.about.stores.items():
        energy = np.asarray(store.energy or [], dtype=np.float64)
        if len(energy) and (energy >= 0).all() and energy.sum() > 0:
            found.setdefault(" ".join((store.data, store.model)).strip() or name, energy)
    return found


def _draw_energies(axes: Axes, spectra: Mapping[str, NDArray[np.float64]], ranks: set[int]) -> None:
    alone = len(spectra) == 1
    for name, energy, style in styled(spectra):
        colour = style["color"]
        kept = np.cumsum(energy) / energy.sum()
        axes.plot(np.arange(1, len(energy) + 1), kept, color=MUTED if alone else colour, linewidth=1.4)
        used = [rank for rank in sorted(ranks) if rank <= len(energy)]
        axes.plot(used, kept[[rank - 1 for rank in used]], "o", color=PALETTE[1] if alone else colour, markersize=4)
        if not alone:
            text: Any = {"ha": "right", "va": "top", "fontsize": SMALL, "color": colour}
            axes.annotate(safe(shortened(name)), (len(energy), kept[-1]), **text)
    axes.set_ylabel("energy kept")


def _describe_ranks(results: Results, shown: Ranked, titles: Mapping[str, str]) -> str:
    if not shown:
        return f"The share of energy kept against rank, of {plural(len(_spectra(results)), 'data set')}."
    parts = ["Lines against rank."]
    ranks = sorted({rank for rows in shown.values() for rank, _ in rows})
    kept = [f"{share:.3f} at rank {rank}" for rank in ranks if (share := energy_share(results, rank)) is not None]
    parts += [f"Energy kept: {', '.join(kept)}."] if kept else []
    for name, rows in shown.items():
        ends = [f"{row.value('srcc'):.3f} at rank {rank}" for rank, row in (rows[0], rows[-1])]
        parts.append(f"SRCC of {titles[name]}: {' and '.join(ends)}.")
    return " ".join(parts)
