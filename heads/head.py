"""A head: projection, encoder, pooling and regressor in a row."""

from collections.abc import Callable

from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders import ENCODERS
from agiqa.heads.features import TokenStatistics
from agiqa.heads.pooling import POOLINGS, PoolingName, select_role
from agiqa.heads.projection import PROJECTIONS, FeatureSpec
from agiqa.heads.regressor import Regressor
from agiqa.heads.token_dropout import hide_tokens


class Head(nn.Module):
    """Features of the tokens in, the MOS of one label or several out."""

    def __init__(self, config: HeadConfig, spec: FeatureSpec, *, labels: int = 1) -> None:
        """Use `build_head`, which checks all names first."""
        super().__init__()
        self.projection = PROJECTIONS.get(config.projection)(config, spec)
        self.encoder = ENCODERS.get(config.encoder)(config)
        name = PoolingName.parse(config.pooling)
        self.pooling = POOLINGS.get(name.pooling)(config, self.encoder.out_width)
        self.regressor = Regressor(config, self.encoder.out_width, labels=labels)
        self.pooling_name = config.pooling
        self.label_count = labels
        self._pooled_role = name.role
        self._token_dropout = config.token_dropout

    def calibrate(self, statistics: TokenStatistics, labels: Float[Tensor, "items label"]) -> None:
        """Fix the constants that come from the training items, before training."""
        self.projection.calibrate(statistics)
        self.regressor.calibrate(labels)

    def forward(
        self,
        features: Float[Tensor, "batch token channel"],
        mask: Bool[Tensor, "batch token"],
        roles: UInt8[Tensor, "batch token"] | None = None,
        *,
        encode: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "batch label"]:
        """The predicted MOS of each item, a column per label.

        `mask` is True on real tokens, `roles` are values of TOKEN_ROLES. `encode` is called instead of the encoder, to
        compute the same in another way.
        A pooling over a role raises HeadError without `roles`, and DataError for an item without such a token.
        """
        pooled = mask if self._pooled_role is None else select_role(mask, roles, self._pooled_role)
        if self.training and self._token_dropout:
            places = self.pooling.places(pooled)
            features, mask, pooled = hide_tokens(features, mask, pooled, places, share=self._token_dropout)
        tokens = (encode or self.encoder)(self.projection(features), mask)
        predicted: Tensor = self.regressor(self.pooling(tokens, pooled))
        return predicted


def check_parts(config: HeadConfig) -> None:
    """Raise UnknownName for a part that no registry holds, or a token role that does not exist."""
    PROJECTIONS.get(config.projection)
    ENCODERS.get(config.encoder)
    PoolingName.parse(config.pooling)


def build_head(config: HeadConfig, spec: FeatureSpec, *, labels: int = 1) -> Head:
    """A fresh head for features of this spec that predicts so many labels; its weights come from torch's random state.

    Raises UnknownName for a part, ConfigError for sizes, HeadError for features that the projection cannot read.
    """
    check_parts(config)
    return Head(config, spec, labels=labels)
