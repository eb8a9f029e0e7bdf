"""Projections: from the features of a token to the width of the head.

Each reads one encoding and refuses the others. `calibrate` fixes an affine change of coordinates from the
training tokens once, before training; it never changes which functions the head can express, only how well
conditioned they are for AdamW. Its constants are buffers of the checkpoint, so encoders without a norm of
their own (`gru`, `none`) get inputs of unit scale too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from agiqa.errors import HeadError
from agiqa.heads.data.features import FeatureSource, TokenStatistics
from agiqa.heads.settings.config import HeadConfig
from agiqa.registry import Registry

_STD_FLOOR = 1e-4
_USUAL_HIDDEN_SIZE = 4096
_WHITENING_FLOOR = 1e-3
"""Directions of hidden states with a smaller share of the largest deviation are near the rounding of bfloat16."""

_USUAL_PROJECTION = {"hidden": "vocabulary", "sketch": "sketch", "logits": "logits"}


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """What the features of a store mean: enough to build a head for them and to compare two stores."""

    encoding: str
    width: int
    """Channels per token: D of hidden states, r of a sketch."""
    lm_head_sha256: str
    basis_id: str | None
    """Of a sketch only."""
    lm_head: Callable[[], NDArray[np.float32]] | None = None
    """Reads W_lm (V, D), float32; None where the projection has no need of it."""

    @classmethod
    def of(cls, source: FeatureSource) -> "FeatureSpec":
        """The spec of a store. W_lm is read when a projection asks for it; `int8` rows are read as hidden states."""
        sketch = source.encoding == "sketch"
        return cls(
            encoding="hidden" if source.encoding == "int8" else source.encoding,
            width=source.width,
            lm_head_sha256=source.lm_head_sha256,
            basis_id=source.basis().id if sketch else None,
            lm_head=None if sketch else source.lm_head,
        )


class Projection(nn.Module, ABC):
    """Base: `reads` names the encoding, `remedy` what to do about a store of another one."""

    reads: ClassVar[str]
    remedy: ClassVar[str]
    lr_scale: float = 1.0
    """How much smaller than the rest of the head this projection's AdamW steps must be."""

    def __init__(self, spec: FeatureSpec) -> None:
        """Raises HeadError when the encoding of `spec` is not the one that this projection reads."""
        super().__init__()
        self.refuse_other(spec.encoding)

    @classmethod
    def refuse_other(cls, encoding: str) -> None:
        """Raise HeadError, with the remedy, unless this projection reads `encoding`."""
        if encoding != cls.reads:
            message = f"This projection reads {cls.reads!r} features, but the store holds {encoding!r}. {cls.remedy}"
            raise HeadError(message)

    @abstractmethod
    def calibrate(self, statistics: TokenStatistics) -> None:
        """Fix the affine change of coordinates from the training tokens."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token width"]:
        """Project every token on its own."""


PROJECTIONS: Registry[Callable[[HeadConfig, FeatureSpec], Projection]] = Registry("projection")


def check_encoding(source: FeatureSource, projection: str) -> None:
    """Raise HeadError when the projection of this name cannot read `source`, before any feature is decoded."""
    part = PROJECTIONS.get(projection)
    if isinstance(part, type) and issubclass(part, Projection):
        part.refuse_other(FeatureSpec.of(source).encoding)


def usual_projection(*sources: FeatureSource) -> str | None:
    """The projection of heads that read all of `sources` where nobody names one; None where no projection reads all.

    Hidden states (also in eight bits) are read by `vocabulary`, as in the paper; a sketch by `sketch`, logits by
    `logits`.
    """
    encodings = {"hidden" if source.encoding == "int8" else source.encoding for source in sources}
    return _USUAL_PROJECTION.get(encodings.pop()) if len(encodings) == 1 else None


@PROJECTIONS.register("vocabulary")
class VocabularyProjection(Projection):
    """The paper's W_proj (d, V) on logits that are never made.

    `E W_proj^T = H (W_proj W_lm)^T`: the parameter and its gradient live in vocabulary coordinates. Without
    `standardise` AdamW walks exactly as it would on explicit logits, with it as on those of whitened hidden states:
    the functions are the same, the steps are not. Xavier initialisation and a bias, as published. A few directions
    hold nearly all energy of the logits, and AdamW on them as they are learns from little else: `calibrate` centres
    and whitens the hidden states first, which leaves the set of functions as it is (W_lm has full rank). An AdamW step
    moves all V entries of a row by about the learning rate, and the logits span D directions only, hence
    `lr_scale` = D / V. W_lm is frozen and not in the checkpoint.
    """

    reads = "hidden"
    remedy = "Give the store of hidden states that it came from, or the projection 'sketch' for a sketch."

    def __init__(self, config: HeadConfig, spec: FeatureSpec) -> None:
        """Reads W_lm. Raises HeadError when its width is not that of the features."""
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
        self._standardise = config.standardise
        self._cached: tuple[tuple[object, ...], Tensor] | None = None

    @torch.no_grad()
    def calibrate(self, statistics: TokenStatistics) -> None:
        """Take mean and whitening of the hidden states, and the scale of the outputs, from a sample of the tokens."""
        if not self._standardise:
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
        """As torch's; also forgets the product kept for evaluation."""
        self._cached = None
        super().train(mode)
        return self

    def forward(self, features: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token width"]:
        """((H - shift) W_eff^T + bias) / scale."""
        return nn.functional.linear(_minus(features, self.shift), self._current_weight(), self.bias) / self.scale

    def _current_weight(self) -> Tensor:
        """W_eff, computed at every step of training and once per evaluation.

        A step may follow whatever has a gradient, and a fused optimiser does not count its changes. Tensors that were
        made in inference mode count none at all.
        """
        counted = not any(each.is_inference() for each in self._factors())
        if self.training or torch.is_grad_enabled() or not counted:
            self._cached = None
            return self.effective_weight()
        made_of = self._made_of()
        if self._cached is None or self._cached[0] != made_of:
            self._cached = (made_of, self.effective_weight())
        return self._cached[1]

    def _made_of(self) -> tuple[object, ...]:
        """What W_eff depends on: where its factors are, how often each was changed, and the dtype of its products.

        A change by way of `.data` is not seen; `train` and `eval` forget the product.
        """
        kind = self.weight.device.type
        mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (mixed, *((each.device, each.dtype, each.data_ptr(), each._version) for each in self._factors()))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.lm_head, self.whitening


def _minus(features: Tensor, shift: Float[Tensor, " channel"]) -> Tensor:
    """The difference; in mixed precision already rounded as the product would round it, which saves writing it wide."""
    kind = features.device.type
    if features.requires_grad or not torch.is_autocast_enabled(kind):
        return features - shift
    return torch.sub(features, shift, out=torch.empty_like(features, dtype=torch.get_autocast_dtype(kind)))


def _narrowest(lm_head: Tensor) -> Tensor:
    """W_lm in bfloat16 where that changes no value: half the memory, and nothing to convert in mixed precision."""
    narrow = lm_head.bfloat16()
    return narrow if torch.equal(narrow.float(), lm_head) else lm_head


class ChannelProjection(Projection):
    """Linear(channels, d) with bias on channels that are each standardised over the training tokens.

    The standard deviations differ by orders of magnitude, so AdamW on raw channels would learn from the largest few
    only. Those under 1e-4 of the largest are taken for rounding and held there.
    """

    def __init__(self, config: HeadConfig, spec: FeatureSpec) -> None:
        """Xavier initialisation, zero bias."""
        super().__init__(spec)
        self.linear = nn.Linear(spec.width, config.width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(spec.width))
        self.std: Tensor
        self.register_buffer("std", torch.ones(spec.width))
        self._standardise = config.standardise

    @torch.no_grad()
    def calibrate(self, statistics: TokenStatistics) -> None:
        """Take mean and standard deviation of every coordinate."""
        if not self._standardise:
            return
        largest = statistics.std.max()
        self.mean.copy_(statistics.mean)
        self.std.copy_(statistics.std.clamp_min(largest * _STD_FLOOR) if largest > 0 else torch.ones(()))

    def forward(self, features: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token width"]:
        """W (x - mean) / std + bias."""
        outputs: Tensor = self.linear((features - self.mean) / self.std)
        return outputs


@PROJECTIONS.register("sketch")
class SketchProjection(ChannelProjection):
    """On sketch coordinates c, of which Q makes the logits `E = Q c`: `W_proj E = (W_proj Q) c`."""

    reads = "sketch"
    remedy = "Make a sketch of hidden states with `agiqa store sketch STORE OUT --rank R`, or take 'vocabulary'."

    @torch.no_grad()
    def fold(
        self,
        weight: Float[Tensor, "width vocabulary"],
        bias: Float[Tensor, " width"],
        q: Float[Tensor, "vocabulary channel"],
    ) -> None:
        """Become W_proj `weight` and `bias` on logits, as far as the sketch has them; `q` is `basis().q`."""
        folded = weight @ q
        self.linear.weight.copy_(folded * self.std)
        self.linear.bias.copy_(bias + folded @ self.mean)


@PROJECTIONS.register("hidden")
class HiddenProjection(ChannelProjection):
    """On hidden states: the paper's ablation `w/o lm_head`."""

    reads = "hidden"
    remedy = "Give the store of hidden states that it came from, or the projection 'sketch' for a sketch."


@PROJECTIONS.register("logits")
class LogitsProjection(ChannelProjection):
    """On raw logits: the paper's W_proj as published, for stores of the encoding `logits`.

    `vocabulary` computes the same from hidden states in a fraction of the time. The logits span D directions at most,
    so steps are smaller by the width of usual hidden states over V, as in `vocabulary`.
    """

    reads = "logits"
    remedy = "Write raw logits with `agiqa store convert STORE OUT --encoding logits`, or take 'vocabulary'."

    def __init__(self, config: HeadConfig, spec: FeatureSpec) -> None:
        """As ChannelProjection, on V channels."""
        super().__init__(config, spec)
        self.lr_scale = min(1.0, _USUAL_HIDDEN_SIZE / spec.width)
