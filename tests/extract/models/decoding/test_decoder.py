"""Answers in slots, against `generate` for one item alone: tiny models in float32 give the same tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from agiqa.extract.data.items import Message
from agiqa.extract.models import GenerationSettings, open_backbone
from agiqa.extract.models.batches import alike
from agiqa.extract.models.decoding.choosing import Policy
from agiqa.extract.models.decoding.continuing import next_prompt
from agiqa.extract.models.decoding.decoder import SUFFIX_WIDTH, Ask, Decoder
from agiqa.extract.models.decoding.eligibility import slot_shapes
from agiqa.extract.models.decoding.slot_model import Suffix
from agiqa.extract.models.expansions import common_beginning
from agiqa.extract.models.generation import generated_ids, left_padded, stop_tokens
from tests.extract import tiny_minicpm, tiny_models

QUESTIONS = ("describe the image of 'a dog' in every detail that you see", "rate", "describe it", "is it good? " * 9)
SECOND = "rate the quality: [bad, poor, fair]"
GREEDY = Policy.of(GenerationSettings())
LENGTH = 512
WRITERS = {
    "text": lambda folder: tiny_models.write_text_checkpoint(folder, seed=8),
    "vision": tiny_models.write_vision_checkpoint,
    "tiled": tiny_models.write_tiled_checkpoint,
    "grid": tiny_models.write_grid_checkpoint,
    "minicpm": tiny_minicpm.write_minicpm_checkpoint,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(len(QUESTIONS))]
    for path, shape in zip(paths, [(50, 64, 3), (30, 20, 3), (64, 64, 3), (64, 90, 3)], strict=True):
        Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module", params=list(WRITERS))
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder)
    backbone = open_backbone(str(folder), device="cpu", dtype="float32")
    backbone.load()
    if (
        backbone.kind == "vision"
    ):  # random weights would answer with image tokens, which a forward pass wants images for
        backbone.lm_head()[backbone.image_token_id] = 0.0
    return backbone


@pytest.fixture(scope="module")
def items(backbone, pictures):
    """Prompts of different lengths, each with an image of its own if the backbone reads images."""
    return [
        backbone.prepare([Message(role="user", content=text)], path if backbone.reads_images else None, answer=True)
        for text, path in zip(QUESTIONS, pictures, strict=True)
    ]


def decoder_of(backbone, *, slots, limit, stops=None, length=LENGTH, policies=(GREEDY,), keeps=False):
    loaded = backbone.answering_parts()
    stops = stop_tokens(loaded.model, loaded.renderer) if stops is None else stops
    shapes = slot_shapes(loaded, keeps=keeps)
    options = {"slots": slots, "length": length, "policies": policies, "limit": limit, "stops": stops}
    return Decoder(loaded, shapes, keeps=keeps, **options)


def alone(backbone, item, limit, stops=None):
    """The ids that `generate` of transformers gives for one item, with the one that ends the answer."""
    loaded = backbone.answering_parts()
    stops = stop_tokens(loaded.model, loaded.renderer) if stops is None else stops
    inputs = left_padded(loaded.collate([item]), [len(item.token_ids)])
    settings = GenerationSettings(max_new_tokens=limit)
    (row,) = generated_ids(loaded.model, inputs, settings, seeds=[0], stops=stops or [0], limit=limit)
    end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
    return row[: end + 1]


def begin(decoder, rows, items, limits):
    for group in alike(items):
        asks = [Ask(limit=limits[place], policy=GREEDY) for place in group]
        decoder.begin([rows[place] for place in group], [items[place] for place in group], asks)


def until_all_ended(decoder, rows, steps=3):
    found = {}
    while set(found) != set(rows):
        decoder.step(steps)
        found |= decoder.ended()
    return found


def test_rows_of_different_lengths_and_limits(backbone, items):
    limits, rows = [12, 1, 5, 9], [2, 0, 4, 1]
    decoder = decoder_of(backbone, slots=5, limit=12)
    begin(decoder, rows, items, limits)
    found = until_all_ended(decoder, rows)
    assert [found[row] for row in rows] == [
        alone(backbone, item, limit) for item, limit in zip(items, limits, strict=True)
    ]
    assert len({tuple(answer) for answer in found.values()}) > 1


def test_more_items_than_slots(backbone, items):
    """A row's next conversation begins while the other rows are in the middle of theirs."""
    decoder = decoder_of(backbone, slots=2, limit=20)
    waiting, limits, working, found = list(range(4)) * 2, [20, 3, 7, 11], {}, []
    while waiting or working:
        for row in {0, 1} - set(working):
            if waiting:
                working[row] = waiting.pop(0)
                begin(decoder, [row], [items[working[row]]], [limits[working[row]]])
        decoder.step(2)
        found += [(working.pop(row), answer) for row, answer in decoder.ended().items()]
    expected = [alone(backbone, item, limit) for item, limit in zip(items, limits, strict=True)]
    assert len(found) == 8
    assert all(answer == expected[place] for place, answer in found)


def test_an_answer_that_ends_at_once(backbone, items):
    (first,) = alone(backbone, items[0], 1)
    decoder = decoder_of(backbone, slots=2, limit=6, stops=[first])
    begin(decoder, [0, 1], items[:2], [6, 6])
    found = until_all_ended(decoder, [0, 1])
    assert found[0] == [first]
    assert found[1] == alone(backbone, items[1], 6, stops=[first])


@pytest.mark.parametrize("words", ["a blurry dog", "a blurry dog, " * 30], ids=["short", "longer than a pass"])
def test_a_second_question_goes_on_from_what_the_slot_holds(backbone, items, pictures, words):
    """The answer is that to the whole conversation, read at once with its image."""
    decoder, again = decoder_of(backbone, slots=6, limit=8), {}
    begin(decoder, [3, 5, 0, 1], items, [8, 3, 5, 8])
    held = until_all_ended(decoder, [0, 1, 3, 5])
    suffixes = []
    for row, item, text, path in zip([3, 5, 0, 1], items, QUESTIONS, pictures, strict=True):
        before = [Message(role="user", content=text)]
        after = [*before, Message(role="assistant", content=words), Message(role="user", content=SECOND)]
        prompt = next_prompt(backbone.renderer, item, before, after)
        whole = backbone.prepare(after, path if backbone.reads_images else None, answer=True)
        assert prompt is not None
        assert np.array_equal(prompt.ids, whole.token_ids)
        has = np.array([*item.token_ids, *held[row][:-1]])
        kept = min(common_beginning(has, prompt.ids), len(prompt.ids) - 1)
        assert kept >= prompt.seen
        suffixes.append(Suffix(row=row, start=kept, ids=prompt.ids[kept:].tolist()))
        again[row] = whole
    assert (max(len(suffix.ids) for suffix in suffixes) > SUFFIX_WIDTH) == (len(words) > 100)
    decoder.go_on(suffixes, [Ask(limit=4 + number, policy=GREEDY) for number in range(4)])
    found = until_all_ended(decoder, list(again))
    assert [found[row] for row in again] == [
        alone(backbone, item, 4 + number) for number, item in enumerate(again.values())
    ]


def longer(item, ids):
    """The item with these token ids; what follows its own is no image."""
    roles = np.zeros(len(ids), np.uint8)
    roles[: len(item.roles)] = item.roles
    return replace(item, token_ids=np.array(ids, np.int32), roles=roles)


def test_kept_states_are_those_of_whole_passes(backbone, items):
    """Of prompts, of generated tokens while other rows begin and end, and of tokens that are put behind them."""
    decoder, limits, waiting, working = (
        decoder_of(backbone, slots=2, limit=9, keeps=True),
        [9, 3, 7, 5],
        [*range(4)],
        {},
    )
    while waiting or working:
        for row in {0, 1} - set(working):
            if waiting:
                working[row] = waiting.pop(0)
                begin(decoder, [row], [items[working[row]]], [limits[working[row]]])
        decoder.step(2)
        ended = {row: (items[working.pop(row)], answer) for row, answer in decoder.ended().items()}
        held = {row: [*item.token_ids.tolist(), *answer[:-1], 20, 21, 22] for row, (item, answer) in ended.items()}
        decoder.put_behind([Suffix(row=row, start=len(ids) - 3, ids=ids[-3:]) for row, ids in held.items()])
        for row, ids in held.items():
            (expected,) = backbone.hidden_states([longer(ended[row][0], ids)])
            error = (decoder.states(row, len(ids)) - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert error.max() < 1e-5


def test_up_to_the_last_place_of_a_slot(backbone, items):
    longest = max(len(item.token_ids) for item in items)
    decoder = decoder_of(backbone, slots=4, limit=7, length=longest + 7)
    begin(decoder, [0, 1, 2, 3], items, [7] * 4)
    found = until_all_ended(decoder, [0, 1, 2, 3], steps=20)
    assert [found[row] for row in range(4)] == [alone(backbone, item, 7) for item in items]


def test_draws_do_not_depend_on_row_or_company(backbone, items):
    policy = Policy.of(GenerationSettings.published())
    asks = [Ask(limit=9, policy=policy, seed=10**16 + number) for number in range(4)]
    found = []
    for rows in ([0], [4, 1, 3, 0]):
        decoder = decoder_of(backbone, slots=5, limit=9, policies=[policy])
        for number, row in enumerate(rows):
            decoder.begin([row], [items[number]], [asks[number]])
        found.append(until_all_ended(decoder, rows)[rows[0]])
    assert found[0] == found[1]
    assert found[0] != alone(backbone, items[0], 9)


def test_rows_with_different_policies(backbone, items):
    """Those of the two rounds may differ: here one row draws, and the other is greedy with a penalty."""
    drawn, worse = GenerationSettings.published(), GenerationSettings(repetition_penalty=4.0)
    policies = [Policy.of(drawn), Policy.of(worse)]
    decoder = decoder_of(backbone, slots=2, limit=9, policies=policies)
    for row in (0, 1):
        decoder.begin([row], [items[row]], [Ask(limit=9, policy=policies[row], seed=5)])
    together = until_all_ended(decoder, [0, 1])
    for row in (0, 1):
        single = decoder_of(backbone, slots=1, limit=9, policies=[policies[row]])
        single.begin([0], [items[row]], [Ask(limit=9, policy=policies[row], seed=5)])
        assert until_all_ended(single, [0])[0] == together[row]
    said = backbone.generate([items[1]], GenerationSettings(max_new_tokens=9, repetition_penalty=4.0))[0]
    ids = [token for token in together[1] if token not in decoder_stops(backbone)]
    assert backbone.renderer.tokenizer.decode(ids, skip_special_tokens=True).strip() == said


def decoder_stops(backbone):
    loaded = backbone.answering_parts()
    return stop_tokens(loaded.model, loaded.renderer)


def test_clear_forgets_what_is_in_work(backbone, items):
    decoder = decoder_of(backbone, slots=2, limit=6)
    begin(decoder, [0, 1], items[:2], [6, 6])
    decoder.step(2)
    decoder.clear()
    begin(decoder, [1], items[2:3], [6])
    assert until_all_ended(decoder, [1]) == {1: alone(backbone, items[2], 6)}
    assert not torch.is_inference_mode_enabled()
