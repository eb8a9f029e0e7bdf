"""The short causal convolution in torch against torch's own convolution."""

import pytest
import torch
from torch.nn.functional import conv1d, silu

from agiqa.heads.model.encoders.kernels.dispatch import causal_conv_silu


def by_torch(tokens, weight, bias):
    channels, _, taps = weight.shape
    padded = conv1d(tokens.transpose(1, 2), weight, bias, padding=taps - 1, groups=channels)
    return silu(padded[..., : tokens.shape[1]].transpose(1, 2))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("tokens", "taps"), [(1, 4), (2, 4), (3, 4), (4, 4), (50, 4), (9, 1), (9, 2)])
def test_values_and_gradients_are_those_of_torchs_convolution(tokens, taps, dtype, most):
    torch.manual_seed(0)
    wider = torch.randn(3, tokens, 10, dtype=dtype)[..., 2:9]  # rows of a wider tensor, as in Mamba2
    given = [part.requires_grad_() for part in (wider, torch.randn(7, 1, taps).to(dtype), torch.randn(7).to(dtype))]
    weights, found = torch.randn(3, tokens, 7, dtype=dtype), []
    for function in (causal_conv_silu, by_torch):
        outputs = function(*given)
        found.append((outputs, *torch.autograd.grad((outputs * weights).sum(), given)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=most, atol=most)


def test_no_bias_is_a_bias_of_zero():
    tokens, weight = torch.randn(2, 6, 3), torch.randn(3, 1, 4)
    torch.testing.assert_close(causal_conv_silu(tokens, weight, None), by_torch(tokens, weight, None))
