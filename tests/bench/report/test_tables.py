"""Tables hold the numbers of rows.jsonl, all their digits in CSV; bold means what the page says that it means."""

import re
from functools import partial

import numpy as np
import pytest

from agiqa.bench.recording.records import Against, Row, Scores
from agiqa.bench.report.charts import interval_chart, rank_table
from agiqa.bench.report.findings import findings, limits
from agiqa.bench.report.naming import row_titles
from agiqa.bench.report.reading import read_all
from agiqa.bench.report.row_tables import bold_rows, main_tables, optimism_tables
from agiqa.bench.report.tables import Cell, Column, Table
from tests.bench.report import made
from tests.bench.report.made import cells_of


def test_main_tables_hold_every_row_with_all_digits(results):
    (found,) = read_all([results.ablation])
    tables = main_tables(found)
    assert [table.title for table in tables][:2] == ["Quality, grouped by prompt", "Quality, published split"]
    lines = [line for line in made.read_lines(results.ablation / "rows.jsonl") if line["test"]]
    for table, (label, protocol) in zip(tables, found.groups(), strict=True):
        told = {row["row"]: row for row in cells_of(table)}
        expected = [line for line in lines if (line["label"], line["protocol"]) == (label, protocol)]
        assert len(told) == len(expected) == 4
        titles = row_titles(found.of(label, protocol))
        for line in expected:
            row, test, against = told[titles[line["row"]]], line["test"], line["against"]
            for metric in ("srcc", "plcc"):
                assert row[metric] == ("" if test[metric] is None else repr(test[metric]))
                if test["ci"][metric]:
                    assert [float(row[f"{metric}_{end}"]) for end in ("low", "high")] == test["ci"][metric]
                if against:
                    for key, value in (("difference", against["difference"]), ("p_holm", against["p_holm"])):
                        assert row[f"{metric}_{key}"] == ("" if value[metric] is None else repr(value[metric]))
            assert row["tag"] == ("baseline" if line["kind"] == "baseline" else "" if against else "reference")


def test_both_protocols_are_shown_and_their_difference_on_the_same_items(results, copy):
    (found,) = read_all([results.ablation])
    table = optimism_tables(found)[0]
    assert [row["srcc_optimism"] for row in cells_of(table)] == [""] * len(table.rows)
    assert "an older agiqa lack" in table.notes[1]

    def compare(line):
        if line["protocol"] == "published":
            line["beside_grouped"] = {"n": 15, "difference": {"srcc": 0.01}, "ci": {"srcc": [-0.02, 0.04]}}

    found = spoil(copy(results.ablation), compare)
    tables = optimism_tables(found)
    assert [table.name for table in tables] == ["quality-optimism", "correspondence-optimism"]
    for row in cells_of(tables[0]):
        assert [row[f"{metric}_optimism"] for metric in ("srcc", "plcc")] == ["0.01", ""]
        assert [row["srcc_optimism_low"], row["srcc_optimism_high"]] == ["-0.02", "0.04"]
    assert len(tables[0].notes) == 1


def test_the_published_split_is_labelled_with_its_leak(results):
    (found,) = read_all([results.ablation])
    notes = {table.name: " ".join(table.notes) for table in main_tables(found)}
    leak = next(
        line["split"] for line in made.read_lines(results.ablation / "results.jsonl") if line["protocol"] == "published"
    )
    count = leak["leak"]["test_items_with_a_training_prompt"]
    assert count == 15
    assert f"This protocol leaks prompts: {count} of {leak['test']} test images" in notes["quality-published"]
    assert "No prompt of a test image occurs in training" in notes["quality-grouped"]


def row(name, value, *, p=None, difference=0.0, kind="head"):
    against = None
    if p is not None:
        told = dict.fromkeys(("srcc", "plcc"), difference)
        against = Against(row="best", difference=told, p_holm=dict.fromkeys(told, p), covers="prompts and seeds")
    test = Scores(n=9, srcc=value, plcc=value, ci=dict.fromkeys(("srcc", "plcc"), (0.59, 0.81)))
    return Row(kind=kind, row=name, protocol="grouped", label="quality", test=test, against=against)


@pytest.mark.parametrize(
    ("others", "bold"),
    [
        ([], set()),
        ([row("a", 0.5, p=0.5, difference=-0.1), row("b", 0.6, p=0.06, difference=0.1)], set()),
        ([row("a", 0.5, p=0.01, difference=-0.1), row("b", 0.6, p=0.06, difference=0.1)], {"best", "b"}),
        ([row("a", 0.5, p=0.01, difference=-0.1), row("b", 0.8, p=0.04, difference=0.1)], {"b"}),
        ([row("a", 0.5, p=0.01, difference=-0.1), row("b", None)], {"best"}),
        ([row("a", 0.5, p=0.01, difference=-0.1), row("far", 0.58, p=0.9, difference=-0.12)], {"best"}),
        (
            [row("a", 0.5, p=0.01, difference=-0.1), row("far", 0.4, p=0.9, difference=-0.3, kind="baseline")],
            {"best"},
        ),
        (
            [row("a", 0.5, p=0.01, difference=-0.1), row("near", 0.6, p=0.9, difference=-0.1, kind="baseline")],
            {"best", "near"},
        ),
    ],
)
def test_bold_is_the_reference_and_what_cannot_be_told_from_it_or_what_beats_it(others, bold):
    best = row("best", 0.7)
    assert {one.row for one in bold_rows(best, others, "srcc")} == bold


def test_markdown_cannot_be_broken_by_what_is_in_a_cell():
    cells = [Cell("x | <script>\ny", tag="baseline"), Cell(0.12345, (-0.0001, 0.2), strong=True)]
    columns = [Column("a", "a|b", lambda row: row[0], "text"), Column("n", "n", lambda row: row[1], interval=True)]
    table = Table(
        name="t", title="t", columns=columns, rows=[[column.cell(cells) for column in columns]], notes=["a\n# b"]
    )
    assert table.markdown().splitlines() == [
        "### t",
        "",
        "| a\\|b | n |",
        "| --- | --- |",
        "| x \\| &lt;script&gt; y (baseline) | **0.123** [0.000 to 0.200] |",
        "",
        "a # b",
    ]
    assert cells_of(table) == [
        {"a": "x | <script>\ny", "n": "0.12345", "n_low": "-0.0001", "n_high": "0.2", "tag": "baseline"}
    ]


def test_rows_without_a_p_value_and_few_prompts_are_told(results):
    (found,) = read_all([results.ablation])
    untested = Against(row="x", difference={"srcc": -0.1}, no_p="one seed")
    rows = tuple(one.model_copy(update={"against": untested}) if one.against else one for one in found.rows)
    spoiled = type(found)(**{**vars(found), "rows": rows})
    notes = " ".join(main_tables(spoiled)[0].notes)
    compared = sum(one.against is not None for one in spoiled.of("quality", "grouped"))
    assert f"{compared} rows have no p-value, because one of the compared rows has one seed" in notes
    assert f"{found.of('quality', 'grouped')[0].test.caution}." in notes
    assert "no p-value" not in " ".join(main_tables(found)[0].notes)


def test_titles_are_short_and_never_the_same(results):
    rows = [
        Row(kind="head", row="encoder=none,width=8", settings={"encoder": "none", "width": 8}, protocol="p", label="q"),
        Row(kind="head", row="deep", settings={"encoder": "gru"}, protocol="p", label="q"),
        Row(kind="baseline", row="text", settings={"baseline": "text"}, protocol="p", label="q"),
        Row(kind="head", row="loss=a_b", settings={"loss": "mse"}, protocol="p", label="q"),
        Row(kind="head", row="loss=ab", settings={"loss": "mse"}, protocol="p", label="q"),
    ]
    told = list(row_titles(rows).values())
    assert told == ["no encoder\N{NO-BREAK SPACE}· width 8", "deep", "text", "loss=a_b", "loss=ab"]


def spoil(folder, change):
    """Change every line of rows.jsonl."""
    lines = made.read_lines(folder / "rows.jsonl")
    for line in lines:
        change(line)
    made.write_lines(folder / "rows.jsonl", lines)
    (found,) = read_all([folder])
    return found


def test_p_values_of_an_older_agiqa_are_not_shown_and_make_nothing_bold(results, copy):
    """It had no `covers`, and its p-values were about prompts alone."""

    def age(line):
        if line.get("against"):
            line["against"].pop("covers")
            line["against"]["p_holm"] = dict.fromkeys(line["against"]["p_holm"], 0.001)

    found = spoil(copy(results.ablation), age)
    for table in main_tables(found):
        assert "computed by an older agiqa" in " ".join(table.notes)
        rows = cells_of(table)
        assert not any(row["srcc_p_holm"] or row["plcc_p_holm"] for row in rows)
        assert any(row["srcc_difference"] for row in rows)
        assert not any(cell.strong for row in table.rows for cell in row)
    assert not any("significantly" in sentence or "test needs" in sentence for sentence in findings(found))
    (whole,) = read_all([results.ablation])
    assert not any("older agiqa" in note for table in main_tables(whole) for note in table.notes)


def features(line):
    """Give the ridge of a row another name in each protocol and label, as a best closed form has."""
    if line["row"] == "mean hidden state":
        line["settings"] = {"baseline": "features"}
        line["row"] = f"ridge of {line['label']} {line['protocol']}"
        line["notes"] = ["its strength is at the end of its range", "reads a sketch only"]


def test_a_baseline_is_paired_by_its_settings_and_its_notes_are_shown(results, copy):
    found = spoil(copy(results.ablation), features)
    table = optimism_tables(found)[0]
    assert [row["row"] for row in cells_of(table) if row["tag"]] == ["features", "prompt"]
    (main, *_) = main_tables(found)
    told = "ridge of quality grouped: its strength is at the end of its range; reads a sketch only."
    assert told in main.notes
    chart = interval_chart(found, "quality", [""])
    assert chart is not None
    assert "of 4 rows" in chart.alt


def test_a_baseline_of_several_names_has_one_line_against_rank(results, copy):
    def rename(line):
        if line["row"] == "mean hidden state":
            line["settings"] = {"baseline": "features"}
            line["row"] = f"ridge on {line['store_name']}"

    table = rank_table(spoil(copy(results.ranks), rename), "quality", "grouped")
    assert table is not None
    assert [(row["row"], row["rank"]) for row in cells_of(table) if row["tag"]] == [
        ("features", "2"),
        ("features", "4"),
    ]


def test_an_rmse_that_is_not_on_the_scale_of_the_mos_is_a_dash(results, copy):
    def lose(line):
        if line["kind"] == "baseline" and line.get("test"):
            line["test"]["rmse"] = line["test"]["ci"]["rmse"] = None

    for table in main_tables(spoil(copy(results.ablation), lose)):
        assert {row["rmse"] == "" for row in cells_of(table) if row["tag"] == "baseline"} == {True}


def calibrate(every, line):
    """Say that all heads, or only those of a GRU, were calibrated."""
    if line["kind"] == "head":
        line["calibrated"] = line["runs"] if every or "gru" in line["row"] else 0


def test_calibrated_heads_are_told(results, copy):
    folder = copy(results.ablation)
    for every, told in (
        (True, "All heads were calibrated by a line"),
        (False, "1 of 2 heads was calibrated by a line"),
    ):
        (main, *_) = main_tables(spoil(folder, partial(calibrate, every)))
        assert told in " ".join(main.notes)
    (whole,) = read_all([results.ablation])
    assert not any("calibrated by a line" in note for table in main_tables(whole) for note in table.notes)


def test_leaks_are_counted_letter_by_letter_too(results, copy):
    folder = copy(results.ablation)
    lines = made.read_lines(folder / "results.jsonl")
    for line in lines:
        line["split"]["leak"]["test_items_with_a_training_prompt_verbatim"] = 11
    made.write_lines(folder / "results.jsonl", lines)
    (found,) = read_all([folder])
    told = "15 of 15 test images have a prompt that also occurs in training (11 of them word for word)"
    assert told in " ".join(main_tables(found)[1].notes)
    assert told in " ".join(optimism_tables(found)[0].notes)
    assert told in " ".join(limits([found]))


def switchable(*values):
    """A table of a text, two values that are always shown, and one that is switched on by `krcc`."""
    columns = [
        Column("row", "Row", lambda row: row[0], "text"),
        Column("srcc", "SRCC", lambda row: row[1], interval=True),
        Column("empty", "Empty", lambda row: row[2]),
        Column("krcc", "KRCC", lambda row: row[3], switch="krcc"),
    ]
    return Table(
        name="t", title="t", columns=columns, rows=[[column.cell(one) for column in columns] for one in values]
    )


def test_empty_columns_are_dropped_and_switched_ones_appear():
    table = switchable(("a", 0.5, None, 0.4), ("b", None, None, 0.3))
    assert table.markdown().splitlines()[2] == "| Row | SRCC |"
    assert table.switches == {"krcc": "KRCC"}
    assert table.with_switched_on({"krcc"}).markdown().splitlines()[2] == "| Row | SRCC | KRCC |"
    assert table.csv().splitlines()[0] == "row,srcc,srcc_low,srcc_high,empty,krcc"
    assert switchable(("a", 0.5, None, None)).switches == {}


def test_krcc_rmse_and_the_logistic_plcc_are_those_of_the_files(results, copy):
    folder = copy(results.ablation)
    lines = made.read_lines(folder / "results.jsonl")
    for number, line in enumerate(lines):
        for label in ("quality", "correspondence"):
            line["test"][label]["plcc_logistic4"] = number / 100
    made.write_lines(folder / "results.jsonl", lines)
    (found,) = read_all([folder])
    table = next(table for table in main_tables(found) if table.name == "quality-grouped")
    assert set(table.switches) >= {"krcc", "rmse", "logistic", "sd"}
    heads = [line for line in made.read_lines(folder / "rows.jsonl") if line["kind"] == "head"]
    for row in cells_of(table):
        head = [one for one in heads if one["label"] == "quality" and one["protocol"] == "grouped"]
        line = next((one for one in head if str(one["test"]["srcc"]) == row["srcc"]), None)
        if line is None:
            assert row["tag"] == "baseline"
            continue
        runs = [one for one in lines if (one["row"], one["protocol"]) == (line["row"], "grouped")]
        assert float(row["krcc"]) == line["test"]["krcc"]
        assert float(row["rmse"]) == line["test"]["rmse"]
        mean = np.mean([one["test"]["quality"]["plcc_logistic4"] for one in runs])
        assert float(row["plcc_logistic"]) == pytest.approx(mean)


def test_every_table_of_scores_says_where_its_numbers_come_from(results):
    (found,) = read_all([results.ablation])
    for table in main_tables(found):
        told = table.notes[-1]
        assert told.startswith(f"Data: agiqa-3k. Model of the features: {found.store('').model} (hidden, width ")
        assert "Settings of all heads: projection hidden, width 8, " in told
        assert re.search(r"Trained: \d{4}-\d\d-\d\d( to .*)?\.$", told)
