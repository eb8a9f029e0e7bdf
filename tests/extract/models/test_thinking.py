"""Thinking models: their thoughts are saved, but neither the next question nor an extraction includes them."""

import json
from dataclasses import replace

import pytest

from agiqa.errors import DataError
from agiqa.extract import (
    DescriptionSettings,
    GenerationSettings,
    Message,
    load_data_set,
    open_backbone,
    run_descriptions,
)
from agiqa.extract.data.templates import fill, template_of
from agiqa.extract.models.generation import read_answer
from agiqa.extract.models.rendering import begins_in_thought, switches_of
from agiqa.heads.evaluation.rating_words import parse_rating_word
from tests.extract.small_sets import write_table
from tests.extract.tiny_models import TEXT_TEMPLATE, make_tokenizer
from tests.extract.tiny_thinkers import FORCED_TEMPLATE, HYBRID_TEMPLATE, write_reciter, write_reciter_for_slots

SETTINGS = DescriptionSettings(describe=GenerationSettings(max_new_tokens=80), batch_size=2)
THOUGHT = "it seems dark, good or bad?\n</think>\n\n"
QUESTIONS = template_of("quality")
FIRST = Message(role="user", content=fill(QUESTIONS.describe, "a dog"))
TALK = (FIRST, Message(role="assistant", content="a blurry dog"), Message(role="user", content=QUESTIONS.rate))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [["0.png", "a dog", 3.0], ["1.png", "a dog", 2.0], ["2.png", "a dog", 1.0]]
    return write_table(tmp_path_factory.mktemp("set"), rows, ["name", "prompt", "mos_quality"])


def thinker(folder, template, first, second, *, special=False):
    """A model that answers the two questions with `first` and `second`."""
    blank = open_backbone(str(write_reciter(folder / "blank", template, {})), device="cpu")
    lengths = [len(blank.prepare(turns, None, answer=True).token_ids) for turns in ([FIRST], TALK)]
    sayings = dict(zip(lengths, (first + "<|im_end|>", second + "<|im_end|>"), strict=True))
    return open_backbone(str(write_reciter(folder / "model", template, sayings, special=special)), device="cpu")


def describe(data, backbone, out, settings=SETTINGS):
    items = load_data_set(data, variant="no_id", images=False)
    run_descriptions(items, backbone, out, settings, rating_of=parse_rating_word)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("special", [False, True], ids=["ordinary marks", "special marks"])
@pytest.mark.parametrize(
    ("template", "begin"), [(HYBRID_TEMPLATE, "<think>\n"), (FORCED_TEMPLATE, "")], ids=["hybrid", "forced"]
)
def test_what_was_generated_is_kept_and_what_was_said_goes_on(data, tmp_path, template, begin, special):
    backbone = thinker(tmp_path, template, f"{begin}{THOUGHT}a blurry dog", f"{begin}{THOUGHT}Fair", special=special)
    lines = describe(data, backbone, tmp_path / "d.jsonl")
    assert [line["name"] for line in lines] == ["0.png", "1.png", "2.png"]
    for line in lines:
        assert (line["description"], line["rating"], line["cut"]) == ("a blurry dog", "fair", False)
        assert line["generated"] == {
            "describe": f"{begin}{THOUGHT}a blurry dog",
            "rate": f"{begin}{THOUGHT}Fair",
        }
        assert line["conversations"] == [{"role": turn.role, "content": turn.content} for turn in TALK]
        assert (line["response_0"], line["response_1"]) == ("a blurry dog", "Fair")


@pytest.mark.parametrize(
    ("template", "begin"), [(HYBRID_TEMPLATE, "<think>\n"), (FORCED_TEMPLATE, "")], ids=["hybrid", "forced"]
)
def test_thoughts_in_slots(data, tmp_path, template, begin):
    """The same in the slots of a decoder: ratings have room for thoughts, and read on from the prompt without any."""
    blank = open_backbone(str(write_reciter_for_slots(tmp_path / "blank", template, {})), device="cpu")
    lengths = [len(blank.prepare(turns, None, answer=True).token_ids) for turns in ([FIRST], TALK)]
    said = (f"{begin}{THOUGHT}a blurry dog", f"{begin}{THOUGHT}Fair")
    sayings = dict(zip(lengths, (words + "<|im_end|>" for words in said), strict=True))
    backbone = open_backbone(str(write_reciter_for_slots(tmp_path / "model", template, sayings)), device="cpu")
    lines = describe(data, backbone, tmp_path / "d.jsonl")
    for line in lines:
        assert line["decoder"] == "slots"
        assert (line["description"], line["rating"], line["cut"]) == ("a blurry dog", "fair", False)
        assert line["generated"] == dict(zip(("describe", "rate"), said, strict=True))
        assert line["tokens"]["answer"] > 16


def test_a_run_that_was_cut_off_goes_on_with_the_same_lines(data, tmp_path):
    backbone = thinker(tmp_path, HYBRID_TEMPLATE, f"<think>{THOUGHT}a blurry dog", "Poor")
    whole = describe(data, backbone, tmp_path / "whole.jsonl")
    out = tmp_path / "whole.jsonl"
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:1]) + '{"name": "1.p')
    again = describe(data, backbone, out)
    assert [replaced | {"seconds": 0} for replaced in again] == [line | {"seconds": 0} for line in whole]
    assert [line["generated"]["rate"] for line in again] == [None] * 3


def test_an_extraction_reads_what_was_said(data, tmp_path):
    backbone = thinker(tmp_path, HYBRID_TEMPLATE, f"<think>{THOUGHT}a blurry dog", f"<think>{THOUGHT}Fair")
    describe(data, backbone, tmp_path / "d.jsonl")
    decode = backbone.renderer.tokenizer.decode
    for variant in ("id", "full"):
        read = load_data_set(data, conversations=[str(tmp_path / "d.jsonl")], variant=variant, images=False)
        item = backbone.prepare(read.items[0].conversation, None)
        said = ["a blurry dog", "Fair"][: len(read.items[0].conversation) // 2]
        assert decode(item.token_ids[item.roles == 3].tolist()) == "".join(said)
        text = decode(item.token_ids.tolist())
        assert text.count("a blurry dog<|im_end|>") == 1
        assert "dark" not in text
        assert text.endswith("<think>\n\n</think>\n\nFair<|im_end|>\n") == (variant == "full")


def test_the_switch_is_turned_off_where_the_template_has_one(tmp_path):
    backbone = open_backbone(str(write_reciter(tmp_path, HYBRID_TEMPLATE, {})), device="cpu")
    prompt = backbone.prepare(TALK, None, answer=True)
    decode = backbone.renderer.tokenizer.decode
    assert decode(prompt.token_ids.tolist()).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert decode(prompt.token_ids[prompt.roles == 3].tolist()) == "a blurry dog"
    assert backbone.provenance()["chat_template"]["enable_thinking"] is False
    assert switches_of("{% if thinking is defined and thinking %}{{ m.enable_thinking }}{% endif %}") == {
        "thinking": False
    }
    assert switches_of("{{ 'thinking' }} enable_thinking {{ message.thinking }}" + TEXT_TEMPLATE) == {}


def test_a_thought_that_does_not_end_is_a_bad_item(data, tmp_path):
    backbone = thinker(tmp_path, FORCED_TEMPLATE, f"{THOUGHT}a blurry dog", f"{THOUGHT}Fair")
    short = replace(SETTINGS, describe=GenerationSettings(max_new_tokens=4))
    with pytest.raises(DataError, match=r"0\.png: .* still thinking after 4 tokens; allow more with --max-new-tokens"):
        describe(data, backbone, tmp_path / "d.jsonl", short)
    silent = thinker(tmp_path / "silent", FORCED_TEMPLATE, THOUGHT, "Fair")
    with pytest.raises(DataError, match=r"0\.png: the model's description is empty: it thought and then said nothing"):
        describe(data, silent, tmp_path / "d.jsonl")


def test_a_thought_in_a_text_that_was_given_is_a_fault_of_that_text(tmp_path):
    backbone = open_backbone(str(write_reciter(tmp_path, HYBRID_TEMPLATE, {})), device="cpu")
    spoilt = Message(role="assistant", content="<think>\nhm\n</think>\n\na dog")
    with pytest.raises(DataError, match=r"a message contains '<think>', and the chat template leaves out thoughts"):
        backbone.prepare([FIRST, spoilt, TALK[2]], None)


@pytest.mark.parametrize(
    ("generated", "begun", "said"),
    [
        ("<think>a</think>b", False, "b"),
        ("a</think>\n\nb", True, "b"),
        ("<think>a</think>b</think> c", False, "c"),
        ("<think>a", False, ""),
        ("a", True, ""),
        ("[THINK]a[/THINK]b", False, "b"),
        ("<|channel>thought\n<channel|>b", False, "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", False, "b"),
        ("\u25c1think\u25b7d\u00f6g\u25c1/think\u25b7d\u00f6g", False, "d\u00f6g"),
        ("a <b> is < c", False, "a <b> is < c"),
        ("", False, ""),
    ],
)
@pytest.mark.parametrize("marks", ["special", "several tokens"])
def test_thoughts_of_the_published_families(generated, begun, said, marks):
    words = ["</think>", "[/THINK]", "<|channel>", "<channel|>", "<|channel|>", "<|message|>"]
    tokenizer = make_tokenizer(*(words if marks == "special" else []))
    ids = tokenizer(generated, add_special_tokens=False)["input_ids"]
    answer = read_answer(tokenizer, ids, [2], begun=begun)
    assert answer == said
    assert (answer.generated is None) == (generated == said)
    assert answer.generated in (None, generated)


def test_a_prompt_that_begins_a_thought_is_known():
    tokenizer = make_tokenizer("<think>")

    def known(text):
        return begins_in_thought(tokenizer, tokenizer(text)["input_ids"])

    assert known("rate it<|assistant|><think>\n")
    assert not known("rate it<|assistant|><think>\n\n</think>\n\n")
    assert not known("rate")
