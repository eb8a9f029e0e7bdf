"""The sentences of a report: what came out, how the numbers are made, and what they cannot show."""

from collections.abc import Sequence

from agiqa.bench.report.naming import listed, plural, protocol_name, row_titles
from agiqa.bench.report.reading import CONFIDENT, Results, Row
from agiqa.bench.report.row_tables import leak

METHOD = (
    "A row is one head, trained once for every seed and, where the protocol has them, every fold or held-out "
    "generator. Each number "
    "is a metric over all test items of the protocol, averaged over seeds; sd is its standard deviation over seeds.",
    "SRCC is Spearman's rank correlation of predicted and true MOS, PLCC is Pearson's, with no mapping fitted in "
    "between. A dash is a "
    "correlation that does not exist, because all predictions are equal, or a number that was not recorded.",
    "Intervals are 95% percentiles of a bootstrap that draws whole prompts, since images of one prompt are not "
    "independent. All "
    "seeds share the draws. An interval tells how much other prompts would have changed the number; sd tells how "
    "much other seeds would.",
    "Δ is a row minus the reference row of its table, scored on the same draws (a paired bootstrap). Its p is "
    "two-sided: twice the "
    "share of draws on the other side of zero, counted with one draw more. Holm's correction then covers all "
    "rows of the table, so "
    "that one in twenty tables, not one in twenty rows, has a false difference.",
    "The reference row has the best mean validation SRCC. Epochs, too, are chosen by validation items. Test "
    "items take part in no choice, and the order of the rows is that of validation.",
    "Baselines see the same training and test items as the heads of their table.",
)


_FEW_SEEDS = 3


def findings(results: Results, *, several: bool = False) -> list[str]:
    """What came out of an ablation, a sentence or two for each label and protocol."""
    found: list[str] = []
    for label, protocol in results.groups():
        rows = results.of(label, protocol)
        chosen = next((row for row in rows if row.kind == "head" and row.value("srcc") is not None), None)
        if chosen is not None:
            titles = row_titles(rows)
            same = [row for row in rows if row.store_name == chosen.store_name]
            where = f"{results.name}: " if several else ""
            parts = [where + _chosen(chosen, titles, label, protocol), _rivals(same, chosen), _best_baseline(same)]
            found.append(" ".join(part for part in parts if part))
    return found


def limits(results: Sequence[Results]) -> list[str]:
    """What the data cannot show, as far as the files tell."""
    found: list[str] = []
    leaks = dict.fromkeys(counts for one in results if (counts := leak(one, "published")) and counts[0])
    if leaks:
        told = listed([f"{leaked:,} of {tested:,}" for leaked, tested in leaks])
        found.append(
            f"On the published split {told} test images have a prompt that occurs in training: those numbers say "
            "nothing of new prompts."
        )
    seeds = [row.seeds for one in results for row in one.rows if row.kind == "head"]
    if seeds and min(seeds) < _FEW_SEEDS:
        found.append(f"Some rows have {plural(min(seeds), 'seed')} only: too few to tell how much seeds matter.")
    models = sorted({store.model_name for one in results for store in one.about.stores.values() if store.model_name})
    if models:
        found.append(
            f"All numbers are of features of {listed(models)}; another model, or the same with other text, may "
            "order heads otherwise."
        )
    found.append(
        "Intervals and p-values are about the prompts of these data sets. They do not cover another data set or "
        "another split of it."
    )
    return list(dict.fromkeys(found))


def _chosen(row: Row, titles: dict[str, str], label: str, protocol: str) -> str:
    name = " @ ".join(part for part in (titles[row.row], row.store_name) if part)
    where = f"{label.capitalize()}, {protocol_name(protocol)}"
    return (
        f"{where}: {name}, chosen by validation, has a test SRCC of {_number(row, 'srcc')} and a PLCC of "
        f"{_number(row, 'plcc')}."
    )


def _rivals(rows: Sequence[Row], chosen: Row) -> str | None:
    """How many heads the paired test tells from the chosen one."""
    tested = {
        row.row: p for row in rows if row.kind == "head" and row is not chosen and (p := row.p("srcc")) is not None
    }
    if not tested:
        return None
    alike = sum(p >= CONFIDENT for p in tested.values())
    if alike == len(tested):
        return f"The paired test tells none of the {plural(len(tested), 'other head')} from it."
    return f"The paired test tells {len(tested) - alike} of {plural(len(tested), 'other head')} from it."


def _best_baseline(rows: Sequence[Row]) -> str | None:
    known = [row for row in rows if row.kind == "baseline" and row.value("srcc") is not None]
    if not known:
        return None
    best = max(known, key=lambda row: row.value("srcc") or float("-inf"))
    p = best.p("srcc")
    verdict = (
        ""
        if p is None
        else ", which the test tells from it"
        if p < CONFIDENT
        else ", which the test cannot tell from it"
    )
    return f"The best baseline, {best.row}, has {_number(best, 'srcc')}{verdict}."


def _number(row: Row, metric: str) -> str:
    value, interval = row.value(metric), row.interval(metric)
    if value is None:
        return "no defined value"
    return f"{value:.3f}" + ("" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})")
