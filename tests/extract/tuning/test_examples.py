"""Which tokens the loss counts, against the published chat layout written by hand; and items that are refused."""

from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import DataError
from agiqa.extract.data.items import Item, Message
from agiqa.extract.tuning.examples import Limited, answer_spans, example_of, plan_example
from agiqa.extract.tuning.tuning import TuningSettings, plan_tuning
from tests.extract.tiny_models import TEXT_TEMPLATE, roomy, write_grid_checkpoint, write_text_checkpoint
from tests.extract.tiny_thinkers import FORCED_TEMPLATE, HYBRID_TEMPLATE
from tests.extract.tuning.talks import load_talks, opener_for, quick


def learnt(backbone, pieces):
    """The ids of a conversation whose text is `pieces` of (text, whether it is learnt), and the mask of the latter.

    Each piece is tokenised alone; pieces meet at special tokens, or where byte pairs of the tiny tokenizers do not
    join.
    """
    tokenizer = backbone.renderer.tokenizer
    ids, mask = [], []
    for text, counts in pieces:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        mask += [counts] * len(found)
    return ids, mask


def seen(example):
    """Ids and mask of an example."""
    mask = np.zeros(len(example.prepared.token_ids), bool)
    mask[example.labels] = True
    return example.prepared.token_ids.tolist(), mask.tolist()


def test_labels_in_the_published_layout_of_llama_3(minicpm, data):
    backbone = opener_for(minicpm, max_slices=1)(device="cpu")
    item = data.items[2]
    ask, text, rate, word = (turn.content for turn in item.conversation)

    def head(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    image = f"<image>{'<unk>' * 6}</image>"
    ids, mask = learnt(
        backbone,
        [
            (f"<|begin_of_text|>{head('user')}{image}\n{ask}<|eot_id|>{head('assistant')}", False),
            (f"{text}<|eot_id|>", True),
            (f"{head('user')}{rate}<|eot_id|>{head('assistant')}", False),
            (f"{word}<|eot_id|>", True),
        ],
    )
    example = example_of(backbone, item)
    assert seen(example) == (ids, mask)
    assert backbone.renderer.tokenizer.decode(example.targets[-example.rating :]) == f"{word}<|eot_id|>"
    assert example.targets.tolist() == [token for token, counts in zip(ids, mask, strict=True) if counts]


def test_both_descriptions_and_one_word_of_several_aspects(minicpm, talks):
    backbone = opener_for(minicpm, max_slices=1)(device="cpu")
    files = [f"{aspect}:{talks / f'{aspect}.json'}" for aspect in ("quality", "correspondence")]
    item = load_talks(talks, variant="full:quality+correspondence", files=files).items[0]
    example = example_of(backbone, item)
    said = [turn.content for turn in item.conversation if turn.role == "assistant"]
    assert len(said) == 3
    assert backbone.renderer.tokenizer.decode(example.targets) == "".join(f"{text}<|eot_id|>" for text in said)


def test_labels_of_a_text_model(llama, talks):
    backbone = opener_for(llama)(device="cpu")
    item = load_talks(talks, images=False).items[0]
    ask, text, rate, word = (turn.content for turn in item.conversation)
    ids, mask = learnt(
        backbone,
        [
            (f"<s><|system|>\nYou rate images.</s>\n<|user|>\n{ask}</s>\n<|assistant|>\n", False),
            (f"{text}</s>", True),
            (f"\n<|user|>\n{rate}</s>\n<|assistant|>\n", False),
            (f"{word}</s>", True),
            ("\n", False),
        ],
    )
    assert seen(example_of(backbone, item)) == (ids, mask)


def test_labels_of_vision_models_are_the_answers(llava, data, tmp_path):
    for checkpoint in (llava, roomy(write_grid_checkpoint(tmp_path))):
        backbone = opener_for(checkpoint)(device="cpu")
        for item in data.items[:2]:
            _, text, _, word = (turn.content for turn in item.conversation)
            example = example_of(backbone, item)
            assert backbone.renderer.tokenizer.decode(example.targets) == f"{text}</s>{word}</s>"


def test_without_a_template_only_the_words_are_learnt(tmp_path, talks):
    backbone = opener_for(roomy(write_text_checkpoint(tmp_path, template=None)))(device="cpu")
    item = load_talks(talks, images=False).items[0]
    _, text, _, word = (turn.content for turn in item.conversation)
    example = example_of(backbone, item)
    assert backbone.renderer.tokenizer.decode(example.targets).split() == f"{text} {word}".split()


TEMPLATES = {
    "published thinking": HYBRID_TEMPLATE.replace("<|im_end|>", "</s>"),
    "trims": TEXT_TEMPLATE,
    "closes answers only": "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + '</s>' }}"
    "{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_learnt_behind_the_question_as_describe_asks_it(name, tmp_path, talks):
    """Templates of thinking models write an empty thought in front of the last answer only."""
    backbone = opener_for(roomy(write_text_checkpoint(tmp_path, template=TEMPLATES[name])))(device="cpu")
    item = load_talks(talks, images=False).items[0]
    example = example_of(backbone, item)
    learnt = {}
    for part in example.parts:
        ids = part.prepared.token_ids
        for start, stop in answer_spans(part.prepared, backbone.renderer.turn_end):
            if start in part.labels:
                learnt[backbone.renderer.tokenizer.decode(ids[start:stop])] = ids[:start].tolist()
    asked = [backbone.prepare(item.conversation[:count], None, answer=True).token_ids.tolist() for count in (1, 3)]
    assert list(learnt.values()) == asked
    end = backbone.renderer.tokenizer.decode([backbone.renderer.turn_end])
    assert list(learnt) == [f"{item.conversation[place].content}{end}" for place in (1, 3)]
    assert example.count == sum(len(part.labels) for part in example.parts)
    planned = plan_example(backbone, Limited(item=item, max_length=None))
    assert planned.tokens == sum(len(part.prepared.token_ids) for part in example.parts)
    assert len(example.parts) == (2 if name == "published thinking" else 1)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (FORCED_TEMPLATE, "asks for an answer with other words than it writes in front of one"),
        (None, "closes an answer with no special token"),
    ],
)
def test_templates_from_which_a_model_cannot_learn_all(template, expected, tmp_path, talks, capsys):
    opener = opener_for(roomy(write_text_checkpoint(tmp_path, template=template)))
    settings = TuningSettings(recipe=quick("light"))
    plan_tuning(load_talks(talks, images=False), opener(device="cpu"), settings, opener)
    assert expected in capsys.readouterr().err


def test_what_does_not_fit_is_refused_by_item_or_left_out(minicpm, data):
    """Lengths are known before the first step; nothing is cut."""
    opener = opener_for(minicpm, max_slices=1)
    backbone = opener(device="cpu")
    lengths = {item.name: len(example_of(backbone, item).prepared.token_ids) for item in data.items}
    limit = sorted(lengths.values())[5]
    too_long = sorted(name for name, length in lengths.items() if length > limit)
    assert 0 < len(too_long) < 8
    settings = TuningSettings(recipe=quick(max_length=limit), val_share=0)
    with pytest.raises(
        DataError, match=rf"{too_long[0]}: {lengths[too_long[0]]} tokens \(6 of the image\), more than"
    ) as caught:
        plan_tuning(data, backbone, settings, opener)
    assert all(name in str(caught.value) for name in too_long)
    plan = plan_tuning(data, backbone, replace(settings, on_bad_item="skip"), opener)
    assert sorted(line.partition(":")[0] for line in plan.skipped) == too_long
    kept = [item.name for item in plan.material.train]
    assert kept == [item.name for item in data.items if item.name not in too_long]
    assert plan.material.tokens == [lengths[name] for name in kept]


def test_an_item_without_an_answer_is_refused(minicpm, data):
    backbone = opener_for(minicpm, max_slices=1)(device="cpu")
    silent = replace(data.items[0], conversation=data.items[0].conversation[:1])
    problem = plan_example(backbone, Limited(item=silent, max_length=None)).problem
    assert problem == f"{silent.name}: no token of an answer, so there is nothing to learn from it"


def test_an_unreadable_image_is_refused(minicpm, tmp_path):
    backbone = opener_for(minicpm)(device="cpu")
    (tmp_path / "a.png").write_bytes(b"no image")
    turns = (Message(role="user", content="?"), Message(role="assistant", content="!"))
    item = Item(name="a.png", prompt="p", conversation=turns, image=tmp_path / "a.png")
    problem = plan_example(backbone, Limited(item=item, max_length=None)).problem
    assert problem is not None
    assert problem.startswith("a.png: ")


def test_validation_items_are_those_of_the_split_val_or_of_whole_prompts(minicpm, data, capsys):
    opener = opener_for(minicpm, max_slices=1)
    backbone, settings = opener(device="cpu"), TuningSettings(recipe=quick(), val_share=0.3)
    plan = plan_tuning(data, backbone, settings, opener)
    held = {item.prompt for item in plan.material.validation}
    assert len(held) == 1
    assert held.isdisjoint(item.prompt for item in plan.material.train)
    assert len(plan.material.train) + len(plan.material.validation) == 8
    others = [plan_tuning(data, backbone, replace(settings, seed=seed), opener) for seed in range(1, 5)]
    assert {item.prompt for other in others for item in other.material.validation} > held
    stated = replace(
        data,
        items=(
            replace(data.items[0], split="val"),
            *data.items[1:],
        ),
    )
    plan = plan_tuning(stated, backbone, settings, opener)
    assert [item.name for item in plan.material.validation] == [data.items[0].name]
    assert "1 of 1 validation items have a prompt that training items have too" in capsys.readouterr().err
    tested = replace(data, items=tuple(replace(item, split="test") for item in data.items))
    with pytest.raises(DataError, match="no item is left to train on; 8 items"):
        plan_tuning(tested, backbone, settings, opener)


def test_one_prompt_leaves_nothing_to_validate_on(minicpm, data, capsys):
    opener = opener_for(minicpm, max_slices=1)
    same = replace(data, items=tuple(replace(item, prompt="a dog") for item in data.items))
    plan = plan_tuning(same, opener(device="cpu"), TuningSettings(recipe=quick()), opener)
    assert (len(plan.material.train), len(plan.material.validation)) == (8, 0)
    assert "nothing is held out for validation, since all items have one prompt" in capsys.readouterr().err
