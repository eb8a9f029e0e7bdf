"""`agiqa score`: the same MOS as describing, extracting and predicting in three commands; and what it refuses."""

import csv
import json
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from agiqa.extract.models.loading import quiet_transformers
from agiqa.store.disk.files import sha256_of_file
from tests.cli.conftest import SMALL_HEAD
from tests.cli.refusals import misuse, refuse, truncate
from tests.extract.models.test_adapters import PLAIN, random_adapter
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
    [
        ("vocabulary", ()),
        ("sketch", ("--basis",)),
        ("logits", ("--variant", "id", "--aspect", "quality")),
        ("no_id", ("--describe",)),
    ],
)
def test_the_same_mos_as_by_a_store(agiqa, way, run, options, tmp_path):
    if options == ("--basis",):
        options = ("--basis", way.sketch)
    outcome = agiqa(*way.score(run, *options, "--batch-size", 2))
    told = outcome.json
    assert "warning" not in outcome.err
    assert (told["aspect"], told["variant"]) == ("quality", "no_id" if run == "no_id" else "id")
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
    refuse(agiqa(*way.score("vocabulary", "--run", example.run)), example.run, example.model.name, way.model.name)
    refuse(agiqa(*way.score("sketch")), way.runs["sketch"], "--basis STORE")
    refuse(agiqa(*way.score("sketch", "--basis", example.sketch)), "belongs to the language-model head")
    other = tmp_path / "other.agiqa"
    assert agiqa("store", "sketch", way.store, other, "--rank", 4).code == 0
    refuse(agiqa(*way.score("sketch", "--basis", other)), way.runs["sketch"], "was trained on the sketch basis")
    refuse(agiqa(*way.score("vocabulary", "--basis", way.sketch)), "--basis belongs to a head on a sketch")
    refuse(agiqa(*way.score("vocabulary", "--run", way.data)), way.data, "no run folder")


def test_another_model_adapter_or_wording_is_refused_naming_both(agiqa, way, tmp_path):
    """Models whose language-model heads are the same: nothing else would tell them apart."""
    other = tmp_path / "other"
    shutil.copytree(way.model, other)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({**tensors, name: tensors[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    digests = [sha256_of_file(folder / "model.safetensors")[:12] for folder in (way.model, other)]
    outcome = agiqa(*way.score("vocabulary", "--model", other))
    refuse(outcome, way.runs["vocabulary"], f"{way.model.name} (weights {digests[0]})", f"other (weights {digests[1]})")
    with quiet_transformers():
        model = LlavaForConditionalGeneration.from_pretrained(way.model)
    random_adapter(model, tmp_path / "adapter", **{**PLAIN, "target_modules": r".*language_model.*(q|v)_proj"})
    outcome = agiqa(*way.score("vocabulary", "--adapter", tmp_path / "adapter"))
    refuse(outcome, way.runs["vocabulary"], "trained with no adapter; you gave the adapter adapter (")
    refuse(agiqa(*way.score("vocabulary", "--variant", "no_id")), "variant id, and --variant is no_id")
    refuse(agiqa(*way.score("vocabulary", "--aspect", "authenticity")), "aspect quality, and --aspect is authenticity")


def test_a_moved_model_is_the_same_and_lesser_differences_are_told(agiqa, way, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(way.model, moved)
    told = agiqa(*way.score("vocabulary", "--model", moved))
    assert told.code == 0, told.err
    assert "warning" not in told.err
    (moved / "generation_config.json").write_text("{}")
    told = agiqa(*way.score("vocabulary", "--model", moved))
    assert told.code == 0, told.err
    head = f"The head {way.runs['vocabulary']}"
    assert f"warning: {head} was trained with another generation_config.json of {way.model.name}" in told.err
    outcome = agiqa(*way.score("vocabulary", "--dtype", "bfloat16"))
    refuse(outcome, f"{head} was trained with the dtype float32 (--dtype); you gave the dtype bfloat16")


def test_a_run_that_does_not_say_what_made_its_store(agiqa, way, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(way.runs["vocabulary"], run)
    config = json.loads((run / "config.json").read_text())
    assert set(config.pop("origin")) == {"model", "conversation"}
    (run / "config.json").write_text(json.dumps(config))
    told = agiqa(*way.score("vocabulary", "--run", run))
    assert told.code == 0, told.err
    assert f"warning: {run} does not record which model made its store" in told.err
    assert (told.json["aspect"], told.json["variant"]) == ("quality", "id")


def test_images_that_cannot_be_scored_cost_the_others_nothing(agiqa, way, tmp_path):
    """A broken file is found before the model runs, a prompt that is too long for its positions when it is asked."""
    broken, long, table = tmp_path / "broken.png", tmp_path / "long.png", tmp_path / "prompts.csv"
    for number, path in enumerate((broken, long)):
        save_noise(path, seed=number)
    truncate(broken)
    fine = way.images[:3]
    prompts = {
        fine[0].name: "a picture 0",
        broken.name: "b",
        long.name: "word " * 3000,
        fine[1].name: "c",
        fine[2].name: "",
    }
    table.write_text("name,prompt\n" + "".join(f"{name},{prompt}\n" for name, prompt in prompts.items()))
    given = ("--run", way.runs["vocabulary"], "--model", way.model, *GENERATION, "--prompts", table)
    outcome = agiqa("score", fine[0], broken, long, fine[0], fine[1], fine[2], *given, "--batch-size", 3)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    told = json.loads(outcome.out)
    assert [one["image"] for one in told["images"]] == [str(fine[0]), str(fine[1])]
    assert sorted(told["failed"]) == sorted(map(str, (broken, long, fine[2])))
    assert "error: the images to score: 3 problems" in outcome.err
    for mention in (broken, long, f"{fine[2]}: {table} has no prompt"):
        assert str(mention) in outcome.err
    alone = agiqa("score", fine[0], *given)
    assert alone.json["images"][0]["mos"] == pytest.approx(told["images"][0]["mos"], abs=2e-4)


def test_every_image_is_printed_as_soon_as_it_is_scored(agiqa, way):
    """The process is killed as soon as the line of the first is there: the model is at work on the others."""
    arguments = [argument for argument in way.score("vocabulary", "--batch-size", 1) if argument != "--json"]
    cut = agiqa.interrupted(*arguments, after=f"{way.images[0]}: MOS ", number=signal.SIGKILL)
    assert cut.code == -signal.SIGKILL
    assert str(way.images[4]) not in cut.out


def test_what_a_head_does_not_read_is_not_generated(agiqa, way):
    bare = agiqa(*way.score("no_id")).json["images"]
    described = agiqa(*way.score("no_id", "--describe")).json["images"]
    assert {one[key] for one in bare for key in ("description", "rating_word", "rating", "cut")} == {None}
    assert all(one["description"] for one in described)
    assert [one["mos"] for one in bare] == pytest.approx([one["mos"] for one in described], abs=2e-4)
    full, short = (agiqa(*way.score("vocabulary", *options)).json["images"] for options in ((), ("--mos-only",)))
    assert [one["mos"] for one in short] == pytest.approx([one["mos"] for one in full], abs=2e-4)
    assert [one["description"] for one in short] == [one["description"] for one in full]
    assert {one["rating_word"] for one in short} == {None}
    lines = agiqa(*(argument for argument in way.score("no_id") if argument != "--json")).out.splitlines()
    assert lines == [f"{image}: MOS {one['mos']:.4f}" for image, one in zip(way.images, bare, strict=True)]


def test_images_and_prompts_that_cannot_be_used(agiqa, way, tmp_path):
    base = ("--run", way.runs["vocabulary"], "--model", way.model, *GENERATION)
    image, broken, table = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "prompts.csv"
    for number, path in enumerate((image, broken)):
        save_noise(path, seed=number)
    truncate(broken)
    refuse(agiqa("score", image, *base), "--prompt", "--prompts table.csv")
    refuse(agiqa("score", image, *base, "--prompt", " "), "The prompt is empty")
    refuse(agiqa("score", broken, *base, "--prompt", "a"), "1 problem", broken)
    table.write_text("name,prompt\na.png,\nc.png,a dog\n")
    refuse(agiqa("score", image, *base, "--prompts", table), image, "has no prompt under this name")
    table.write_text("name,words\na.png,a dog\n")
    refuse(agiqa("score", image, *base, "--prompts", table), "no column 'prompt'")
    misuse(agiqa("score", image, *base, "--prompt", "a", "--aspect", "qualty"), "Did you mean 'quality'?")
    assert agiqa("score", tmp_path / "absent.png", *base, "--prompt", "a").code == 2
    assert agiqa("score", *base, "--prompt", "a").code == 2


def test_intervals_are_those_of_predict(agiqa, way, tmp_path):
    told = agiqa(*way.score("no_id", "--mos-only", "--interval", 0.3)).json
    assert agiqa("predict", way.runs["no_id"], way.stores["no_id"], tmp_path / "s.csv", "--interval", 0.3).code == 0
    with (tmp_path / "s.csv").open(newline="") as file:
        ends = {row["name"]: (float(row["low"]), float(row["high"])) for row in csv.DictReader(file)}
    for one in told["images"]:
        name = next(name for name in ends if one["image"].endswith(name))
        assert one["interval"] == pytest.approx(ends[name], abs=1e-4)
        assert one["spread"] is None
    shown = agiqa(*[word for word in way.score("no_id", "--mos-only", "--interval", 0.3) if word != "--json"]).out
    assert shown.count(" [") == len(told["images"])
    refuse(agiqa(*way.score("no_id", "--interval", 0.99)), "needs 99 validation items or more")
