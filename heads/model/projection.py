"""Projections: from the features of a token to the width of the head.

Each reads one encoding and refuses the others. Before training, `standardise` derives an affine change of coordinates
from the training tokens. It does not change which functions a head can express, only how well AdamW learns them. Its
constants are buffers of the checkpoint. So encoders without a norm of their own get inputs of unit scale too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from agiqa.errors import HeadError
from agiqa.heads.data.features import FeatureSource, TokenStatistics
from agiqa.heads.data.layers import JOINER, LAST, layer_of, pooled_rows, tap_of
from agiqa.heads.settings.config import HeadConfig
from agiqa.registry import Registry

_STD_FLOOR = 1e-4
_MIX_FACTOR = 10.0
_USUAL_HIDDEN_SIZE = 4096
_WHITENING_FLOOR = 1e-3
"""As a share of the largest deviation. Directions of hidden states below it are near the rounding of bfloat16."""
_LOWER_HALF, _ROWS_PER_CHECK = 0xFFFF, 4096
_USUAL_PROJECTION = {"hidden": "vocabulary", "sketch": "sketch", "logits": "logits"}


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """What the features of a store are: enough to build a head for them, and to compare two stores."""

    encoding: str
    width: int
    """Channels per token: D of hidden states, r of a sketch."""
    lm_head_sha256: str
    basis_id: str | None
    """Of a sketch only."""
    layer: str = LAST
    """Name of the layer, or of several joined, as in `8+16+last`."""
    widths: tuple[int, ...] = ()
    """Channels of each of the layers that are joined; empty for one layer."""
    pooled: tuple[str, ...] = ()
    """Poolings of the rows of each item; empty where rows are tokens."""
    tap: str | None = None
    """Where in the model the features were taken; None for states of the language model."""
    lm_head: Callable[[], NDArray[np.float32]] | None = None
    """Reads W_lm (V, D), float32; None where no projection needs it."""

    @classmethod
    def of(cls, source: FeatureSource) -> "FeatureSpec":
        """The spec of a store; `int8` rows count as hidden states. W_lm is read when a projection needs it."""
        sketch, layer, tap = source.encoding == "sketch", layer_of(source), tap_of(source)
        joined = layer.split(JOINER)
        equal = (source.width // len(joined),) * len(joined)
        widths: Sequence[int] = getattr(source, "widths", equal) if len(joined) > 1 else ()
        return cls(
            encoding="hidden" if source.encoding == "int8" else source.encoding,
            width=source.width,
            lm_head_sha256=source.lm_head_sha256,
            basis_id=source.basis().id if sketch else None,
            layer=layer,
            widths=tuple(widths),
            pooled=pooled_rows(source),
            tap=tap,
            lm_head=None if sketch or layer != LAST or tap is not None else source.lm_head,
        )

    @property
    def lacks_lm_head(self) -> bool:
        """Whether they are hidden states that no W_lm follows: of another layer than the last, or of no LLM."""
        return self.encoding == "hidden" and (self.layer != LAST or self.tap is not None)


class Projection(nn.Module, ABC):
    """Base: `reads` names the encoding, `remedy` what to do about a store of another one."""

    reads: ClassVar[str]
    remedy: ClassVar[str]
    lr_scale: float = 1.0
    """The projection's learning rate as a factor of that of the rest of the head."""

    def __init__(self, spec: FeatureSpec) -> None:
        """Raises HeadError where the features of `spec` are not those that this projection reads."""
        super().__init__()
        self.check_features(spec)

    @classmethod
    def check_features(cls, spec: FeatureSpec) -> None:
        """Raise HeadError, with the remedy, unless this projection reads features of `spec`."""
        if spec.encoding != cls.reads:
            message = (
                f"This projection reads {cls.reads!r} features, but the store holds {spec.encoding!r}. {cls.remedy}"
            )
            raise HeadError(message)

    @property
    def layer_weights(self) -> dict[str, float] | None:
        """The share of each layer in a learned mix, by name; None without a mix."""
        return None

    @abstractmethod
    def standardise(self, statistics: TokenStatistics) -> None:
        """Set the affine change of coordinates from the training tokens, if the setting `standardise` is on."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token width"]:
        """Project every token on its own."""


PROJECTIONS: Registry[Callable[[HeadConfig, FeatureSpec], Projection]] = Registry("projection")


def check_encoding(source: FeatureSource, projection: str) -> None:
    """Raise HeadError where the projection of this name cannot read `source`, before any feature is decoded."""
    part = PROJECTIONS.get(projection)
    if isinstance(part, type) and issubclass(part, Projection):
        part.check_features(FeatureSpec.of(source))


def usual_projection(*sources: FeatureSource) -> str | None:
    """The default projection for heads that read all of `sources`; None where no projection reads all.

    It is `vocabulary`, as in the paper, for final hidden states (also int8), `hidden` for those of other layers and
    without W_lm, `sketch` for sketches, and `logits` for logits.
    """
    specs = [FeatureSpec.of(source) for source in sources]
    usual = {"hidden" if spec.lacks_lm_head else _USUAL_PROJECTION.get(spec.encoding) for spec in specs}
    return usual.pop() if len(usual) == 1 else None


@PROJECTIONS.register("vocabulary")
class VocabularyProjection(Projection):
    """The paper's W_proj (d, V) on logits that are never computed: `E W_proj^T = H (W_proj W_lm)^T`.

    Parameter and gradient have vocabulary coordinates, with Xavier initialisation and a bias as in the released code. A
    few directions hold nearly all energy of the logits, and AdamW on raw logits learns from little else. So
    `standardise` centres and whitens the hidden states first. The set of functions stays the same (W_lm has full rank);
    the steps of AdamW do not. Without `standardise` they are exactly those on explicit logits.

    A step of AdamW moves all V entries of a row by about the learning rate, and logits span D directions only; hence
    `lr_scale` = D / V. W_lm is frozen and not in the checkpoint.
    """

    reads = "hidden"
    remedy = "Give the store of hidden states that it came from, or the projection 'sketch' for a sketch."

    @classmethod
    def check_features(cls, spec: FeatureSpec) -> None:
        """As every projection; also raises HeadError for hidden states that no W_lm follows."""
        super().check_features(spec)
        if spec.lacks_lm_head:
            what = f"those of the tap {spec.tap}" if spec.tap is not None else f"those of layer {spec.layer}"
            message = (
                f"The projection 'vocabulary' multiplies final hidden states by W_lm, and the features are {what}, "
                "which W_lm does not read. Take the projection 'hidden'."
            )
            raise HeadError(message)

    def __init__(self, config: HeadConfig, spec: FeatureSpec) -> None:
        """Reads W_lm. Raises HeadError where its width is not that of the features."""
        super().__init__(spec)
        if spec.lm_head is None:
            message = "A vocabulary projection needs the language-model head, and this spec holds none."
            raise HeadError(message)
        lm_head = torch.from_numpy(np.require(spec.lm_head(), np.float32, ["C", "W"]))
        if lm_head.shape[1] != spec.width:
            message = f"W_lm has shape {tuple(lm_head.shape)}, expected (*, {spec.width}) to fit the features."
            raise HeadError(message)
        self.weight = nn.Parameter(torch.empty(config.width, len(lm_head)))
        self.bias = nn.Parameter(torch.zeros(config.width))
        nn.init.xavier_uniform_(self.weight)
        self.lm_head: Tensor
        self.register_buffer("lm_head", _narrowest(lm_head), persistent=False)
        self.shift: Tensor
        self.register_buffer("shift", torch.zeros(spec.width))
        self.whitening: Tensor
        self.register_buffer("whitening", torch.eye(spec.width))
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.lr_scale = min(1.0, lm_head.shape[1] / len(lm_head))
        self._is_standardised = config.standardise
        self._cached: tuple[tuple[object, ...], Tensor] | None = None

    @torch.no_grad()
    def standardise(self, statistics: TokenStatistics) -> None:
        """Take mean and whitening of the hidden states, and the scale of the outputs, from a sample of the tokens."""
        if not self._is_standardised:
            return
        sample = statistics.sample.to(self.weight.device)
        mean = statistics.mean.to(sample.device)
        centred = sample.double() - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        deviations = variances.clamp_min(0.0).sqrt()
        if deviations[-1] == 0:
            return
        deviations = deviations.clamp_min(float(deviations[-1]) * _WHITENING_FLOOR)
        self.shift.copy_(mean)
        self.whitening.copy_((directions / deviations) @ directions.T)
        outputs = self(sample.to(self.weight.dtype)[None])
        self.scale.copy_(outputs.double().std())

    def effective_weight(self) -> Float[Tensor, "width channel"]:
        """W_eff = W_proj W_lm, in front of whitened hidden states."""
        lm_head = self.lm_head
        if not torch.is_autocast_enabled(lm_head.device.type):
            lm_head = lm_head.to(self.weight.dtype)
        return self.weight @ lm_head @ self.whitening

    def train(self, mode: bool = True) -> "VocabularyProjection":  # noqa: FBT001, FBT002 - torch's own signature
        """As torch's; also drops the cached product."""
        self._cached = None
        super().train(mode)
        return self

    def forward(self, features: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token width"]:
        """((H - shift) W_eff^T + bias) / scale."""
        return nn.functional.linear(_minus(features, self.shift), self._current_weight(), self.bias) / self.scale

    def _current_weight(self) -> Tensor:
        """W_eff, computed at every step of training and cached in evaluation.

        Not cached while gradients are on, as an optimiser may step next and a fused one does not count its changes, nor
        for tensors made in inference mode, which have no version counter. The key is the address and version of each
        factor, and the dtype of the products. It misses changes through `.data`; `train` and `eval` drop the cache.
        """
        factors = self.weight, self.lm_head, self.whitening
        if self.training or torch.is_grad_enabled() or any(factor.is_inference() for factor in factors):
            self._cached = None
            return self.effective_weight()
        kind = self.weight.device.type
        mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (mixed, *((factor.device, factor.dtype, factor.data_ptr(), factor._version) for factor in factors))
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self.effective_weight())
        return self._cached[1]


def _minus(features: Tensor, shift: Float[Tensor, " channel"]) -> Tensor:
    """The difference; in mixed precision in the dtype of the product behind it, which saves writing float32."""
    kind = features.device.type
    if features.requires_grad or not torch.is_autocast_enabled(kind):
        return features - shift
    return torch.sub(features, shift, out=torch.empty_like(features, dtype=torch.get_autocast_dtype(kind)))


def _narrowest(lm_head: Tensor) -> Tensor:
    """W_lm in bfloat16 where that changes no value: half the memory, and no conversion in mixed precision.

    That is where the lower half of the bits of every value is zero.
    """
    exact = all(not (piece & _LOWER_HALF).any() for piece in lm_head.view(torch.int32).split(_ROWS_PER_CHECK))
    return lm_head.bfloat16() if exact else lm_head


class ChannelProjection(Projection):
    """Linear(channels, d) with bias, on channels that are each standardised over the training tokens.

    Standard deviations differ by orders of magnitude, so AdamW on raw channels would learn from the largest few only.
    Those below 1e-4 of the largest of their layer are rounding noise and set to that.

    With the setting `layer_mix` softmax, the standardised layers are summed first, with weights softmax(10 mix), which
    begin equal. A step of AdamW moves a parameter by about the learning rate, hence the factor.
    """

    def __init__(self, config: HeadConfig, spec: FeatureSpec) -> None:
        """Xavier initialisation, zero bias."""
        super().__init__(spec)
        self._layers = tuple(spec.layer.split(JOINER))
        self._widths = spec.widths or (spec.width,)
        mixed = config.layer_mix == "softmax" and len(self._layers) > 1
        self.mix = nn.Parameter(torch.zeros(len(self._layers))) if mixed else None
        self.linear = nn.Linear(self._widths[0] if mixed else spec.width, config.width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(spec.width))
        self.std: Tensor
        self.register_buffer("std", torch.ones(spec.width))
        self._is_standardised = config.standardise

    @torch.no_grad()
    def standardise(self, statistics: TokenStatistics) -> None:
        """Take mean and standard deviation of every coordinate."""
        if not self._is_standardised:
            return
        self.mean.copy_(statistics.mean)
        self.std.copy_(torch.cat([_floored(std) for std in statistics.std.split(self._widths)]))

    @property
    def layer_weights(self) -> dict[str, float] | None:
        """softmax(10 mix), by the name of the layer."""
        if self.mix is None:
            return None
        return dict(zip(self._layers, (_MIX_FACTOR * self.mix.detach().double()).softmax(0).tolist(), strict=True))

    def forward(self, features: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token width"]:
        """W (x - mean) / std + bias."""
        scaled = (features - self.mean) / self.std
        if self.mix is not None:
            scaled = (_MIX_FACTOR * self.mix).softmax(0) @ scaled.unflatten(-1, (len(self._layers), -1))
        outputs: Tensor = self.linear(scaled)
        return outputs


def _floored(std: Tensor) -> Tensor:
    """Standard deviations of one layer, the smallest raised to a share of the largest; 1 where all are 0."""
    largest = std.max()
    return std.clamp_min(largest * _STD_FLOOR) if largest > 0 else torch.ones_like(std)


@PROJECTIONS.register("sketch")
class SketchProjection(ChannelProjection):
    """On sketch coordinates c, where the logits are `E = Q c`: `W_proj E = (W_proj Q) c`."""

    reads = "sketch"
    remedy = "Make a sketch of hidden states with `agiqa store sketch STORE OUT --rank R`, or take 'vocabulary'."


@PROJECTIONS.register("hidden")
class HiddenProjection(ChannelProjection):
    """On hidden states: the paper's ablation `w/o lm_head`."""

    reads = "hidden"
    remedy = "Give the store of hidden states that it came from, or the projection 'sketch' for a sketch."


@PROJECTIONS.register("logits")
class LogitsProjection(ChannelProjection):
    """On raw logits: the paper's W_proj as in the released code, for stores of the encoding `logits`.

    `vocabulary` computes the same from hidden states in a fraction of the time. As there, `lr_scale` is D / V, with the
    usual D of hidden states.
    """

    reads = "logits"
    remedy = "Write raw logits with `agiqa store convert STORE OUT --encoding logits`, or take 'vocabulary'."

    def __init__(self, config: HeadConfig, spec: FeatureSpec) -> None:
        """As ChannelProjection, on V channels."""
        super().__init__(config, spec)
        self.lr_scale = min(1.0, _USUAL_HIDDEN_SIZE / spec.width)
