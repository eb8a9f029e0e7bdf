"""The rows of an ablation as a markdown table: heads in the order of the grid, then baselines, protocol by protocol."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from agiqa.bench.recording.tables import as_table

Row = Mapping[str, Any]


def rows_text(rows: Sequence[Row]) -> str:
    """A table with intervals of 95 % and the paired difference to the best head by validation, of heads and baselines.

    Lines below it say what is left out.
    """
    shown = [row for row in rows if "left_out" not in row]
    order = {protocol: number for number, protocol in enumerate(dict.fromkeys(row["protocol"] for row in shown))}
    shown.sort(key=lambda row: (order[row["protocol"]], row["kind"] != "head"))
    columns = _columns(shown)
    table = as_table([title for title, _ in columns], [[cell(row) for _, cell in columns] for row in shown])
    left_out = [
        f"{row['row']} ({row['protocol']}, {row['label']}): {row['left_out']}" for row in rows if "left_out" in row
    ]
    return "\n\n".join(part for part in (table, "Left out:\n" + "\n".join(left_out) if left_out else "") if part)


def score_text(test: Mapping[str, Any] | None, metric: str, *, undefined: str) -> str:
    """A test metric with its interval; `-` where there is no test, `undefined` where it has no value."""
    if test is None:
        return "-"
    if test[metric] is None:
        return undefined
    interval = test["ci"].get(metric)
    return f"{test[metric]:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Titles and cells; what is the same everywhere has no column."""
    several = {name: len({row[name] for row in rows}) > 1 for name in ("store_name", "protocol", "label")}
    columns: list[tuple[str, Callable[[Row], str]]] = [("run", lambda row: str(row["row"]))]
    for name, title in (("store_name", "store"), ("protocol", "protocol"), ("label", "label")):
        if several[name]:
            columns.append((title, partial(_text, name)))
    columns += [
        ("seeds", _seeds),
        ("validation SRCC", _validation),
        ("test SRCC", lambda row: score_text(row["test"], "srcc", undefined="undefined")),
        ("test PLCC", lambda row: score_text(row["test"], "plcc", undefined="undefined")),
        ("SRCC against the best by validation (p, Holm)", _against),
    ]
    return columns


def _seeds(row: Row) -> str:
    """How many seeds the numbers are means over, and how many there are where these are not the same."""
    if row["kind"] != "head":
        return "-"
    seeds = row["seeds"]
    averaged = seeds if row["test"] is None else row["test"]["seeds"]
    if averaged == seeds:
        return str(seeds)
    return f"{averaged} of {seeds}" if row["failed"] else f"{seeds}, one a part"


def _text(name: str, row: Row) -> str:
    return str(row[name])


def _validation(row: Row) -> str:
    found = (row["validation"] or {}).get("srcc")
    if found is None:
        return "-"
    mean, spread = found
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"


def _against(row: Row) -> str:
    against = row["against"]
    if against is None or against["difference"]["srcc"] is None:
        return "-"
    p = against["p_holm"]["srcc"]
    told = "one seed: no p" if "no_p" in against else "no p" if p is None else f"{p:.3g}"
    return f"{against['difference']['srcc']:+.4f} ({told})"
