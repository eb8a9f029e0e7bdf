"""A short causal convolution of each channel with SiLU behind it, as xLSTM and Mamba2 begin with.

Torch's own wants (batch, channel, time): two copies of everything there and back, and kernels for any width, in
place of one pass over the tokens. On a GPU with Triton it is that one pass.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv1d, silu

from agiqa.heads.model.encoders.gpu_kernels import product_dtype, unavailable_because, uncompiled


def causal_conv_silu(
    tokens: Float[Tensor, "batch token channel"],
    weight: Float[Tensor, "channel 1 taps"],
    bias: Float[Tensor, " channel"] | None,
) -> Float[Tensor, "batch token channel"]:
    """SiLU of the sum of each channel's last `taps` values, the present one times the last weight, and the bias if any.

    The output is in the dtype of autocast where that is on.
    """
    if unavailable_because(tokens.device, ("triton",)) is None and tokens.dtype != torch.float64:
        return _by_kernels(tokens, weight, bias)
    channels, _, taps = weight.shape
    padded = conv1d(tokens.transpose(1, 2), weight, bias, padding=taps - 1, groups=channels)
    return silu(padded[..., : tokens.shape[1]].transpose(1, 2))


@uncompiled
def _by_kernels(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from agiqa.heads.model.encoders.causal_conv_triton import KernelConv  # imports triton, which a CPU has not

    added = weight.new_zeros(len(weight)) if bias is None else bias
    outputs: Tensor = KernelConv.apply(tokens.to(product_dtype(tokens)), weight, added)
    return outputs
