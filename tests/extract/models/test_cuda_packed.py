"""Packed and compiled MiniCPM on a GPU in bfloat16, against float32 on the CPU, and its kernels against float64."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, linear

from agiqa.extract import open_backbone
from agiqa.extract.models.attention import Bounds, attention
from agiqa.extract.models.minicpm.packed import PackedForm, PackedMiniCPM
from agiqa.extract.models.minicpm.passes import gated, linear_gelu, rotated, signed
from tests.extract.backbone_contract import CONVERSATION
from tests.extract.models.test_attention import softmax_of
from tests.extract.tiny_minicpm import write_minicpm_checkpoint

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns of its own code
]
SIZES = [(64, 50), (300, 20), (1, 1), (150, 160), (64, 50), (90, 60)]
WORSE = 1.5
"""How much farther from float32 a faster way may be than transformers' own layers in bfloat16."""


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """For each way to compute them, the hidden states of the same items; `exact` in float32 on the CPU."""
    folder = tmp_path_factory.mktemp("minicpm")
    checkpoint = write_minicpm_checkpoint(folder / "tiny")
    for number, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    exact, backbone = (
        open_backbone(str(checkpoint), device=device, dtype=dtype)
        for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16"))
    )
    batch = [backbone.prepare(CONVERSATION[: 1 + n % 3], folder / f"{n}.png") for n in range(len(SIZES))]
    batch.append(backbone.prepare(CONVERSATION, None))
    with torch.no_grad():
        found = {"exact": exact.states(batch), "plain": backbone.states(batch)}
    found["packed"] = backbone.hidden_states(batch)
    found["alone"] = [backbone.hidden_states([item])[0] for item in batch]
    backbone._packed = PackedMiniCPM(backbone._loaded(), PackedForm(head_width=16, mlp_multiple=1, fused_gelu=False))
    found["padded weights"] = backbone.hidden_states(batch)
    backbone._packed = None
    backbone.compile_layers()
    found["compiled"] = backbone.hidden_states(batch)
    found["compiled, alone"] = [backbone.hidden_states([item])[0] for item in batch]
    return found


def error(found, expected):
    one, other = (torch.cat([rows.cpu().double() for rows in states]) for states in (found, expected))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("way", ["packed", "alone", "padded weights", "compiled", "compiled, alone"])
def test_faster_ways_are_as_near_to_float32(states, way):
    assert 0 < error(states[way], states["exact"]) <= WORSE * error(states["plain"], states["exact"])


@pytest.mark.parametrize(("width", "heads", "key_heads", "causal"), [(128, 8, 2, True), (72, 4, 4, False)])
@pytest.mark.parametrize("lengths", [[70] * 3, [31, 64, 64, 7, 120, 1, 33, 90]])
def test_attention_is_softmax_for_equal_and_for_any_lengths(width, heads, key_heads, causal, lengths):
    random = torch.Generator().manual_seed(0)
    joint = torch.randn(sum(lengths), heads + 2 * key_heads, width, generator=random).to("cuda", torch.bfloat16)
    query, key, value = joint.split([heads, key_heads, key_heads], dim=1)
    bounds = Bounds.of(np.array(lengths), query.device)
    with torch.inference_mode():
        found = attention(query, key, value, bounds, bounds, causal=causal, scale=width**-0.5).cpu().double()
    parts = zip(*(part.cpu().split(lengths) for part in (query, key, value)), strict=True)
    expected = torch.cat([softmax_of(*part, causal=causal, scale=width**-0.5) for part in parts])
    assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_the_gelu_of_a_product_is_the_one_by_tanh():
    random = torch.Generator().manual_seed(0)
    values, weight, bias = (torch.randn(*shape, generator=random) for shape in ((64, 48), (80, 48), (80,)))
    values, weight, bias = (tensor.to("cuda", torch.bfloat16) for tensor in (values, weight / 7, bias))
    with torch.inference_mode():
        found = linear_gelu(values, weight, bias).cpu().double()
    expected = gelu(linear(*(tensor.cpu().double() for tensor in (values, weight, bias))), approximate="tanh")
    assert float((found - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("shape", [(3, 14_336), (5, 7, 11)])
def test_the_gate_is_silu_times_the_other_product(shape):
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(*shape, generator=random).to("cuda", torch.bfloat16) for _ in range(2))
    expected = torch.nn.functional.silu(gate.cpu().double()) * up.cpu().double()
    found = gated(gate, up).cpu().double()
    assert float((found - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(32, 8, 128), (4, 2, 32), (3, 1, 24)])
def test_heads_are_turned_by_their_places(heads, key_heads, width):
    """The last width has no kernel."""
    random = torch.Generator().manual_seed(0)
    read = torch.randn(13, heads + 2 * key_heads, width, generator=random).to("cuda", torch.bfloat16)
    angles = torch.rand(13, 1, width // 2, generator=random).repeat(1, 1, 2) * 6
    cos, sin = (wave(angles).to("cuda", torch.bfloat16) for wave in (torch.cos, torch.sin))
    whole, turned = read.cpu().double(), read[:, : heads + key_heads].cpu().double()
    other = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    expected = turned * cos.cpu().double() + other * sin.cpu().double()
    found = rotated(read, cos, signed(sin), heads + key_heads).cpu().double()
    assert float((found - expected).norm() / expected.norm()) < 1e-2
    assert torch.equal(read[:, heads + key_heads :].cpu().double(), whole[:, heads + key_heads :])  # the values stay
