"""`agiqa describe`, and the whole way from it to features and to the metrics of the rating words."""

import json

import pytest

from agiqa.store import open_store
from tests.cli.refusals import misuse, refuse, truncate
from tests.extract.small_sets import read_table, write_set, write_table
from tests.extract.tiny_models import roomy, write_text_checkpoint, write_vision_checkpoint

ITEMS = 12
SHORT = ("--max-new-tokens", 12, "--device", "cpu", "--json")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return roomy(write_vision_checkpoint(tmp_path_factory.mktemp("vision")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), ITEMS, images=True)


@pytest.fixture(scope="module")
def described(agiqa, data, model, tmp_path_factory):
    """The file, and what the command printed."""
    out = tmp_path_factory.mktemp("described") / "out.jsonl"
    return out, agiqa("describe", data, out, "--model", model, *SHORT)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_descriptions_become_features_and_metrics(agiqa, data, model, described, tmp_path):
    out, outcome = described
    printed, lines = outcome.json, lines_of(out)
    assert (printed["items"], printed["described"], printed["skipped"]) == (ITEMS, ITEMS, [])
    assert printed["unknown"] == sum(line["rating"] is None for line in lines)
    assert "describe: 12/12 items in" in outcome.err

    store = tmp_path / "s.agiqa"
    extracted = agiqa("extract", data, store, "--model", model, "--conversations", out, "--device", "cpu", "--json")
    assert extracted.json["items"] == ITEMS
    items = open_store(store).items
    assert dict(zip(items.names, items.descriptions, strict=True)) == {
        line["name"]: line["description"] for line in lines
    }

    scores = agiqa("words", out, "--labels", data / "data.csv", "--json")
    assert (scores.json["n"], scores.json["unknown"]) == (ITEMS, printed["unknown"])
    assert "teacher" not in scores.err


def test_answers_without_a_word_count_as_unknown(agiqa, data, described, tmp_path):
    """Even an answer of nothing at all, of which `agiqa extract` must not make a rating."""
    lines = lines_of(described[0])
    for number, line in enumerate(lines):
        line["answer"] = "" if number < 5 else "Excellent!"
        line["response_1"] = line["answer"] or None
    out = tmp_path / "out.jsonl"
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = agiqa("words", out, "--labels", data / "data.csv", "--json").json
    assert (scores["n"], scores["unknown"]) == (ITEMS, 5)
    truths = [min(4, int(float(row["mos_quality"]))) for row in read_table(data)]
    right = {row["name"] for row, truth in zip(read_table(data), truths, strict=True) if truth == 4}
    assert scores["accuracy"] == sum(line["name"] in right for line in lines[5:]) / ITEMS


def test_the_text_for_people_and_the_settings_file(agiqa, data, model, described, tmp_path):
    out, _ = described
    config = tmp_path / "describe.yaml"
    config.write_text(f"model: {model}\nmax-new-tokens: 12\ndevice: cpu\n")
    shown = agiqa("describe", data, out, "--options", config)
    assert shown.code == 0, shown.err
    assert "described  0" in shown.out
    assert f"items      {ITEMS}" in shown.out
    assert "resume: 12 of 12 items are described already" in shown.err
    assert "describe: 12/12 items in" in shown.err


def test_a_conversation_file_as_data_and_another_aspect(agiqa, data, model, described, tmp_path):
    """The items of the file, asked with the questions of the aspect."""
    talks = tmp_path / "five.jsonl"
    talks.write_text("".join(json.dumps(line) + "\n" for line in lines_of(described[0])[:5]))
    out, labels = tmp_path / "out.jsonl", ("--labels", data / "data.csv")
    printed = agiqa("describe", talks, out, "--model", model, *labels, "--aspect", "correspondence", *SHORT).json
    assert printed["items"] == 5
    assert all("aligns with the original prompt" in line["conversations"][0]["content"] for line in lines_of(out))


def test_a_table_without_mos_in_worker_processes(agiqa, data, model, described, tmp_path):
    """As AIGCIQA-20k publishes its test part: names and prompts."""
    rows = [[row["name"], row["prompt"]] for row in read_table(data)]
    bare, out = write_table(tmp_path / "bare", rows, ["name", "prompt"]), tmp_path / "out.jsonl"
    (bare / "images").symlink_to(data / "images")
    outcome = agiqa("describe", bare, out, "--model", model, *SHORT, "--prepare-workers", 2)
    assert outcome.json["items"] == ITEMS
    assert "MOS" not in outcome.err
    with_labels = {line["name"]: line["response_0"] for line in lines_of(described[0])}
    assert {line["name"]: line["response_0"] for line in lines_of(out)} == with_labels


def test_broken_images_are_told_before_the_model_runs(agiqa, model, tmp_path):
    data, out = write_set(tmp_path / "set", 4, images=True), tmp_path / "out.jsonl"
    truncate(data / "images" / "001.png")
    (data / "images" / "003.png").unlink()
    refuse(agiqa("describe", data, out, "--model", model, *SHORT), "2 problems", "001.png", "003.png", "no image of")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    outcome = agiqa("describe", data, out, "--model", model, *SHORT, "--on-bad-item", "skip")
    assert (outcome.json["items"], len(outcome.json["skipped"])) == (2, 2)
    assert "skipped 001.png" in outcome.err


def test_what_is_refused(agiqa, data, model, described, tmp_path):
    out, _ = described
    before = out.read_bytes()
    other = roomy(write_text_checkpoint(tmp_path / "other"))
    refuse(agiqa("describe", data, out, "--model", other, *SHORT), out, "made with other settings", "model.name")
    refuse(agiqa("describe", data, out, "--model", model, *SHORT, "--settings", "published"), "describe.sample")
    assert agiqa("describe", data, out, "--model", model, *SHORT, "--seed", 3).json["described"] == 0  # draws nothing
    refuse(agiqa("describe", data, out, "--model", "timm:resnet18", *SHORT), "timm:resnet18 is an image encoder")
    assert "timm:" not in agiqa("describe", "--help").out
    misuse(agiqa("describe", data, out, "--model", model, *SHORT, "--aspect", "qualty"), "Did you mean 'quality'?")
    assert out.read_bytes() == before
    refuse(agiqa("describe", data, tmp_path / "out.csv", "--model", model, *SHORT), "ends in .jsonl")
    refuse(agiqa("describe", data, tmp_path / "no" / "out.jsonl", "--model", model, *SHORT), tmp_path / "no")
    refuse(agiqa("describe", data, tmp_path / "out.jsonl", "--model", tmp_path / "none.gguf", *SHORT), "none.gguf")
    blank = write_table(tmp_path / "blank", [["0.png", " ", 3.0]], ["name", "prompt", "mos_quality"])
    refuse(agiqa("describe", blank, tmp_path / "out.jsonl", "--model", other, *SHORT), "0.png", "the prompt is empty")
    assert not (tmp_path / "out.jsonl").exists()
    assert agiqa("describe", data, tmp_path / "out.jsonl").code == 2
