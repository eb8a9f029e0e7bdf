"""What a report says of its results, each against the files that it was made from."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest

from agiqa.bench.report.charts import energy_share, rank_chart, rank_table
from agiqa.bench.report.findings import findings, limits, teacher_findings, transfer_findings
from agiqa.bench.report.items import SHOWN, examples_of, predictions_of, scatter_chart
from agiqa.bench.report.reading import read_all
from agiqa.bench.report.row_tables import leak
from agiqa.bench.report.sections import ReportSettings, compose
from agiqa.bench.report.transfers import directions, shots_table, transfer_table
from agiqa.bench.report.writing import write_report
from tests.bench.report import made
from tests.bench.report.made import cells_of


def lead(folder, label="quality", protocol="grouped"):
    """The row of a folder with the best validation SRCC, and its result lines."""
    heads = [line for line in made.read_lines(folder / "rows.jsonl") if line["kind"] == "head"]
    rows = [line for line in heads if (line["label"], line["protocol"]) == (label, protocol)]
    best = max(rows, key=lambda line: line["validation"]["srcc"][0])
    lines = made.read_lines(folder / "results.jsonl")
    return best, [line for line in lines if (line["row"], line["protocol"]) == (best["row"], protocol)]


def mean_predictions(folder, label="quality", protocol="grouped"):
    """True MOS and the mean of all predictions of each test item of the leading row, computed item by item."""
    found = {}
    for line in lead(folder, label, protocol)[1]:
        for key, (true, value) in made.predictions_of(
            folder / "runs" / line["name"] / "predictions.csv", label
        ).items():
            found.setdefault(key, (true, []))[1].append(value)
    return {key: (true, float(np.mean(values))) for key, (true, values) in found.items()}


def test_predictions_are_means_over_seeds_of_every_item_once(results):
    (found,) = read_all([results.ablation])
    row = next(row for row in found.of("quality", "grouped") if row.row == lead(results.ablation)[0]["row"])
    predictions = predictions_of(found, row)
    expected = mean_predictions(results.ablation)
    assert len(expected) == len(results.stores["ours"].items)
    told = zip(predictions.keys, predictions.true, predictions.predicted, strict=True)
    assert {(name, prompt): (true, pytest.approx(value)) for (name, prompt, _), true, value in told} == expected
    assert (predictions.runs, predictions.missing) == (2 * made.FOLDS, ())


def test_items_of_one_name_and_prompt_stay_apart(results, copy):
    """A store may hold an image twice; the number of the item identifies which of them a prediction belongs to."""
    folder, (image, *_) = copy(results.ablation), results.stores["ours"].items.names
    for path in (folder / "runs").glob("*/predictions.csv"):
        path.write_text(re.sub(r"^image_\d+\.png,[^,]*,", f"{image},a cat,", path.read_text(), flags=re.MULTILINE))
    predictions = leading(folder)[1]
    _, whole = leading(results.ablation)
    assert len(predictions.keys) == len(results.stores["ours"].items)
    assert predictions.predicted == pytest.approx(whole.predicted)
    assert predictions.true.tolist() == whole.true.tolist()


def test_two_items_of_one_name_and_prompt_stay_two(results, copy):
    """The column `item` tells them apart, as the store holds both; folders of older runs have no such column."""
    folder = copy(results.ablation)
    row = lead(folder, protocol="published")[0]["row"]
    runs = [line["name"] for line in made.read_lines(folder / "results.jsonl")]
    for name in runs:
        path = folder / "runs" / name / "predictions.csv"
        table = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
        twin = next(line for line in table if line["split"] == "test")
        numbered = [{**line, "item": k} for k, line in enumerate([*table, {**twin, "predicted_quality": "0.25"}])]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(numbered[0]))
            writer.writeheader()
            writer.writerows(numbered)
    (found,) = read_all([folder])
    predictions = predictions_of(found, next(one for one in found.of("quality", "published") if one.row == row))
    expected = mean_predictions(results.ablation, protocol="published")
    assert len(predictions.keys) == len(expected) + 1
    told = zip(predictions.keys, predictions.predicted, strict=True)
    assert sorted(value for key, value in told if expected[key[:2]][1] != pytest.approx(value)) == [0.25]


def leading(folder):
    """The results of a folder, and the predictions of the leading row of quality under the grouped protocol."""
    (found,) = read_all([folder])
    return found, predictions_of(found, found.of("quality", "grouped")[0])


def examples(folder, images):
    found, predictions = leading(folder)
    return examples_of(found, predictions, "a head", images=images)


def test_best_and_worst_items_are_those_of_the_smallest_and_largest_error(results):
    found = examples(results.ablation, results.images)
    errors = {name: abs(value - true) for (name, _), (true, value) in mean_predictions(results.ablation).items()}
    order = sorted(errors, key=lambda name: errors[name])
    assert [one.name for one in found.best] == order[:SHOWN]
    assert [one.name for one in found.worst] == order[::-1][:SHOWN]
    items = results.stores["ours"].items
    for one in (*found.best, *found.worst):
        assert abs(one.error) == pytest.approx(errors[one.name])
        assert one.description == items.descriptions[items.names.index(one.name)]
        assert one.image.startswith("data:image/jpeg;base64,")


def test_images_that_cannot_be_read_are_left_out_and_counted(results, copy):
    folder = copy(results.images)
    for path in sorted(folder.iterdir())[::2]:
        path.write_bytes(b"no picture")
    found = examples(results.ablation, folder)
    broken = {path.name for path in sorted(folder.iterdir())[::2]}
    shown = (*found.best, *found.worst)
    assert [one.image is None for one in shown] == [one.name in broken for one in shown]
    absent = sum(one.image is None for one in shown)
    assert absent > 0
    assert any(note.startswith(f"{absent} of {len(shown)} images") for note in found.table.notes)


def test_an_image_outside_its_folder_is_never_read(results, copy):
    folder = copy(results.ablation)
    outside = f"{results.images}/../{results.images.name}/image_"
    for path in (folder / "runs").glob("*/predictions.csv"):
        path.write_text(path.read_text().replace("image_", outside))
    (folder / "inside").mkdir()
    found = examples(folder, folder / "inside")
    assert (results.images / found.best[0].name).exists()
    assert all(one.image is None for one in (*found.best, *found.worst))


def test_a_store_that_is_gone_takes_only_the_descriptions(results, copy):
    folder = copy(results.ablation)
    about = json.loads((folder / "about.json").read_text())
    for path, said in (("/gone.agiqa", "is not at /gone.agiqa"), (None, "has no path"), (str(folder), "are not shown")):
        about["stores"][""]["path"] = path
        (folder / "about.json").write_text(json.dumps(about))
        found = examples(folder, None)
        assert all(one.description is None for one in (*found.best, *found.worst))
        assert any("Descriptions are not shown" in note and said in note for note in found.table.notes)


def test_runs_whose_predictions_are_gone_are_told_and_the_others_used(results, copy):
    folder = copy(results.ablation)
    gone, broken, *_ = lead(folder)[1]
    (folder / "runs" / gone["name"] / "predictions.csv").unlink()
    (folder / "runs" / broken["name"] / "predictions.csv").write_text("name,prompt\nx,y\n")
    results_read, found = leading(folder)
    assert len(found.missing) == 2
    assert any(gone["name"] in problem and "missing" in problem for problem in found.missing)
    assert any(broken["name"] in problem and "not readable" in problem for problem in found.missing)
    assert found.runs == 2 * made.FOLDS - 2
    assert "Predictions of 2 runs are missing" in scatter_chart(results_read, found, "a head").caption


def test_the_scatter_plot_has_a_logistic_or_the_quartic_of_the_paper(results):
    found, predictions = leading(results.ablation)
    assert "and a logistic fit; below" in scatter_chart(found, predictions, "a head").alt
    assert "and a fit, degree 4; below" in scatter_chart(found, predictions, "a head", quartic=True).alt


def test_without_any_run_folder_the_tables_are_there_and_the_rest_is_told_missing(results, copy):
    folder = copy(results.ranks)
    shutil.rmtree(folder / "runs")
    content = compose(read_all([folder]), ReportSettings())
    assert {"rows", "ranks", "provenance"} <= {section.name for section in content.sections}
    told = {one.what: one.line() for one in content.missing}
    assert {"Scatter, best and worst items", "Training curves"} <= told.keys()
    assert "agiqa transfer SOURCE TARGET OUT" in told["Results across data sets, few-shot curve"]
    assert "label: quality+correspondence" in told["Radar over the aspects"]
    assert "SRCC against rank" not in told


def test_ranks_have_the_energy_of_the_basis_and_the_scores_of_their_rows(results):
    (found,) = read_all([results.ranks])
    energy = results.stores["r4"].basis().energy
    assert energy_share(found, 2) == pytest.approx(energy[:2].sum() / energy.sum())
    rows = {(row["row"], row["rank"]): row for row in cells_of(rank_table(found, "quality", "grouped"))}
    lines = {
        (line["kind"], line["store_name"]): line
        for line in made.read_lines(results.ranks / "rows.jsonl")
        if line["test"]
    }
    for rank in (2, 4):
        assert float(rows["no encoder", str(rank)]["srcc"]) == lines["head", f"r{rank}"]["test"]["srcc"]
        assert float(rows["no encoder", str(rank)]["energy"]) == energy_share(found, rank)


def test_ranks_whose_energy_nobody_tells_have_their_scores_alone(results, copy):
    folder = copy(results.ranks)
    about = json.loads((folder / "about.json").read_text())
    for store in about["stores"].values():
        del store["energy"]
    (folder / "about.json").write_text(json.dumps(about))
    (found,) = read_all([folder])
    table = rank_table(found, "quality", "grouped")
    assert [column.key for column in table.columns] == ["row", "rank", "srcc", "plcc"]
    assert table.notes == []
    assert rank_chart(found, "quality", "grouped").caption == "Test SRCC with 95% intervals."


def test_a_grid_over_stores_of_several_ranks_has_its_heads_in_the_curve(results, copy):
    """As of `--grid ranks`, where the store is what tells one row from another."""
    folder = copy(results.ranks)
    rows = made.read_lines(folder / "rows.jsonl")
    for row in rows:
        if row["kind"] == "head":
            row["row"], row["settings"] = f"store={row['store_name']}", {"store": row["store_name"]}
    made.write_lines(folder / "rows.jsonl", rows)
    (found,) = read_all([folder])
    heads = [
        (row["rank"], float(row["srcc"])) for row in cells_of(rank_table(found, "quality", "grouped")) if not row["tag"]
    ]
    told = {row["store_name"]: row["test"]["srcc"] for row in rows if row["kind"] == "head"}
    assert heads == [("2", told["r2"]), ("4", told["r4"])]
    assert all("@" not in sentence for sentence in findings(found))


def test_transfer_has_the_layout_of_table_vi_and_the_papers_numbers(results):
    (found,) = read_all([results.transfer])
    rows = cells_of(transfer_table(found, "quality", "published"))
    lines = {tuple(line["settings"].values()): line for line in made.read_lines(results.transfer / "rows.jsonl")}
    assert [(row["from"], row["to"]) for row in rows] == [("AGIQA-3k", "AIGCIQA2023"), ("AIGCIQA2023", "AGIQA-3k")]
    for row in rows:
        ends = row["from"], row["to"]
        assert float(row["apply_srcc"]) == lines[(*ends, "apply", "all")]["test"]["srcc"]
        assert float(row["tp_plcc"]) == lines[(*ends, "tp", "all")]["test"]["plcc"]
        assert float(row["within_srcc"]) == lines[(row["from"], row["from"], "within", "all")]["test"]["srcc"]
    assert [float(rows[0][f"paper_{way}_srcc"]) for way in ("apply", "tp")] == [0.7489, 0.8557]
    shots = cells_of(shots_table(found, "quality", "published"))
    assert [(row["from"], row["training_items"]) for row in shots] == [
        (name, count) for name in ("AGIQA-3k", "AIGCIQA2023") for count in ("10", "all")
    ]
    assert len(directions(found, "quality", "published")) == 2


def test_what_there_is_no_data_for_is_told_with_its_command(report):
    (one,) = report.missing
    assert one.what == "Best epoch on test beside the honest number"
    assert "paper_compatible: true" in one.line()


def test_findings_say_what_the_files_say(results):
    (found,) = read_all([results.ablation])
    best, _ = lead(results.ablation)
    low, high = best["test"]["ci"]["srcc"]
    sentence = next(words for words in findings(found) if words.startswith("Quality, grouped by prompt: "))
    assert f"has a test SRCC of {best['test']['srcc']:.3f} ({low:.3f} to {high:.3f})" in sentence
    notes = limits([found])
    assert any(note.startswith("On the published split, 15 of 15 test images") for note in notes)
    assert any("only 2 seeds" in note for note in notes)


def test_without_a_validation_score_no_head_is_said_to_be_chosen(results, copy):
    folder = copy(results.ablation)
    rows = made.read_lines(folder / "rows.jsonl")
    for row in rows:
        row["validation"] = None
    made.write_lines(folder / "rows.jsonl", rows)
    (found,) = read_all([folder])
    content = compose([found], ReportSettings())
    assert content.findings
    assert all("no head could be chosen" in sentence for sentence in content.findings)
    assert "items" not in [section.name for section in content.sections]


def test_findings_of_a_transfer_say_what_the_files_say(results, copy):
    folder = copy(results.transfer)
    rows = made.read_lines(folder / "rows.jsonl")
    warm = json.loads(json.dumps([row for row in rows if row["settings"]["way"] == "fresh"]).replace("fresh", "warm"))
    for row in warm:
        row["test"]["srcc"] += 0.125
    made.write_lines(folder / "rows.jsonl", [*rows, *warm])
    values = {tuple(row["settings"].values()): row["test"]["srcc"] for row in [*rows, *warm]}
    (found,) = read_all([folder])
    sentences = transfer_findings(found)
    ways = (("apply", "all"), ("tp", "all"), ("fresh", 10), ("warm", 10))
    for ends, sentence in zip((("AGIQA-3k", "AIGCIQA2023"), ("AIGCIQA2023", "AGIQA-3k")), sentences, strict=True):
        told = [f"{values[*ends, way, count]:.3f} (" for way, count in ways]
        assert sentence.startswith(f"{ends[0]} to {ends[1]}, quality, published split: the unchanged head has ")
        assert [sentence.count(number) for number in told] == [1] * len(told)


def test_the_stores_of_a_transfer_are_of_the_data_sets_that_it_calls_them_by(results, copy):
    folder = copy(results.transfer)
    about = json.loads((folder / "about.json").read_text())
    for store in about["stores"].values():
        store["data"] = {"items": 15}
    (folder / "about.json").write_text(json.dumps(about))
    (found,) = read_all([folder], data="AGIQA-20k")
    facts = compose([found], ReportSettings()).facts
    assert facts["Data"] == "agiqa-3k and aigciqa2023"


def test_a_folder_without_the_images_is_told_on_the_command_line_too(results, tmp_path):
    (tmp_path / "wrong").mkdir()
    found = write_report([results.ablation], tmp_path / "report", ReportSettings(images=tmp_path / "wrong"))
    told = [problem for problem in found.problems if f"could not be read in {tmp_path / 'wrong'}" in problem]
    assert told
    assert all(re.fullmatch(r"(\d+) of \1 images could not .*", problem) for problem in told)
    assert not write_report([results.ablation], tmp_path / "report", ReportSettings(images=results.images)).problems


def test_curves_of_one_epoch_are_none(results, copy):
    folder = copy(results.ablation)
    for path in (folder / "runs").glob("*/curves.csv"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    content = compose(read_all([folder]), ReportSettings())
    assert "holds the curves of more than one epoch" in next(
        one.line() for one in content.missing if one.what == "Training curves"
    )


def test_the_leak_of_a_transfer_is_that_of_the_row_with_the_most(results, copy):
    """Its lines name no row; the row follows from the name of the line."""
    folder = copy(results.transfer)
    lines = [line for line in made.read_lines(folder / "results.jsonl") if "leak" in line.get("split", {})]
    rows = list(dict.fromkeys(line["row"] for line in lines))
    for line in lines:
        row = line.pop("row")
        line["name"] = f"{row},seed={line['seed']}"
        line["split"]["leak"]["test_items_with_a_training_prompt"] = len(rows) - rows.index(row)
    made.write_lines(folder / "results.jsonl", lines)
    (found,) = read_all([folder])
    assert len(rows) > 1
    told = leak(found, "published")
    assert told is not None
    assert (told.items, told.tested) == (len(rows), lines[0]["split"]["test"])


def test_texts_of_a_teacher_are_a_finding_where_the_rating_word_is_read(results, copy):
    folder = copy(results.ablation)
    lines = made.read_lines(folder / "results.jsonl")
    for line in lines:
        line["text_authors"] = {"validation": {"model": 9}, "test": {"teacher": 12, "unknown": 3}}
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = json.loads((folder / "about.json").read_text())
    said = f"In {len(lines)} runs, up to 12 of 15 test items read the text of a teacher that knew their MOS"
    for variant, place in (("full", 0), (None, 0), ("id", 1)):
        about["stores"][""]["variant"] = variant
        (folder / "about.json").write_text(json.dumps(about))
        (found,) = read_all([folder])
        told = [[one for one in lines if "teacher" in one] for lines in (teacher_findings(found), limits([found]))]
        assert [len(lines) for lines in told] == [place == 0, place == 1]
        assert told[place][0].startswith(said)
    about["stores"][""]["variant"] = "full"
    (folder / "about.json").write_text(json.dumps(about))
    assert compose(read_all([folder]), ReportSettings()).findings[0].startswith(said)
    assert teacher_findings(*read_all([results.ablation])) == []


def test_a_transfer_reads_the_rating_words_that_its_stores_have(results, copy):
    """Its lines name no store, so the variants of all stores count, whatever the names of the stores."""
    folder = copy(results.transfer)
    lines = made.read_lines(folder / "results.jsonl")
    for line in lines:
        line["text_authors"] = {"validation": {"teacher": 9}}
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = json.loads((folder / "about.json").read_text())
    for variants, found in ((("id", "id"), 0), (("id", "full"), 1), (("id", None), 1)):
        for store, variant in zip(about["stores"].values(), variants, strict=True):
            store["variant"] = variant
        (folder / "about.json").write_text(json.dumps(about))
        assert len(teacher_findings(*read_all([folder]))) == found


def test_a_column_that_no_row_can_fill_is_named(results):
    """These heads have fewer validation images than a logistic curve needs."""
    read = read_all([results.ablation])
    problems = compose(read, ReportSettings(show=frozenset({"logistic", "krcc"}))).problems
    assert [text for text in problems if "--show" in text] == [
        "the column PLCC (logistic) (`--show logistic`): no row has a value for it. "
        "A logistic curve needs 100 validation images in every run of a row."
    ]
    assert not [text for text in compose(read, ReportSettings()).problems if "--show" in text]
