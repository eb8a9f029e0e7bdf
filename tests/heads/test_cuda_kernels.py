"""The GPU's kernels against the torch forms that the CPU runs: outputs and gradients, on a CUDA device only."""

import pytest
import torch
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple

from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders import XLSTMEncoder
from agiqa.heads.encoders.mlstm import mlstm
from agiqa.heads.encoders.slstm import slstm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, which these kernels need")


def gradients(function, *arguments, device, dtype, mixed=False):
    """Output of `function` and the gradients of a fixed random projection of it, as float64 on the CPU."""
    given = [argument.to(device, dtype).requires_grad_() for argument in arguments]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mixed):
        output = function(*given)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(device, output.dtype)
    found = torch.autograd.grad((output * weights).sum(), given)
    return [value.detach().double().cpu() for value in (output, *found)]


def assert_near(found, expected, most):
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.isfinite().all(), number
        assert float((one - other).norm()) <= most * float(other.norm()), number


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
    expected = gradients(
        lambda *given: parallel_stabilized_simple(*given, mask), *arguments, device="cpu", dtype=torch.float64
    )
    found = gradients(
        lambda *given: mlstm(*given, mask.cuda()), *arguments, device="cuda", dtype=torch.float32, mixed=mixed
    )
    assert_near(found, expected, most)


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
