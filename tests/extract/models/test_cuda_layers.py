"""Layers kept by hooks on compiled models on a GPU, against an uncompiled forward pass in float32 on the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image

from agiqa.extract import open_backbone
from agiqa.extract.models.checks import relative_error
from agiqa.extract.models.layers import parse_layers
from tests.extract.backbone_contract import CONVERSATION, SHORT
from tests.extract.families.sweep import KINDS, TALK, save_pictures
from tests.extract.models.test_layers import own_states
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import write_deep_checkpoint

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, for which layers are compiled"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns of its own code, and of float32 without TF32
    pytest.mark.usefixtures("exact_convolutions"),
]
TOLERANCE = 1e-4
"""Of float32 on two devices."""
WORSE = 1.5
"""How much farther from float32 compiled layers may be than others in bfloat16."""
ASKED = (("0", "2", "4", "last"), ("last",), ("2", "4"), ("0",), ("0", "2", "4", "last"))
"""Hooks come and go between calls."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return write_deep_checkpoint(tmp_path_factory.mktemp("deep"))


def talks_of(backbone):
    """Items of different lengths, so that the shorter ones are padded."""
    talks = (CONVERSATION, SHORT, CONVERSATION[:1])
    return talks, [backbone.prepare(talk, None) for talk in talks]


def errors_of(found, expected):
    """By layer, the largest relative error over items; `expected` are lists of all layers, `last` at the end."""
    layers = list(found[0])
    places = {layer: -1 if layer == "last" else int(layer) for layer in layers}
    return {
        layer: max(
            relative_error(one[layer].cpu(), own[places[layer]]) for one, own in zip(found, expected, strict=True)
        )
        for layer in layers
    }


def test_compiled_layers_are_those_that_transformers_reports_in_float32(deep):
    backbone = open_backbone(str(deep), device=DEVICE, dtype="float32")
    talks, batch = talks_of(backbone)
    expected = [own_states(backbone, talk, None) for talk in talks]
    backbone.compile_layers()
    for layers in ASKED:
        found = backbone.layer_states(batch, layers)
        assert {states.device.type for one in found for states in one.values()} == {DEVICE}
        errors = errors_of(found, expected)
        assert tuple(errors) == layers
        assert max(errors.values()) < TOLERANCE


def test_compiled_layers_are_as_near_to_float32_as_others_in_bfloat16(deep):
    layers = ("2", "4", "last")
    found = {}
    for compiled in (False, True):
        backbone = open_backbone(str(deep), device=DEVICE, dtype="bfloat16")
        talks, batch = talks_of(backbone)
        expected = [own_states(backbone, talk, None) for talk in talks]
        if compiled:
            backbone.compile_layers()
        states = backbone.layer_states(batch, layers)
        assert {one.dtype for item in states for one in item.values()} == {torch.bfloat16}
        found[compiled] = errors_of(states, expected)
    for layer in layers:
        assert 0 < found[True][layer] <= WORSE * found[False][layer]


@pytest.mark.parametrize(("kind", "family"), [("text", "gemma2"), ("vision", "gemma3"), ("vision", "qwen3_vl")])
def test_compiled_layers_of_other_families(kind, family, tmp_path):
    """Gemma normalises around its blocks, and Qwen3-VL adds states of its vision tower between them."""
    folder = tmp_path / "model"
    folder.mkdir()
    pictures = save_pictures(tmp_path) if kind == "vision" else [None, None]
    KINDS[kind][1](folder, family)
    backbone = open_backbone(str(folder), dtype="float32", device=DEVICE)
    layers = parse_layers("all", backbone.layer_count, model=family)
    talks = (TALK, TALK[:1])
    expected = [own_states(backbone, talk, picture) for talk, picture in zip(talks, pictures, strict=True)]
    batch = [backbone.prepare(talk, picture) for talk, picture in zip(talks, pictures, strict=True)]
    backbone.compile_layers()
    assert max(errors_of(backbone.layer_states(batch, layers), expected).values()) < TOLERANCE


def test_compiled_layers_of_minicpm_are_those_of_its_llama(tmp_path):
    """Its packed layers have kernels of their own, and may overwrite their input."""
    checkpoint = str(write_minicpm_checkpoint(tmp_path / "minicpm"))
    exact = open_backbone(checkpoint, device="cpu", dtype="float32")
    batch = []
    for number, (width, height) in enumerate([(64, 50), (300, 20), (90, 60)]):
        noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        batch.append(exact.prepare(CONVERSATION[: 1 + 2 * (number % 2)], tmp_path / f"{number}.png"))
    batch.append(exact.prepare(CONVERSATION, None))
    with torch.no_grad():
        model = exact.loaded().llm.model
        together = model(inputs_embeds=exact._embedded(batch), output_hidden_states=True).hidden_states
    expected = [[states[row, : len(item.token_ids)] for states in together] for row, item in enumerate(batch)]
    layers = [*map(str, range(exact.layer_count)), "last"]
    plain, compiled = (open_backbone(checkpoint, device=DEVICE, dtype="bfloat16") for _ in range(2))
    compiled.compile_layers()
    own, found = (errors_of(one.layer_states(batch, layers), expected) for one in (plain, compiled))
    for layer in layers:
        assert 0 < found[layer] <= max(WORSE * own[layer], 1e-2)
        assert own[layer] < 0.05
    (alone,) = compiled.layer_states(batch[1:2], ("1",))
    assert relative_error(alone["1"].cpu(), expected[1][1]) < 0.05
