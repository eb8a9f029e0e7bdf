"""`agiqa data check` and `agiqa extract --plan-only`: what would be read and stored, before a model runs."""

import os
import pty
import shutil
import subprocess
import sys

import pytest

from agiqa.store import open_store
from tests.cli.refusals import misuse, refuse
from tests.command_line import REPOSITORY
from tests.extract.data.published_folders import evalmi_50k
from tests.extract.small_sets import save_noise, write_set, write_table, write_talks
from tests.extract.tiny_minicpm import write_minicpm_checkpoint

COLUMNS = ["name", "prompt", "mos_quality", "mos_align", "split", "generator"]


@pytest.fixture
def leaky(tmp_path):
    """Six rows: a prompt and an image of train in test, an image twice in train, and MOS that are missing."""
    rows = [
        ["a.png", "A cat.", 0, 1, "train", "SD"],
        ["b.png", "a dog", 2.4, "", "train", "SD"],
        ["c.png", "a bird", 2.6, "", "train", "MJ"],
        ["d.png", "a cat", 5, "", "test", "MJ"],
        ["e.png", "a fish", 4.9, "", "test", "MJ"],
        ["f.png", "a dog", 1, "", "val", "SD"],
    ]
    folder = write_table(tmp_path / "leaky", rows, COLUMNS)
    for seed, name in ((0, "a"), (1, "b"), (1, "c"), (2, "d"), (0, "e"), (3, "f")):
        save_noise(folder / "images" / f"{name}.png", seed=seed)
    return folder


def test_what_is_found(agiqa, leaky):
    outcome = agiqa("data", "check", leaky, "--json")
    found = outcome.json
    assert (found["items"], found["prompts"], found["unlabelled"]) == (6, 4, 0)
    assert found["splits"] == {"train": 3, "val": 1, "test": 2}
    assert found["generators"] == {"MJ": 3, "SD": 3}
    assert found["leaks"] == {
        "test in train": {"of": 2, "prompts": 1, "verbatim": 0, "images": 1},
        "test in val": {"of": 2, "prompts": 0, "verbatim": 0, "images": 0},
        "val in train": {"of": 1, "prompts": 1, "verbatim": 1, "images": 0},
    }
    assert found["duplicates"] == {"images": 2, "examples": [["a.png", "e.png"], ["b.png", "c.png"]]}
    quality = found["mos"]["quality"]
    assert quality["histogram"] == [1, 0, 1, 0, 1, 1, 0, 0, 0, 2]
    assert (quality["count"], quality["lowest"], quality["highest"]) == (6, 0.0, 5.0)
    assert found["mos"]["correspondence"]["missing"] == 5
    assert found["mos"]["correspondence"]["missing_by_split"] == {"train": 2, "val": 1, "test": 2}
    assert found["images"]["sizes"] == {"40x32": 6}
    assert found["tokens"]["slices_per_item"] == {"mean": 1.0, "median": 1.0, "most": 1}
    assert found["tokens"]["exact"] is False
    assert found["cost"]["hidden"]["bytes_per_token"] == 8197
    assert "bench/LOG.md" in found["cost"]["rate"]
    assert "this is the check of --variant no_id" in outcome.err


def test_the_text_for_people(agiqa, leaky):
    shown = agiqa("data", "check", leaky).out
    for line in (
        "items            6, with 4 different prompts",
        "test and train   1 of 2 test items have a prompt of train, 1 an image of train (leak)",
        "same images      2, such as a.png = e.png; b.png = c.png",
        "MOS of quality: 6, mean 2.65",
        "MOS of correspondence: 1, 5 items without",
        "Tokens of MiniCPM-Llama3-V-2.5, estimated; --model counts them",
        "under 1 min of GPU",
    ):
        assert line in shown
    assert "\x1b" not in shown


def test_a_terminal_gets_colours(leaky):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "agiqa", "data", "check", str(leaky)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(REPOSITORY)}
    environment.pop("NO_COLOR", None)
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, check=True, env=environment)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "\x1b[36m█" in shown


def test_a_model_counts_its_own_tokens_without_weights(agiqa, leaky, tmp_path):
    model = write_minicpm_checkpoint(tmp_path / "model")
    for path in model.glob("*.safetensors"):
        path.unlink()
    found = agiqa("data", "check", leaky, "--model", model, "--json").json
    assert found["tokens"]["exact"] is True
    assert found["tokens"]["image_per_item"]["most"] == 6
    assert found["cost"]["width"] == 128
    assert (found["cost"]["rate"], found["cost"]["hidden"]["gpu_hours"]) == (None, None)


def test_descriptions_are_in_the_default_conversation(agiqa, tmp_path):
    folder = write_set(tmp_path / "set", 8, images=True)
    plain = agiqa("data", "check", folder, "--variant", "no_id", "--json").json
    described = agiqa("data", "check", folder, "--json").json
    talks = agiqa("data", "check", folder, "--conversations", write_talks(folder), "--json").json
    assert (plain["described"], described["described"], talks["described"]) == (0, 8, 8)
    assert described["tokens"]["total"] > plain["tokens"]["total"]


def test_what_extract_would_refuse(agiqa, leaky):
    """The summary is printed, and the exit code is 1 as that of extract would be."""
    (leaky / "images" / "b.png").write_bytes(b"no image")
    (leaky / "images" / "c.png").unlink()
    outcome = agiqa("data", "check", leaky)
    assert outcome.code == 1
    assert "items            4, with" in outcome.out
    assert "left out: b.png (data.csv, line 3): " in outcome.out
    for mention in ("c.png (data.csv, line 4): no image of that name", "2 problems", "--on-bad-item skip"):
        assert mention in outcome.err
    skipped = agiqa("data", "check", leaky, "--on-bad-item", "skip", "--json").json
    assert (skipped["items"], len(skipped["problems"])) == (4, 2)


def test_too_long_conversations(agiqa, leaky, tmp_path):
    model = write_minicpm_checkpoint(tmp_path / "model")
    outcome = agiqa("data", "check", leaky, "--model", model, "--max-tokens", 30)
    refuse_all = "the limit is 30"
    assert outcome.code == 1
    assert refuse_all in outcome.err


def test_no_data_set(agiqa, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(agiqa("data", "check", tmp_path / "empty"), "data.csv: no such file")
    misuse(agiqa("data", "check", tmp_path / "none"), "does not exist")
    misuse(agiqa("data", "chek", tmp_path), "No such command 'chek'")


def test_a_folder_of_images_without_a_table(agiqa, tmp_path):
    for name in ("a.png", "sub/b.png"):
        save_noise(tmp_path / "images" / name, seed=len(name))
    refuse(agiqa("data", "check", tmp_path / "images"), "2 images and no table", "Give --prompt TEXT")
    found = agiqa("data", "check", tmp_path / "images", "--prompt", "a cat", "--json")
    assert (found.json["items"], found.json["prompts"], found.json["unlabelled"]) == (2, 1, 2)
    assert "--variant no_id" in found.err


def test_the_table_of_a_folder_is_announced_once(agiqa, leaky):
    (leaky / "data.csv").rename(leaky / "labels.csv")
    assert agiqa("data", "check", leaky).err.count("reading the table labels.csv") == 1


def test_the_recorded_scale_is_announced_for_another_table(agiqa, tmp_path):
    out = tmp_path / "out"
    agiqa("data", "import", "evalmi-50k", evalmi_50k(tmp_path / "down"), out)
    assert "MOS from" not in agiqa("data", "check", out).err
    (out / "mine.csv").write_bytes((out / "data.csv").read_bytes())
    found = agiqa("data", "check", out / "mine.csv", "--json")
    assert f"mine.csv: MOS from 0 to 100, the scale in {out / 'source.json'}" in found.err
    assert found.json["mos_range"] == [0.0, 100.0]


def test_plan_only_refuses_what_the_job_would(agiqa, example, tmp_path):
    for options, message in (
        (("--encoding", "sketch"), "--encoding sketch needs either --rank R"),
        (("--encoding", "sketch", "--rank", 6000), "Sketch rank 6000 is outside 1.."),
        (("--rank", 4), "belong to --encoding sketch"),
    ):
        refuse(agiqa(*example.extract(tmp_path / "s.agiqa", "--plan-only", *options)), message)
    refuse(agiqa(*example.extract(example.data, "--plan-only")), "exists and is not a feature store")


def test_plan_only_is_the_check_of_the_real_job(agiqa, example, tmp_path):
    store = tmp_path / "s.agiqa"
    found = agiqa(*example.extract(store, "--plan-only", "--json")).json
    assert not store.exists()
    assert found["items"] == 40
    assert found["tokens"]["total"] == int(open_store(example.store).n_tokens.sum())
    assert found["tokens"]["exact"] is True
    shown = agiqa(*example.extract(store, "--plan-only", "--encoding", "sketch", "--rank", 4))
    assert shown.code == 0, shown.err
    assert "A store of each encoding" in shown.out
    too_long = agiqa(*example.extract(store, "--plan-only", "--max-tokens", 20))
    refuse(too_long, "the limit is 20")
    shutil.rmtree(store, ignore_errors=True)
