"""The GPU's kernels against the torch forms that the CPU runs: outputs and gradients, on a CUDA device only."""

import gc

import pytest
import torch
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple

from agiqa.heads.model.encoders import ENCODERS, XLSTMEncoder
from agiqa.heads.model.encoders.base import Encoder
from agiqa.heads.model.encoders.kernels.cuda_graphs import GraphedEncoder
from agiqa.heads.model.encoders.kernels.dispatch import causal_conv_silu, norm
from agiqa.heads.model.encoders.mamba2 import scan, ssd
from agiqa.heads.model.encoders.mlstm import mlstm, mlstm_in_torch
from agiqa.heads.model.encoders.slstm import slstm
from agiqa.heads.settings.config import HeadConfig

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, which these kernels need"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch.compile looks at it
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # by torch's compiler, for mlstm_kernels
]


def gradients(function, *arguments, device, dtype, mixed=False):
    """Output of `function` and the gradients of a fixed random projection of it, as float64 on the CPU."""
    given = [argument.to(device, dtype).requires_grad_() for argument in arguments]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mixed):
        output = function(*given)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(device, output.dtype)
    found = torch.autograd.grad((output * weights).sum(), given)
    return [value.detach().double().cpu() for value in (output, *found)]


def assert_near(found, expected, most):
    """Small gradients, such as those of gates that do nothing, must be near by the measure of the largest."""
    largest = max(float(value.norm()) for value in expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.isfinite().all(), number
        assert float((one - other).norm()) <= most * max(0.3 * largest, float(other.norm())), number


@pytest.mark.parametrize(("mixed", "most"), [(False, 1e-5), (True, 2e-2)])
@pytest.mark.parametrize(
    ("time", "batch", "heads", "dim"), [(1, 1, 4, 128), (37, 5, 2, 32), (130, 33, 4, 128), (20, 16, 1, 128)]
)
def test_slstm_kernels(time, batch, heads, dim, mixed, most):
    torch.manual_seed(0)
    inputs, bias = torch.randn(time, batch, 4, heads, dim), torch.randn(4, heads, dim)
    recurrent = torch.randn(heads, 4, dim, dim) / dim**0.5
    run = lambda *given: slstm(*given)[0]  # noqa: E731
    expected = gradients(run, inputs, recurrent, bias, device="cpu", dtype=torch.float64)
    found = gradients(run, inputs, recurrent, bias, device="cuda", dtype=torch.float32, mixed=mixed)
    assert_near(found, expected, most)


@pytest.mark.parametrize(("mixed", "most"), [(False, 5e-3), (True, 5e-2)])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (64, 64), (100, 256), (477, 256)])
def test_mlstm_kernels(tokens, dim, mixed, most):
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(3, 2, tokens, dim) for _ in range(3))
    gates = torch.randn(3, 2, tokens, 1), 4 + torch.randn(3, 2, tokens, 1)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    arguments = (queries, keys, values, *gates)
    norm = lambda hidden: torch.nn.functional.layer_norm(hidden, (dim,))  # noqa: E731  (as in the cell)
    expected = gradients(
        lambda *given: norm(parallel_stabilized_simple(*given, mask)), *arguments, device="cpu", dtype=torch.float64
    )
    found = gradients(lambda *given: norm(mlstm(*given)), *arguments, device="cuda", dtype=torch.float32, mixed=mixed)
    assert_near(found, expected, most)


@pytest.mark.parametrize("forget", [0.0, 3.0])
@pytest.mark.parametrize(("mixed", "most"), [(False, 1e-5), (True, 2e-2)])
def test_the_mlstm_has_its_whole_gradient_without_a_norm_too(mixed, most, forget):
    torch.manual_seed(0)
    rows = [torch.randn(2, 3, 150, 64) for _ in range(3)]
    if mixed:  # rounded before: some normalisers are near zero, and rounding alone moves their gradients by a tenth
        rows = [part.bfloat16() for part in rows]
    gates = torch.randn(2, 3, 150, 1), forget + torch.randn(2, 3, 150, 1)
    expected = gradients(mlstm_in_torch, *rows, *gates, device="cpu", dtype=torch.float64)
    found = gradients(mlstm, *rows, *gates, device="cuda", dtype=torch.float32, mixed=mixed)
    assert_near(found, expected, most)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "dim", "state", "plain"),
    [(1, 16, 16, 1e-5), (64, 64, 16, 1e-5), (477, 64, 16, 1e-4), (100, 128, 64, 5e-3)],
)  # wide rows are multiplied in TF32
def test_scan_kernels(tokens, dim, state, plain, mixed):
    torch.manual_seed(0)
    inputs, step_sizes, rates = torch.randn(3, tokens, 5, dim), torch.rand(3, tokens, 5), -3 * torch.rand(5)
    arguments = (inputs, step_sizes, rates, *torch.randn(2, 3, tokens, state))
    expected = gradients(ssd, *arguments, device="cpu", dtype=torch.float64)

    def run(inputs, step_sizes, rates, writes, reads):
        product = torch.bfloat16 if mixed else torch.float32
        return scan(inputs.to(product), step_sizes, rates, writes.to(product), reads.to(product))

    found = gradients(run, *arguments, device="cuda", dtype=torch.float32, mixed=mixed)
    assert_near(found, expected, 2e-2 if mixed else plain)


@pytest.mark.parametrize(("mixed", "most"), [(False, 1e-2), (True, 1e-1)])
def test_the_whole_stack(mixed, most):
    torch.manual_seed(0)
    encoder = XLSTMEncoder(HeadConfig(width=512))
    lengths = torch.tensor([300, 77, 1])
    mask = torch.arange(300) < lengths[:, None]
    tokens = torch.randn(3, 300, 512)
    expected = gradients(lambda x: encoder(x, mask), tokens, device="cpu", dtype=torch.float32)
    encoder.cuda()
    assert encoder.kernels == "mlstm: Triton kernels; slstm: Triton kernels"
    found = gradients(lambda x: encoder(x, mask.cuda()), tokens, device="cuda", dtype=torch.float32, mixed=mixed)
    assert_near(found, expected, most)
    assert (found[0][~mask] == 0).all()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["lstm", "gru", "mamba2", "transformer"])
@pytest.mark.parametrize(("mixed", "most"), [(False, 2e-3), (True, 5e-2)])
def test_the_other_encoders(name, bidirectional, mixed, most):
    torch.manual_seed(0)
    encoder = ENCODERS.get(name)(HeadConfig(width=128, layers=2, bidirectional=bidirectional))
    mask = torch.arange(150) < torch.tensor([150, 77, 1] * 12)[:, None]
    tokens = torch.randn(36, 150, 128)
    expected = gradients(lambda x: encoder(x, mask), tokens, device="cpu", dtype=torch.float32)
    encoder.cuda()
    found = gradients(lambda x: encoder(x, mask.cuda()), tokens, device="cuda", dtype=torch.float32, mixed=mixed)
    assert_near(found, expected, most)
    assert (found[0][~mask] == 0).all()


@pytest.mark.parametrize(("mixed", "most"), [(False, 1e-5), (True, 2e-2)])
@pytest.mark.parametrize(("items", "tokens", "channels"), [(3, 70, 130), (2, 5, 7), (4, 100, 512)])
def test_causal_conv_kernels(items, tokens, channels, mixed, most):
    torch.manual_seed(0)
    arguments = torch.randn(items, tokens, channels), torch.randn(channels, 1, 4), torch.randn(channels)
    expected = gradients(causal_conv_silu, *arguments, device="cpu", dtype=torch.float64)
    found = gradients(causal_conv_silu, *arguments, device="cuda", dtype=torch.float32, mixed=mixed)
    assert_near(found, expected, most)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("mixed", "most"), [(False, 1e-5), (True, 1e-2)])
@pytest.mark.parametrize(
    ("shape", "heads"), [((3, 477, 512), 1), ((7, 100), 1), ((1, 4096), 1), ((5, 9, 4, 256), 4), ((2, 50, 3, 33), 3)]
)
def test_norm_kernels(shape, heads, mixed, most, centred):
    torch.manual_seed(0)
    inputs, weight = 1 + 3 * torch.randn(shape), torch.randn(heads, shape[-1]).squeeze(0)
    biases = [torch.randn(shape[-1])] if centred and heads == 1 else []

    def run(given, weight, *bias):
        return norm(given, weight, *bias, eps=1e-5, centred=centred or heads > 1)

    expected = gradients(run, inputs, weight, *biases, device="cpu", dtype=torch.float64)
    found = gradients(run, inputs, weight, *biases, device="cuda", dtype=torch.float32, mixed=mixed)
    assert_near(found, expected, most)


@pytest.mark.parametrize(
    ("name", "width"), [*((name, 64) for name in ENCODERS if name != "none"), ("xlstm", 48)]
)  # no kernels for heads of 12 channels
def test_graphs_compute_what_the_encoder_does(name, width):
    torch.manual_seed(0)
    encoder = ENCODERS.get(name)(HeadConfig(width=width, layers=2, dropout=0.0, bidirectional=True)).cuda()
    graphed = GraphedEncoder(encoder, 3)

    def values(run, tokens, mask, weights):
        outputs = run(tokens, mask)
        found = torch.autograd.grad((outputs * weights).sum(), [tokens, *encoder.parameters()])
        return [value.detach().double() for value in (outputs, *found)]

    for lengths in ([50, 7, 1], [50, 50, 50], [90, 3, 8], [49, 2, 9], [50, 7, 1], [50, 9], [7]):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).cuda()
        tokens = torch.randn(*mask.shape, width, device="cuda", requires_grad=True)
        weights = torch.randn(*mask.shape, encoder.out_width, device="cuda")
        assert_near(*(values(run, tokens, mask, weights) for run in (graphed, encoder)), 5e-3)


def test_a_graph_of_one_precision_is_not_replayed_in_another():
    encoder = ENCODERS.get("transformer")(HeadConfig(width=64)).cuda()
    graphed, mask = GraphedEncoder(encoder, 2), torch.ones(2, 20, dtype=torch.bool, device="cuda")
    tokens = torch.randn(2, 20, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        mixed = graphed(tokens, mask).detach().clone()
        torch.testing.assert_close(mixed, encoder(tokens, mask), rtol=1e-2, atol=1e-2)
    single = graphed(tokens, mask)
    torch.testing.assert_close(single, encoder(tokens, mask), rtol=1e-5, atol=1e-5)
    assert not torch.equal(mixed, single)


def test_the_random_state_is_the_same_after_a_capture():
    encoder = ENCODERS.get("transformer")(HeadConfig(width=64, dropout=0.5)).cuda()
    mask = torch.ones(2, 20, dtype=torch.bool, device="cuda")
    tokens = torch.randn(2, 20, 64, device="cuda", requires_grad=True)
    outputs = []
    for _ in range(2):
        graphed = GraphedEncoder(encoder, 2)
        torch.manual_seed(1)
        outputs += [graphed(tokens, mask).detach().clone() for _ in range(2)]
    first, second, first_again, second_again = outputs
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)


class LeavesAGraphBehind(Encoder):
    """An encoder; while it is captured a graph becomes garbage that only the collector finds."""

    def __init__(self, encoder, graph):
        super().__init__(encoder.out_width)
        self.encoder, self.graphs = encoder, [graph]

    def forward(self, tokens, mask):
        if torch.cuda.is_current_stream_capturing() and self.graphs:
            cycle = [self.graphs.pop()]
            cycle.append(cycle)
        return self.encoder(tokens, mask)


def test_garbage_breaks_no_capture():
    encoder = ENCODERS.get("transformer")(HeadConfig(width=64, dropout=0.0)).cuda()
    mask = torch.ones(2, 20, dtype=torch.bool, device="cuda")
    tokens = torch.randn(2, 20, 64, device="cuda", requires_grad=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
    leaving, often, before = LeavesAGraphBehind(encoder, graph), 1, gc.get_threshold()
    del graph
    gc.set_threshold(often)
    try:
        outputs = GraphedEncoder(leaving, 2)(tokens, mask)
    finally:
        gc.set_threshold(*before)
    assert not leaving.graphs
    torch.testing.assert_close(outputs, encoder(tokens, mask), rtol=1e-3, atol=1e-3)
