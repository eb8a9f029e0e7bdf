"""The encoder `none`: the paper's ablation without xLSTM."""

from jaxtyping import Bool, Float
from torch import Tensor

from agiqa.heads.model.encoders.base import ENCODERS, Encoder
from agiqa.heads.model.encoders.bidirectional import check_forwards_only
from agiqa.heads.settings.config import HeadConfig


@ENCODERS.register("none")
class IdentityEncoder(Encoder):
    """Passes every token on as it is."""

    mixes_tokens = False
    reads = frozenset()

    def __init__(self, config: HeadConfig) -> None:
        """Only the width has a meaning here. Raises ConfigError for `bidirectional`: there is no direction to add."""
        check_forwards_only(config, "none")
        super().__init__(config.width)

    @property
    def kernels(self) -> str:
        """Nothing is computed."""
        return "none"

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token width"]:
        """The tokens, with zeros in the padding."""
        return tokens.masked_fill(~mask[..., None], 0.0)
