"""What a store will take: bytes on disk by encoding, from the store's own formats, and GPU time at measured rates."""

from dataclasses import asdict, dataclass
from typing import Any

from agiqa.extract.filling.token_estimates import TokenCounts
from agiqa.extract.models import Backbone
from agiqa.store.format.arrays import rows_dtype

RANK = 512
"""Rank of a sketch where none is given."""
RATE_SOURCE = (
    "bench/LOG.md: MiniCPM-Llama3-V-2.5 on one H100 80 GB, 11.3 ms per 477 tokens and 6.8 ms per 3 slices; raw logits "
    "521 MB/s of rows"
)
"""Where the rates of `gpu_hours` were measured."""
_SECONDS_PER_TOKEN, _SECONDS_PER_SLICE = 11.3e-3 / 477, 6.774e-3 / 3
_LOGIT_BYTES_PER_SECOND = 521e6
_STORED_SHARE = {"hidden": 0.69, "sketch": 0.67, "int8": 0.75, "logits": 0.62}
"""Bytes on disk over raw bytes, as measured (bench/LOG.md): for `hidden` of rows that occur once, else of all rows."""
_TOKEN_BYTES = 5
"""Per token: its id in int32, and its role."""
_SCALE_BYTES = 4
"""Per token of an int8 store: the scale of its row in float32."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the size of a store depends on."""

    name: str
    width: int
    """D"""
    vocabulary: int
    """V"""
    dtype: str
    """Of hidden states: bfloat16, float16 or float32."""
    is_measured: bool
    """Whether the rates of RATE_SOURCE are those of this shape."""

    @classmethod
    def of(cls, backbone: Backbone, name: str) -> "ModelShape":
        """The shape of `backbone`, which is called `name`."""
        width, vocabulary = backbone.hidden_size, backbone.vocab_size
        known = (width, vocabulary) == (PUBLISHED.width, PUBLISHED.vocabulary)
        return cls(name=name, width=width, vocabulary=vocabulary, dtype=backbone.logical_dtype, is_measured=known)


PUBLISHED = ModelShape(name="MiniCPM-Llama3-V-2.5", width=4096, vocabulary=128_256, dtype="bfloat16", is_measured=True)
"""The shape of the published model."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a store of one encoding takes."""

    encoding: str
    bytes_per_token: int
    """Before compression: a row of the features, the token's id and its role."""
    raw_bytes: int
    """All tokens, and W_lm or a basis, before compression."""
    disk_bytes: int
    """About, compressed."""
    gpu_hours: float | None
    """About, of computing and writing on one GPU, without start and planning; None where no rate was measured."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def footprints(counts: TokenCounts, shape: ModelShape, *, rank: int | None = None) -> list[Footprint]:
    """The store of each encoding for items with `counts`; a sketch has `rank` or RANK."""
    rank = min(RANK if rank is None else rank, shape.width)
    return [_footprint(encoding, counts, shape, rank) for encoding in ("hidden", "sketch", "int8", "logits")]


def _footprint(encoding: str, counts: TokenCounts, shape: ModelShape, rank: int) -> Footprint:
    width = {"sketch": rank, "logits": shape.vocabulary}.get(encoding, shape.width)
    dtype = "float16" if encoding == "sketch" else shape.dtype
    row = width * rows_dtype(encoding, dtype).itemsize + (_SCALE_BYTES if encoding == "int8" else 0)
    head = shape.vocabulary * shape.width * rows_dtype("hidden", shape.dtype).itemsize
    constants = {"sketch": 4 * rank * (shape.vocabulary + shape.width), "logits": 0}.get(encoding, head)
    tokens = int(counts.tokens.sum())
    raw = tokens * (row + _TOKEN_BYTES) + constants
    return Footprint(
        encoding=encoding,
        bytes_per_token=row + _TOKEN_BYTES,
        raw_bytes=raw,
        disk_bytes=round(raw * _STORED_SHARE[encoding]),
        gpu_hours=_gpu_hours(encoding, counts, tokens * row) if shape.is_measured else None,
    )


def _gpu_hours(encoding: str, counts: TokenCounts, row_bytes: int) -> float:
    slices = 0 if counts.slices is None else int(counts.slices.sum())
    seconds = int(counts.tokens.sum()) * _SECONDS_PER_TOKEN + slices * _SECONDS_PER_SLICE
    if encoding == "logits":
        seconds = max(seconds, row_bytes / _LOGIT_BYTES_PER_SECOND)
    return seconds / 3600
