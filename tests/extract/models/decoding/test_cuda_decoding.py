"""Decoding on a GPU: replayed steps against steps one kernel after the other, and against `generate`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from agiqa.extract.data.items import Message
from agiqa.extract.models import GenerationSettings, open_backbone
from agiqa.extract.models.batches import alike
from agiqa.extract.models.checks import BATCH_TOLERANCE, relative_error
from agiqa.extract.models.decoding.choosing import Policy
from agiqa.extract.models.decoding.decoder import Ask, Decoder
from agiqa.extract.models.decoding.eligibility import slot_shapes
from agiqa.extract.models.decoding.slot_model import REACH_STEP, SlotModel, Suffix
from agiqa.extract.models.generation import stop_tokens
from tests.extract import tiny_minicpm, tiny_models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

QUESTIONS = ("describe the image of 'a dog' in every detail that you see", "rate", "is it good? " * 6)
NEW = REACH_STEP + 20
"""Enough that attention reads more of the cache in the end than in the beginning."""
SETTINGS = GenerationSettings(max_new_tokens=NEW)
WRITERS = {
    "text": lambda folder: tiny_models.write_text_checkpoint(folder, seed=8),
    "vision": tiny_models.write_vision_checkpoint,
    "minicpm": tiny_minicpm.write_minicpm_checkpoint,
}


@pytest.fixture(scope="module", params=list(WRITERS))
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder)
    backbone = open_backbone(str(folder), device="cuda", dtype="float32")
    if backbone.kind == "vision":
        backbone.lm_head()[backbone.image_token_id] = 0.0
    return backbone


@pytest.fixture(scope="module")
def items(backbone, tmp_path_factory):
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    found = []
    for number, text in enumerate(QUESTIONS):
        path = folder / f"{number}.png"
        Image.fromarray(noise.integers(0, 255, (30 + 20 * number, 64, 3), dtype=np.uint8)).save(path)
        turns = [Message(role="user", content=text)]
        found.append(backbone.prepare(turns, path if backbone.reads_images else None, answer=True))
    return found


def answers(backbone, items, settings=SETTINGS, *, graphs):
    """The ids of each answer, and of one more to a second question for each."""
    loaded, policy = backbone.answering_parts(), Policy.of(settings)
    stops = stop_tokens(loaded.model, loaded.renderer)
    shapes = slot_shapes(loaded)
    decoder = Decoder(loaded, shapes, slots=4, length=768, policies=[policy], limit=NEW, stops=stops, graphs=graphs)
    asks = [Ask(limit=NEW - number, policy=policy, seed=7 + number) for number in range(len(items))]
    for group in alike(items):
        decoder.begin([3 - place for place in group], [items[place] for place in group], [asks[p] for p in group])
    decoder.step(NEW)
    first = decoder.ended()
    kept = [len(item.token_ids) + 2 for item in items]
    more = [Suffix(row=3 - place, start=kept[place], ids=[20, 21, 22] * 30) for place in range(len(items))]
    decoder.go_on(more, asks)
    decoder.step(NEW)
    second = decoder.ended()
    return [(first[3 - place], second[3 - place]) for place in range(len(items))]


def test_replayed_steps_are_the_steps_themselves(backbone, items):
    assert answers(backbone, items, graphs=True) == answers(backbone, items, graphs=False)
    drawn = GenerationSettings.published(max_new_tokens=NEW)
    assert answers(backbone, items, drawn, graphs=True) == answers(backbone, items, drawn, graphs=False)


def test_states_that_replayed_steps_keep_are_those_of_whole_passes(backbone, items):
    loaded = backbone.answering_parts()
    shapes = slot_shapes(loaded, keeps=True)
    decoder = Decoder(
        loaded, shapes, slots=4, length=768, policies=[Policy.of(SETTINGS)], limit=NEW, stops=[], keeps=True
    )
    for place, item in enumerate(items):
        decoder.begin([place], [item], [Ask(limit=NEW, policy=Policy.of(SETTINGS))])
    decoder.step(NEW)
    for row, answer in decoder.ended().items():
        item, ids = items[row], [*items[row].token_ids.tolist(), *answer[:-1]]
        roles = np.zeros(len(ids), np.uint8)
        roles[: len(item.roles)] = item.roles
        (expected,) = backbone.hidden_states([replace(item, token_ids=np.array(ids, np.int32), roles=roles)])
        found = decoder.states(row, len(ids))
        assert relative_error(found, expected) < BATCH_TOLERANCE[expected.dtype]
        assert relative_error(found[-1], expected[-1]) < BATCH_TOLERANCE[expected.dtype]


def test_answers_are_those_of_generate(backbone, items):
    decode = backbone.renderer.tokenizer.decode
    for (first, _), item, number in zip(answers(backbone, items, graphs=True), items, range(9), strict=False):
        (expected,) = backbone.generate([item], GenerationSettings(max_new_tokens=NEW - number))
        ids = first if not expected.complete else first[:-1]
        assert (len(ids), decode(ids, skip_special_tokens=True).strip()) == (expected.tokens, expected)


def test_a_step_that_cannot_be_captured_runs_without_a_graph(backbone, items, monkeypatch, capsys):
    expected = answers(backbone, items, graphs=False)
    usual = SlotModel.next_logits

    def waits(self, tokens, lengths, *others):
        lengths.max().item()  # no capture may wait for the device
        return usual(self, tokens, lengths, *others)

    monkeypatch.setattr(SlotModel, "next_logits", waits)
    assert answers(backbone, items, graphs=True) == expected
    assert capsys.readouterr().err.count("cannot be replayed from a CUDA graph") == 1


def test_a_decoder_that_is_gone_holds_no_memory(backbone, items):
    """The first one leaves cuBLAS a workspace for the stream of its captures; a second one must add nothing."""
    answers(backbone, items, graphs=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    answers(backbone, items, graphs=True)
    assert torch.cuda.memory_allocated() == before
