"""A head: projection, token dropout in training, encoder, pooling and regressor in a row."""

import math
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from agiqa.errors import AgiqaError, ConfigError
from agiqa.heads.data.features import TokenStatistics
from agiqa.heads.data.scales import Line
from agiqa.heads.model.encoders import ENCODERS, Encoder
from agiqa.heads.model.encoders.base import completed
from agiqa.heads.model.pooling import POOLINGS, Pooling, PoolingName, pooling_names, select_role
from agiqa.heads.model.projection import PROJECTIONS, FeatureSpec, Projection
from agiqa.heads.model.readouts import GAUSSIAN, OUTPUTS, VALUE, level_readout, log_variance
from agiqa.heads.settings.config import HeadConfig

_Encoders = Callable[[HeadConfig], Encoder]
_Poolings = Callable[[HeadConfig, int], Pooling]


class Head(nn.Module):
    """Features of the tokens in, the MOS of one label or several out."""

    def __init__(self, config: HeadConfig, spec: FeatureSpec, *, labels: int = 1, readout: str = VALUE) -> None:
        """Use `build_head`, which checks all names first."""
        super().__init__()
        config = completed(config)
        self.projection = PROJECTIONS.get(config.projection)(config, spec)
        _check_class("projection", config.projection, self.projection, Projection)
        self.encoder = ENCODERS.get(config.encoder)(config)
        name = PoolingName.parse(config.pooling)
        self.pooling = POOLINGS.get(name.pooling)(config, self.encoder.out_width)
        self.regressor = Regressor(config, self.encoder.out_width, labels=labels, readout=readout)
        self.pooling_name = config.pooling
        self.label_count = labels
        self._pooled_row = spec.pooled.index(config.pooling) if config.pooling in spec.pooled else None
        self._pooled_role = None if self._pooled_row is not None else name.role
        self._token_dropout = config.token_dropout

    @property
    def predicts_spread(self) -> bool:
        """Whether `moments` has a spread."""
        return self.regressor.readout != VALUE

    def standardise(self, statistics: TokenStatistics, labels: Float[Tensor, "items label"]) -> None:
        """Set the constants that come from the tokens and labels of the training items, before training."""
        self.projection.standardise(statistics)
        self.regressor.standardise(labels)

    @property
    def layer_weights(self) -> dict[str, float] | None:
        """The share of each layer in a learned mix, by name; None without a mix."""
        return self.projection.layer_weights

    def rescale(self, lines: Sequence[Line]) -> None:
        """Map all later predictions of each label by its line."""
        self.regressor.rescale(lines)

    def forward(
        self,
        features: Float[Tensor, "batch token channel"],
        mask: Bool[Tensor, "batch token"],
        roles: UInt8[Tensor, "batch token"] | None = None,
        *,
        encode: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "batch label"]:
        """The predicted MOS of each item, a column per label.

        `mask` is True on real tokens, `roles` are values of TOKEN_ROLES. `encode` replaces the encoder by something
        that computes the same, such as CUDA graphs.
        A pooling over a role raises HeadError without `roles`, and DataError for an item without such a token.
        """
        predicted: Tensor = self.regressor(self.pooled(features, mask, roles, encode=encode))
        return predicted

    def moments(
        self,
        features: Float[Tensor, "batch token channel"],
        mask: Bool[Tensor, "batch token"],
        roles: UInt8[Tensor, "batch token"] | None = None,
    ) -> tuple[Float[Tensor, "batch label"], Float[Tensor, "batch label"] | None]:
        """The predicted MOS and its spread on the MOS scale; None for a head without one. Raises as `forward`."""
        return self.regressor.moments(self.regressor.outputs(self.pooled(features, mask, roles)))

    def pooled(
        self,
        features: Float[Tensor, "batch token channel"],
        mask: Bool[Tensor, "batch token"],
        roles: UInt8[Tensor, "batch token"] | None = None,
        *,
        encode: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "batch width"]:
        """What the regressor reads. The arguments and errors are those of `forward`."""
        pooled = mask if self._pooled_role is None else select_role(mask, roles, self._pooled_role)
        if self._pooled_row is not None:
            pooled = mask & (torch.arange(mask.shape[1], device=mask.device) == self._pooled_row)
        if self.training and self._token_dropout:
            keep = self.pooling.fixed_positions(pooled)
            features, mask, pooled = drop_tokens(features, mask, pooled, keep, share=self._token_dropout)
        projected: Tensor = self.projection(features.masked_fill(~mask[..., None], 0.0))
        tokens = (encode or self.encoder)(projected, mask)
        vector: Tensor = self.pooling(tokens, pooled)
        return vector


class Regressor(nn.Module):
    """From the pooled vector to MOS: linear, ReLU, linear (d, hidden, labels), or one linear layer (d, labels).

    The layers predict labels scaled to mean 0 and variance 1 over the training items, each label on its own. Means and
    standard deviations stay in the checkpoint (scalars for one label). So one learning rate fits a MOS of 0-1, 0-5 and
    0-100 alike, and an untrained head predicts about the mean. With another `readout` than a value the layers have
    several outputs for each label (see readouts.py), and the head predicts a spread too.
    """

    def __init__(self, config: HeadConfig, width: int, *, labels: int = 1, readout: str = VALUE) -> None:
        """`width` is that of the encoder's outputs; `labels` is their number."""
        super().__init__()
        hidden, outputs = config.regressor_hidden, labels * OUTPUTS[readout]
        if hidden:
            self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        else:
            self.layers = nn.Sequential(nn.Linear(width, outputs))
        self.readout = readout
        self.label_count = labels
        self.levels = level_readout(readout, labels)
        shape = () if labels == 1 else (labels,)
        self.label_mean: Tensor
        self.register_buffer("label_mean", torch.zeros(shape))
        self.label_std: Tensor
        self.register_buffer("label_std", torch.ones(shape))

    @torch.no_grad()
    def standardise(self, labels: Float[Tensor, "items label"]) -> None:
        """Take mean and standard deviation of each training label, which must not be the same for all items.

        NaN stands for an item that lacks a label.
        """
        columns = [column[~column.isnan()] for column in labels.double().T.contiguous()]
        for constant, values in (
            (self.label_mean, [column.mean() for column in columns]),
            (self.label_std, [column.std(correction=0) for column in columns]),
        ):
            constant.copy_(torch.stack(values).view(constant.shape))

    @torch.no_grad()
    def start_at_zero(self) -> None:
        """Predict 0 for every item, on the scale of the labels, until the last layer has learned something."""
        self.label_mean.zero_()
        for parameter in self.layers[-1].parameters():
            parameter.zero_()

    @torch.no_grad()
    def rescale(self, lines: Sequence[Line]) -> None:
        """Map all later predictions of each label by its line."""
        slopes, offsets = torch.tensor(lines, dtype=torch.float64, device=self.label_mean.device).unbind(1)
        shape = self.label_mean.shape
        self.label_mean.copy_((self.label_mean.double().view(-1) * slopes + offsets).view(shape))
        self.label_std.copy_((self.label_std.double().view(-1) * slopes).view(shape))
        if self.levels is not None:
            self.levels.rescale(slopes, offsets)

    def scaled(self, labels: Float[Tensor, "batch label"]) -> Float[Tensor, "batch label"]:
        """Labels or predictions on the scale of the loss."""
        return (labels - self.label_mean) / self.label_std

    def outputs(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch label output"]:
        """The outputs of the layers for each label, in the dtype of the constants."""
        flat: Tensor = self.layers(pooled)
        return flat.to(self.label_std.dtype).view(len(flat), self.label_count, OUTPUTS[self.readout])

    def moments(
        self, outputs: Float[Tensor, "batch label output"]
    ) -> tuple[Float[Tensor, "batch label"], Float[Tensor, "batch label"] | None]:
        """The predicted MOS, and its spread where the readout has one."""
        if self.levels is not None:
            return self.levels.moments(outputs)
        mos = outputs[..., 0] * self.label_std + self.label_mean
        return mos, (0.5 * log_variance(outputs)).exp() * self.label_std if self.readout == GAUSSIAN else None

    def distribution(self, outputs: Float[Tensor, "batch label output"]) -> Float[Tensor, "batch label number"] | None:
        """What a loss of this readout reads, see `LossTerm.readout`; None for a value."""
        if self.levels is not None:
            return self.levels.log_probabilities(outputs)
        return torch.stack([outputs[..., 0], log_variance(outputs)], dim=-1) if self.readout == GAUSSIAN else None

    def forward(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch label"]:
        """The predicted MOS of each item."""
        return self.moments(self.outputs(pooled))[0]


def drop_tokens(
    features: Float[Tensor, "batch token channel"],
    mask: Bool[Tensor, "batch token"],
    pooled: Bool[Tensor, "batch token"],
    keep: Int64[Tensor, "batch kept"],
    *,
    share: float,
) -> tuple[Float[Tensor, "batch left channel"], Bool[Tensor, "batch left"], Bool[Tensor, "batch left"]]:
    """Token dropout: features, mask and `pooled` (a part of the mask) without `share` of the tokens of each item.

    An item of n tokens loses floor(share n) of them, drawn uniformly without replacement from torch's random state. The
    tokens at the positions `keep` stay, and so does one token of `pooled` at least. The rest moves to the left, in its
    order: tokens that were only set to zero would still count in a mean and be read by an encoder, and training would
    pool values of another distribution than evaluation. The new length follows from the old one alone, so that nothing
    is read back from a GPU.
    """
    batch, length = mask.shape
    fewest = max(1, keep.shape[1])
    left = min(length, max(length - math.floor(share * length), fewest))
    lengths = mask.sum(1)
    kept = lengths - (share * lengths.double()).floor().long()
    kept = torch.minimum(kept.clamp_min(fewest), lengths)
    stays = _random_ranks(mask, pooled, keep) < kept[:, None]
    steps = torch.arange(length, device=mask.device)
    # padding is sorted before dropped tokens, so that padding remains padding
    index = torch.where(stays, steps, torch.where(mask, steps + 2 * length, steps + length)).argsort(1)[:, :left]
    rows = index + length * torch.arange(batch, device=mask.device)[:, None]
    shorter = features.flatten(0, 1).index_select(0, rows.flatten()).view(batch, left, -1)
    remains = steps[:left] < kept[:, None]
    return shorter, remains, pooled.gather(1, index) & remains


def _random_ranks(mask: Bool[Tensor, "batch token"], pooled: Bool[Tensor, "batch token"], keep: Tensor) -> Tensor:
    """The rank of each token, from 0, in a random order of its item that starts with the tokens that must stay."""
    draws = torch.rand(mask.shape, device=mask.device)
    one_of_pooled = draws.masked_fill(~pooled, -1.0).argmax(1, keepdim=True)
    draws = draws.masked_fill(~mask, -1.0)
    first = keep if keep.shape[1] else one_of_pooled
    return draws.scatter(1, first, 2.0).argsort(1, descending=True).argsort(1)


def build_head(config: HeadConfig, spec: FeatureSpec, *, labels: int = 1, readout: str = VALUE) -> Head:
    """A new head for features of this spec and so many labels; weights are drawn from torch's random state.

    `readout` is that of its loss (see losses.py).

    Raises UnknownName for a part, ConfigError for sizes, HeadError for features that the projection cannot read.
    """
    check_parts(config)
    if config.is_closed:
        message = f"{config.encoder!r} is a closed form, which is no network: `agiqa.heads.train_head` fits it."
        raise ConfigError(message)
    return Head(config, spec, labels=labels, readout=readout)


def check_parts(config: HeadConfig) -> None:
    """Raise UnknownName for a part that is not registered, or a token role that does not exist.

    Raises ConfigError as `completed`.
    """
    PROJECTIONS.get(config.projection)
    completed(config)
    for name in pooling_names(config):
        PoolingName.parse(name)


def check_sizes(config: HeadConfig) -> None:
    """Raise what encoder or pooling raise for sizes that they cannot have, before any feature is read.

    They are built on torch's device `meta`, which takes no memory. Raises as `check_parts`, and ConfigError for a part
    that is no Encoder or Pooling.
    """
    check_parts(config)
    if config.is_closed:
        return
    config = completed(config)
    encoder, pooling = ENCODERS.get(config.encoder), POOLINGS.get(PoolingName.parse(config.pooling).pooling)
    _check_sizes(config, encoder, pooling)  # pyright: ignore[reportArgumentType]  # pydantic hashes frozen models


@lru_cache(maxsize=1024)
def _check_sizes(config: HeadConfig, encoder: _Encoders, pooling: _Poolings) -> None:
    """`check_sizes` for these parts. They are keys of the cache, as a name may be registered anew."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                _build_encoder_and_pooling(config, encoder, pooling)
        except AgiqaError:
            raise
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError):
            # the part may read a value while it is built, and `meta` has none
            try:
                _build_encoder_and_pooling(config, encoder, pooling)
            except AgiqaError:
                raise
            except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                message = (
                    f"The encoder {config.encoder!r} with the pooling {config.pooling!r} cannot be built from these "
                    f"settings: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
                )
                raise ConfigError(message) from error


def _build_encoder_and_pooling(config: HeadConfig, encoder: _Encoders, pooling: _Poolings) -> None:
    built = encoder(config)
    _check_class("encoder", config.encoder, built, Encoder)
    _check_class("pooling", config.pooling, pooling(config, built.out_width), Pooling)


def _check_class(kind: str, name: str, part: object, base: type[nn.Module]) -> None:
    """Raise ConfigError unless `part` is a `base`: training needs more of its methods than `forward`."""
    if not isinstance(part, base):
        message = (
            f"The {kind} {name!r} builds an object of the class {type(part).__name__}, which is no {base.__name__}: "
            f"derive that class from {base.__module__}.{base.__name__}."
        )
        raise ConfigError(message)
