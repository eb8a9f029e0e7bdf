"""Parts of the xlstm package's blocks, computed otherwise: the same functions of the same weights, by fewer operations.

Tests hold values and gradients of the whole stack to those of the package.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, silu
from xlstm import xLSTMBlockStack
from xlstm.blocks.mlstm.cell import mLSTMCell
from xlstm.blocks.mlstm.layer import mLSTMLayer
from xlstm.blocks.slstm.cell import sLSTMCell_vanilla
from xlstm.blocks.slstm.layer import sLSTMLayer
from xlstm.components.conv import CausalConv1d
from xlstm.components.linear_headwise import LinearHeadwiseExpand
from xlstm.components.ln import MultiHeadLayerNorm

from agiqa.heads.model.encoders.causal_conv import causal_conv_silu
from agiqa.heads.model.encoders.mlstm import mlstm
from agiqa.heads.model.encoders.slstm import slstm

_SMALL_BLOCK = 16


class MLSTMLayer(mLSTMLayer):
    """The package's layer; in mixed precision, what is multiplied behind the cell is in the narrow dtype too."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """As the package's."""
        mixed, gate = self.proj_up(x).chunk(2, dim=-1)
        convolved = _convolved(self.conv1d, mixed)
        queries, keys, values = self.q_proj(convolved), self.k_proj(convolved), self.v_proj(mixed)
        hidden: Tensor = self.mlstm_cell(q=queries, k=keys, v=values).to(values.dtype)
        skipped = torch.addcmul(hidden, convolved, self.learnable_skip.to(values.dtype))
        outputs: Tensor = self.dropout(self.proj_down(skipped * silu(gate)))
        return outputs


class MLSTMCell(mLSTMCell):
    """The package's cell, with both gates from one product."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        """As the package's."""
        heads = self.config.num_heads
        weight = torch.cat([self.igate.weight, self.fgate.weight])
        gates = linear(torch.cat([q, k, v], dim=-1), weight, torch.cat([self.igate.bias, self.fgate.bias]))
        entry, forget = gates.transpose(1, 2)[..., None].chunk(2, dim=1)
        queries, keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        hidden = mlstm(queries, keys, values, entry, forget)
        outputs: Tensor = self.outnorm(hidden)
        return outputs.transpose(1, 2).flatten(2)


class SLSTMLayer(sLSTMLayer):
    """The package's layer, for whole sequences."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As the package's, whose gates i and f come from the weights that it calls f and i."""
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
        """As the package's; where a state is given, the package's own loop runs.

        Computed in float32 at least; the result has the wider dtype of input and weights.
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
    """The package's projection by blocks of a few channels, as one dense product on a GPU.

    Tensor cores do hundreds of times the arithmetic in a third of the time of so many tiny products.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As the package's."""
        blocks, rows, columns = self.weight.shape
        if not x.is_cuda or columns > _SMALL_BLOCK:
            outputs: Tensor = super().forward(x)
            return outputs
        spread = torch.diag_embed(self.weight.permute(1, 2, 0)).permute(2, 0, 3, 1)
        return linear(x, spread.reshape(blocks * rows, blocks * columns), self.bias)


class HeadNorm(MultiHeadLayerNorm):
    """The package's norm of each head as a layer norm, whose gradient is several times as fast as a group norm's."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the package's name)
        """As the package's: (batch, heads, token, dim) in and out."""
        heads, dim = input.shape[1], input.shape[-1]
        normed = layer_norm(input.transpose(1, 2), (dim,), eps=self.eps)
        scaled: Tensor = normed * self.weight_proxy.view(heads, dim)
        return scaled.transpose(1, 2)


def install_parts(stack: xLSTMBlockStack) -> None:
    """Put the parts of this module in the place of the package's, with their weights."""
    successors: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
        mLSTMLayer: lambda part: MLSTMLayer(part.config),
        mLSTMCell: lambda part: MLSTMCell(part.config),
        sLSTMLayer: lambda part: SLSTMLayer(part.config),
        sLSTMCell_vanilla: lambda part: SLSTMCell(part.config),
        LinearHeadwiseExpand: lambda part: BlockDiagonal(part.config),
        MultiHeadLayerNorm: lambda part: HeadNorm(part.ndim, part.weight is not None, part.bias is not None, part.eps),
    }
    for parent in stack.modules():
        for name, part in parent.named_children():
            if type(part) in successors:
                successor = successors[type(part)](part)
                successor.load_state_dict(part.state_dict())
                setattr(parent, name, successor)
