"""`agiqa tune`: from conversations to a score by the tuned model; estimates, interruption, and what is refused."""

import csv
import json
import shutil
import signal

import pytest

from tests.cli.conftest import SMALL_HEAD
from tests.cli.refusals import misuse, refuse
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import roomy, write_text_checkpoint
from tests.extract.tuning.talks import load_talks, write_talks

SMALL = ("--set", "rank=4", "--set", "lr=1e-3", "--set", "batch_size=4", "--set", "micro_batch=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_minicpm_checkpoint(tmp_path_factory.mktemp("tune-minicpm"))


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    return write_talks(tmp_path_factory.mktemp("tune-talks"), aspects=("quality", "correspondence"), count=24)


@pytest.fixture
def tune(model, talks, tmp_path):
    """The arguments of a small training; further ones follow, and the last of an option counts."""

    def arguments(*options, adapter=tmp_path / "adapter", data=talks, model=model):
        given = ("--model", model, "--conversations", talks / "quality.json", "--device", "cpu", *SMALL)
        slices = ("--max-slices", 1) if "minicpm" in str(model) else ()
        return ("tune", data, adapter, *given, *slices, "--steps", 4, *options)

    return arguments


def test_tune_describe_extract_train_score(agiqa, tune, model, talks, tmp_path):
    """The adapter serves every later command, by their own words: each result names it."""
    adapter, out, store, run = (tmp_path / name for name in ("adapter", "out.jsonl", "s.agiqa", "run"))
    printed = agiqa(*tune("--json")).json
    assert (printed["adapter"], printed["steps"], printed["skipped"]) == (str(adapter), 4, [])
    assert printed["validation_loss"] > 0
    tuned = ("--model", model, "--adapter", adapter, "--max-slices", 1, "--device", "cpu")
    short = ("--max-new-tokens", 8)
    assert agiqa("describe", talks, out, *tuned, *short).code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 24
    assert {line["adapter"]["name"] for line in lines} == {"adapter"}
    extracted = agiqa("extract", talks, store, *tuned, "--conversations", out, "--json").json
    assert extracted["state"] == "complete"
    assert agiqa("train", store, run, *SMALL_HEAD).code == 0
    with (talks / "data.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    image = talks / "images" / row["name"]
    asked = ("score", image, "--prompt", row["prompt"], "--run", run, "--json", *short)
    scored = agiqa(*asked, *tuned).json
    (one,) = scored["images"]
    assert isinstance(one["mos"], float)
    (line,) = [line for line in lines if line["name"] == row["name"]]
    assert (one["description"], one["rating_word"]) == (line["description"], line["rating_word"])
    refuse(agiqa(*asked, *tuned[:2], *tuned[4:]), "was trained with the adapter", "you gave no adapter")


def test_a_dry_run_estimates_and_writes_nothing(agiqa, tune, tmp_path):
    found = agiqa(*tune("--dry-run", "--json")).json
    assert (found["train"] + found["validation"], found["steps"]) == (18, 4)
    assert set(found["recipes"]) == {"published", "no-embeddings", "light"}
    sizes = [found["recipes"][name]["trained_parameters"] for name in ("published", "no-embeddings", "light")]
    assert sizes == sorted(sizes, reverse=True)
    assert found["estimate"]["gb"] > 0
    assert not (tmp_path / "adapter").exists()
    text = agiqa(*tune("--dry-run")).out
    assert "memory" in text
    assert "no-embeddings" in text


def test_several_aspects_in_one_conversation(agiqa, tune, talks):
    both = ("--variant", "full:quality+correspondence", "--conversations", talks / "correspondence.json")
    one, two = (agiqa(*tune("--dry-run", "--json", *options)).json for options in ((), both))
    assert two["labels"] > one["labels"]
    assert two["sha256"] != one["sha256"]
    refuse(agiqa(*tune("--dry-run", *both[:2])), "No descriptions of correspondence; give their file")


def test_ctrl_c_and_the_same_command_again(agiqa, tune, model, tmp_path):
    options = ("--checkpoint-minutes", 0, "--steps", 12, "--set", "dropout=0.2", "--json")
    stopped = agiqa.interrupted(*tune(*options), when=lambda: _steps(tmp_path / "adapter") >= 3)
    assert stopped.code == 128 + signal.SIGINT
    assert "run the same command again to resume" in stopped.err
    done = _steps(tmp_path / "adapter")
    assert 3 <= done < 12
    unfinished = ("merge", model, tmp_path / "adapter", tmp_path / "merged")
    refuse(agiqa(*unfinished), "no adapter_config.json", "Its training has not ended: run the same `agiqa tune` again")
    again = agiqa(*tune(*options))
    assert "resume after step" in again.err
    assert "tune: 12/12 steps in" in again.err
    whole = agiqa(*tune(*options, adapter=tmp_path / "whole")).json
    for name in ("loss", "validation_loss", "best_step"):
        assert again.json[name] == whole[name]
    refused = agiqa(*tune(*options))
    refuse(refused, "holds an adapter already. Choose another ADAPTER")
    assert "check" not in refused.err  # before the images are looked at


def _steps(adapter):
    curves = adapter / "curves.csv"
    return sum(1 for line in curves.read_text().splitlines()[1:] if line.split(",")[1]) if curves.exists() else 0


def test_what_does_not_fit_is_listed_or_left_out(agiqa, tune):
    limit = ("--set", "max_length=1")
    refuse(agiqa(*tune(*limit)), "18 problems", "tokens (6 of the image), more than the 1 allowed")
    found = agiqa(*tune("--dry-run", "--json")).json
    nearly = ("--set", f"max_length={found['longest'] - 1}", "--on-bad-item", "skip")
    outcome = agiqa(*tune("--dry-run", "--json", *nearly))
    assert outcome.json["skipped"]
    assert "skipped " in outcome.err
    assert outcome.json["train"] + outcome.json["validation"] + len(outcome.json["skipped"]) == 18


def test_wrong_usage(agiqa, tune, tmp_path):
    misuse(agiqa(*tune("--variant", "fulll")), "Did you mean 'full'")
    misuse(agiqa(*tune("--variant", "id")), "has no rating word to learn")
    refuse(agiqa(*tune("--set", "learning_rate=1")), "No setting of a recipe is called 'learning_rate'")
    refuse(agiqa(*tune("--set", "lr")), "expected KEY=VALUE")
    refuse(agiqa(*tune("--set", "lr=[1")), "--set lr=[1: the value cannot be read as YAML")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    refuse(agiqa(*tune("--dry-run", adapter=tmp_path / "thesis")), "holds other files")
    refuse(agiqa(*tune("--recipe", "publishd")), "Did you mean 'published'")
    refuse(agiqa(*tune("--model", "timm:resnet18")), "timm:resnet18 is an image encoder, which writes no text")
    (tmp_path / "mine.yaml").write_text("base: light\nranc: 3\n")
    refuse(agiqa(*tune("--recipe", tmp_path / "mine.yaml")), "Did you mean 'rank'")


def test_items_without_a_rating_word(agiqa, tune, talks, tmp_path):
    entries = json.loads((talks / "quality.json").read_text())
    for entry in entries:
        del entry["conversations"][3]
    (tmp_path / "wordless.json").write_text(json.dumps(entries))
    command = ["tune", talks, tmp_path / "adapter", *tune()[3:5], "--conversations", tmp_path / "wordless.json"]
    refuse(agiqa(*command), "no rating word", "`agiqa teach` writes both for items with MOS")


def test_a_text_model_learns_by_the_light_recipe_only(agiqa, tune, tmp_path):
    text = roomy(write_text_checkpoint(tmp_path / "text"))
    refuse(agiqa(*tune(model=text)), "trains vision, projector, which this model does not have", "light")
    tuned = agiqa(*tune("--recipe", "light", "--json", model=text))
    assert tuned.json["steps"] == 4
    assert "reads no images; it learns from the text alone" in tuned.err


def test_conversations_of_another_aspect_are_pointed_out(agiqa, tune, talks):
    wrong = agiqa(*tune("--dry-run", "--aspect", "correspondence"))
    assert "warning: 24 of 24 conversations in quality.json ask about quality, and you gave" in wrong.err
    assert "Give the file of correspondence, or --aspect quality." in wrong.err
    swapped = [f"correspondence:{talks / 'quality.json'}", f"quality:{talks / 'correspondence.json'}"]
    notes = load_talks(talks, images=False, variant="full:quality+correspondence", files=swapped).notes
    assert [note.partition(" in ")[2] for note in notes] == [
        "correspondence.json ask about correspondence, and you gave them for quality. Give the file of quality.",
        "quality.json ask about quality, and you gave them for correspondence. Give the file of correspondence.",
    ]
    rated = agiqa("words", talks / "correspondence.json", "--labels", talks / "data.csv")
    assert "24 of 24 conversations" in rated.err
    assert "Give --label correspondence" in rated.err
    for outcome in (
        agiqa(*tune("--dry-run")),
        agiqa("words", talks / "correspondence.json", "--labels", talks / "data.csv", "--label", "correspondence"),
    ):
        assert "ask about" not in outcome.err


def test_damaged_checkpoints_and_other_folders(agiqa, tune, tmp_path):
    adapter = tmp_path / "adapter"
    spoilt = ("--set", "lr=1e30", "--val-share", 0)
    refuse(agiqa(*tune(*spoilt)), "Step 2: the loss is nan, with the items", "last-good")
    for options in ((), ("--dry-run",)):
        refuse(agiqa(*tune(*spoilt, *options, "--seed", 1)), "is being trained with other settings: seed was 0")
    state = adapter / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    refuse(agiqa(*tune(*spoilt)), "state.safetensors is damaged", "to begin again")
    shutil.rmtree(adapter / "training")
    assert agiqa(*tune("--steps", 2, "--json")).json["steps"] == 2
    shutil.rmtree(adapter)
    adapter.write_text("")
    misuse(agiqa(*tune()), "is a file")
