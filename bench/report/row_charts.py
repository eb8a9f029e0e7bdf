"""Charts of an ablation: rows with their intervals, SRCC against rank, and the validation curves."""

import csv
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agiqa.bench.recording.result_folders import RUNS
from agiqa.bench.report.figures import MUTED, PAPER, SMALL, Picture, draw, safe, shortened, styles, tidy
from agiqa.bench.report.naming import kin_titles, on_store, plural, protocol_name, row_titles, slug
from agiqa.bench.report.reading import Results, Row

_CURVES = 7
"""Lines that can be told apart in one picture."""
Keyed = dict[tuple[str, str], Row]
"""Rows by their `kin` and store."""
_FAR, _FAR_AT_LEAST = 4.0, 0.1
"""Times the distance of the quartiles, and SRCC, below the median from which a row is far below the others."""
_ROW_INCHES, _DOT_INCHES = 0.14, 0.13


def interval_chart(results: Results, label: str, stores: Sequence[str]) -> Picture | None:
    """Dots and whiskers: the test SRCC of each row of `stores`, a colour for each protocol; None without numbers."""
    by_protocol: dict[str, Keyed] = {}
    for one, protocol in results.groups():
        keyed = {
            (row.kin, row.store_name): row
            for row in results.of(label, protocol)
            if row.store_name in stores and row.value("srcc") is not None
        }
        if one == label and keyed:
            by_protocol[protocol] = keyed
    rows = {key: row for keyed in by_protocol.values() for key, row in keyed.items()}
    if not rows:
        return None
    order = sorted(rows, key=lambda key: rows[key].kind == "baseline")
    titles = kin_titles(row for keyed in by_protocol.values() for row in keyed.values())
    names = [on_store(titles[name], store if len(stores) > 1 else "") for name, store in order]
    heads = sum(rows[key].kind == "head" for key in order)
    where = ", ".join(part for part in (label, *(stores if len(stores) == 1 else ())) if part)

    least = _least([_srcc(row) for keyed in by_protocol.values() for row in keyed.values()])
    further = "" if least is None else " An arrow: a row further left, at that value."

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for k, (protocol, (colour, marker)) in enumerate(styles(by_protocol).items()):
            shift = (k - (len(by_protocol) - 1) / 2) * 0.62 / len(by_protocol)
            found = [by_protocol[protocol].get(key) for key in order]
            _whiskers(axes, found, shift, colour, marker, protocol, least=least)
        if least is not None:
            axes.set_xlim(left=least)
        if 0 < heads < len(order):
            axes.axhline(heads - 0.5, color=MUTED, linewidth=0.7, linestyle=(0, (2, 3)))
        axes.set_yticks(range(len(order)), [safe(shortened(name)) for name in names])
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set_xlabel("test SRCC")
        tidy(axes, grid="x")
        axes.tick_params(axis="y", length=0)
        if len(by_protocol) > 1:
            figure.legend(loc="outside upper right", ncols=min(3, len(by_protocol)), fontsize=SMALL, handletextpad=0.3)

    return draw(
        slug(results.prefix, "intervals", label, *(stores if len(stores) == 1 else ())),
        results.titled(f"test SRCC of every row, {where}"),
        alt=_told_intervals(by_protocol, titles),
        caption="Dots: test SRCC, of several seeds the mean. Whiskers: 95% intervals. Hollow: baselines." + further,
        height=0.75 + len(order) * (_ROW_INCHES + _DOT_INCHES * len(by_protocol)),
        is_wide=True,
        paint=paint,
    )


def curves_chart(results: Results, label: str, protocol: str) -> Picture | None:
    """The validation SRCC after each epoch, mean over the runs of a row, of the rows with the best validation."""
    heads = [row for row in results.of(label, protocol) if row.kind == "head"]
    found = {row.row + row.store_name: (row, _curve(results, row)) for row in heads[:_CURVES]}
    curves = {name: (row, curve) for name, (row, curve) in found.items() if len(curve) > 1}
    if not curves:
        return None
    titles = row_titles(row for row, _ in curves.values())
    stores = len({row.store_name for row, _ in curves.values()}) > 1

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (row, curve), (colour, marker) in zip(curves.values(), styles(list(curves)).values(), strict=True):
            name = on_store(titles[row.row], row.store_name if stores else "")
            epochs = range(1, len(curve) + 1)
            axes.plot(
                epochs, curve, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=safe(shortened(name))
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation SRCC")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
        figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL)

    first, last = (f"{next(iter(curves.values()))[1][at]:.3f}" for at in (0, -1))
    best = titles[next(iter(curves.values()))[0].row]
    more = f" {len(heads) - len(curves)} further heads are left out." if len(heads) > len(curves) else ""
    return draw(
        slug(results.prefix, "curves", label, protocol),
        results.titled(f"validation SRCC by epoch, {label}, {protocol_name(protocol)}"),
        alt=(
            f"Lines of the validation SRCC by epoch for {plural(len(curves), 'head')}; {best} goes from {first} "
            f"to {last}."
        ),
        caption=f"Means over the runs of a row, as far as all of them went; the best by validation first.{more}",
        height=3.0 + 0.12 * len(curves),
        paint=paint,
    )


def _curve(results: Results, row: Row) -> list[float]:
    """The mean validation SRCC by epoch over the runs of a row, up to the last epoch that all of them reached."""
    runs = [values for line in results.runs_of(row) if (values := _epochs(results, line.name))]
    length = min((len(run) for run in runs), default=0)
    return np.mean([run[:length] for run in runs], axis=0).tolist() if length else []


def _epochs(results: Results, run: str) -> list[float]:
    """The validation SRCC of each epoch of one run; nothing where it has none or cannot be read."""
    path = results.folder / RUNS / run / "curves.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            values = [float(row["validation_srcc"]) for row in csv.DictReader(file) if row["stage"] == "train"]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        return []
    return values if np.isfinite(values).all() else []


def _least(values: Sequence[float]) -> float | None:
    """Where an axis begins that is not to be stretched by a few rows far below the others; None without such rows."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    least = float(middle - max(_FAR * (high - low), _FAR_AT_LEAST))
    return least if min(values) < least else None


def _whiskers(
    axes: Axes,
    rows: Sequence[Row | None],
    shift: float,
    colour: str,
    marker: str,
    protocol: str,
    *,
    least: float | None,
) -> None:
    labelled = False
    for place, row in enumerate(rows):
        value = None if row is None else row.value("srcc")
        if row is None or value is None:
            continue
        if least is not None and value < least:
            text = f"\N{LEFTWARDS ARROW} {value:.2f}".replace("-", "\N{MINUS SIGN}")
            axes.text(least, place + shift, f" {text}", color=colour, fontsize=SMALL - 1, va="center")
            continue
        interval = row.interval("srcc")
        if interval is not None:
            axes.plot(interval, [place + shift] * 2, color=colour, linewidth=1.5, solid_capstyle="round", zorder=2)
        face = colour if row.kind == "head" else PAPER
        label = None if labelled else protocol_name(protocol)
        axes.plot(value, place + shift, marker, color=colour, markerfacecolor=face, markersize=5, label=label, zorder=3)
        labelled = True


def _told_intervals(by_protocol: dict[str, Keyed], titles: dict[str, str]) -> str:
    parts = [f"Dots with whiskers of the test SRCC of {plural(max(map(len, by_protocol.values())), 'row')}."]
    for protocol, rows in by_protocol.items():
        low, high = (pick(rows.values(), key=_srcc) for pick in (min, max))
        chosen = max((row for row in rows.values() if row.kind == "head"), key=Row.chosen_by, default=None)
        ends = " to ".join(f"{_srcc(row):.3f} ({titles[row.kin]})" for row in (low, high))
        told = f"; chosen by validation: {titles[chosen.kin]}, {_srcc(chosen):.3f}" if chosen is not None else ""
        parts.append(f"{protocol_name(protocol).capitalize()}: from {ends}{told}.")
    return " ".join(parts)


def _srcc(row: Row) -> float:
    value = row.value("srcc")
    return float("-inf") if value is None else value
