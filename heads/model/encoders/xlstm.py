"""The encoder `xlstm`: the published stack from the xlstm package (Beck et al. 2024, NX-AI)."""

import math
from collections.abc import Iterable
from typing import cast

from jaxtyping import Bool, Float
from torch import Tensor, nn
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
)

from agiqa.errors import ConfigError
from agiqa.heads.model.encoders.base import ENCODERS, Encoder
from agiqa.heads.model.encoders.bidirectional import EitherWay, check_one_way
from agiqa.heads.model.encoders.mlstm import torch_form_because
from agiqa.heads.model.encoders.slstm import loops_because
from agiqa.heads.model.encoders.xlstm_parts import install_parts
from agiqa.heads.settings.config import HeadConfig

_SLSTM_INDEX = 1
_CONTEXT = 512
"""As published. It sizes masks of the package that are not used here, and bounds no item."""
_MLSTM_FACTOR = 2
"""How much wider an mLSTM works than its block, as the package has it."""
_MLSTM_STEP = 64
"""The package rounds the channels of an mLSTM up to a multiple of this."""


class XLSTMEncoder(Encoder):
    """Pre-norm residual blocks: an sLSTM at index 1, mLSTMs elsewhere, a norm at the end.

    Published settings: convolution kernel 4, qkv block size 4, sLSTM bias `powerlaw_blockdependent`, gated
    feed-forward of factor 1.3 with GELU. Every part is causal, so right padding cannot reach a real token;
    it is zeroed on the way in all the same, since the parallel form multiplies it by zero, which NaN survives.
    """

    graphable = True
    reads = frozenset({"blocks", "num_heads", "dropout"})

    def __init__(self, config: HeadConfig) -> None:
        """Raises ConfigError when the heads do not divide the width into two channels or more each, or not an mLSTM's.

        Raises ConfigError for `bidirectional` too, for which `ENCODERS.get("xlstm")` builds two of these.
        """
        check_one_way(config, XLSTMEncoder, entry="xlstm")
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
    def repeated(self) -> Iterable[nn.Module]:
        """The blocks."""
        return cast("Iterable[nn.Module]", self.stack.blocks)

    @property
    def kernels(self) -> str:
        """What computes the two recurrences on the device that the encoder is on, and why."""
        weight = next(self.stack.parameters())
        torch_form = torch_form_because(weight.device, self._mlstm_dim)
        loops = loops_because(weight.new_empty(0, self._dim))
        parallel = "mlstm: Triton kernels" if torch_form is None else f"mlstm: torch's parallel form ({torch_form})"
        return f"{parallel}; slstm: " + ("Triton kernels" if loops is None else f"loops over the steps ({loops})")

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token width"]:
        """The normed output of the last block, with zeros in the padding."""
        padding = ~mask[..., None]
        outputs: Tensor = self.stack(tokens.masked_fill(padding, 0.0))
        return outputs.masked_fill(padding, 0.0)


ENCODERS.add("xlstm", EitherWay(XLSTMEncoder))


def stack_config(config: HeadConfig) -> xLSTMBlockStackConfig:
    """The package's config of the published stack at the sizes of `config`; a stack of one block is an mLSTM."""
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
