"""The paper's numbers: a file of facts that names real settings, and rows that are matched only where they mean the same."""

import pytest

from agiqa.bench.report.paper import paper, paper_tables
from agiqa.bench.report.reading import read_all
from agiqa.heads import ENCODERS, POOLINGS, PROJECTIONS
from tests.bench.report import made
from tests.bench.report.made import cells_of


def test_the_file_names_parts_that_there_are_and_numbers_in_range():
    known = {"encoder": {*ENCODERS}, "pooling": {*POOLINGS}, "projection": {*PROJECTIONS}}
    for fact in paper().rows:
        assert all(0.79 < value < 0.94 for value in (fact.srcc, fact.plcc))
        assert fact.data in paper().data_sets
        assert fact.label in paper().labels
        for name, value in (fact.settings or {}).items():
            assert value in known[name]
    assert {*paper().reads_logits} == {*PROJECTIONS} - {"hidden"}
    assert {fact.table for fact in (*paper().rows, *paper().words, *paper().transfers)} == {
        "II",
        "III",
        "IV",
        "V",
        "VI",
    }
    counted = {table: sum(fact.table == table for fact in paper().rows) for table in ("II", "III", "IV")}
    assert counted == {"II": 6, "III": 4, "IV": 14}  # the full model is that of Table II


def test_every_cited_row_says_what_its_numbers_were_compared_with():
    """The paper marks the five methods whose numbers it copied from other papers; nobody here has read those."""
    used = [name for row in paper().cited for name in (*row.confirmed, *row.unconfirmed)]
    assert {*used} == {*paper().sources}
    for row in paper().cited:
        assert row.confirmed == ["table-ii"]
    unconfirmed = {row.name for row in paper().cited if row.unconfirmed}
    assert unconfirmed == {"DBCNN", "AMFF-Net", "MA-AGIQA", "IPCE", "SF-IQA"}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("AGIQA-3k", "agiqa-3k"),
        ("agiqa_3k", "agiqa-3k"),
        ("agiqa-3k-r128.agiqa", "agiqa-3k"),
        ("AIGIQA-20K", "aigciqa-20k"),
        ("demo", None),
        ("", None),
    ],
)
def test_data_sets_are_known_by_their_usual_names(name, known):
    assert paper().data_set(name) == known


def test_the_paper_stands_beside_rows_that_mean_the_same_and_no_others(results):
    (found,) = read_all([results.ablation])
    assert paper_tables(found) == []  # heads on bare hidden states are not its logits
    lines = made.read_lines(results.ablation / "results.jsonl")
    as_sketch = [line | {"config": {**line["config"], "projection": "sketch"}} for line in lines]
    other = type(found)(**{**vars(found), "lines": tuple(type(found.lines[0])(**line) for line in as_sketch)})
    (table,) = paper_tables(other)
    (row,) = cells_of(table)
    assert (row["paper_row"], row["paper_srcc"], row["table"]) == ("without xLSTM", "0.8959", "IV")
    ours = {
        line["protocol"]: line
        for line in made.read_lines(results.ablation / "rows.jsonl")
        if line["row"] == "encoder=none,pooling=mean" and line["label"] == "quality"
    }
    for protocol in ("published", "grouped"):
        assert float(row[f"srcc_{protocol}"]) == ours[protocol]["test"]["srcc"]
    notes = " ".join(table.notes)
    assert "Not comparable: our features are of made up" in notes
    assert "Without a counterpart here: M3-AGIQA (II)" in notes


def test_features_of_its_model_are_said_to_be_so(results):
    (found,) = read_all([results.ablation])
    store = found.store("").model_copy(update={"model": "openbmb/MiniCPM-Llama3-V-2_5"})
    assert paper().is_its_model(store)
    assert not paper().is_its_model(found.store(""))


def test_a_data_set_that_the_paper_has_not_has_no_table(results, copy):
    folder = copy(results.ablation)
    (folder / "about.json").write_text((folder / "about.json").read_text().replace('"agiqa-3k"', '"other"'))
    assert paper_tables(read_all([folder])[0]) == []
