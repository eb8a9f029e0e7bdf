"""`agiqa reproduce`: whole tables from tiny checkpoints of a hub's cache, killed and resumed; what is missing is named."""

import json
import os
import shutil

import pytest
import yaml

from agiqa.store import open_store
from tests.bench.reproducing.published import write_hub, write_plan, write_published
from tests.cli.refusals import refuse
from tests.command_line import CommandLine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder with the hub's cache, the published sets and the plan."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_hub(folder / "hub")
    write_published(folder / "root" / "agiqa-3k", seed=1)
    write_published(folder / "root" / "aigciqa2023", seed=2)
    write_plan(folder / "plan")
    return folder


@pytest.fixture(scope="module")
def offline(world):
    """The command line, which finds checkpoints in the cache alone; huggingface_hub reads this when it is imported."""
    settings = {"HF_HUB_CACHE": str(world / "hub"), "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    command_line = CommandLine()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    yield command_line
    command_line.close()


@pytest.fixture(scope="module")
def reproduce(offline, world):
    """Calls `agiqa reproduce TABLES OUT` with the plan of the world."""

    def call(*arguments, root=world / "root", plan=world / "plan" / "plan.yaml", run=offline, **options):
        return run("reproduce", *arguments, "--plan", plan, "--data", root, **options)

    return call


@pytest.fixture(scope="module")
def whole(reproduce, offline, world):
    """(OUT, what the killed call had finished, what the next one printed)."""
    out = world / "out"
    killed = reproduce("all", out, run=offline.killed, when=(out / "stores" / "untuned.agiqa").exists)
    assert killed.code == -9
    before = {path.name: path.read_bytes() for path in (out / "steps").glob("*.json")}
    return out, before, reproduce("all", out, "--json").json


def fail(outcome, *mentions):
    """Steps failed, after the tables were printed."""
    assert outcome.code == 1, outcome.err
    assert "Traceback" not in outcome.err
    for mention in mentions:
        assert str(mention) in outcome.err


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_killed_reproduction_goes_on_and_does_shared_steps_once(whole):
    out, before, printed = whole
    assert {"describe,tuned.json", "extract,tuned.json"} <= {*before}
    assert "ablate,ours.json" not in before
    assert (printed["failed"], printed["blocked"]) == ({}, {})
    assert len(printed["done"]) == len(set(printed["done"])) == 15
    for name, content in before.items():
        assert (out / "steps" / name).read_bytes() == content


def test_tables_hold_our_numbers_beside_those_of_the_paper(whole, offline):
    out, _, printed = whole
    tables = printed["tables"]
    ours, *others = tables["table-ii"]
    assert ours["cited"] == {"srcc": 0.9045, "plcc": 0.9317}
    found = {row["protocol"]: row["test"] for row in rows_of(out / "heads" / "ours") if row["kind"] == "head"}
    assert {way: one["srcc"] for way, one in ours["ours"].items()} == {way: one["srcc"] for way, one in found.items()}
    assert {*found} == {"published", "grouped"}
    closed = next(row for row in others if row["paper"] == "SF-IQA")
    assert (closed["cited"]["srcc"], closed["ours"], closed["row"]) == (0.9024, {}, "cited only, no public code")
    talks = next(row for row in rows_of(out / "heads" / "talks") if row["row"] == "store=untuned,variant=full")
    (row,) = tables["table-iv"]
    assert row["ours"][talks["protocol"]]["srcc"] == talks["test"]["srcc"]
    assert row["cited"]["srcc"] == 0.8720
    transfers = {row["settings"]["way"]: row["test"] for row in rows_of(out / "transfers" / "there")}
    assert [row["ours"]["published"]["srcc"] for row in tables["table-vi"]] == [
        transfers[way]["srcc"] for way in ("apply", "tp")
    ]
    text = (out / "tables.md").read_text()
    assert f"{found['published']['srcc']:.4f}" in text
    assert "0.9045" in text
    assert (out / "report" / "index.html").is_file()


def test_rating_words_are_those_of_the_test_images(whole, offline, tmp_path):
    out, _, printed = whole
    lines = [json.loads(line) for line in (out / "described" / "tuned.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    test = [line for line in lines if int(line["name"].removesuffix(".jpg")[-3:]) % 4 == 3]
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in test))
    by_hand = offline(
        "words", tmp_path / "test.jsonl", "--labels", out / "data" / "agiqa-3k" / "data.csv", "--json"
    ).json
    (row,) = printed["tables"]["table-v"]
    assert by_hand["n"] == 6
    assert row["ours"]["test"]["rough_accuracy"] == by_hand["rough_accuracy"]
    assert row["cited"]["accuracy"] == 0.6616


def test_stores_are_of_the_adapter_and_the_longest_conversation(whole):
    out, _, _ = whole
    tuned, untuned = (open_store(out / "stores" / f"{name}.agiqa") for name in ("tuned", "untuned"))
    assert tuned.provenance["model"]["name"] == "someone/tiny-minicpm+someone/tiny-ft"
    assert untuned.provenance["model"]["name"] == "someone/tiny-minicpm"
    assert tuned.provenance["conversation"] == {"variant": "full", "aspect": "agiqa3k_quality_v0"}
    assert tuned.provenance["model"]["image"]["slices"] == 1
    assert sorted(set(tuned.items.splits)) == ["test", "train"]


def test_what_is_done_is_left_alone_and_the_dry_run_says_so(whole, reproduce):
    out, _, _ = whole
    planned = reproduce("all", out, "--dry-run", "--json").json
    assert {row["state"] for row in planned["steps"]} == {"done"}
    assert planned["left"]["gpu_hours"] == 0.0
    again = reproduce("all", out)
    assert again.code == 0
    assert "agiqa extract" not in again.err


def forget(out, name):
    """Remove a store and the record of its step; where they were."""
    store, record = out / "stores" / f"{name}.agiqa", out / "steps" / f"extract,{name}.json"
    shutil.rmtree(store)
    record.unlink()
    return store, record


def hashes_of(store):
    manifest = json.loads((store / "MANIFEST.json").read_text())
    return {entry["path"]: entry["sha256"] for entry in manifest["objects"]}


@pytest.mark.parametrize("machine", [("--devices", 2), ("--ray",)])
def test_processes_of_a_host_or_a_ray_cluster_fill_the_same_store(whole, reproduce, offline, machine):
    out, _, _ = whole
    if "--ray" in machine:
        pytest.importorskip("ray", reason="needs the extra ray")
    before = hashes_of(out / "stores" / "untuned.agiqa")
    store, record = forget(out, "untuned")
    offline.environment = {"RAY_ADDRESS": "local"}  # not a cluster that happens to run on this machine
    found = reproduce("all", out, *machine, "--json").json
    offline.environment = {}
    assert (found["failed"], found["blocked"]) == ({}, {})
    assert hashes_of(store) == before
    given = json.loads(record.read_text())["arguments"]
    assert given[-2:] == [str(word) for word in (*machine, "auto")][:2]


def test_the_command_of_a_step_can_be_run_by_hand_and_the_next_call_takes_what_it_made(reproduce, offline, tmp_path):
    """So several GPUs describe at the same time: `agiqa describe` uses one."""
    out = tmp_path / "out"
    assert reproduce("table-v", out, "--only", "fetch", "--only", "data").code == 0
    planned = {row["step"]: row for row in reproduce("table-v", out, "--dry-run", "--json").json["steps"]}
    assert offline(*planned["describe/tuned"]["command"][1:]).code == 0
    before = (out / "described" / "tuned.jsonl").read_bytes()
    assert reproduce("table-v", out, "--json").json["failed"] == {}
    assert (out / "described" / "tuned.jsonl").read_bytes() == before


def test_parts_of_an_array_fill_a_store_and_the_next_call_goes_on(whole, reproduce):
    out, _, _ = whole
    store, record = forget(out, "untuned")
    for part in ("1/2", "2/2"):
        filled = reproduce("all", out, "--part", part)
        assert filled.code == 0, filled.err
        assert filled.err.count("agiqa extract") == 1
        assert not record.exists()
        assert (out / "steps" / f"extract,untuned,{part.replace('/', '-of-')}.log").is_file()  # jobs do not share it
        assert [*(out / "steps").glob("*.out")] == []
    assert len(open_store(store).n_tokens) == 24
    assert reproduce("all", out, "--json").json["blocked"] == {}
    assert record.exists()


def test_a_missing_set_is_named_and_the_other_one_goes_on(reproduce, world, tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    (root / "agiqa-3k").symlink_to(world / "root" / "agiqa-3k")
    planned = reproduce("table-vi", out, "--dry-run", root=root)
    assert planned.code == 0
    assert f"{root / 'aigciqa2023'}: no such folder. Put the data set aigciqa2023 there" in planned.out
    assert "| data/aigciqa2023 | missing |" in planned.out
    assert not out.exists()
    outcome = reproduce("table-vi", out, "--only", "data", "--only", "describe", root=root)
    fail(outcome, "data/aigciqa2023", "no such folder", "describe/other: not begun, since")
    assert (out / "data" / "agiqa-3k" / "data.csv").read_text().count("train") == 18


def test_a_set_without_a_split_and_an_adapter_that_the_hub_lacks(reproduce, world, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(world / "root", root)
    (root / "agiqa-3k" / "quality_test_res.json").unlink()
    outcome = reproduce("table-v", tmp_path / "out", "--only", "data", root=root)
    fail(outcome, "6 of 24 images have no split", "quality_test_res.json")
    content = yaml.safe_load((world / "plan" / "plan.yaml").read_text())
    content["descriptions"]["tuned"]["adapter"] = "someone/absent"
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    for grid in ("ours", "talks"):
        shutil.copy(world / "plan" / f"{grid}.yaml", tmp_path)
    fail(
        reproduce("table-v", tmp_path / "out", "--only", "fetch", plan=tmp_path / "plan.yaml"),
        "fetch/absent: someone/absent: no folder of that name here, and the Hugging Face hub did not provide it",
    )


def test_wrong_names(reproduce, tmp_path):
    refuse(reproduce("table-i", tmp_path / "out"), "No table of the plan is called 'table-i'")
    refuse(reproduce("all", tmp_path / "out", "--only", "extrakt"), "No step of these tables is called 'extrakt'")
