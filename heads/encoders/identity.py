"""The encoder `none`: the paper's ablation without xLSTM."""

from jaxtyping import Bool, Float
from torch import Tensor

from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders.base import ENCODERS, Encoder


@ENCODERS.register("none")
class IdentityEncoder(Encoder):
    """Passes every token on as it is."""

    mixes_tokens = False

    def __init__(self, config: HeadConfig) -> None:
        """No setting of `config` has a meaning here."""
        del config
        super().__init__()

    @property
    def kernels(self) -> str:
        """There is nothing to compute."""
        return "none"

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token width"]:
        """The tokens, with zeros in the padding."""
        return tokens.masked_fill(~mask[..., None], 0.0)
