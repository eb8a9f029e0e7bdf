"""Folders of results: damaged lines are left out and reported, a folder without results is refused."""

import json

import pytest

from agiqa.bench.report.reading import read_all
from agiqa.errors import DataError
from tests.bench.report import made


def test_rows_and_runs_are_those_of_the_files(results):
    (found,) = read_all([results.ablation])
    lines = made.read_lines(results.ablation / "rows.jsonl")
    told = {(line["kind"], line["row"], line["protocol"], line["label"]): line for line in lines if line["test"]}
    assert len(found.rows) == len(told)
    for row in found.rows:
        line = told[row.kind, row.row, row.protocol, row.label]
        assert row.value("srcc") == line["test"]["srcc"]
        assert row.interval("plcc") == (
            None if line["test"]["ci"]["plcc"] is None else tuple(line["test"]["ci"]["plcc"])
        )
    assert [row.left_out for row in found.left_out] == ["no --words were given"] * 4
    assert len(found.done) == len(made.read_lines(results.ablation / "results.jsonl"))
    assert (found.name, found.problems) == ("encoders", ())


def test_the_order_and_the_reference_are_those_of_validation(results):
    (found,) = read_all([results.ablation])
    for label, protocol in found.groups():
        heads = [row for row in found.of(label, protocol) if row.kind == "head"]
        assert [row.kind for row in found.of(label, protocol)][: len(heads)] == ["head"] * len(heads)
        values = [row.validation["srcc"][0] for row in heads]
        assert values == sorted(values, reverse=True)
        ((reference, others),) = found.references(label, protocol)
        assert reference is heads[0]
        assert heads[1:] == [row for row in others if row.kind == "head"]
    assert found.groups() == [
        (label, way) for label in ("quality", "correspondence") for way in ("grouped", "published")
    ]


def test_a_run_that_was_tried_again_counts_once(results, copy):
    folder = copy(results.ablation)
    name = made.read_lines(folder / "results.jsonl")[0]["name"]
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({"name": name, "error": "a late failure"}) + "\n")
    (found,) = read_all([folder])
    assert [line.error for line in found.lines if line.name == name] == ["a late failure"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (b"no json\n", "rows.jsonl, line {n} is damaged and was left out (Invalid JSON"),
        (b'{"kind": "head", "row": "x", "protocol": "p"}\n', "rows.jsonl, line {n} is damaged and was left out (label"),
        (b'{"kind": "hat", "row": "x", "protocol": "p", "label": "q"}\n', "line {n} is damaged and was left out (kind"),
        (
            b'{"kind": "head", "row": "x", "protocol": "p", "label": "q", "test": {"n": 3, "srcc": "high"}}\n',
            "test.srcc",
        ),
        (b"\xff\xfe\n", "rows.jsonl, line {n} is damaged"),
        (b'{"kind": "he', "rows.jsonl ends in the middle of a line"),
    ],
)
def test_a_damaged_line_is_left_out_and_told(results, copy, damage, said):
    folder = copy(results.ablation)
    path = folder / "rows.jsonl"
    count = len(path.read_text().splitlines())
    path.write_bytes(path.read_bytes() + damage)
    (found,) = read_all([folder])
    (problem,) = found.problems
    assert said.format(n=count + 1) in problem
    assert len(found.rows) + len(found.left_out) == count


def test_what_is_no_folder_of_results_is_refused(results, copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is no folder of results: it has no about\.json.*agiqa ablate"):
        read_all([tmp_path / "empty"])
    with pytest.raises(DataError, match="is given twice"):
        read_all([results.ablation, results.ablation / ".." / results.ablation.name])
    folder = copy(results.ablation)
    for content, said in (("{", "not what `agiqa ablate`"), ('{"kind": "cake"}', "kind"), ("[]", "not what")):
        (folder / "about.json").write_text(content)
        with pytest.raises(DataError, match=said):
            read_all([folder])


def test_results_without_a_row_are_refused_with_what_to_do(results, copy):
    folder = copy(results.ablation)
    (folder / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match=r"rows\.jsonl holds no results.*Run the same `agiqa ablate` again"):
        read_all([folder])
    (folder / "rows.jsonl").unlink()
    (folder / "results.jsonl").unlink()
    with pytest.raises(DataError, match="nothing was run"):
        read_all([folder])


def test_folders_of_one_name_are_told_apart(results, tmp_path, copy):
    copied = copy(results.ablation)
    names = [one.name for one in read_all([results.ablation, copied])]
    assert len(set(names)) == 2
    assert all(name.endswith("/encoders") for name in names)
