"""What computes the mLSTM: the Triton kernels of mlstm_kernels on a GPU, the xlstm package's torch form elsewhere.

The torch form makes several matrices of (batch, heads, tokens, tokens); the kernels go over chunks of tokens and make
none (Beck et al. 2025, arXiv 2503.14376). Their gradient leaves out what goes through the normaliser: it is zero behind
a norm of each head, which takes away any scale, and the mLSTM cell has one.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple

from agiqa.heads.model.encoders.gpu_kernels import is_power_of_two, product_dtype, unavailable_because, uncompiled

_CHUNK = 128
_LEAST_DIM = 16
_EPS = 1e-6
"""As the package's torch form has it."""


@uncompiled
def mlstm(
    queries: Float[Tensor, "batch heads token dim"],
    keys: Float[Tensor, "batch heads token dim"],
    values: Float[Tensor, "batch heads token dim"],
    igate_preact: Float[Tensor, "batch heads token 1"],
    fgate_preact: Float[Tensor, "batch heads token 1"],
) -> Float[Tensor, "batch heads token dim"]:
    """The mLSTM of whole sequences, all from the zero state."""
    if torch_form_because(queries.device, queries.shape[-1]) is not None:
        outputs: Tensor = parallel_stabilized_simple(queries, keys, values, igate_preact, fgate_preact, eps=_EPS)
        return outputs
    tokens = queries.shape[2]
    missing = -tokens % _CHUNK  # causal, so what follows reaches no token

    def padded(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, 0, 0, missing))

    dtype = product_dtype(queries)
    rows = [padded(values).to(dtype) for values in (queries, keys, values)]
    gates = [padded(gate).squeeze(-1).float() for gate in (igate_preact, fgate_preact)]
    with torch.autocast("cuda", enabled=False):  # it would round the gates, whose sums run over all tokens
        hidden: Tensor = _kernel()(*rows, *gates, eps=_EPS, chunk_size=_CHUNK, autocast_kernel_dtype=dtype)
    return hidden[:, :, :tokens]


def torch_form_because(device: torch.device, dim: int) -> str | None:
    """Why heads of `dim` channels on `device` are not computed by the kernels; None where they are."""
    unavailable = unavailable_because(device, ("triton", "mlstm_kernels"))
    if unavailable is None and not (dim >= _LEAST_DIM and is_power_of_two(dim)):
        return f"the kernels need heads of 2^k channels, {_LEAST_DIM} or more, not {dim}"
    return unavailable


def _kernel() -> Callable[..., Any]:
    from mlstm_kernels.torch.chunkwise import triton_xl_chunk  # imports triton, which a CPU has not

    kernel: Callable[..., Any] = triton_xl_chunk.mlstm_chunkwise__xl_chunk
    return kernel
