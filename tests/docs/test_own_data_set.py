"""The page docs/own-data-set.md is run as it stands, with a tiny model, the demo's pictures and a teacher on loopback."""

import csv
import json
import re
import subprocess

import pytest
import torch

from agiqa.bench.demo.images import draw_data_set
from agiqa.extract import Message, open_backbone
from agiqa.extract.data.templates import template_of
from agiqa.extract.teaching.wording_and_prices import shipped_prices
from agiqa.extract.tuning.folder import AdapterFolder
from agiqa.store import open_store
from tests.command_line import REPOSITORY
from tests.docs.pages import blocks, overridden, programs, run_script
from tests.extract.teaching.providers import KEY, MODEL, explains, says
from tests.extract.teaching.wire_formats import Gemini, OpenAi
from tests.extract.tiny_minicpm import write_minicpm_checkpoint

PATH = REPOSITORY / "docs" / "own-data-set.md"
PAGE = PATH.read_text()
IMAGES = 12


def write_photos(folder):
    """The demo's pictures with prompts and MOS, as a user has them: without splits."""
    draw_data_set(folder, count=IMAGES)
    with (folder / "data.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "data.csv").open("w", newline="") as file:
        kept = ["name", "prompt", "mos_quality", "mos_correspondence"]
        table = csv.DictWriter(file, kept, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return {row["name"]: row["prompt"] for row in rows}


def described(path):
    return {line["name"]: line for line in map(json.loads, path.read_text().splitlines())}


def answers(server, request):
    """The served model rates every image good, and describes it."""
    return (says("good") if template_of("quality").rate in request.text else explains)(server, request)


@pytest.fixture(scope="module")
def done(agiqa, tmp_path_factory):
    """The folder in which the page was run, the prompts of its images, and what the shell printed."""
    folder = tmp_path_factory.mktemp("page")
    prompts = write_photos(folder / "photos")
    write_minicpm_checkpoint(folder / "tiny")
    (folder / "prices.yaml").write_text(f"servers: [{{url: '', models: {{{MODEL}: {{input: 1.0, output: 1.0}}}}}}]")
    with Gemini() as teacher, OpenAi(key=None) as server, programs(agiqa, folder / "bin") as environment:
        server.default = answers
        values = {
            "DATA": "photos",
            "MODEL": "tiny",
            "TEACHER": f"--api gemini --teacher {MODEL} --base-url {teacher.base_url} --key-env GEMINI_API_KEY "
            "--prices prices.yaml",
            "RECIPE": "published",
            "TUNE": "--steps 2 --device cpu",
            "HEAD": "--encoder gru --width 8 --epochs 2 --device cpu",
            "WORDS": "12",
            "NEW": f"photos/images/{next(iter(prompts))}",
            "PROMPT": "a boat",
            "GEMINI_API_KEY": KEY,
            "SERVER": server.base_url,
            "SERVED": MODEL,
        }
        script = overridden("".join(blocks(PATH)), values)
        assert set(re.findall(r"^export (\w+)=", script, re.MULTILINE)) == set(values)
        shell = run_script(script, folder, environment)
    return folder, prompts, shell


def test_every_step_leaves_what_the_page_says(done):
    folder, prompts, shell = done
    names = set(prompts)
    assert described(folder / "teacher.jsonl").keys() == names
    for aspect in ("quality", "correspondence"):
        lines = (folder / f"teacher.{aspect}.jsonl").read_text().splitlines()
        assert len(lines) == IMAGES
        assert all(len(json.loads(line)["conversations"]) == 4 for line in lines)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    assert described(folder / "described.jsonl").keys() == described(folder / "served.jsonl").keys() == names
    assert {line["rating"] for line in described(folder / "served.jsonl").values()} == {"good"}
    assert json.loads((folder / "served.provenance.json").read_text())["model"]["kind"] == "server"
    merged = open_backbone(str(folder / "merged"), device="cpu")
    adapted = open_backbone(str(folder / "tiny"), adapter=str(folder / "adapter"), device="cpu")
    item = adapted.prepare([Message(role="user", content="rate")], folder / "photos" / "images" / min(names))
    assert torch.equal(merged.hidden_states([item])[0], adapted.hidden_states([item])[0])
    for run in ("quality", "correspondence", "both"):
        assert (folder / "runs" / run / "head.safetensors").is_file()
    assert re.search(r"^photos/images/\S+: MOS \d", shell.stdout, re.MULTILINE)
    assert (
        f"resume: {IMAGES} of {IMAGES} items are described already" in shell.stderr
    )  # the night job, after everything is done
    assert "error" not in shell.stderr
    assert "ask about" not in shell.stderr  # aspects of questions, texts and MOS agree in every step
    assert "ask for" not in shell.stderr


def test_the_splits_of_teach_hold_in_all_later_steps(done):
    folder, prompts, _ = done
    taught = {
        entry["image"]: entry["split"]
        for entry in map(json.loads, (folder / "teacher.quality.jsonl").read_text().splitlines())
    }
    assert {*taught.values()} == {"train", "val", "test"}
    assert {prompts[name] for name in taught if taught[name] == "test"}.isdisjoint(
        prompts[name] for name in taught if taught[name] != "test"
    )
    items = open_store(folder / "quality.agiqa").items
    assert dict(zip(items.names, items.splits, strict=True)) == taught
    tuned = json.loads((folder / "adapter" / "tuning.json").read_text())["data"]
    counts = [list(taught.values()).count(part) for part in ("train", "val")]
    assert [tuned["train"], tuned["validation"]] == counts
    tested = described(folder / "described-test.jsonl")
    assert tested.keys() == {name for name in taught if taught[name] == "test"}
    metrics = json.loads((folder / "runs" / "quality" / "metrics.json").read_text())
    assert metrics["test"]["n"] == len(tested)


def test_the_night_job_goes_on_with_a_training_that_was_stopped(tmp_path):
    (guard,) = re.findall(r"^(test .*) \|\| agiqa tune", PAGE, re.MULTILINE)
    with AdapterFolder(tmp_path / "adapter", {}).writing():
        pass
    assert subprocess.run(["bash", "-c", guard], cwd=tmp_path, check=False).returncode == 1


def test_the_key_is_in_no_file(done):
    folder, _, shell = done
    assert KEY not in shell.stdout
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(texts) > 40
    assert all(KEY.encode() not in text for text in texts)


def test_what_the_teacher_costs_is_computed_from_the_price_table():
    sent, received = (
        int(number.replace(",", ""))
        for number in re.search(r"About ([\d,]+) tokens are sent and ([\d,]+)", PAGE).groups()
    )
    rows = re.findall(r"^\| ([\w.-]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for model, whole, batch in rows:
        server = (
            "https://generativelanguage.googleapis.com/" if model.startswith("gemini") else "https://api.openai.com/"
        )
        price = shipped_prices().price(server, model)
        assert price is not None, model
        cost = 3000 * price.cost(sent, received)
        assert float(whole) == pytest.approx(cost, abs=0.051)
        assert float(batch) == pytest.approx(cost / 2, abs=0.051)
