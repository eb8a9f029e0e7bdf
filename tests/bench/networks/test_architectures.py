"""The networks against their papers: layer shapes, parameter counts, and what their special layers compute.

The parameter counts of timm's encoders, ViL and HyperIQA are published; those of DBCNN and StairIQA follow from the
layer shapes and guard them.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple

from agiqa.bench.networks.architectures.dbcnn import DBCNN
from agiqa.bench.networks.architectures.encoders import MeanOfConvolutions, timm_model, timm_network
from agiqa.bench.networks.architectures.hyperiqa import HyperIQA
from agiqa.bench.networks.architectures.stairiqa import WIDTHS, StairIQA
from agiqa.bench.networks.architectures.vil import ViLBlock, ViLEncoder, vil_network
from agiqa.bench.networks.building import random_network
from agiqa.bench.networks.config import TABLE_II, network_config
from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.models.timm_models import import_timm


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.fixture
def meta():
    """Builds networks without memory for their weights."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(
    ("name", "published"), [("vgg16", 138.36), ("resnet50", 25.56), ("vit_base_patch16_224", 86.57)]
)
def test_encoders_of_timm_have_the_published_parameters(meta, name, published):
    """Simonyan and Zisserman 2015, He et al. 2016 and Dosovitskiy et al. 2021, with 1,000 classes."""
    assert round(millions(import_timm().create_model(name)), 2) == published


def test_vgg16_is_read_after_its_last_convolution(meta):
    encoder = MeanOfConvolutions(timm_model("vgg16"))
    assert round(millions(encoder), 2) == 14.71  # its 13 convolutions
    assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, 512)


@pytest.mark.parametrize(("name", "published"), [("vil_tiny", 6), ("vil_small", 23), ("vil_base", 89)])
def test_vil_has_the_published_parameters(meta, name, published):
    network = vil_network(name, image_size=224, hidden=0)
    features = network.regressor[0].in_features
    classifier = (features + 1) * 1000
    assert round(millions(network.encoder) + classifier / 1e6) == published
    assert len(network.encoder.blocks) == 24
    assert network.encoder.positions.shape[1:3] == (14, 14)


def test_hyperiqa_has_the_published_target_network(meta):
    network = HyperIQA()
    assert round(millions(network), 2) == 27.38
    assert [(layer.inputs, layer.outputs) for layer in network.target] == [
        *((224, 112), (112, 56), (56, 28), (28, 14), (14, 1)),
    ]
    assert [tuple(layer.weights.weight.shape) for layer in network.target] == [
        *((512, 112, 3, 3), (128, 112, 3, 3), (32, 112, 3, 3), (8, 112, 3, 3), (14, 112)),
    ]
    assert sum(module.linear.out_features for module in (*network.local, network.whole)) == 224
    assert [[*map(tuple, (p.shape for p in module.parameters()))] for module in network.local] == [
        [(16, 256, 1, 1), (16, 1024), (16,)],  # 8 x 8 tiles, and no bias before them
        [(32, 512, 1, 1), (16, 512), (16,)],
        [(64, 1024, 1, 1), (16, 256), (16,)],
    ]


def test_hyperiqa_begins_with_the_authors_values():
    """He's normal values everywhere but in the ResNet50 and the three 1 x 1 convolutions after it, which are torch's."""
    torch.manual_seed(6)
    network = HyperIQA()
    for layer in (network.target[0].weights, network.whole.linear, network.local[2].linear):
        fan_in = layer.weight[0].numel()
        assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
    assert float(network.hyper[0].weight.detach().abs().max()) <= 1 / math.sqrt(2048)  # uniform


def test_dbcnn_has_the_published_layers(meta):
    network = DBCNN()
    assert round(millions(network), 2) == 15.31
    assert network.distortion(torch.zeros(1, 3, 448, 448)).shape == (1, 128, 28, 28)
    assert network.content(torch.zeros(1, 3, 448, 448)).shape == (1, 512, 28, 28)
    assert network.linear.in_features == 65_536


def test_stairiqa_has_the_published_layers(meta):
    network = StairIQA()
    assert round(millions(network), 2) == 30.49
    steps = [(stage, WIDTHS[stage], WIDTHS[stage + 1]) for first in range(4) for stage in range(first, 4)]
    expected = sum(n * n // 4 + 9 * (n // 4) ** 2 + n // 4 * m for _, n, m in steps)
    assert millions(network.stairs) == expected / 1e6
    assert len(steps) == 10


@pytest.mark.parametrize("name", [*TABLE_II, "vil_tiny", "test_vit"])
def test_a_network_has_a_body_and_new_layers_and_nothing_else(meta, name):
    network = random_network(network_config(name, {"image_size": 32}))
    parts = [id(p) for module in (network.body, *network.new_layers) for p in module.parameters()]
    assert sorted(parts) == sorted(id(parameter) for parameter in network.parameters())


@pytest.mark.parametrize("name", ["hyperiqa", "dbcnn", "stairiqa", "vil_tiny", "test_resnet"])
def test_every_parameter_is_used_and_items_do_not_depend_on_their_batch(name):
    torch.manual_seed(0)
    network = random_network(network_config(name, {"image_size": 32}))
    pixels = torch.randn(3, 3, 32, 32)
    scores = network(pixels)
    assert scores.shape == (3,)
    scores.square().sum().backward()
    # at random weights, a ReLU may be closed for all images, but no parameter may be left out of the graph
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(pixels)[1:2], network(pixels[1:2]), rtol=1e-3, atol=1e-4)


def test_hyperiqa_scores_each_image_by_a_network_of_its_own():
    """The target network of one image, computed layer by layer in float64."""
    torch.manual_seed(1)
    network = HyperIQA().eval()
    pixels = torch.randn(2, 3, 224, 224)
    kept = {}
    network.hyper.register_forward_hook(lambda *passed: kept.update(hyper=passed[2]))
    network.target[0].register_forward_pre_hook(lambda _, passed: kept.update(values=passed[0]))
    with torch.no_grad():
        scores = network(pixels)
        assert kept["hyper"].shape == (2, 112, 7, 7)
        for image in range(2):
            features = kept["hyper"][image : image + 1]
            values = kept["values"][image].double().numpy()
            for number, layer in enumerate(network.target):
                means = features.mean(dim=(2, 3))
                written = layer.weights(features if number < 4 else means).double().numpy().ravel()
                biases = layer.biases(means).double().numpy().ravel()
                values = written.reshape(layer.outputs, layer.inputs) @ values + biases
                values = 1 / (1 + np.exp(-values)) if number < 4 else values
            assert float(scores[image]) == pytest.approx(float(values[0]), rel=1e-4)


def test_dbcnn_pools_the_products_of_all_channels():
    torch.manual_seed(2)
    network = DBCNN().eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        content, distortion = (
            part(pixels)[0].double().numpy().reshape(-1, 16) for part in (network.content, network.distortion)
        )
        products = np.stack([[np.mean(a * b) for b in distortion] for a in content]).ravel()
        rooted = np.sign(products) * np.sqrt(np.abs(products) + 1e-8)
        weights = network.linear.weight[0].double().numpy()
        wanted = weights @ (rooted / np.linalg.norm(rooted)) + float(network.linear.bias)
        assert float(network(pixels)) == pytest.approx(wanted, rel=1e-3)


def test_stairiqa_adds_every_step_to_the_stage_after_it():
    torch.manual_seed(3)
    network = StairIQA().eval()
    resnet, stairs, pixels = network.resnet, network.stairs, torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(pixels))))
        first = resnet.layer1(before)
        second = resnet.layer2(first)
        third = resnet.layer3(second)
        last = resnet.layer4(third)
        ends = [
            stairs[0][3](stairs[0][2](stairs[0][1](stairs[0][0](before) + first) + second) + third),
            stairs[1][2](stairs[1][1](stairs[1][0](first) + second) + third),
            stairs[2][1](stairs[2][0](second) + third),
            stairs[3][0](third),
        ]
        wanted = network.regressor((last + sum(ends)).mean(dim=(2, 3)))[:, 0]
        torch.testing.assert_close(network(pixels), wanted, rtol=1e-3, atol=1e-4)


def block_of_the_paper(block, tokens, side):
    """A ViL block that reads forwards, with the cell of the xlstm package."""
    up = functional.linear(
        functional.layer_norm(tokens, tokens.shape[-1:], block.norm.weight, block.norm.bias),
        block.up.weight,
        block.up.bias,
    )
    branch, gate = up.chunk(2, dim=-1)
    batch, count, inner = branch.shape
    grid = branch.reshape(batch, side, side, inner).permute(0, 3, 1, 2)
    convolution = block.convolution
    convolved = functional.conv2d(grid, convolution.weight, convolution.bias, padding=1, groups=inner)
    convolved = functional.silu(convolved.permute(0, 2, 3, 1).reshape(batch, count, inner))

    layer = block.parts
    parts = [
        values @ torch.block_diag(*layer.weight[part]).T + layer.bias[part]
        for part, values in enumerate((convolved, convolved, branch))
    ]
    gates = torch.cat(parts, dim=-1)
    rows = [part.reshape(batch, count, 4, inner // 4).transpose(1, 2) for part in parts]
    entries = [
        functional.linear(gates, block.gates.weight[heads], block.gates.bias[heads]).transpose(1, 2)[..., None]
        for heads in (slice(4), slice(4, 8))
    ]
    hidden = parallel_stabilized_simple(*rows, *entries)
    normed = functional.layer_norm(hidden, hidden.shape[-1:]).transpose(1, 2).reshape(batch, count, inner)
    normed = normed * block.head_norm.weight + block.head_norm.bias
    return tokens + functional.linear(
        (normed + block.skip * convolved) * functional.silu(gate), block.down.weight, block.down.bias
    )


def test_a_block_of_vil_is_that_of_the_paper_in_both_directions():
    torch.manual_seed(4)
    block, tokens = ViLBlock(16), torch.randn(2, 9, 16)
    for parameter in block.parameters():  # gates of weight 0 would hide what they read
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        wanted = block_of_the_paper(block, tokens, 3)
        torch.testing.assert_close(block(tokens, 3, backwards=False), wanted, rtol=1e-4, atol=1e-4)
        wanted = block_of_the_paper(block, tokens.flip(1), 3).flip(1)
        torch.testing.assert_close(block(tokens, 3, backwards=True), wanted, rtol=1e-4, atol=1e-4)


def test_vil_reads_the_image_from_both_ends():
    torch.manual_seed(5)
    encoder = ViLEncoder(16, image_size=48, blocks=2).eval()
    pixels = torch.randn(1, 3, 48, 48)
    changed = pixels.clone()
    changed[..., 32:, 32:] += 1.0  # the last patch
    with torch.no_grad():
        before, after = encoder(pixels), encoder(changed)
    assert before.shape == (1, 32)
    assert not torch.allclose(before[:, :16], after[:, :16])  # the first token reads the last patch
    assert not math.isclose(float(before[:, 16:].sum()), float(after[:, 16:].sum()))


def test_vil_refuses_images_that_patches_do_not_fill():
    with pytest.raises(ConfigError, match="patches of 16 pixels, and 40 is no multiple"):
        vil_network("vil_tiny", image_size=40, hidden=8)


def test_an_unknown_name_is_answered_with_the_nearest_one_of_timm():
    with pytest.raises(UnknownName, match="Did you mean 'resnet50'"):
        timm_network("resnet5O", image_size=32, hidden=8)


def test_vit_gets_the_size_of_the_images_and_its_own_normalisation(meta):
    network = timm_network("vit_base_patch16_224", image_size=32, hidden=8)
    assert network.encoder.pos_embed.shape == (1, 5, 768)
    assert network.mean == network.std == (0.5, 0.5, 0.5)
