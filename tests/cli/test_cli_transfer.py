"""`agiqa transfer` by real processes: every way of carrying a head over, resumption, failures, and refusals."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from scipy import stats

from agiqa.store.disk.locks import exclusive_lock
from tests.cli.refusals import refuse
from tests.command_line import in_time
from tests.store.conftest import make_content
from tests.store.conftest import make_store as write_store

SETTINGS = {
    "head": {"projection": "hidden", "encoder": "none", "width": 8},
    "train": {"epochs": 2, "batch_size": 8, "lr": 0.01, "device": "cpu"},
    "few_shot": {"epochs": 3, "batch_size": 8},
}
FEW = ("--seeds", 2, "--shots", "4,8", "--train-workers", 1)
COUNT = 60


def stored(path, seed, *, vocabulary=40, **labels):
    """60 items of 15 prompts, every fourth for tests, whose quality follows the features; W_lm by `vocabulary`."""
    random = np.random.default_rng(seed)
    content = make_content(random.integers(4, 12, COUNT).tolist(), seed=seed, width=8, logical_dtype="float32")
    quality = np.array([2.5 + rows[:, 0].mean() for rows in content.hidden])
    items = replace(
        content.items,
        names=[f"{seed}/{name}" for name in content.items.names],
        prompts=[f"prompt {(k + seed) % 15}" for k in range(COUNT)],
        labels={"quality": quality, **labels},
    )
    lm_head = np.random.default_rng(vocabulary).normal(size=(vocabulary, 8)).astype(np.float32)
    return write_store(path, replace(content, items=items, lm_head=lm_head), data_set={"name": path.stem}).path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def stores(folder):
    return stored(folder / "here.agiqa", 1), stored(folder / "there.agiqa", 2)


@pytest.fixture
def transfer(tmp_path, stores):
    """Arguments of a transfer into tmp_path/out with the given sections."""

    def arguments(*options, at=None, **sections):
        file = tmp_path / "transfer.yaml"
        file.write_text(yaml.safe_dump({**SETTINGS, **sections}))
        return ("transfer", *(at or stores), tmp_path / "out", "--config", file, *options)

    return arguments


@pytest.fixture(scope="module")
def done(agiqa, folder, stores):
    """A whole transfer: its folder, and what it printed."""
    file = folder / "transfer.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    told = agiqa("transfer", *stores, folder / "out", "--config", file, *FEW, "--json")
    return folder / "out", told.json


def lines_of(out):
    """The last line of every name, without what the clock says."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {
        line["name"]: {key: value for key, value in line.items() if key not in ("seconds", "trained_at")}
        for line in lines
    }


def named(source, target, way, items="all"):
    return [f"from={source},to={target},way={way},training_items={items},seed={seed}" for seed in range(2)]


def parts(out, line):
    recorded = json.loads((out / line["run"] / "parts.json").read_text())
    return {part: {tuple(item) for item in items} for part, items in recorded.items()}


def test_every_way_has_a_line_for_every_seed(done):
    out, printed = done
    lines = lines_of(out)
    assert (printed["lines"], printed["trained"], printed["failed"]) == (36, 28, [])
    assert len(lines) == 36
    for line in lines.values():
        metrics = json.loads((out / line["run"] / "metrics.json").read_text())
        assert (line["protocol"], set(line["stores"])) == ("published", {line["from"], line["to"]})
        if line["way"] != "apply":
            assert (line["validation"], line["test"]) == (metrics["validation"], metrics["test"])
    for seed in range(2):
        tp, within = (named(*pair)[seed] for pair in (("here", "there", "tp"), ("there", "there", "within")))
        assert lines[tp]["test"] == lines[within]["test"]
        assert "there's own" in lines[tp]["same_head_as"]


def test_a_head_is_applied_as_evaluate_does(agiqa, done, stores):
    out, _ = done
    lines = lines_of(out)
    for name in named("here", "there", "apply"):
        line = lines[name]
        told = agiqa("evaluate", out / line["run"], stores[1], "--device", "cpu", "--json").json
        assert line["test"] == {key: told[key] for key in line["test"]}
        assert any(key.startswith("rmse") for key in line["test"])
        with (out / line["predictions"]).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == line["test"]["n"] == 15
    trained = [k for k in range(COUNT) if k % 4]
    known = {f"prompt {(k + 1) % 15}" for k in trained}
    leaked = sum(f"prompt {(k + 2) % 15}" in known for k in range(0, COUNT, 4))
    assert line["shared"] == {
        "test_items": 15,
        "with_a_prompt_of_the_source": leaked,
        "with_a_prompt_of_the_source_verbatim": leaked,
        "that_are_items_of_the_source": 0,
    }


def test_few_items_are_nested_drawn_by_seed_and_the_same_for_both_starts(done):
    out, _ = done
    lines = lines_of(out)
    for seed in range(2):
        few, more, every = (lines[named("here", "there", "fresh", count)[seed]] for count in (4, 8, "all"))
        drawn = [parts(out, line) for line in (few, more, every)]
        assert [len(one["train"]) for one in drawn] == [4, 8, 45]
        assert drawn[0]["train"] < drawn[1]["train"] < drawn[2]["train"]
        assert len({frozenset(one["test"]) for one in drawn}) == 1
        assert not any(one["validation"] for one in drawn)
        assert few["chosen_by"].startswith("last epoch")
        assert few["config"]["epochs"] == 3
        warm = lines[named("here", "there", "warm", 4)[seed]]
        assert parts(out, warm) == drawn[0]
        config = json.loads((out / warm["run"] / "config.json").read_text())
        assert config["start"]["run"] == f"here,own,seed={seed}"
    first, second = (parts(out, lines[name])["train"] for name in named("here", "there", "fresh", 4))
    assert first != second


def test_rows_are_means_over_seeds_of_the_predictions(done):
    out, printed = done
    lines = lines_of(out)
    rows = {row["row"]: row for row in printed["rows"]}
    assert [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()] == printed["rows"]
    assert len(rows) == 18
    for row in printed["rows"]:
        of_row = [line for name, line in lines.items() if name.startswith(row["row"] + ",seed")]
        assert (row["runs"], row["seeds"], row["failed"]) == (2, 2, 0)
        for metric in ("srcc", "plcc", "rmse"):
            assert row["test"][metric] == pytest.approx(np.mean([line["test"][metric] for line in of_row]))
    row = rows["from=here,to=there,way=apply,training_items=all"]
    read = []
    for name in named("here", "there", "apply"):
        with (out / lines[name]["predictions"]).open(newline="") as file:
            read.append(list(csv.DictReader(file)))
    for metric, correlation in (("srcc", stats.spearmanr), ("plcc", stats.pearsonr)):
        values = [
            correlation(*([float(one[column]) for one in table] for column in ("predicted", "mos"))).statistic
            for table in read
        ]
        assert row["test"][metric] == pytest.approx(np.mean(values))
        assert row["test"]["sd"][metric] == pytest.approx(np.std(values, ddof=1))
    compared = {name: row["against"]["row"] for name, row in rows.items() if row["against"]}
    assert compared["from=here,to=there,way=tp,training_items=all"] == row["row"]
    warm = "from=there,to=here,way=warm,training_items=4"
    assert compared[warm] == warm.replace("warm", "fresh")
    assert len(compared) == 2 + 2 * 3
    against = rows[warm]["against"]
    gain = rows[warm]["test"]["srcc"] - rows[compared[warm]]["test"]["srcc"]
    assert against["difference"]["srcc"] == pytest.approx(gain)
    assert against["p"]["srcc"] <= against["p_holm"]["srcc"] <= 1


def test_the_tables_are_those_of_the_paper(agiqa, done, stores, tmp_path):
    out, printed = done
    about = json.loads((out / "about.json").read_text())
    del about["settings"]["train"]["ema"]  # as an agiqa wrote it that did not know this setting
    (out / "about.json").write_text(json.dumps(about))
    again = agiqa("transfer", *stores, out, "--config", out.parent / "transfer.yaml", *FEW)
    assert "36 of 36 results exist already" in again.err
    assert "| from -> to | SRCC | PLCC | w/ TP SRCC | w/ TP PLCC |" in again.out
    assert "| from -> to | items | fresh SRCC | fresh PLCC | warm SRCC | warm PLCC |" in again.out
    (row,) = [row for row in printed["rows"] if row["row"].startswith("from=there,to=here,way=apply")]
    low, high = row["test"]["ci"]["srcc"]
    assert f"| there -> here | {row['test']['srcc']:.4f} [{low:.3f}, {high:.3f}] |" in again.out
    assert "| there -> here | all |" in again.out


def test_a_transfer_that_is_broken_off_goes_on(agiqa, transfer, done, tmp_path):
    out = tmp_path / "out"
    half = out / "runs" / "there,fresh,items=8,seed=1"
    broken = in_time(lambda: agiqa.killed(*transfer(*FEW), when=half.exists), out)
    assert broken.code == -9
    with (out / "results.jsonl").open("a") as file:
        file.write('{"name": "from')
    assert agiqa(*transfer(*FEW)).code == 0
    assert lines_of(out) == lines_of(done[0])
    assert (out / "rows.jsonl").exists()


def test_what_fails_is_kept_and_tried_again(agiqa, transfer, tmp_path):
    out = tmp_path / "out"
    taken = out / "runs" / "here,own,seed=0"
    taken.mkdir(parents=True)
    (taken / "letter.txt").write_text("mine")
    few = ("--seeds", 1, "--shots", "", "--train-workers", 1, "--one-way")
    failed = agiqa(*transfer(*few, "--json"))
    assert failed.code == 1
    assert "error: 3 of 5 results failed; run the same command again to retry:" in failed.err
    assert "Traceback" not in failed.err
    lines = lines_of(out)
    assert [line["way"] for line in lines.values() if "error" in line] == ["within", "warm", "apply"]
    assert (
        "start here,own,seed=0 was not trained"
        in lines["from=here,to=there,way=warm,training_items=all,seed=0"]["error"]
    )
    rows = {row["settings"]["way"]: row for row in json.loads(failed.out)["rows"]}
    assert (rows["within"]["test"], rows["within"]["failed"], rows["tp"]["failed"]) == (None, 1, 0)
    shutil.rmtree(taken)
    whole = agiqa(*transfer(*few, "--json")).json
    assert whole["trained"] == 2
    assert not any("error" in line for line in lines_of(out).values())
    (applied,) = (out / line["predictions"] for line in lines_of(out).values() if line["way"] == "apply")
    applied.unlink()
    shutil.rmtree(out / "runs" / "there,own,seed=0")
    again = agiqa(*transfer(*few, "--json")).json
    assert (again["trained"], again["rows"][0]["test"]) == (1, whole["rows"][0]["test"])
    assert applied.exists()


def test_grouped_parts_are_the_same_for_every_seed_and_few_items_are_not(agiqa, transfer, tmp_path):
    assert (
        agiqa(*transfer("--split", "grouped", "--seeds", 2, "--shots", 4, "--train-workers", 1, "--one-way")).code == 0
    )
    lines = lines_of(tmp_path / "out")
    assert {line["protocol"] for line in lines.values()} == {"grouped"}
    tested = {
        frozenset(parts(tmp_path / "out", line)["test"])
        for line in lines.values()
        if line["to"] == "there" and line["way"] != "apply"
    }
    assert len(tested) == 1
    few = {
        way: [parts(tmp_path / "out", lines[name])["train"] for name in named("here", "there", way, 4)]
        for way in ("fresh", "warm")
    }
    assert few["fresh"] == few["warm"]
    assert few["fresh"][0] != few["fresh"][1]


def test_stores_that_no_head_can_read_both_are_refused(agiqa, transfer, stores, tmp_path):
    here, there = stores
    sketches = [tmp_path / f"{name}.agiqa" for name in ("one", "two")]
    for store, sketch in zip(stores, sketches, strict=True):
        assert agiqa("store", "sketch", store, sketch, "--rank", 4).code == 0
    refuse(
        agiqa(*transfer(at=sketches)), "No head can read both", f"agiqa store sketch STORE OUT --basis {sketches[0]}"
    )
    refuse(agiqa(*transfer(at=(sketches[0], there))), f"agiqa store sketch {there} OUT --basis {sketches[0]}")
    other = stored(tmp_path / "other.agiqa", 3, vocabulary=41)
    refuse(agiqa(*transfer(at=(here, other))), "Extract both with the same model")
    refuse(agiqa(*transfer("--names", "a,b", at=(here, here))), "a and b have the same 60 images")
    refuse(agiqa(*transfer(head={"projection": "sketch"})), "reads 'sketch' features", "data set 'here'")
    assert not (tmp_path / "out").exists()


def test_sketches_are_read_as_such_where_nobody_sets_the_projection(agiqa, transfer, stores, tmp_path):
    first, second = sketches = [tmp_path / f"{name}.agiqa" for name in ("one", "two")]
    assert agiqa("store", "sketch", stores[0], first, "--rank", 4).code == 0
    assert agiqa("store", "sketch", stores[1], second, "--basis", first).code == 0
    asked = ("--names", "one,two", "--shots", 46)
    bare = agiqa("transfer", *sketches, tmp_path / "out", *asked)
    refuse(bare, "46 training items of two are asked for")  # the heads can read both, or this were not asked
    refuse(agiqa("transfer", *sketches, tmp_path / "out", *asked, "--preset", "paper"), "reads 'hidden' features")
    head = {"encoder": "none", "width": 8}
    few = ("--seeds", 1, "--shots", "", "--one-way", "--train-workers", 1, "--names", "one,two")
    assert agiqa(*transfer(*few, at=sketches, head=head)).code == 0
    assert {line["config"]["projection"] for line in lines_of(tmp_path / "out").values()} == {"sketch"}


def test_a_small_data_set_has_the_part_of_the_curve_that_it_has_items_for(agiqa, transfer, tmp_path):
    outcome = agiqa(*transfer("--seeds", 1, "--train-workers", 1, "--one-way", few_shot={"epochs": 1}))
    assert outcome.code == 0, outcome.err
    assert "note: there has 45 training items: none are drawn of 100, 300" in outcome.err
    assert "7 heads to train on" in outcome.err
    assert "1 at a time" in outcome.err
    few = [name for name in lines_of(tmp_path / "out") if "way=fresh" in name or "way=warm" in name]
    assert {re.search(r"training_items=(\w+)", name).group(1) for name in few} == {"10", "30", "all"}


def test_what_cannot_be_asked_is_refused_before_anything_is_written(agiqa, transfer, stores, tmp_path):
    half = stored(tmp_path / "half.agiqa", 4, beauty=np.ones(COUNT))
    refuse(agiqa(*transfer("--label", "beauty", at=(half, stores[0]))), "'beauty'", "data set 'here'")
    refuse(agiqa(*transfer("--names", "a")), "--names A,B")
    refuse(agiqa(*transfer("--shots", "4,46")), "46 training items of there are asked for, and it has 45")
    refuse(agiqa(*transfer(few_shot={"label": "beauty"})), "transfer.yaml", "cannot be set in `few_shot`")
    assert agiqa(*transfer("--shots", "4,x")).code == 2
    assert not (tmp_path / "out").exists()


def test_results_of_something_else_are_refused(agiqa, transfer, stores, done, tmp_path):
    shutil.copytree(done[0], tmp_path / "out")
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    third = stored(tmp_path / "third.agiqa", 5)
    refuse(
        agiqa(*transfer(*FEW, "--names", "here,there", at=(stores[0], third))),
        "about.json",
        "stores.there: stored ",
        f"{stores[1]} (",
        f"{third} (",
    )
    refuse(agiqa(*transfer(*FEW, train={**SETTINGS["train"], "epochs": 1})), "settings.train.epochs: stored 2, asked 1")
    shutil.copytree(stores[1], tmp_path / "there.agiqa")
    (tmp_path / "mos.csv").write_text("name,mos_quality\n2/image_3.png,4.5\n")
    assert agiqa("store", "labels", tmp_path / "there.agiqa", tmp_path / "mos.csv", "--mos-range", -10, 10).code == 0
    labelled = transfer(*FEW, at=(stores[0], tmp_path / "there.agiqa"))
    refuse(agiqa(*labelled), "there,own,seed=0 holds another training", "labels of train are not")
    with exclusive_lock(tmp_path / "out" / "lock") as held:
        assert held
        refuse(agiqa(*transfer(*FEW)), "Another transfer is at work", tmp_path / "out")
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
