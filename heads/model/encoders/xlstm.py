"""The encoder `xlstm`: the stack of the xlstm package (Beck et al. 2024, NX-AI) in the settings of the released code.

The package's layers and cells are replaced by classes that compute the same functions of the same weights with fewer
operations. Tests hold values and gradients of the whole stack to those of the package.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
)
from xlstm.blocks.mlstm.cell import mLSTMCell
from xlstm.blocks.mlstm.layer import mLSTMLayer
from xlstm.blocks.slstm.cell import sLSTMCell_vanilla
from xlstm.blocks.slstm.layer import sLSTMLayer
from xlstm.components.conv import CausalConv1d
from xlstm.components.linear_headwise import LinearHeadwiseExpand
from xlstm.components.ln import LayerNorm, MultiHeadLayerNorm

from agiqa.errors import ConfigError
from agiqa.heads.model.encoders.base import ENCODERS, EitherWay, Encoded, Encoder, Mask, Tokens, refuse_bidirectional
from agiqa.heads.model.encoders.kernels.dispatch import causal_conv_silu, norm
from agiqa.heads.model.encoders.mlstm import mlstm, mlstm_torch_reason
from agiqa.heads.model.encoders.slstm import slstm, slstm_loop_reason
from agiqa.heads.settings.config import HeadConfig

_SLSTM_INDEX = 1
_CONTEXT = 512
"""As in the released code. It sizes masks of the package that are not used here, and limits no item."""
_MLSTM_FACTOR = 2
"""How much wider an mLSTM works than its block, as in the package."""
_MLSTM_STEP = 64
"""The package rounds the channels of an mLSTM up to a multiple of this."""


class XLSTMEncoder(Encoder):
    """Pre-norm residual blocks: an sLSTM at index 1, mLSTMs elsewhere, a norm at the end.

    Every part is causal, so right padding cannot reach a real token. It is set to zero first all the same: masked
    products multiply it by zero, which would keep a NaN.
    """

    graphable = True
    settings = frozenset({"blocks", "num_heads", "dropout"})

    def __init__(self, config: HeadConfig) -> None:
        """Raises ConfigError for `bidirectional`, for which `ENCODERS.get("xlstm")` builds two of these.

        Raises ConfigError where the heads do not divide the width into two channels or more each, or the channels of an
        mLSTM.
        """
        refuse_bidirectional(config, XLSTMEncoder, entry="xlstm")
        super().__init__(config.width)
        if config.width % config.num_heads or config.width < 2 * config.num_heads:
            message = (
                f"An xLSTM of width {config.width} cannot have {config.num_heads} heads: "
                f"the width must be a multiple of the heads, and at least twice as many."
            )
            raise ConfigError(message)
        inner = _MLSTM_STEP * math.ceil(_MLSTM_FACTOR * config.width / _MLSTM_STEP)
        if inner % config.num_heads:
            message = (
                f"An xLSTM of width {config.width} cannot have {config.num_heads} heads: its mLSTMs have {inner} "
                f"channels, twice the width rounded up to a multiple of {_MLSTM_STEP}, which the heads must divide."
            )
            raise ConfigError(message)
        self._dim, self._mlstm_dim = config.width // config.num_heads, inner // config.num_heads
        self.stack = xLSTMBlockStack(stack_config(config))
        install_parts(self.stack)

    @property
    def compiled_blocks(self) -> Iterable[nn.Module]:
        """The blocks."""
        return cast("Iterable[nn.Module]", self.stack.blocks)

    @property
    def kernels(self) -> str:
        """What computes the two recurrences on the device of the weights, and why."""
        weight = next(self.stack.parameters())
        torch_form = mlstm_torch_reason(weight.device, self._mlstm_dim)
        loops = slstm_loop_reason(weight.new_empty(0, self._dim))
        in_chunks = "mlstm: Triton kernels" if torch_form is None else f"mlstm: torch, in chunks ({torch_form})"
        return f"{in_chunks}; slstm: " + ("Triton kernels" if loops is None else f"loops over the steps ({loops})")

    def forward(self, tokens: Tokens, mask: Mask) -> Encoded:
        """The normed output of the last block, with zeros in the padding."""
        padding = ~mask[..., None]
        outputs: Tensor = self.stack(tokens.masked_fill(padding, 0.0))
        return outputs.masked_fill(padding, 0.0)


ENCODERS.add("xlstm", EitherWay(XLSTMEncoder))


def stack_config(config: HeadConfig) -> xLSTMBlockStackConfig:
    """The stack of the released code at the sizes of `config`; a stack of one block is an mLSTM."""
    return xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(
            mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=config.num_heads)
        ),
        slstm_block=sLSTMBlockConfig(
            slstm=sLSTMLayerConfig(
                backend="vanilla",
                num_heads=config.num_heads,
                conv1d_kernel_size=4,
                bias_init="powerlaw_blockdependent",
            ),
            feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu", dropout=config.dropout),
        ),
        context_length=_CONTEXT,
        num_blocks=config.blocks,
        embedding_dim=config.width,
        slstm_at=[_SLSTM_INDEX] if config.blocks > _SLSTM_INDEX else [],
        dropout=config.dropout,
    )


def install_parts(stack: xLSTMBlockStack) -> None:
    """Replace the package's layers and cells in `stack` by those below, with the same weights."""
    successors: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
        mLSTMLayer: lambda part: MLSTMLayer(part.config),
        mLSTMCell: lambda part: MLSTMCell(part.config),
        sLSTMLayer: lambda part: SLSTMLayer(part.config),
        sLSTMCell_vanilla: lambda part: SLSTMCell(part.config),
        LinearHeadwiseExpand: lambda part: BlockDiagonal(part.config),
        LayerNorm: lambda part: Norm(part.ndim, part.weight is not None, part.bias is not None, part.eps),
        MultiHeadLayerNorm: lambda part: HeadNorm(part.ndim, part.weight is not None, part.bias is not None, part.eps),
    }
    for parent in stack.modules():
        for name, part in parent.named_children():
            if type(part) in successors:
                successor = successors[type(part)](part)
                successor.load_state_dict(part.state_dict())
                setattr(parent, name, successor)
    if isinstance(stack.post_blocks_norm, Norm):
        stack.post_blocks_norm.is_last = True


class MLSTMLayer(mLSTMLayer):
    """The package's layer; in mixed precision the products after the cell are in the narrow dtype too.

    Its rows stay in heads from the projections to the norm, which saves copies.
    """

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """As the package's."""
        mixed, gate = self.proj_up(x).chunk(2, dim=-1)
        convolved = _convolved(self.conv1d, mixed)
        cell, parts = cast("MLSTMCell", self.mlstm_cell), (self.q_proj, self.k_proj, self.v_proj)
        projections = [cast("BlockDiagonal", part) for part in parts]
        gates = cell.gates(projections, convolved, mixed)
        heads = self.config.num_heads
        of_query, of_key, of_value = projections
        queries, keys = of_query.in_heads(convolved, heads), of_key.in_heads(convolved, heads)
        hidden = cell.hidden(queries, keys, of_value.in_heads(mixed, heads), gates).to(mixed.dtype)
        skipped = torch.addcmul(hidden, convolved, self.learnable_skip.to(mixed.dtype))
        outputs: Tensor = self.dropout(self.proj_down(skipped * silu(gate)))
        return outputs


class MLSTMCell(mLSTMCell):
    """The package's cell, in two parts."""

    def gates(self, projections: Sequence["BlockDiagonal"], convolved: Tensor, mixed: Tensor) -> Tensor:
        """The pre-activations of the input gates, then of the forget gates, (batch, 2 heads, token).

        The package computes them from queries, keys and values, which are linear in the two inputs: the weights of both
        steps are multiplied first. `projections` are those of queries and keys, from `convolved`, and values.
        """
        with torch.autocast(mixed.device.type, enabled=False):
            whole = torch.cat([self.igate.weight, self.fgate.weight])
            of_query, of_key, of_value = (
                part.folded(weight) for part, weight in zip(projections, whole.chunk(3, dim=1), strict=True)
            )
            of_convolved, bias = of_query + of_key, torch.cat([self.igate.bias, self.fgate.bias])
        gates = linear(convolved, of_convolved, bias) + linear(mixed, of_value)
        return gates.transpose(1, 2)

    def hidden(self, queries: Tensor, keys: Tensor, values: Tensor, gates: Tensor) -> Tensor:
        """The normed hidden states, (batch, token, channel), of rows (batch, heads, token, dim)."""
        entry, forget = gates[..., None].chunk(2, dim=1)
        outputs: Tensor = self.outnorm(mlstm(queries, keys, values, entry, forget))
        return outputs.transpose(1, 2).flatten(2)


class SLSTMLayer(sLSTMLayer):
    """The package's layer, for whole sequences."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As the package's, which computes gates i and f from the weights that it calls f and i."""
        convolved = _convolved(self.conv1d, x)
        gates = [self.fgate(convolved), self.igate(convolved), self.zgate(x), self.ogate(x)]
        hidden, _state = self.slstm_cell(torch.cat(gates, dim=-1))
        outputs: Tensor = self.group_norm(self.dropout(hidden))
        return outputs.transpose(1, 2).flatten(2)


def _convolved(part: CausalConv1d, tokens: Tensor) -> Tensor:
    convolution: Any = part.conv
    return causal_conv_silu(tokens, convolution.weight, convolution.bias)


class SLSTMCell(sLSTMCell_vanilla):
    """The package's torch cell, parameters and all, with `slstm` for whole sequences from the zero state."""

    def forward(
        self,
        input: Tensor,  # noqa: A002  (the package's name)
        state: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As the package's, in float32 at least; with a `state` the package's own loop runs.

        The result has the wider dtype of input and weights.
        """
        if state is not None:
            output, last = super().forward(input, state, lengths)
            return output, last
        self._check_input(input)
        heads, dim = self.config.num_heads, self.config.head_dim
        result_dtype = torch.promote_types(input.dtype, self._recurrent_kernel.dtype)
        dtype = torch.promote_types(result_dtype, torch.float32)
        hidden, last = slstm(
            self._permute_input(input).unflatten(-1, (4, heads, dim)),
            self._recurrent_kernel.view(heads, 4, dim, dim).to(dtype),
            self._bias.view(4, heads, dim).to(dtype),
        )
        return self._permute_output(hidden.flatten(2).to(result_dtype)), last.flatten(2).to(result_dtype)


class BlockDiagonal(LinearHeadwiseExpand):
    """The package's projection by blocks of a few channels, without a bias."""

    def in_heads(self, x: Tensor, heads: int) -> Tensor:
        """As the package's, in heads: (batch, heads, token, dim). The blocks of a head are computed as one.

        That has many times the arithmetic, and takes a fraction of the time.
        """
        blocks, rows, columns = self.weight.shape
        batch, tokens, channels = x.shape
        groups = math.gcd(heads, blocks)
        weight = self.weight.view(groups, -1, rows, columns)
        spread = (
            torch.diag_embed(weight.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2).reshape(groups, -1, channels // groups)
        )
        given = x.reshape(batch * tokens, groups, -1).transpose(0, 1)
        found: Tensor = torch.bmm(given, spread.transpose(1, 2)).view(groups, batch, tokens, -1)
        if groups == heads:
            return found.transpose(0, 1)
        return found.permute(1, 2, 0, 3).reshape(batch, tokens, heads, -1).transpose(1, 2)

    def folded(self, weight: Tensor) -> Tensor:
        """The weight on the inputs that is this projection followed by `weight`, (outputs, channels)."""
        blocks, rows, _columns = self.weight.shape
        per_block = weight.view(len(weight), blocks, rows)
        return torch.einsum("obr,brc->obc", per_block, self.weight).flatten(1)


class Norm(LayerNorm):
    """The package's layer norm; on a GPU in the dtype of the product behind it."""

    is_last = False
    """No product follows: the outputs are in the dtype of the weights."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the package's name)
        """As the package's."""
        weight = self.weight_proxy
        return norm(input, weight, self.bias, eps=self.eps, dtype=weight.dtype if self.is_last else None)


class HeadNorm(MultiHeadLayerNorm):
    """The package's norm of each head as a layer norm, whose gradient is several times faster than a group norm's."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the package's name)
        """As the package's: (batch, heads, token, dim) in and out."""
        heads, dim = input.shape[1], input.shape[-1]
        weight = self.weight_proxy.view(heads, dim)
        return norm(input.transpose(1, 2), weight, eps=self.eps, dtype=input.dtype).transpose(1, 2)
