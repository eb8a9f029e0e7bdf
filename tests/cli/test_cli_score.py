"""`agiqa score`: the same MOS as describing, extracting and predicting in three commands; and what it refuses."""

import csv
import json

import pytest

from tests.cli.conftest import SMALL_HEAD
from tests.cli.refusals import refuse, truncate
from tests.extract.small_sets import save_noise, write_set
from tests.extract.tiny_models import roomy, write_text_checkpoint, write_vision_checkpoint

GENERATION = ("--max-new-tokens", 10, "--device", "cpu", "--json")


class Way:
    """A data set, its model, descriptions, stores and heads."""

    def __init__(self, folder, agiqa):
        self.model = roomy(write_vision_checkpoint(folder / "model"))
        self.data = write_set(folder / "set", 16, images=True)
        self.out, self.store, self.sketch = folder / "out.jsonl", folder / "hidden.agiqa", folder / "sketch.agiqa"
        self.runs = {name: folder / name for name in ("vocabulary", "sketch", "logits", "no_id")}
        on_cpu, talks = ("--model", self.model, "--device", "cpu"), ("--conversations", self.out)
        logits, no_id = folder / "logits.agiqa", folder / "no_id.agiqa"
        for arguments in (
            ("describe", self.data, self.out, "--model", self.model, *GENERATION),
            ("extract", self.data, self.store, *on_cpu, *talks),
            ("store", "sketch", self.store, self.sketch, "--rank", 8),
            ("extract", self.data, logits, *on_cpu, *talks, "--encoding", "logits"),
            ("extract", self.data, no_id, *on_cpu, "--variant", "no_id"),
            ("train", self.store, self.runs["vocabulary"], *SMALL_HEAD),
            ("train", self.sketch, self.runs["sketch"], *SMALL_HEAD, "--projection", "sketch"),
            ("train", logits, self.runs["logits"], *SMALL_HEAD, "--projection", "logits"),
            ("train", no_id, self.runs["no_id"], *SMALL_HEAD),
        ):
            outcome = agiqa(*arguments)
            assert outcome.code == 0, outcome.err
        self.stores = {"vocabulary": self.store, "sketch": self.sketch, "logits": logits, "no_id": no_id}
        self.images = sorted((self.data / "images").iterdir())[:5]

    def score(self, run, *options):
        """The arguments that score the images with the prompts of the table."""
        prompts = () if "--prompt" in options else ("--prompts", self.data / "data.csv")
        given = ("--run", self.runs[run], "--model", self.model, *GENERATION, *prompts)
        return ("score", *self.images, *given, *options)


@pytest.fixture(scope="module")
def way(agiqa, tmp_path_factory):
    return Way(tmp_path_factory.mktemp("way"), agiqa)


@pytest.mark.parametrize(
    ("run", "options"),
    [("vocabulary", ()), ("sketch", ("--basis",)), ("logits", ()), ("no_id", ("--variant", "no_id"))],
)
def test_the_same_mos_as_by_a_store(agiqa, way, run, options, tmp_path):
    if options == ("--basis",):
        options = ("--basis", way.sketch)
    told = agiqa(*way.score(run, *options, "--batch-size", 2)).json
    assert agiqa("predict", way.runs[run], way.stores[run], tmp_path / "scores.csv").code == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        predicted = {row["name"]: float(row["predicted"]) for row in csv.DictReader(file)}
    lines = {line["name"]: line for line in map(json.loads, way.out.read_text().splitlines())}
    assert [one["image"] for one in told["images"]] == [str(image) for image in way.images]
    for image, one in zip(way.images, told["images"], strict=True):
        line = lines[image.name]
        assert {key: one[key] for key in ("prompt", "description", "rating_word", "rating", "cut")} == {
            key: line[key] for key in ("prompt", "description", "rating_word", "rating", "cut")
        }
        assert one["mos"] == pytest.approx(predicted[image.name], abs=2e-4)
    assert len({one["mos"] for one in told["images"]}) > 1


def test_one_prompt_for_all_and_the_text_for_people(agiqa, way):
    arguments = [argument for argument in way.score("vocabulary", "--prompt", "a picture 0") if argument != "--json"]
    shown = agiqa(*arguments)
    assert shown.code == 0, shown.err
    told = agiqa(*way.score("vocabulary", "--prompt", "a picture 0")).json["images"]
    for image, one in zip(way.images, told, strict=True):
        assert f"{image}: MOS {one['mos']:.4f}, rating word: " in shown.out
        assert one["description"] in shown.out


def test_a_model_that_reads_no_images_says_so(agiqa, example, way, tmp_path):
    model = roomy(write_text_checkpoint(tmp_path / "model"))
    outcome = agiqa("score", way.images[0], "--prompt", "a", "--run", example.run, "--model", model, *GENERATION)
    assert outcome.code == 0, outcome.err
    assert "reads no images; these scores are of the prompts alone" in outcome.err


def test_heads_that_mean_nothing_here(agiqa, example, way, tmp_path):
    refuse(agiqa(*way.score("vocabulary", "--run", example.run)), example.run, "language-model head", "same model")
    refuse(agiqa(*way.score("sketch")), way.runs["sketch"], "--basis STORE")
    refuse(agiqa(*way.score("sketch", "--basis", example.sketch)), "belongs to the language-model head")
    other = tmp_path / "other.agiqa"
    assert agiqa("store", "sketch", way.store, other, "--rank", 4).code == 0
    refuse(agiqa(*way.score("sketch", "--basis", other)), way.runs["sketch"], "was trained on the sketch basis")
    refuse(agiqa(*way.score("vocabulary", "--basis", way.sketch)), "--basis belongs to a head on a sketch")
    refuse(agiqa(*way.score("vocabulary", "--run", way.data)), way.data, "no run folder")


def test_images_and_prompts_that_cannot_be_used(agiqa, way, tmp_path):
    base = ("--run", way.runs["vocabulary"], "--model", way.model, *GENERATION)
    image, broken, table = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "prompts.csv"
    for number, path in enumerate((image, broken)):
        save_noise(path, seed=number)
    truncate(broken)
    refuse(agiqa("score", image, *base), "--prompt", "--prompts table.csv")
    refuse(agiqa("score", image, *base, "--prompt", " "), "The prompt is empty")
    refuse(agiqa("score", image, broken, image, *base, "--prompt", "a"), "2 problems", broken, "given twice")
    table.write_text("name,prompt\na.png,\nc.png,a dog\n")
    refuse(agiqa("score", image, *base, "--prompts", table), image, "has no prompt under this name")
    table.write_text("name,text\na.png,a dog\n")
    refuse(agiqa("score", image, *base, "--prompts", table), "no column 'prompt'")
    refuse(agiqa("score", image, *base, "--prompt", "a", "--aspect", "qualty"), "Did you mean 'quality'?")
    assert agiqa("score", tmp_path / "absent.png", *base, "--prompt", "a").code == 2
    assert agiqa("score", *base, "--prompt", "a").code == 2
