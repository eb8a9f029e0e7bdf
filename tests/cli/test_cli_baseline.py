"""`agiqa baseline` by real processes: all seven networks, splits, resumption, other tools, one report with heads."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from agiqa.bench.demo.images import draw_data_set
from agiqa.extract import load_data_set
from tests.cli.refusals import misuse, refuse
from tests.command_line import in_time
from tests.extract.small_sets import read_table, save_noise, write_set, write_table
from tests.store.conftest import make_content
from tests.store.conftest import make_store as write_store

TINY = ("--image-size", 32, "--no-pretrained", "--epochs", 2, "--batch-size", 8, "--device", "cpu", "--workers", 0)
SMALL = ("--model", "test_resnet", *TINY)
COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("baseline")


@pytest.fixture(scope="module")
def data(folder):
    return write_set(folder / "set", COUNT, images=True)


@pytest.fixture(scope="module")
def done(agiqa, folder, data):
    """Two seeds of a tiny ResNet under two protocols: the folder, and what was printed."""
    protocols = ("--protocol", "published", "--protocol", "grouped", "--folds", 2)
    told = agiqa("baseline", data, folder / "out", *SMALL, *protocols, "--seeds", 2, "--json")
    return folder / "out", told.json


def lines_of(out):
    """The last line of every run, without what the clock says."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {
        line["name"]: {key: value for key, value in line.items() if key not in ("seconds", "trained_at")}
        for line in lines
    }


def predictions_of(out, name):
    with (out / "runs" / name / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_network_of_table_ii_runs_on_the_data_of_the_demo(agiqa, tmp_path):
    draw_data_set(tmp_path / "data", count=12, seed=0)
    options = (*TINY[:2], "--resize", 32, "--no-pretrained", "--epochs", 1, "--alone-epochs", 0, "--batch-size", 16)
    crops = ("--train-crops", 1, "--test-crops", 1, "--validation", 0, "--seeds", 1, "--device", "cpu", "--workers", 0)
    told = agiqa(
        "baseline", tmp_path / "data", tmp_path / "out", "--model", "table-ii", *options, *crops, "--json"
    ).json
    names = ["vgg16", "resnet50", "vit_base_patch16_224", "vil", "hyperiqa", "dbcnn", "stairiqa"]
    assert (told["trained"], told["failed"]) == (7, [])
    assert [row["row"] for row in told["table"]] == names
    parameters = [line["parameters"] / 1e6 for line in lines_of(tmp_path / "out").values()]
    # bodies and regressors: ViT and ViL have fewer positions than for 224 pixels
    assert [round(value, 1) for value in parameters] == [14.8, 23.8, 85.7, 87.8, 27.4, 15.3, 30.5]
    for name in names:
        rows = predictions_of(tmp_path / "out", f"{name},label=quality,protocol=published,seed=0")
        assert {row["split"] for row in rows} == {"test"}
        assert np.isfinite([float(row["predicted"]) for row in rows]).all()


def test_lines_and_rows_are_those_of_heads(done, data):
    out, printed = done
    lines = lines_of(out)
    assert (printed["runs"], printed["trained"], printed["failed"]) == (6, 6, [])
    published = [f"test_resnet,label=quality,protocol=published,seed={seed}" for seed in range(2)]
    folds = [f"test_resnet,label=quality,protocol=grouped,seed={s},fold={f}" for s in range(2) for f in range(2)]
    assert list(lines) == [*published, *folds]
    rows = {row["protocol"]: row for row in printed["table"]}
    for protocol, names in (("published", published), ("grouped", folds)):
        row = rows[protocol]
        assert (row["kind"], row["row"], row["settings"]) == ("network", "test_resnet", {"network": "test_resnet"})
        assert (row["seeds"], row["failed"], row["runs"]) == (2, 0, len(names))
        by_seed = [[name for name in names if f"seed={seed}" in name] for seed in range(2)]
        values = []
        for of_seed in by_seed:
            table = [row for name in of_seed for row in predictions_of(out, name) if row["split"] == "test"]
            values.append(stats.spearmanr([[float(one["predicted"]), float(one["mos"])] for one in table]).statistic)
        assert row["test"]["srcc"] == pytest.approx(np.mean(values))
        assert row["test"]["n"] == (10 if protocol == "published" else COUNT)
    mos = {row["name"]: float(row["mos_quality"]) for row in read_table(data)}
    tested = [row for name in folds[:2] for row in predictions_of(out, name) if row["split"] == "test"]
    assert {row["name"]: float(row["mos"]) for row in tested} == mos
    prompts = [{row["prompt"] for row in predictions_of(out, name) if row["split"] == "test"} for name in folds[:2]]
    assert prompts[0].isdisjoint(prompts[1])
    config = lines[published[0]]["config"]
    assert (config["epochs"], config["image_size"], config["resize"], config["weights"]) == (2, 32, 37, "none")
    assert config["source"].endswith("changed here: epochs, batch_size, image_size, resize")


def test_a_run_again_trains_nothing_and_another_network_joins_the_table(agiqa, done, data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    again = agiqa("baseline", data, out, *SMALL, "--seeds", 2, "--json")
    assert "2 of 2 runs exist already" in again.err
    assert (again.json["trained"], len(again.json["table"])) == (0, 2)
    more = agiqa("baseline", data, out, "--model", "test_vit", *TINY, "--seeds", 2, "--json").json
    assert (more["runs"], more["trained"]) == (2, 2)
    assert [(row["row"], row["protocol"]) for row in more["table"]] == [
        *(("test_resnet", "published"), ("test_resnet", "grouped"), ("test_vit", "published")),
    ]
    compared = [row["against"] for row in more["table"] if row["protocol"] == "published"]
    assert sum(one is None for one in compared) == 1  # the reference
    (against,) = (one for one in compared if one)
    assert against["row"] in ("test_resnet", "test_vit")
    assert 0 <= against["p_holm"]["srcc"] <= 1


def test_a_training_that_is_killed_goes_on_to_the_same_numbers(agiqa, data, tmp_path):
    options = (*SMALL, "--epochs", 6, "--seeds", 1, "--save-seconds", 0)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert agiqa("baseline", data, whole, *options).code == 0
    state = out / "runs" / ".test_resnet,label=quality,protocol=published,seed=0.state" / "state.ckpt"
    broken = in_time(lambda: agiqa.killed("baseline", data, out, *options, when=state.exists), out)
    assert broken.code == -9
    resumed = agiqa("baseline", data, out, *options)
    assert resumed.code == 0
    assert re.search(r"going on after epoch \d, kept in", resumed.err)
    assert lines_of(out) == lines_of(whole)
    (name,) = lines_of(out)
    assert predictions_of(out, name) == predictions_of(whole, name)
    assert not state.parent.exists()


def test_predictions_of_another_tool_are_a_row(agiqa, done, data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    items = read_table(data)
    noisy = np.random.default_rng(0).normal(0, 0.1, (2, COUNT))
    file = tmp_path / "tool.csv"
    lines = [
        f"{item['name']},{np.clip(float(item['mos_quality']) + noisy[s, k], 0, 5)},{s}"
        for s in range(2)
        for k, item in enumerate(items)
    ]
    file.write_text("name,predicted,seed\n" + "\n".join(lines) + "\n")
    told = agiqa("baseline", data, out, "--predictions", f"tool={file}", "--json").json
    row = next(row for row in told["table"] if row["row"] == "tool")
    assert (row["kind"], row["seeds"], row["validation"], row["test"]["n"]) == ("network", 2, None, 10)
    assert row["test"]["srcc"] > 0.95
    assert row["test"]["rmse"] == pytest.approx(0.1, abs=0.06)
    assert row["against"]["row"] == "test_resnet"
    file.write_text("\n".join(["name,predicted", *(f"{item['name']},{item['mos_quality']}0" for item in items[:-1])]))
    refuse(
        agiqa("baseline", data, tmp_path / "new", "--predictions", f"x={file}"),
        "no prediction of '039.png', a test item",
    )
    file.write_text("name,predicted\nother.png,1\n")
    refuse(agiqa("baseline", data, tmp_path / "new", "--predictions", f"x={file}"), "line 2: 'other.png' is no item of")
    assert not (tmp_path / "new").exists()


def test_one_report_compares_networks_with_heads(agiqa, done, data, tmp_path):
    """A store with features made up for the same images, its best head, and the networks of the folder."""
    out, printed = done
    items = load_data_set(data, variant="no_id", images=False).items
    content = make_content([4] * COUNT, width=8, logical_dtype="float32")
    columns = replace(
        content.items,
        names=[item.name for item in items],
        prompts=[item.prompt for item in items],
        splits=[item.split for item in items],
        labels={"quality": np.array([item.labels["quality"] for item in items])},
    )
    store = write_store(tmp_path / "store.agiqa", replace(content, items=columns), data_set={"name": "AGIQA-3k"}).path
    base = {"projection": "hidden", "width": 8, "epochs": 2, "batch_size": 8, "device": "cpu"}
    grid = {"base": base, "grid": {"encoder": ["none"], "pooling": ["mean", "max"]}, "seeds": [0, 1]}
    protocols = ["published", {"grouped": {"folds": 2}}]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**grid, "protocols": protocols}))
    heads = tmp_path / "heads"
    rows = agiqa("ablate", store, heads, "--grid", tmp_path / "grid.yaml", "--train-workers", 1, "--json").json["table"]
    report = agiqa("report", heads, out, "--to", tmp_path / "report", "--json").json
    assert report["problems"] == []
    for protocol in ("published", "grouped"):
        (path,) = (tmp_path / "report" / "tables").glob(f"*networks-quality-{protocol}.csv")
        with path.open(newline="") as file:
            best, network = csv.DictReader(file)
        reference = max(
            (row for row in rows if row["kind"] == "head" and row["protocol"] == protocol),
            key=lambda row: row["validation"]["srcc"][0],
        )
        mine = next(row for row in printed["table"] if row["protocol"] == protocol)
        assert float(best["srcc"]) == pytest.approx(reference["test"]["srcc"])
        assert best["tag"] == "best head of heads"
        assert network["row"] == "test_resnet"
        difference = mine["test"]["srcc"] - reference["test"]["srcc"]
        assert float(network["srcc_difference"]) == pytest.approx(difference)
        assert 0 <= float(network["srcc_p_holm"]) <= 1
    assert "Image networks" in (tmp_path / "report" / "report.md").read_text()


def test_table_ii_of_the_paper_stands_beside_ours(agiqa, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    for name in ("about.json", "rows.jsonl", "results.jsonl"):
        text = (out / name).read_text().replace('"data": "set"', '"data": "AGIQA-3k"')
        (out / name).write_text(text.replace("test_resnet", "resnet50"))
    report = agiqa("report", out, "--json").json
    (path,) = (path for path in report["tables"] if path.endswith("table-ii-agiqa-3k-quality.csv"))
    with open(path, newline="") as file:  # noqa: PTH123
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert len(rows) == 12
    assert (rows["ResNet50"]["paper_srcc"], rows["ResNet50"]["paper_plcc"]) == ("0.8552", "0.9072")
    ours = next(row for row in done[1]["table"] if row["protocol"] == "published")
    assert float(rows["ResNet50"]["srcc_published"]) == pytest.approx(ours["test"]["srcc"])
    assert (rows["MGQA"]["paper_srcc"], rows["MGQA"]["srcc_published"]) == ("0.8283", "")
    text = (out / "report" / "report.md").read_text()
    assert "which were not compared" in text
    assert "AMFF-Net (its paper, arXiv 2404.15163)" in text
    assert "Cited only, since agiqa cannot train them: MGQA, AMFF-Net, MA-AGIQA, IPCE and SF-IQA." in text


def test_wrong_networks_weights_and_settings_are_told_before_anything_is_trained(agiqa, done, data, tmp_path):
    out = tmp_path / "new"
    refuse(agiqa("baseline", data, out, "--model", "resnet5"), "No network is called 'resnet5'. Did you mean 'resnet50")
    torch.save({"conv1.0.weight": torch.zeros(1, 3, 3, 3)}, tmp_path / "weights.pth")
    refuse(
        agiqa("baseline", data, out, "--model", "test_resnet", "--weights", tmp_path / "weights.pth"),
        "weights.pth lacks tensors of the body of test_resnet",
    )
    refuse(agiqa("baseline", data, out, "--model", "vil", "--image-size", 32), "Give their file by --weights vil=FILE")
    refuse(agiqa("baseline", data, out, *SMALL, "--label", "qualty"), "Did you mean 'quality'")
    refuse(agiqa("baseline", data, out, *SMALL, "--loss", "mze"), "Did you mean 'mse'")
    refuse(agiqa("baseline", data, out, "--model", "vil_tiny", "--no-pretrained", "--image-size", 40), "no multiple")
    refuse(agiqa("baseline", data, out, *SMALL, "--protocol", "leave-one-generator-out"), "needs the generators")
    assert not (out / "results.jsonl").exists()
    misuse(agiqa("baseline", data, out), "There is nothing to do: give --model NAME")
    misuse(agiqa("baseline", data, out, *SMALL, "--weights", tmp_path / "weights.pth"), "contradict each other")
    given, two = ("--weights", tmp_path / "weights.pth"), ("--model", "test_resnet", "--model", "vil_tiny")
    misuse(
        agiqa("baseline", data, out, *two, *given), "weights.pth must name its network, as in --weights test_resnet="
    )
    other = ("--weights", f"vil={tmp_path / 'weights.pth'}")
    misuse(agiqa("baseline", data, out, *two, *other), "must name one of the networks, not 'vil'")
    refuse(
        agiqa("baseline", data, out, *two, "--weights", f"test_resnet={tmp_path / 'weights.pth'}", "--image-size", 32),
        "timm has no pretrained weights of vil_tiny",  # told before the weights of others are read or downloaded
    )
    other = agiqa("baseline", data, done[0], *SMALL, "--seeds", 1, "--epochs", 3)
    refuse(other, "had epochs 2, and this command has 3. Choose another OUT")


def test_data_without_images_or_mos_are_told(agiqa, done, tmp_path):
    columns = ["name", "prompt", "mos_quality", "split"]
    rows = [[f"{k}.png", f"prompt {k}", 1 + k / 10, "test" if k % 4 == 0 else "train"] for k in range(12)]
    folder = write_table(tmp_path / "set", rows, columns)
    for row in rows[:-1]:
        save_noise(folder / "images" / row[0], seed=1)
    out = tmp_path / "out"
    refuse(agiqa("baseline", folder, out, *SMALL), "11.png")
    save_noise(folder / "images" / "11.png", seed=1)
    write_table(folder, [[*row[:2], "" if row[0] == "4.png" else row[2], row[3]] for row in rows], columns)
    refuse(agiqa("baseline", folder, out, *SMALL), "'4.png' has no quality MOS")  # a test item may lack it in a table
    write_table(folder, [[*row[:2], 3, row[3]] for row in rows], columns)
    refuse(agiqa("baseline", folder, out, *SMALL), "there is nothing to learn")
    write_table(folder, [[*row[:3], "train"] for row in rows], columns)
    refuse(agiqa("baseline", folder, out, *SMALL), "needs items marked train and test")
    write_table(folder, rows, columns)
    shutil.copytree(done[0], out)
    refuse(agiqa("baseline", folder, out, *SMALL), "a run on other images, prompts, splits or MOS than those of")
