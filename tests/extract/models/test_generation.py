"""Answers of tiny models in batches, against a loop of our own that takes the likeliest token of `logits` each time."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from agiqa.errors import ConfigError, DataError
from agiqa.extract.data.items import Message
from agiqa.extract.models import Answer, GenerationSettings, Prepared, open_backbone
from tests.extract import tiny_models

CONVERSATIONS = (
    [Message(role="user", content="describe the image of 'a dog' in every detail that you see")],
    [Message(role="user", content="rate")],
    [
        Message(role="user", content="describe"),
        Message(role="assistant", content="a blurry dog"),
        Message(role="user", content="rate the quality: [bad, poor]"),
    ],
)
NEW = 12
PROMPTED_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(3)]
    for path, shape in zip(paths, [(50, 64, 3), (30, 20, 3), (64, 64, 3)], strict=True):
        Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(path)
    return paths


WRITERS = {
    "text": lambda folder: tiny_models.write_text_checkpoint(folder, seed=8),  # answers unlike prompts unlike
    "vision": tiny_models.write_vision_checkpoint,
    "tiled": tiny_models.write_tiled_checkpoint,
    "grid": tiny_models.write_grid_checkpoint,
}


@pytest.fixture(scope="module", params=list(WRITERS))
def backbone(request, tmp_path_factory):
    folder = WRITERS[request.param](tmp_path_factory.mktemp(request.param))
    backbone = open_backbone(str(folder), device="cpu")
    if backbone.reads_images:  # random weights would answer with image tokens, which a forward pass wants images for
        backbone.lm_head()[backbone.image_token_id] = 0.0
    return backbone


@pytest.fixture(scope="module")
def batch(backbone, pictures):
    """Prompts of different lengths, with different images if the backbone reads images."""
    pairs = zip(CONVERSATIONS, pictures, strict=True)
    return [backbone.prepare(turns, picture, answer=True) for turns, picture in pairs]


def longer(backbone, item, token):
    """`item` with one more token."""
    inputs = {
        key: torch.cat([v, torch.zeros_like(v[:, :1])], 1) if "token_type" in key else v
        for key, v in item.inputs.items()
    }
    return Prepared(
        token_ids=np.append(item.token_ids, np.int32(token)), roles=np.append(item.roles, np.uint8(0)), inputs=inputs
    )


def greedy(backbone, item, count, stops=(2,)):
    """The greedy ids, by one full forward pass per token, and whether the answer ended."""
    ids = []
    while len(ids) < count:
        token = int(backbone.logits(item)[-1].argmax())
        if token in stops:
            return ids, True
        ids.append(token)
        item = longer(backbone, item, token)
    return ids, False


def test_a_batch_answers_as_each_item_alone_by_hand(backbone, batch):
    stops = (2, *([backbone.renderer.turn_end] if backbone.renderer.turn_end else []))
    answers = backbone.generate(batch, GenerationSettings(max_new_tokens=NEW))
    decode = backbone.renderer.tokenizer.decode
    for item, answer in zip(batch, answers, strict=True):
        ids, ended = greedy(backbone, item, NEW, stops)
        assert answer == decode(ids, skip_special_tokens=True).strip()
        assert isinstance(answer, Answer)
        assert (answer.tokens, answer.complete) == (len(ids), ended)
    assert len(set(answers)) > 1
    alone = [backbone.generate([item], GenerationSettings(max_new_tokens=NEW))[0] for item in batch]
    assert alone == answers


def test_draws_follow_the_seed_and_leave_the_random_state(backbone, batch):
    published = GenerationSettings.published(max_new_tokens=NEW, seed=3)
    state = torch.random.get_rng_state()
    first = backbone.generate(batch, published)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert backbone.generate(batch, published) == first
    seeds = [7, *range(len(batch) - 1)]
    drawn = backbone.generate(batch, published, seeds=seeds)
    assert drawn != first
    assert backbone.generate(batch[::-1], published, seeds=seeds[::-1]) == drawn[::-1]
    assert backbone.generate(batch[:1], published, seeds=seeds[:1]) == drawn[:1]
    hot = GenerationSettings(max_new_tokens=NEW, sample=True, temperature=3.0)
    assert backbone.generate(batch, hot) != backbone.generate(batch, GenerationSettings(max_new_tokens=NEW))


def test_repetition_is_penalised_in_the_answer_alone(backbone, batch):
    """By hand: logits of tokens of the answer are divided or multiplied; those of the prompt and padding are not."""
    answers = backbone.generate(batch, GenerationSettings(max_new_tokens=NEW, repetition_penalty=5.0))
    for item, answer in zip(batch, answers, strict=True):
        ids, current = [], item
        while len(ids) < NEW:
            logits = backbone.logits(current)[-1].clone()
            used = torch.tensor(sorted(set(ids)), dtype=torch.long)
            logits[used] = torch.where(logits[used] > 0, logits[used] / 5, logits[used] * 5)
            token = int(logits.argmax())
            if token in (2, backbone.renderer.turn_end):
                break
            ids.append(token)
            current = longer(backbone, current, token)
        assert answer == backbone.renderer.tokenizer.decode(ids, skip_special_tokens=True).strip()


def checkpoint_with(folder, source, **generation):
    shutil.copytree(source, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, **generation}))
    return folder


def test_an_answer_ends_where_the_checkpoint_says(tiny_text_checkpoint, tmp_path):
    plain = open_backbone(str(tiny_text_checkpoint), device="cpu")
    item = plain.prepare(CONVERSATIONS[0], None, answer=True)
    ids, _ = greedy(plain, item, NEW)
    stop = ids[4]
    before = ids[: ids.index(stop)]
    other = open_backbone(
        str(checkpoint_with(tmp_path / "m", tiny_text_checkpoint, eos_token_id=[2, stop])), device="cpu"
    )
    short = plain.prepare(CONVERSATIONS[1], None, answer=True)
    answer, _ = other.generate([item, short], GenerationSettings(max_new_tokens=NEW))
    assert (answer.tokens, answer.complete) == (len(before), True)
    assert answer == plain.renderer.tokenizer.decode(before).strip()


def test_settings_of_the_checkpoint_do_not_make_greedy_anything_else(tiny_text_checkpoint, tmp_path):
    loud = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "min_new_tokens": 9, "top_k": 3}
    other = open_backbone(str(checkpoint_with(tmp_path / "m", tiny_text_checkpoint, **loud)), device="cpu")
    plain = open_backbone(str(tiny_text_checkpoint), device="cpu")
    batch = [plain.prepare(turns, None, answer=True) for turns in CONVERSATIONS]
    settings = GenerationSettings(max_new_tokens=NEW)
    assert other.generate(batch, settings) == plain.generate(batch, settings)


def test_the_prompt_for_an_answer(tmp_path):
    """By the template's generation prompt or, without one, what it writes before an answer; and without a template."""
    turns = CONVERSATIONS[2]
    prompted = open_backbone(
        str(tiny_models.write_text_checkpoint(tmp_path / "a", template=PROMPTED_TEMPLATE)), device="cpu"
    )
    switchless = open_backbone(str(tiny_models.write_text_checkpoint(tmp_path / "b")), device="cpu")
    plain = open_backbone(str(tiny_models.write_text_checkpoint(tmp_path / "c", template=None)), device="cpu")
    for backbone, ending in (
        (prompted, "rate the quality: [bad, poor]</s><|assistant|>"),
        (switchless, "rate the quality: [bad, poor]</s>\n<|assistant|>\n"),
        (plain, "User: rate the quality: [bad, poor]\nAssistant:"),
    ):
        asked = backbone.prepare(turns, None, answer=True)
        without = backbone.prepare(turns, None)
        decode = backbone.renderer.tokenizer.decode
        assert decode(asked.token_ids.tolist()).endswith(ending)
        assert not decode(without.token_ids.tolist()).endswith(ending)
        for role in (2, 3):
            assert decode(asked.token_ids[asked.roles == role].tolist()) == decode(
                without.token_ids[without.roles == role].tolist()
            )
    assert prompted.renderer.turn_end == 2
    assert plain.renderer.turn_end is None


def test_no_more_than_the_positions_of_the_model(tiny_text_checkpoint, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(tiny_text_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    backbone = open_backbone(str(tiny_text_checkpoint), device="cpu")
    lengths = [len(backbone.prepare(turns, None, answer=True).token_ids) for turns in CONVERSATIONS]
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": max(lengths) + 3}))
    short = open_backbone(str(folder), device="cpu")
    batch = [short.prepare(turns, None, answer=True) for turns in CONVERSATIONS]
    settings = GenerationSettings(max_new_tokens=NEW)
    answers = short.generate(batch, settings)
    assert [answer.tokens for answer in answers] == [
        min(answer.tokens, max(lengths) + 3 - length)
        for answer, length in zip(backbone.generate(batch, settings), lengths, strict=True)
    ]
    assert not answers[lengths.index(max(lengths))].complete
    long = short.prepare([Message(role="user", content="rate " * 200)], None, answer=True)
    with pytest.raises(DataError, match="none is left for an answer"):
        short.generate([long], settings)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0.0}]
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GenerationSettings(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_on_the_cpu(tiny_text_checkpoint, tiny_vision_checkpoint, pictures):
    for checkpoint in (tiny_text_checkpoint, tiny_vision_checkpoint):
        cpu, gpu = (open_backbone(str(checkpoint), device=device, dtype="float32") for device in ("cpu", "cuda"))
        pairs = zip(CONVERSATIONS, pictures, strict=True)
        batch = [cpu.prepare(turns, picture, answer=True) for turns, picture in pairs]
        settings = GenerationSettings(max_new_tokens=NEW)
        assert gpu.generate(batch, settings) == cpu.generate(batch, settings)
        state = torch.cuda.get_rng_state()
        drawn = gpu.generate(batch, GenerationSettings.published(max_new_tokens=NEW, seed=1))
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert gpu.generate(batch, GenerationSettings.published(max_new_tokens=NEW, seed=1)) == drawn
