"""A head: projection, encoder, pooling and regressor in a row."""

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from agiqa.errors import AgiqaError, ConfigError
from agiqa.heads.data.features import TokenStatistics
from agiqa.heads.model.encoders import ENCODERS, Encoder
from agiqa.heads.model.pooling import POOLINGS, Pooling, PoolingName, select_role
from agiqa.heads.model.projection import PROJECTIONS, FeatureSpec, Projection
from agiqa.heads.model.regressor import Regressor
from agiqa.heads.model.token_dropout import hide_tokens
from agiqa.heads.settings.config import HeadConfig


class Head(nn.Module):
    """Features of the tokens in, the MOS of one label or several out."""

    def __init__(self, config: HeadConfig, spec: FeatureSpec, *, labels: int = 1) -> None:
        """Use `build_head`, which checks all names first."""
        super().__init__()
        self.projection = PROJECTIONS.get(config.projection)(config, spec)
        _refuse_stranger("projection", config.projection, self.projection, Projection)
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
        projected: Tensor = self.projection(features.masked_fill(~mask[..., None], 0.0))
        tokens = (encode or self.encoder)(projected, mask)
        predicted: Tensor = self.regressor(self.pooling(tokens, pooled))
        return predicted


def check_parts(config: HeadConfig) -> None:
    """Raise UnknownName for a part that no registry holds, or a token role that does not exist."""
    PROJECTIONS.get(config.projection)
    ENCODERS.get(config.encoder)
    PoolingName.parse(config.pooling)


def check_sizes(config: HeadConfig) -> None:
    """Raise what the encoder or the pooling of `config` raises for sizes that it cannot have, before a feature is read.

    They are built without memory for it. Raises ConfigError for a part that is no Encoder or Pooling, and as
    `check_parts`.
    """
    check_parts(config)
    encoder, pooling = ENCODERS.get(config.encoder), POOLINGS.get(PoolingName.parse(config.pooling).pooling)
    _try_sizes(config, encoder, pooling)  # pyright: ignore[reportArgumentType]  # pydantic hashes what is frozen


@lru_cache(maxsize=1024)
def _try_sizes(
    config: HeadConfig, encoder: Callable[[HeadConfig], Encoder], pooling: Callable[[HeadConfig, int], Pooling]
) -> None:
    """`check_sizes` of these parts, which may be registered anew; a grid asks for the same many times."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                _build_sizes(config, encoder, pooling)
        except AgiqaError:
            raise
        except (AssertionError, RuntimeError, TypeError, ValueError):
            # perhaps only since a part reads a value while it is built, and on `meta` there is none
            _build_sizes(config, encoder, pooling)


def _build_sizes(
    config: HeadConfig, encoder: Callable[[HeadConfig], Encoder], pooling: Callable[[HeadConfig, int], Pooling]
) -> None:
    """Build both. Raises ConfigError for a part of another class, and what the parts raise themselves."""
    built = encoder(config)
    _refuse_stranger("encoder", config.encoder, built, Encoder)
    _refuse_stranger("pooling", config.pooling, pooling(config, built.out_width), Pooling)


def _refuse_stranger(kind: str, name: str, part: object, base: type[nn.Module]) -> None:
    """Raise ConfigError unless `part` is one of the base class that a training asks more of than to be called."""
    if not isinstance(part, base):
        message = (
            f"The {kind} {name!r} builds an object of the class {type(part).__name__}, which is no {base.__name__}: "
            f"derive that class from {base.__module__}.{base.__name__}."
        )
        raise ConfigError(message)


def build_head(config: HeadConfig, spec: FeatureSpec, *, labels: int = 1) -> Head:
    """A fresh head for features of this spec that predicts so many labels; its weights come from torch's random state.

    Raises UnknownName for a part, ConfigError for sizes, HeadError for features that the projection cannot read.
    """
    check_parts(config)
    return Head(config, spec, labels=labels)
