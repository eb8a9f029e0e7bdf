"""Descriptions in slots, against those in batches: the same lines for tiny models in float32, whatever happens on the way."""

import json
import shutil
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from agiqa.errors import DataError, ModelError
from agiqa.extract import (
    Describer,
    DescriptionSettings,
    GenerationSettings,
    load_data_set,
    open_backbone,
    run_descriptions,
)
from agiqa.extract.describing import talks
from agiqa.extract.models.decoding.continuing import NextPrompt
from agiqa.extract.models.decoding.slot_model import SlotModel
from agiqa.heads.evaluation.rating_words import parse_rating_word
from tests.extract.small_sets import write_set
from tests.extract.tiny_models import roomy, write_softcapped_checkpoint

SETTINGS = DescriptionSettings(
    describe=GenerationSettings(max_new_tokens=14), rate=GenerationSettings(max_new_tokens=6), batch_size=3
)
VARYING = ("seconds", "decoder")


@pytest.fixture(scope="module")
def expected(folder, vision_model, tmp_path_factory):
    return in_batches(folder, vision_model, tmp_path_factory.mktemp("expected") / "d.jsonl")


class InBatches:
    """A real backbone behind another class, which answers in batches."""

    def __init__(self, backbone):
        self._backbone = backbone

    def __getattr__(self, name):
        return getattr(self._backbone, name)


def opened(model):
    return open_backbone(str(model), device="cpu")


def run(folder, backbone, out, settings=SETTINGS):
    """The lines, without what varies, in the order of the file."""
    items = load_data_set(folder, variant="no_id", images=backbone.reads_images)
    run_descriptions(items, backbone, out, settings, rating_of=parse_rating_word)
    return [
        {key: value for key, value in json.loads(line).items() if key not in VARYING}
        for line in out.read_text().splitlines()
    ]


def in_batches(folder, model, out, settings=SETTINGS):
    return run(folder, InBatches(opened(model)), out, settings)


def decoders(out):
    return Counter(json.loads(line)["decoder"] for line in out.read_text().splitlines())


def test_more_groups_than_slots_in_the_order_of_batches(vision_model, tmp_path):
    """40 items of very different lengths, most of whose answers end early, in three groups and five slots."""
    model = shutil.copytree(vision_model, tmp_path / "model")
    ends = {"eos_token_id": [2, *range(10, 340, 9)]}
    (model / "generation_config.json").write_text(json.dumps(ends))
    data = write_set(tmp_path / "set", 40, images=True)
    settings = replace(SETTINGS, describe=GenerationSettings(max_new_tokens=40), batch_size=5, on_bad_item="skip")
    found = run(data, opened(model), tmp_path / "slots.jsonl", settings)
    assert found == in_batches(data, model, tmp_path / "batches.jsonl", replace(settings, batch_size=16))
    assert decoders(tmp_path / "slots.jsonl") == {"slots": len(found)}
    assert decoders(tmp_path / "batches.jsonl") == {"batches": len(found)}
    assert len({line["tokens"]["description"] for line in found}) > 5
    assert len(found) > 20


def test_the_image_is_not_read_again_for_the_rating(folder, vision_model, expected, tmp_path, monkeypatch):
    """Once for the first round; the plan needs its size, and one rating's prompt is compared with the processor's."""
    backbone, prepared = opened(vision_model), Counter()
    usual = backbone.prepare

    def counted(conversation, image, *, answer=False):
        prepared[len(conversation)] += 1
        return usual(conversation, image, answer=answer)

    monkeypatch.setattr(backbone, "prepare", counted)
    assert run(folder, backbone, tmp_path / "d.jsonl") == expected
    assert prepared == {1: 10, 3: 1}


def test_a_prompt_that_cannot_be_derived_is_read_with_its_image(folder, vision_model, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(talks, "next_prompt", lambda *_: None)
    assert run(folder, opened(vision_model), tmp_path / "d.jsonl") == expected


def test_a_prompt_that_is_derived_wrongly_is_noticed(folder, vision_model, expected, tmp_path, monkeypatch):
    wrong = NextPrompt(ids=np.arange(5, 200, dtype=np.int32), seen=3)
    monkeypatch.setattr(talks, "next_prompt", lambda *_: wrong)
    assert run(folder, opened(vision_model), tmp_path / "d.jsonl") == expected


def test_a_rating_that_does_not_fit_its_slot_is_asked_alone(folder, vision_model, expected, tmp_path, monkeypatch):
    """The slots are made too short on purpose."""
    monkeypatch.setattr(talks, "_SLACK", -40)
    monkeypatch.setattr(talks, "REACH_STEP", 1)
    backbone, asked = opened(vision_model), []
    usual = backbone.generate

    def counted(batch, settings, *, seeds):
        asked.append(len(batch))
        return usual(batch, settings, seeds=seeds)

    monkeypatch.setattr(backbone, "generate", counted)
    assert run(folder, backbone, tmp_path / "d.jsonl") == expected
    assert asked == [1] * 10


@pytest.mark.parametrize("room", [2, 1])
def test_memory_that_runs_out_while_prompts_are_read(
    folder, vision_model, expected, tmp_path, monkeypatch, capsys, room
):
    backbone = opened(vision_model)
    usual = backbone._collate

    def cramped(items):
        if len(items) > room:
            message = "out of memory"
            raise torch.OutOfMemoryError(message)
        return usual(items)

    monkeypatch.setattr(backbone, "_collate", lambda items: usual(items))  # room for the trial at the start
    describer = Describer(backbone, SETTINGS)
    assert describer.conversations is not None
    monkeypatch.setattr(describer.conversations.talks, "_loaded", replace(backbone.answering_parts(), collate=cramped))
    items = load_data_set(folder, variant="no_id", images=True).items
    found = describer.describe(items)
    by_name = {line["name"]: (line["description"], line["answer"]) for line in expected}
    assert {one.item.name: (one.description, one.answer) for one in found} == by_name
    assert [one.item.name for one in found] == [item.name for item in items]
    assert capsys.readouterr().err.count("warning: out of memory with 3 items at a time; going on with 1") == 1


def test_no_memory_for_one_item(folder, vision_model, monkeypatch):
    describer = Describer(opened(vision_model), SETTINGS)

    def full(*_args, **_options):
        message = "out of memory"
        raise torch.OutOfMemoryError(message)

    assert describer.conversations is not None
    monkeypatch.setattr(SlotModel, "read", full)
    with pytest.raises(ModelError, match=r"000\.png: the device is out of memory with this item alone"):
        describer.describe(load_data_set(folder, variant="no_id", images=True).items[:1])


def test_memory_that_runs_out_in_the_middle(folder, vision_model, expected, tmp_path, monkeypatch, capsys):
    """Conversations in work begin anew with half the slots, and none is lost."""
    backbone, calls = opened(vision_model), Counter()
    usual = SlotModel.next_logits

    def failing(self, *args):
        calls[self.slots] += 1
        if self.slots == 3 and calls[3] == 20:
            message = "out of memory"
            raise torch.OutOfMemoryError(message)
        return usual(self, *args)

    monkeypatch.setattr(SlotModel, "next_logits", failing)
    assert run(folder, backbone, tmp_path / "d.jsonl") == expected
    assert calls[3] == 20
    assert "warning: out of memory with 3 items at a time; going on with 1" in capsys.readouterr().err


def test_weights_that_cannot_be_loaded_end_the_plan(folder, vision_model, tmp_path, monkeypatch):
    """They are read once, and the error does not wait until all images are planned."""
    backbone, calls = opened(vision_model), Counter()
    usual = backbone.outline

    def failing():
        calls["load"] += 1
        message = "no room for the weights"
        raise ModelError(message)

    def after_loading(*args, **options):
        calls["outline"] += 1
        for thread in threading.enumerate():
            if thread.name == "agiqa-ahead":
                thread.join()
        return usual(*args, **options)

    monkeypatch.setattr(backbone, "load", failing)
    monkeypatch.setattr(backbone, "outline", after_loading)
    with pytest.raises(ModelError, match="no room for the weights"):
        run(folder, backbone, tmp_path / "d.jsonl")
    assert calls == {"load": 1, "outline": 1}
    assert not list(tmp_path.iterdir())


def test_an_answer_without_words_and_an_item_that_cannot_be_read(folder, vision_model, tmp_path):
    """The first token of one answer ends all answers: that item has no description, and the others go on."""
    backbone = opened(vision_model)
    items = load_data_set(folder, variant="no_id", images=True).items
    first = Describer(backbone, SETTINGS).first(items[0])
    prepared = backbone.prepare(first.conversation, items[0].image, answer=True)
    ends = int(backbone.logits(prepared)[-1].argmax())
    backbone.load()
    loaded = backbone.answering_parts()
    loaded.model.generation_config.eos_token_id = [2, ends]
    broken = replace(items[4], image=tmp_path / "none.png")
    found = Describer(backbone, SETTINGS).describe([*items[:4], broken, *items[5:]])
    assert found[0] == "000.png: the model's description is empty"
    assert found[4].startswith(f"{items[4].name}: ")
    assert "no such image" in found[4]
    old = Describer(InBatches(backbone), SETTINGS).describe([*items[:4], broken, *items[5:]])
    assert [one if isinstance(one, str) else (one.description, one.answer) for one in found] == [
        one if isinstance(one, str) else (one.description, one.answer) for one in old
    ]


def test_a_model_whose_layers_do_not_all_attend_to_all_tokens_answers_in_batches(folder, tmp_path, capsys):
    model = roomy(write_softcapped_checkpoint(tmp_path / "model"))
    run(folder, opened(model), tmp_path / "d.jsonl")
    assert decoders(tmp_path / "d.jsonl") == {"batches": 10}
    assert capsys.readouterr().err.count("cannot answer in slots, so it answers in batches: ") == 1


def test_descriptions_without_ratings(folder, vision_model, expected, tmp_path):
    found = run(folder, opened(vision_model), tmp_path / "d.jsonl", replace(SETTINGS, rate=None))
    assert [line["description"] for line in found] == [line["description"] for line in expected]
    assert {line["answer"] for line in found} == {""}


def test_no_position_is_left_for_the_rating(folder, vision_model, expected, tmp_path, monkeypatch):
    longest = max(line["tokens"]["second_prompt"] for line in expected)
    backbone = opened(vision_model)
    monkeypatch.setattr(backbone, "max_positions", longest)
    with pytest.raises(DataError, match=f"{longest} tokens, and the model has {longest} positions"):
        run(folder, backbone, tmp_path / "d.jsonl")


def test_times_add_up_and_a_second_call_uses_the_same_decoder(folder, vision_model):
    describer = Describer(opened(vision_model), SETTINGS)
    items = load_data_set(folder, variant="no_id", images=True).items
    first = describer.describe(items[:4])
    assert describer.conversations is not None
    decoder = describer.conversations.talks.decoder
    again = describer.describe(items[2:6])
    assert describer.conversations.talks.decoder is decoder
    assert [one.description for one in again[:2]] == [one.description for one in first[2:]]
    assert all(seconds > 0 for one in first for seconds in one.seconds.values())


def test_what_an_item_answers_when_drawn_does_not_depend_on_the_others(folder, vision_model):
    drawn = replace(SETTINGS, describe=GenerationSettings.published(max_new_tokens=14, seed=4))
    items = load_data_set(folder, variant="no_id", images=True).items
    together = Describer(opened(vision_model), drawn).describe(items)
    alone = Describer(opened(vision_model), replace(drawn, batch_size=1)).describe(items[7:8])
    assert alone[0].description == together[7].description
    batches = Describer(InBatches(opened(vision_model)), drawn).describe(items)
    assert [one.description for one in batches] == [one.description for one in together]
    other = replace(drawn, describe=GenerationSettings.published(max_new_tokens=14, seed=5))
    assert Describer(opened(vision_model), other).describe(items[7:8])[0].description != alone[0].description
