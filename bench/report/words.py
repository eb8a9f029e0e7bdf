"""The sentences of a report: what came out, how the numbers are made, and what they cannot show."""

from collections.abc import Sequence

from agiqa.bench.report.naming import group_title, listed, on_store, plural, protocol_name, row_titles
from agiqa.bench.report.reading import CONFIDENT, Results, Row, RunLine
from agiqa.bench.report.row_tables import leak
from agiqa.bench.report.transfers import Direction, directions
from agiqa.store.format.items import TEACHER

METHOD = (
    "A row is one head, trained once for every seed and, where the protocol has them, every fold or held-out "
    "generator. Each number is a metric over all test items of the protocol, averaged over seeds; sd is its standard "
    "deviation over seeds. Where each fold has a seed of its own, all folds are one answer, and there is no sd.",
    "The published split is that of the data set. Grouped by prompt: whole prompts are dealt into folds, and each "
    "image is scored once, by a head that never saw its prompt. Leave one generator out: each image is scored once, by "
    "a head that never saw an image of its generator; its prompt may be known, and the table counts how often. In "
    "both, the scores of all heads are put together before a metric is computed, so differences between these heads "
    "count against it.",
    "SRCC is Spearman's rank correlation of predicted and true MOS, PLCC is Pearson's, with no mapping fitted in "
    "between. A dash is a correlation that does not exist, because all predictions are equal, the RMSE of predictions "
    "that are not on the scale of the MOS, or a number that was not recorded.",
    "Intervals cover 95%. They are about other prompts and other seeds: images of one prompt are not independent, so "
    "whole prompts are left out one by one (a jackknife), and the variance over seeds is added. With one seed they are "
    "about prompts alone; so are those of baselines, which no seed has a part in. Quantiles are those of Student's t; "
    "with fewer than 5 seeds, which tell little of how much seeds matter, they are larger. Correlations have their "
    "interval on Fisher's z scale. There is none for fewer than 10 prompts (RMSE: 20), nor of RMSE for two seeds. "
    "That of RMSE covers less, about 86 to 92%, where a few images or one prompt hold much of the squared "
    "error.",
    "Δ is a row minus the reference row of its table, on the same items. Its two-sided p asks whether a training with "
    "other seeds, on other prompts, would differ too; it is that of a t-test with the same variances. With one seed "
    "there is none. Holm's correction covers, for each metric, all heads and baselines that are compared with one "
    f"reference: the chance that any of them is told from it by luck stays at about {CONFIDENT}. Stores of other items "
    "have a reference of their own.",
    "The reference row has the best mean validation SRCC. Epochs, too, are chosen by validation items. Test "
    "items take part in no choice but that of the baseline which is named first, and the order of the rows is that of "
    "validation.",
    "Baselines are tested on the same items as the heads of their table, and fitted on all others that heads have, "
    "those included that choose an epoch: a few more than a head without `refit` learns from. They are compared "
    "with the reference by the same paired test where they have a value and predict exactly its items, and are never "
    "the reference.",
)


_FEW_SEEDS = 3


def findings(results: Results) -> list[str]:
    """What came out of an ablation, a sentence or two for each label and protocol."""
    found: list[str] = []
    for label, protocol in results.groups():
        rows, where = results.of(label, protocol), group_title(results, label, protocol)
        chosen = next((row for row in rows if row.kind == "head" and row.value("srcc") is not None), None)
        if chosen is not None and not chosen.was_chosen:
            found.append(f"{where}: no head could be chosen, as none has a validation SRCC.")
        elif chosen is not None:
            titles = row_titles(rows)
            beside = [row for row in rows if row.store_name == chosen.store_name]
            rivals = next((others for one, others in results.references(label, protocol) if one is chosen), [])
            parts = [f"{where}: {_chosen(chosen, titles)}", _rivals(rivals), _best_baseline(beside)]
            found.append(" ".join(part for part in parts if part))
    return found


def transfer_findings(results: Results) -> list[str]:
    """What came out of a transfer, a sentence or three for each direction."""
    found: list[str] = []
    for label, protocol in results.groups():
        for one in directions(results, label, protocol):
            applied, retrained = one.way("apply"), one.way("tp")
            parts: list[str] = []
            if applied is not None:
                parts.append(f"the head as it is has a test SRCC of {_number(applied, 'srcc')}")
            if retrained is not None:
                parts.append(f"retrained (w/ TP) it has {_number(retrained, 'srcc')}{_verdict(retrained)}")
            if parts:
                where = f"{one.source} to {one.target}, {label}, {protocol_name(protocol)}"
                told = results.told(f"{where}: {'; '.join(parts)}.")
                found.append(" ".join(part for part in (told, _fewest(one)) if part))
    return found


def teacher_findings(results: Results) -> list[str]:
    """What is wrong with runs that read the rating words of a teacher that was told the MOS, a sentence by part."""
    harms = {"test": "test scores are too high", "validation": "the choice of their epoch favours heads that copy it"}
    return [
        f"{told}, its rating word included: {harms[part]}."
        for part in harms
        if (told := _of_teacher(results, part, rating_words=True))
    ]


def _of_teacher(results: Results, part: str, *, rating_words: bool) -> str | None:
    """How many items of the part read a teacher's text, in runs that read its rating words, or in those that do not.

    Where a store does not tell the variant of its conversations, they count as read. None where there are no such runs.
    """
    counts = [
        line.text_authors[part]
        for line in results.done
        if line.text_authors.get(part, {}).get(TEACHER, 0) and _may_read_rating_words(results, line) == rating_words
    ]
    if not counts:
        return None
    most = max(counts, key=lambda counted: counted[TEACHER])
    return results.titled(
        f"in {plural(len(counts), 'run')}, up to {most[TEACHER]:,} of {sum(most.values()):,} {part} items read the "
        "text of a teacher that was told their MOS"
    )


def _may_read_rating_words(results: Results, line: RunLine) -> bool:
    """Whether the conversations of its store end with the rating word, or nobody knows.

    Lines of a transfer name no store, so there it is one of both.
    """
    stores = results.about.stores
    variants = [store.variant for name, store in stores.items() if line.store_name in (name, "")]
    return not variants or None in variants or "full" in variants


def limits(results: Sequence[Results]) -> list[str]:
    """What the data cannot show, as far as the files tell."""
    found: list[str] = []
    leaks = dict.fromkeys(one for each in results if (one := leak(each, "published")) and one.items)
    if leaks:
        found.append(
            f"On the published split {'; '.join(one.told() for one in leaks)}: those numbers say nothing of new "
            "prompts."
        )
    found += [
        f"{read}, without its rating word; a model that does not know the MOS may describe otherwise."
        for one in results
        if (read := _of_teacher(one, "test", rating_words=False))
    ]
    seeds = [row.test.seeds for one in results for row in one.rows if row.kind == "head" and row.test is not None]
    if seeds and min(seeds) < _FEW_SEEDS:
        found.append(
            f"Some rows have {plural(min(seeds), 'seed')} only for each test image: too few to tell how much seeds "
            "matter."
        )
    models = sorted({store.model_name for one in results for store in one.about.stores.values() if store.model_name})
    if models:
        found.append(
            f"All numbers are of features of {listed(models)}; another model, or the same with other text, may "
            "order heads otherwise."
        )
    single = bool(seeds) and max(seeds) == 1
    found.append(
        "Intervals are about prompts like these. They do not cover other seeds, another data set or another split of "
        "it."
        if single
        else "Intervals and p-values are about prompts and, where a head has several, seeds like these. They do not "
        "cover another data set or another split of it."
    )
    return list(dict.fromkeys(found))


def _chosen(row: Row, titles: dict[str, str]) -> str:
    name = on_store(titles[row.row], row.store_name)
    scores = f"a test SRCC of {_number(row, 'srcc')} and a PLCC of {_number(row, 'plcc')}"
    return f"{name}, chosen by validation, has {scores}."


def _rivals(rows: Sequence[Row]) -> str | None:
    """How many of the heads that are compared with the chosen one the paired test tells from it."""
    heads = [row for row in rows if row.kind == "head"]
    tested = [p for row in heads if (p := row.p("srcc")) is not None]
    untested = sum(row.against is not None and row.against.no_p is not None for row in heads)
    was = "was" if untested == 1 else "were"
    left = f"{plural(untested, 'other head')} {was} not tested: it takes two seeds or more." if untested else None
    if not tested:
        return left
    apart = sum(p < CONFIDENT for p in tested)
    told = (
        f"{apart:,} of {plural(len(tested), 'other head')}" if apart else f"none of {plural(len(tested), 'other head')}"
    )
    return " ".join(part for part in (f"In SRCC the paired test tells {told} from it.", left) if part)


def _best_baseline(rows: Sequence[Row]) -> str | None:
    known = [row for row in rows if row.kind == "baseline" and row.value("srcc") is not None]
    if not known:
        return None
    best = max(known, key=lambda row: row.value("srcc") or float("-inf"))
    return f"Of the baselines {best.row} has the highest test SRCC, {_number(best, 'srcc')}{_verdict(best)}."


def _verdict(row: Row) -> str:
    """Whether the paired test tells the row from its reference; nothing where it was not asked."""
    p = row.p("srcc")
    if p is None:
        return ""
    return ", which the test tells from it" if p < CONFIDENT else ", which the test cannot tell from it"


def _fewest(one: Direction) -> str | None:
    """What the fewest labelled items of the target bring."""
    fewest = {way: rows[0] for way, rows in one.shots().items()}
    if {"fresh", "warm"} - fewest.keys() or fewest["fresh"][0] != fewest["warm"][0]:
        return None
    (count, fresh), (_, warm) = fewest["fresh"], fewest["warm"]
    return (
        f"Trained on {count} items of {one.target}, a head from random weights has {_number(fresh, 'srcc')}, one that "
        f"goes on from {one.source} {_number(warm, 'srcc')}{_verdict(warm)}."
    )


def _number(row: Row, metric: str) -> str:
    value, interval = row.value(metric), row.interval(metric)
    if value is None:
        return "no defined value"
    return f"{value:.3f}" + ("" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})")
