"""The sentences of a report: what was found, how the numbers are computed, and what they cannot show."""

from collections.abc import Sequence

from agiqa.bench.recording.records import Row, RunLine
from agiqa.bench.report.naming import listed, on_store, plural, protocol_name, row_titles
from agiqa.bench.report.reading import CONFIDENT, Results
from agiqa.bench.report.row_tables import leak
from agiqa.bench.report.transfers import Direction, directions
from agiqa.store.format.items import TEACHER

METHOD = (
    "A row is one head, trained once for every seed and, if the protocol has folds or held-out generators, once for "
    "each of them. Each number is a metric over all test items of the protocol, averaged over seeds; sd is its "
    "standard deviation over seeds. If each fold has a seed of its own, all folds together count as one seed, and "
    "there is no sd.",
    "The published split is that of the data set. Grouped by prompt: whole prompts are assigned to folds, and each "
    "image is scored once, by a head that never saw its prompt. Leave one generator out: each image is scored once, by "
    "a head that never saw an image of its generator. That head may have seen the prompt; the table counts how often. "
    "Under both protocols, metrics are computed over the scores of all these heads together, so differences between "
    "the heads lower them.",
    "SRCC is Spearman's rank correlation of predicted and true MOS. PLCC is Pearson's correlation, without a fitted "
    "mapping. PLCC (logistic), a column that can be switched on, is computed after a logistic curve that was fitted on "
    "validation images; it is a mean over runs, each fold or held-out generator counted by itself. A dash "
    "stands for a correlation that is undefined because all predictions are equal, for the RMSE of predictions that "
    "are not on the scale of the MOS, or for a number that was not recorded.",
    "Intervals cover 95%. They include the variation over other prompts and other seeds. Images of one prompt are not "
    "independent, so the jackknife leaves out whole prompts, one at a time; the variance over seeds is added. With one "
    "seed, intervals cover prompts only. So do those of baselines, which do not depend on a seed. Quantiles are those "
    "of Student's t. They are larger for fewer than 5 seeds, which say little about how much seeds matter. Intervals "
    "of correlations are computed on Fisher's z scale. There are none for fewer than 10 prompts (RMSE: 20), and none "
    "of RMSE for two seeds. Intervals of RMSE cover less, about 86 to 92%, if a few images or one prompt cause much of "
    "the squared error.",
    "Δ is a row minus the reference row of its table, on the same items. Its two-sided p-value tests the hypothesis of "
    "no difference over other seeds and other prompts, by a t-test with the same variances. With one seed there is "
    "none. A row differs significantly from the reference if its corrected p-value is below "
    f"{CONFIDENT}. For each metric, Holm's correction covers all heads and baselines that are compared with one "
    "reference: the probability that chance alone makes any of them differ significantly stays at about "
    f"{CONFIDENT}. Stores of different items have a reference of their own.",
    "The reference row has the best mean validation SRCC. Epochs are chosen by validation items too, and rows are "
    "ordered by validation. Test items are used for one choice only: which baseline the summary names.",
    "Baselines are tested on the same items as the heads of their table. They are fitted on all other items that heads "
    "have, including those that choose an epoch, so they learn from a few more items than a head without `refit`. They "
    "are compared with the reference by the same paired test if they have a value and predict exactly its items. A "
    "baseline is never the reference.",
)
_FEW_SEEDS = 3


def findings(results: Results) -> list[str]:
    """The results of an ablation, one to three sentences for each label and protocol."""
    found: list[str] = []
    for label, protocol in results.groups():
        rows, where = results.of(label, protocol), results.heading(f"{label}, {protocol_name(protocol)}")
        chosen = next((row for row in rows if row.kind == "head" and row.value("srcc") is not None), None)
        if chosen is None:
            continue
        if chosen.validated("srcc") is None:
            found.append(f"{where}: no head could be chosen, because none has a validation SRCC.")
            continue
        rivals = next((others for one, others in results.references(label, protocol) if one is chosen), [])
        beside = [row for row in rows if row.store_name == chosen.store_name]
        name = on_store(row_titles(rows)[chosen.row], chosen.store_name)
        scores = f"a test SRCC of {_number(chosen, 'srcc')} and a PLCC of {_number(chosen, 'plcc')}"
        parts = [f"{where}: {name}, chosen by validation, has {scores}.", *_rivals(rivals), *_best_baseline(beside)]
        found.append(" ".join(parts))
    return found


def _rivals(rows: Sequence[Row]) -> list[str]:
    """How many heads differ significantly from the chosen one, and how many could not be tested."""
    heads = [row for row in rows if row.kind == "head"]
    tested = [p for row in heads if (p := row.p("srcc")) is not None]
    untested = sum(row.against is not None and row.against.no_p is not None for row in heads)
    found: list[str] = []
    if tested:
        apart = sum(p < CONFIDENT for p in tested)
        found.append(f"{_how_many(apart, len(tested))} significantly from it in SRCC.")
    if untested:
        was = "was" if untested == 1 else "were"
        found.append(f"{plural(untested, 'other head')} {was} not tested: the test needs two seeds or more.")
    return found


def _how_many(apart: int, tested: int) -> str:
    """`Of the 5 other heads, 2 differ`, and how the rest is said."""
    if tested == 1:
        return "The other head differs" if apart else "The other head does not differ"
    if not apart:
        return f"None of the {tested:,} other heads differs"
    return f"Of the {tested:,} other heads, {apart:,} {'differs' if apart == 1 else 'differ'}"


def _best_baseline(rows: Sequence[Row]) -> list[str]:
    known = [(value, row) for row in rows if row.kind == "baseline" and (value := row.value("srcc")) is not None]
    if not known:
        return []
    _, best = max(known, key=lambda one: one[0])
    return [f"Of the baselines, {best.row} has the highest test SRCC: {_number(best, 'srcc')}{_verdict(best)}."]


def _verdict(row: Row) -> str:
    """Whether the row differs significantly from its reference; empty without a test."""
    p = row.p("srcc")
    if p is None:
        return ""
    return ", a significant difference" if p < CONFIDENT else ", no significant difference"


def transfer_findings(results: Results) -> list[str]:
    """The results of a transfer, one to two sentences for each direction."""
    found: list[str] = []
    for label, protocol in results.groups():
        for one in directions(results, label, protocol):
            unchanged, retrained = one.way("apply"), one.way("tp")
            parts: list[str] = []
            if unchanged is not None:
                parts.append(f"the unchanged head has a test SRCC of {_number(unchanged, 'srcc')}")
            if retrained is not None:
                parts.append(f"retrained (w/ TP) it has {_number(retrained, 'srcc')}{_verdict(retrained)}")
            if parts:
                where = f"{one.source} to {one.target}, {label}, {protocol_name(protocol)}"
                found.append(" ".join([results.prefixed(f"{where}: {'; '.join(parts)}."), *_fewest(one)]))
    return found


def _fewest(one: Direction) -> list[str]:
    """The scores with the fewest labelled items of the target."""
    fewest = {way: rows[0] for way, rows in one.shots().items()}
    if {"fresh", "warm"} - fewest.keys() or fewest["fresh"][0] != fewest["warm"][0]:
        return []
    (count, fresh), (_, warm) = fewest["fresh"], fewest["warm"]
    return [
        f"Trained on {count} items of {one.target}, a head from random weights has {_number(fresh, 'srcc')}, and a "
        f"head from {one.source} has {_number(warm, 'srcc')}{_verdict(warm)}."
    ]


def _number(row: Row, metric: str) -> str:
    value, interval = row.value(metric), row.interval(metric)
    if value is None:
        return "no defined value"
    return f"{value:.3f}" + ("" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})")


def teacher_findings(results: Results) -> list[str]:
    """Warnings about runs that read the rating words of a teacher that knew the MOS, for each part of the split."""
    harms = {"test": "test scores are too high", "validation": "the choice of the epoch favours heads that copy it"}
    return [
        f"{read}, including its rating word: {harm}."
        for part, harm in harms.items()
        if (read := _teacher_texts(results, part, rating_words=True))
    ]


def _teacher_texts(results: Results, part: str, *, rating_words: bool) -> str | None:
    """How many items of the part have a teacher's text, in the runs that read rating words or in the other runs.

    None where there are no such runs.
    """
    counts = [
        line.text_authors[part]
        for line in results.done
        if line.text_authors.get(part, {}).get(TEACHER, 0) and _may_read_rating_words(results, line) == rating_words
    ]
    if not counts:
        return None
    most = max(counts, key=lambda counted: counted[TEACHER])
    return results.heading(
        f"in {plural(len(counts), 'run')}, up to {most[TEACHER]:,} of {sum(most.values()):,} {part} items read the "
        "text of a teacher that knew their MOS"
    )


def _may_read_rating_words(results: Results, line: RunLine) -> bool:
    """Whether the conversations of the run's store end with the rating word, or their variant is unknown.

    Lines of a transfer name no store; there either store counts.
    """
    read = line.config.get("variant")
    variants = [read or store.variant for name, store in results.about.stores.items() if line.store_name in (name, "")]
    return not variants or None in variants or any(str(variant).startswith("full") for variant in variants)


def limits(results: Sequence[Results]) -> list[str]:
    """What the results cannot show, as far as the files say."""
    found: list[str] = []
    leaks = dict.fromkeys(one for each in results if (one := leak(each, "published")) and one.items)
    if leaks:
        sentences = "; ".join(one.sentence() for one in leaks)
        found.append(f"On the published split, {sentences}. Those numbers say nothing about new prompts.")
    found += [
        f"{read}, without its rating word; a model that does not know the MOS may write other descriptions."
        for one in results
        if (read := _teacher_texts(one, "test", rating_words=False))
    ]
    seeds = [row.test.seeds for one in results for row in one.rows if row.is_trained and row.test is not None]
    if seeds and min(seeds) < _FEW_SEEDS:
        found.append(
            f"Some rows have only {plural(min(seeds), 'seed')} for each test image: too few to show how much seeds "
            "matter."
        )
    models = sorted({store.model for one in results for store in one.about.stores.values() if store.model})
    if models:
        found.append(
            f"The heads read features of {'the model' if len(models) == 1 else 'the models'} {listed(models)}. On "
            "features of another model, or of other text, another head may be best."
        )
    found.append(
        "Intervals cover prompts like these. They do not cover other seeds, another data set or another split of it."
        if seeds and max(seeds) == 1
        else "Intervals and p-values cover prompts like these and, where a row has several, seeds like these. They do "
        "not cover another data set or another split of it."
    )
    return list(dict.fromkeys(found))
