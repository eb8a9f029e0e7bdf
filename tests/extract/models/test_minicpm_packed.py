"""MiniCPM with packed tokens and patches, and with compiled layers, against the model itself."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from agiqa.extract import open_backbone
from agiqa.extract.models.minicpm.packed import PackedForm, PackedMiniCPM, joined_linear
from tests.extract.backbone_contract import CONVERSATION
from tests.extract.tiny_minicpm import write_minicpm_checkpoint

SIZES = [(64, 50), (300, 20), (1, 1), (150, 160)]
TOLERANCE = 2e-6
"""Of float32: sums run in another order."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_minicpm_checkpoint(tmp_path_factory.mktemp("minicpm") / "tiny")


@pytest.fixture
def backbone(tiny):
    return open_backbone(str(tiny), device="cpu")


@pytest.fixture
def batch(backbone, tmp_path):
    """Items with images of several sizes, the last without one."""
    found = []
    for number, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        found.append(backbone.prepare(CONVERSATION[: 1 + 2 * (number % 2)], tmp_path / f"{number}.png"))
    return [*found, backbone.prepare(CONVERSATION, None)]


def plain_states(backbone, batch):
    """By transformers' layers, padded."""
    with torch.no_grad():
        return backbone.states(batch)


def largest_error(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)


def test_packed_items_have_the_states_of_padded_ones(backbone, batch):
    expected = plain_states(backbone, batch)
    for chosen in (slice(None), slice(1), slice(4, None), slice(None, None, -1)):
        assert largest_error(backbone.hidden_states(batch[chosen]), expected[chosen]) < TOLERANCE


def test_packed_layers_are_those_that_transformers_reports(backbone, batch):
    """The Llama reads the same embeddings by transformers, padded; only the layers asked for are computed."""
    layers = [*map(str, range(backbone.layer_count)), "last"]
    found = backbone.layer_states(batch, layers)
    with torch.no_grad():
        output = backbone.loaded().llm.model(inputs_embeds=backbone._embedded(batch), output_hidden_states=True)
    for layer, expected in zip(layers, output.hidden_states, strict=True):
        own = [states[: len(item.token_ids)] for states, item in zip(expected, batch, strict=True)]
        assert largest_error([states[layer] for states in found], own) < TOLERANCE
    backbone._in_training = False
    for asked in (["0"], ["1"], ["0", "last"]):
        for some, whole in zip(backbone.layer_states(batch, asked), found, strict=True):
            assert list(some) == asked
            assert all(torch.equal(some[layer], whole[layer]) for layer in asked)


def test_a_model_in_training_has_the_same_layers(backbone, batch):
    layers = ("0", "1", "last")
    packed = backbone.layer_states(batch, layers)
    backbone.loaded()
    for layer in layers:
        plain = [states[layer] for states in backbone.layer_states(batch, layers)]
        assert largest_error(plain, [states[layer] for states in packed]) < TOLERANCE


@pytest.mark.parametrize(
    "form", [PackedForm(head_width=16), PackedForm(mlp_multiple=48), PackedForm(fused_gelu=False, mlp_multiple=1)]
)
def test_padded_weights_compute_the_same(backbone, batch, form):
    expected = backbone.hidden_states(batch)
    backbone._packed = PackedMiniCPM(backbone._loaded(), form)
    assert largest_error(backbone.hidden_states(batch), expected) < TOLERANCE


def test_joined_maps_are_the_maps_and_share_their_memory():
    maps = [torch.nn.Linear(6, rows) for rows in (4, 2, 3)]
    values = torch.randn(5, 6)
    expected = torch.cat([one(values) for one in maps], dim=1).detach()
    weights = [one.weight.detach().clone() for one in maps]
    joined = joined_linear(*maps)
    torch.testing.assert_close(joined(values), expected, rtol=1e-6, atol=1e-6)
    for one, weight in zip(maps, weights, strict=True):
        assert torch.equal(one.weight, weight)
        assert one.weight.untyped_storage().data_ptr() == joined.weight.untyped_storage().data_ptr()


def test_a_model_in_training_computes_with_its_own_layers(backbone, batch):
    before = backbone.hidden_states(batch)
    model = backbone.loaded()
    with torch.no_grad():
        model.llm.model.layers[0].mlp.down_proj.weight.mul_(2)
        layer = model.llm.model.layers[1].mlp
        layer.up_proj = torch.nn.Sequential(layer.up_proj, torch.nn.Identity())  # as adapters wrap a map
    after = backbone.hidden_states(batch)
    assert largest_error(after, plain_states(backbone, batch)) < TOLERANCE
    assert largest_error(after, before) > 100 * TOLERANCE


@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own code
def test_traced_layers_have_the_same_states_for_any_batch(backbone, batch):
    """One trace for all layers and lengths. Code for a CPU would take a minute more."""
    parts = (batch, batch[:1], batch[1:3], batch[4:])
    expected = [backbone.hidden_states(items) for items in parts]
    torch.compiler.reset()
    counters.clear()
    packed = backbone._packed_model()
    for layer in packed.decoder_layers:
        layer.compile(dynamic=True, backend="aot_eager")
    for items, wanted in zip(parts, expected, strict=True):
        assert largest_error(backbone.hidden_states(items), wanted) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
