"""Descriptions of small data sets: questions and lines, kills, full disks, full memory, and refusals."""

import json
import resource
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from agiqa.errors import BusyStore, DataError, ModelError, SettingsConflict
from agiqa.extract import (
    Describer,
    DescriptionSettings,
    GenerationSettings,
    Message,
    load_data_set,
    open_backbone,
    run_descriptions,
)
from agiqa.extract.data.templates import fill, template_of
from agiqa.heads.evaluation.rating_words import parse_rating_word
from agiqa.store.disk.locks import exclusive_lock
from tests.extract.small_sets import read_table, write_set, write_table
from tests.extract.tiny_models import roomy, write_text_checkpoint

SETTINGS = DescriptionSettings(
    describe=GenerationSettings(max_new_tokens=14), rate=GenerationSettings(max_new_tokens=6), batch_size=4
)
TIMES = ("seconds", "decoder")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return roomy(write_text_checkpoint(tmp_path_factory.mktemp("text"), seed=11))


def items_of(folder, backbone):
    return load_data_set(folder, variant="no_id", images=backbone.reads_images)


def run(folder, model, out, settings=SETTINGS, backbone=None, **options):
    backbone = backbone or open_backbone(str(model), device="cpu")
    return run_descriptions(items_of(folder, backbone), backbone, out, settings, rating_of=parse_rating_word, **options)


def lines_of(path):
    """name -> line, without its times and the way it was decoded."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["name"]: {key: value for key, value in line.items() if key not in TIMES} for line in lines}


class Scripted:
    """A real backbone with scripted answers."""

    def __init__(self, backbone, answers):
        self._backbone = backbone
        self._answers = answers

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def generate(self, batch, settings, *, seeds=None):
        return [self._answers(settings.max_new_tokens) for _ in batch]


class Cramped(Scripted):
    """A real backbone whose memory holds a given number of items."""

    def generate(self, batch, settings, *, seeds=None):
        if len(batch) > self._answers:
            message = "out of memory"
            raise torch.OutOfMemoryError(message)
        return self._backbone.generate(batch, settings, seeds=seeds)


@pytest.mark.parametrize("model", ["text_model", "vision_model"])
def test_both_rounds_by_hand(model, folder, tmp_path, request):
    model = request.getfixturevalue(model)
    backbone = open_backbone(str(model), device="cpu")
    result = run(folder, model, tmp_path / "d.jsonl")
    lines, wording = lines_of(tmp_path / "d.jsonl"), template_of("quality")
    assert set(lines) == {row["name"] for row in read_table(folder)}
    assert result.described == 10
    for item in items_of(folder, backbone).items:
        line = lines[item.name]
        question = Message(role="user", content=fill(wording.describe, item.prompt))
        first = backbone.prepare([question], item.image, answer=True)
        description = backbone.generate([first], SETTINGS.describe)[0]
        turns = [question, Message(role="assistant", content=description), Message(role="user", content=wording.rate)]
        second = backbone.prepare(turns, item.image, answer=True)
        answer = backbone.generate([second], SETTINGS.rate)[0]
        assert (line["description"], line["answer"]) == (description, answer)
        assert line["rating_word"] == answer.lower()
        assert line["rating"] == parse_rating_word(answer)
        assert line["tokens"] == {
            "prompt": len(first.token_ids),
            "description": description.tokens,
            "second_prompt": len(second.token_ids),
            "answer": answer.tokens,
        }
        assert line["cut"] is not description.complete
        assert line["conversations"] == [{"role": turn.role, "content": turn.content} for turn in turns]
        assert (line["response_0"], line["response_1"]) == (description, answer or None)
    printed = result.as_dict()
    assert printed["cut"] == sum(line["cut"] for line in lines.values())
    assert printed["unknown"] + sum(printed["ratings"].values()) == 10


def test_descriptions_of_images_differ(folder, vision_model, tmp_path):
    run(folder, vision_model, tmp_path / "d.jsonl")
    lines = lines_of(tmp_path / "d.jsonl")
    pairs = [(f"{k:03d}.png", f"{k + 1:03d}.png") for k in range(0, 10, 2)]
    assert all(lines[a]["prompt"] == lines[b]["prompt"] for a, b in pairs)
    assert any(lines[a]["description"] != lines[b]["description"] for a, b in pairs)


def test_longest_first_and_the_same_in_batches_of_any_size(folder, text_model, tmp_path):
    rows = [[f"{k}.png", "a picture " * (k % 5 + 1), 3.0] for k in range(9)]
    data = write_table(tmp_path / "set", rows, ["name", "prompt", "mos_quality"])
    for size in (1, 4, 64):
        run(data, text_model, tmp_path / f"{size}.jsonl", replace(SETTINGS, batch_size=size))
    assert lines_of(tmp_path / "1.jsonl") == lines_of(tmp_path / "4.jsonl") == lines_of(tmp_path / "64.jsonl")
    order = [len(line["prompt"]) for line in map(json.loads, (tmp_path / "4.jsonl").read_text().splitlines())]
    assert order == sorted(order, reverse=True)


def test_words_that_are_none_of_the_five_are_kept_and_counted(folder, text_model, tmp_path):
    answers = iter(["Good.", "not good", "", "Superb", "POOR"] * 2)
    backbone = Scripted(
        open_backbone(str(text_model), device="cpu"),
        lambda limit: next(answers) if limit == 6 else "a dog \u2028 \x85 b",
    )
    result = run(folder, text_model, tmp_path / "d.jsonl", backbone=backbone).as_dict()
    assert result["ratings"] == {"good": 2, "poor": 2}
    assert result["unknown"] == 6
    lines = lines_of(tmp_path / "d.jsonl").values()
    assert {(line["rating_word"], line["rating"]) for line in lines} == {
        ("good.", "good"),
        ("not good", None),
        ("", None),
        ("superb", None),
        ("poor", "poor"),
    }
    assert all(line["cut"] is None and line["tokens"]["description"] is None for line in lines)
    read = load_data_set(folder, conversations=[str(tmp_path / "d.jsonl")], images=False)
    assert {item.description for item in read.items} == {"a dog \u2028 \x85 b"}


def test_an_empty_description_is_a_bad_item(folder, text_model, tmp_path):
    answers = iter(["a", "", "b", "c"])
    backbone = Scripted(
        open_backbone(str(text_model), device="cpu"), lambda limit: "fair" if limit == 6 else next(answers, "d")
    )
    with pytest.raises(DataError, match=r"1 problem\n.*description is empty"):
        run(folder, text_model, tmp_path / "d.jsonl", backbone=backbone)
    assert len(lines_of(tmp_path / "d.jsonl")) == 3
    silent = Scripted(open_backbone(str(text_model), device="cpu"), lambda limit: "fair" if limit == 6 else "")
    skipping = replace(SETTINGS, on_bad_item="skip")
    result = run(folder, text_model, tmp_path / "d.jsonl", skipping, backbone=silent)
    assert (len(result.lines), result.described, len(result.skipped)) == (3, 0, 10)


def test_memory_that_runs_out_halves_the_batch(folder, text_model, tmp_path, capsys):
    run(folder, text_model, tmp_path / "whole.jsonl")
    cramped = Cramped(open_backbone(str(text_model), device="cpu"), 2)
    run(folder, text_model, tmp_path / "d.jsonl", backbone=cramped)
    assert lines_of(tmp_path / "d.jsonl") == lines_of(tmp_path / "whole.jsonl")
    assert capsys.readouterr().err.count("out of memory with 4 items at a time; going on with 2") == 1
    with pytest.raises(ModelError, match=r"\d{3}\.png: the device is out of memory with this item alone"):
        run(folder, text_model, tmp_path / "none.jsonl", backbone=Cramped(cramped, 0))


class Counting(Cramped):
    """A cramped backbone that counts how often an image is prepared."""

    def __init__(self, backbone, room):
        super().__init__(backbone, room)
        self.prepared = Counter()

    def prepare(self, conversation, image, *, answer=False):
        self.prepared[image.path.name, len(conversation)] += 1
        return self._backbone.prepare(conversation, image, answer=answer)


def test_workers_prepare_what_this_process_would(folder, vision_model, tmp_path):
    run(folder, vision_model, tmp_path / "alone.jsonl")
    run(folder, vision_model, tmp_path / "d.jsonl", workers=2, opener=partial(open_backbone, str(vision_model)))
    assert lines_of(tmp_path / "d.jsonl") == lines_of(tmp_path / "alone.jsonl")


def test_images_are_prepared_once_a_round(folder, vision_model, tmp_path):
    """Also when memory runs out in the first round, whose inputs are prepared already; the plan needs their sizes."""
    counting = Counting(open_backbone(str(vision_model), device="cpu"), 2)
    run(folder, vision_model, tmp_path / "d.jsonl", backbone=counting)
    assert counting.prepared == {(f"{k:03d}.png", turns): count for k in range(10) for turns, count in ((1, 1), (3, 1))}


def test_an_image_that_is_gone_after_the_plan_is_a_bad_item(vision_model, tmp_path):
    folder = write_set(tmp_path / "set", 3, images=True)
    backbone = open_backbone(str(vision_model), device="cpu")
    data_set = items_of(folder, backbone)
    (folder / "images" / "001.png").unlink()
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"1 problem\n  001\.png: .*001\.png: no such image"):
            run_descriptions(
                data_set,
                backbone,
                tmp_path / "d.jsonl",
                SETTINGS,
                rating_of=parse_rating_word,
                workers=workers,
                opener=partial(open_backbone, str(vision_model)),
            )


def test_conversations_longer_than_the_model(folder, tmp_path):
    model = write_text_checkpoint(tmp_path / "model", seed=11)
    rows = [["0.png", "a dog", 3.0], ["1.png", "a cat " * 200, 3.0]]
    data = write_table(tmp_path / "set", rows, ["name", "prompt", "mos_quality"])
    with pytest.raises(DataError, match=r"1\.png: \d+ tokens, and the model has 512 positions"):
        run(data, model, tmp_path / "d.jsonl")
    assert not (tmp_path / "d.jsonl").exists()
    result = run(data, model, tmp_path / "d.jsonl", replace(SETTINGS, on_bad_item="skip"))
    assert set(lines_of(tmp_path / "d.jsonl")) == {"0.png"}
    assert len(result.skipped) == 1


def test_killed_and_resumed_equals_uninterrupted(agiqa, folder, text_model, tmp_path):
    """With sampled answers, in batches that a kill may leave half written, and a torn last line."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"

    def command(path):
        options = ("--settings", "published", "--seed", 5, "--batch-size", 2, "--max-new-tokens", 60, "--device", "cpu")
        return ("describe", folder, path, "--model", text_model, "--json", *options)

    assert agiqa(*command(whole)).json["described"] == 10

    def lines():
        return out.read_bytes().count(b"\n") if out.exists() else 0

    codes = []
    for written in (1, 3, 6):
        codes.append(agiqa.killed(*command(out), when=lambda count=written: lines() >= count).code)
        if out.exists() and codes[-1] == -9:
            kept = out.read_bytes().splitlines(keepends=True)
            out.write_bytes(b"".join(kept[:-1]) + kept[-1][: len(kept[-1]) // 2])
    assert codes.count(-9) >= 1
    last = agiqa(*command(out))
    assert last.json["items"] == 10
    assert "resume: " in last.err
    assert lines_of(out) == lines_of(whole)
    again = agiqa(*command(out)).json
    assert (again["items"], again["described"]) == (10, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed.jsonl",
        "killed.provenance.json",
        "whole.jsonl",
        "whole.provenance.json",
    ]


def test_a_disk_that_is_full_while_appending(folder, text_model, tmp_path):
    """A limit on file sizes simulates a full disk: a write stops in the middle of a line."""
    run(folder, text_model, tmp_path / "whole.jsonl")
    five = sum(len(line) for line in (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)[:5])
    out, before = tmp_path / "d.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (five + 100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            run(folder, text_model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"while writing {out}; the items before are kept" in caught.value.__notes__[0]
    assert not out.read_bytes().endswith(b"\n")
    assert 0 < run(folder, text_model, out).described < 10
    assert lines_of(out) == lines_of(tmp_path / "whole.jsonl")


@pytest.fixture
def begun(folder, text_model, tmp_path):
    run(folder, text_model, tmp_path / "d.jsonl")
    return tmp_path / "d.jsonl"


def test_a_file_of_other_settings_or_another_model_is_refused_by_name(folder, text_model, vision_model, begun):
    content = begun.read_bytes()
    sampled = replace(SETTINGS, describe=GenerationSettings.published(max_new_tokens=14))
    with pytest.raises(SettingsConflict, match=r"settings\.describe\.sample was False, and is True now"):
        run(folder, text_model, begun, sampled)
    with pytest.raises(SettingsConflict, match="aspect was 'quality', and is 'authenticity' now"):
        run(folder, text_model, begun, replace(SETTINGS, aspect="authenticity"))
    with pytest.raises(SettingsConflict, match=r"model\.name was "):
        run(folder, vision_model, begun)
    other = open_backbone(str(text_model), device="cpu", dtype="bfloat16")
    with pytest.raises(SettingsConflict, match=r"model\.dtype was 'float32', and is 'bfloat16' now"):
        run(folder, text_model, begun, backbone=other)
    assert begun.read_bytes() == content
    assert run(folder, text_model, begun, replace(SETTINGS, batch_size=1)).described == 0


def test_a_file_of_other_items_is_refused_by_name(folder, text_model, begun, tmp_path):
    rows = [[row["name"], "something else", 3.0] for row in read_table(folder)]
    changed = write_table(tmp_path / "changed", rows, ["name", "prompt", "mos_quality"])
    with pytest.raises(SettingsConflict, match=r"describes '\d+\.png', which has another image or prompt now"):
        run(changed, text_model, begun)
    fewer = write_set(tmp_path / "fewer", 4)
    with pytest.raises(SettingsConflict, match=r"describes '00[4-9]\.png', which is not in this data set"):
        run(fewer, text_model, begun)


def test_files_that_are_no_descriptions(folder, text_model, begun, tmp_path):
    (tmp_path / "talks.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"talks\.jsonl, line 1 is no line of `agiqa describe`"):
        run(folder, text_model, tmp_path / "talks.jsonl")
    shutil.copy(begun, tmp_path / "alone.jsonl")
    with pytest.raises(SettingsConflict, match=r"alone\.provenance\.json beside it"):
        run(folder, text_model, tmp_path / "alone.jsonl")
    with pytest.raises(DataError, match="no is no folder"):
        run(folder, text_model, tmp_path / "no" / "d.jsonl")


def test_two_runs_never_write_to_one_file(folder, text_model, tmp_path):
    with exclusive_lock(tmp_path / "d.jsonl"), pytest.raises(BusyStore, match="Another run is writing to"):
        run(folder, text_model, tmp_path / "d.jsonl")
    assert run(folder, text_model, tmp_path / "d.jsonl").described == 10


def test_every_variant_is_worded_as_an_extraction_words_it(folder, text_model, tmp_path):
    run(folder, text_model, tmp_path / "d.jsonl")
    backbone = open_backbone(str(text_model), device="cpu")
    describer = Describer(backbone, SETTINGS)
    described = describer.describe(items_of(folder, backbone).items)
    for variant in ("no_id", "id", "full"):
        extracted = load_data_set(folder, conversations=[str(tmp_path / "d.jsonl")], variant=variant, images=False)
        assert [item.conversation for item in extracted.items] == [
            describer.item(one, variant).conversation for one in described
        ]
