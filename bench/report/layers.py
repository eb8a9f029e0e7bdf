"""What the layer of the features changes: SRCC against layer as a picture and as a table, by depth."""

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure

from agiqa.bench.recording.records import Row, spelled
from agiqa.bench.report.naming import identity_titles, on_store, plural, protocol_name, row_titles
from agiqa.bench.report.pictures import SMALL, Picture, draw, draw_line, styled, tidy
from agiqa.bench.report.reading import Results
from agiqa.bench.report.tables import Cell, Column, Table, make_table, score_column
from agiqa.heads.data.layers import JOINER, LAST

_LAYER = "layer"
_LINES = 6
"""The most lines that readers can tell apart in one picture."""
_LABELS = 16
"""The most names of layers that have room below the axis."""
_DEEPEST = 1 << 20
_APART = 0.12
"""Distance between the whiskers of two lines at one layer, in layers."""
ByLayer = dict[str, dict[str, Row]]
"""For each head or baseline its rows by layer, ascending; layers that are joined come last."""
Point = tuple[str, str, Row]
"""The title of a head or baseline, a layer, and the row there."""


def depth_of(layer: str) -> tuple[int, int, str]:
    """The place of a layer in an order: by number, `last` after all numbers, and layers that are joined at the end."""
    if JOINER in layer:
        return 1, layer.count(JOINER), layer
    number = _DEEPEST if layer == LAST else int(layer)
    return 0, number if number >= 0 else _DEEPEST + 1 + number, layer


def layer_table(results: Results, label: str, protocol: str) -> Table | None:
    """The scores of each head and baseline by layer; None unless one was run on two layers or more."""
    shown = _by_layer(results, label, protocol)
    if not shown:
        return None
    titles = _titles(shown)
    points: list[Point] = [(titles[name], layer, row) for name, rows in shown.items() for layer, row in rows.items()]
    columns: list[Column[Point]] = [
        Column("row", "Row", lambda one: Cell(one[0], tag="baseline" if one[2].kind == "baseline" else None), "text"),
        Column("layer", "Layer", lambda one: one[1], "text"),
        Column("validation_srcc", "Validation SRCC", lambda one: one[2].validated("srcc")),
        score_column("srcc", lambda one: one[2]),
        score_column("plcc", lambda one: one[2]),
    ]
    note = "Choose a layer by the validation SRCC: the best test score of many layers is too high as an estimate."
    title = f"by layer, {label}, {protocol_name(protocol)}"
    return make_table(results, ["layers", label, protocol], title, columns, points, [note])


def layer_chart(results: Results, label: str, protocol: str) -> Picture | None:
    """Test SRCC with intervals against layer, a line per head or baseline; None unless one was run on two layers."""
    single = {
        name: rows
        for name, found in _by_layer(results, label, protocol).items()
        if len(rows := {layer: row for layer, row in found.items() if JOINER not in layer}) > 1
    }
    if not single:
        return None
    shown, titles = dict(list(single.items())[:_LINES]), _titles(single)
    layers = sorted({layer for rows in shown.values() for layer in rows}, key=depth_of)
    every = -(-len(layers) // _LABELS)
    labelled = sorted({*range(0, len(layers) - every // 2 - 1, every), len(layers) - 1})

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for k, (name, rows, style) in enumerate(styled(shown)):
            aside = (k - (len(shown) - 1) / 2) * _APART
            points = [
                (layers.index(layer) + aside, row.value("srcc"), row.interval("srcc")) for layer, row in rows.items()
            ]
            draw_line(axes, points, titles[name], markersize=3.5, linewidth=1.4, **style)
        axes.set_xticks(labelled, [layers[place] for place in labelled])
        tidy(axes, x="layer", y="test SRCC")
        figure.legend(loc="outside lower center", ncols=2 if len(shown) > 1 else 1, fontsize=SMALL)

    more = f" {len(single) - len(shown)} further rows are in the table only." if len(single) > len(shown) else ""
    return draw(
        results.anchor("layers", label, protocol),
        results.heading(f"SRCC against layer, {label}, {protocol_name(protocol)}"),
        alt=_description(shown, titles),
        caption=f"Test SRCC, means over seeds, with 95% intervals. Layers are evenly spaced.{more}",
        height=2.9 + 0.12 * len(shown),
        paint=paint,
    )


def _by_layer(results: Results, label: str, protocol: str) -> ByLayer:
    """The rows of every head or baseline that was run on two layers or more."""
    found: ByLayer = {}
    for row in results.of(label, protocol):
        layer = row.settings.get(_LAYER)
        if layer is not None and row.value("srcc") is not None:
            found.setdefault(on_store(_name(row), row.store_name), {})[str(layer)] = row
    return {
        name: {layer: rows[layer] for layer in sorted(rows, key=depth_of)}
        for name, rows in found.items()
        if len(rows) > 1
    }


def _name(row: Row) -> str:
    """What the rows of one head, or baseline, on several layers share."""
    return spelled(_others(row.settings)) or "head"


def _others(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != _LAYER}


def _titles(shown: ByLayer) -> dict[str, str]:
    """A title without the layer for each name of `shown`."""
    firsts: dict[str, Row] = {}
    for name, rows in shown.items():
        first = next(iter(rows.values()))
        spelled_name = _name(first)
        firsts[name] = first.model_copy(update={"settings": _others(first.settings), "row": spelled_name})
    heads = row_titles(row for row in firsts.values() if row.kind == "head")
    baselines = identity_titles(row for row in firsts.values() if row.kind == "baseline")
    return {
        name: on_store(
            heads[row.row] if row.kind == "head" else _baseline_title(baselines[row.identity], shown[name]),
            row.store_name,
        )
        for name, row in firsts.items()
    }


def _baseline_title(title: str, rows: Mapping[str, Row]) -> str:
    """`ridge`, `kernel ridge` or both for the baseline `features`, whose rows name what was fitted to their layer."""
    if title != "baseline=features":
        return title
    kinds = {kind for row in rows.values() for kind in row.row.partition(" (")[0].split(" or ")}
    return " or ".join(sorted(kinds, reverse=True))


def _description(shown: ByLayer, titles: Mapping[str, str]) -> str:
    parts = [f"{plural(len(shown), 'line')} against layer."]
    for name, rows in shown.items():
        best, layers = _best(rows.values()), list(rows)
        told = " to ".join(f"{rows[layer].value('srcc'):.3f} at layer {layer}" for layer in (layers[0], layers[-1]))
        chosen = next((f"; chosen by validation: layer {layer}" for layer, row in rows.items() if row is best), "")
        parts.append(f"{titles[name]}: from {told}{chosen}.")
    return " ".join(parts)


def _best(rows: Iterable[Row]) -> Row | None:
    """The row of the best mean validation SRCC; None where none has one."""
    known = [row for row in rows if row.validated("srcc") is not None]
    return max(known, key=lambda row: row.rank_by, default=None)
