"""What a store will take: bytes on disk by encoding, from the store's own formats, and GPU time at measured rates."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from agiqa.extract.filling.pooling import Pooling
from agiqa.extract.filling.token_estimates import TokenCounts
from agiqa.extract.models import Backbone
from agiqa.store.format.arrays import rows_dtype
from agiqa.store.format.layers import LAST

RANK = 512
"""Rank of a sketch where none is given."""
RATE_SOURCE = (
    "bench/LOG.md: MiniCPM-Llama3-V-2.5 on one H100 80 GB, 11.3 ms per 477 tokens and 6.8 ms per 3 slices; raw logits "
    "521 MB/s of rows"
)
"""Where the rates of `gpu_hours` were measured."""
_SECONDS_PER_TOKEN, _SECONDS_PER_SLICE = 11.3e-3 / 477, 6.774e-3 / 3
_ROW_BYTES_PER_SECOND = 521e6
"""Of all layers together: what one process writes of raw logits."""
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
    """V; 0 for states without W_lm."""
    dtype: str
    """Of hidden states: bfloat16, float16 or float32."""
    blocks: int
    """Of the decoder."""
    is_measured: bool
    """Whether the rates of RATE_SOURCE are those of this shape."""
    layer_widths: Mapping[str, int] = field(default_factory=dict[str, int])
    """Values per row of the layers that may have other widths than `width`."""

    @classmethod
    def of(cls, backbone: Backbone, name: str, layers: Sequence[str] = ()) -> "ModelShape":
        """The shape of `backbone`, which is called `name`, and the widths of its `layers`."""
        width, vocabulary, blocks = backbone.hidden_size, backbone.vocab_size, backbone.layer_count
        known = (width, vocabulary, blocks) == (PUBLISHED.width, PUBLISHED.vocabulary, PUBLISHED.blocks)
        return cls(
            name=name,
            width=width,
            vocabulary=vocabulary,
            dtype=backbone.logical_dtype,
            blocks=blocks,
            is_measured=known,
            layer_widths={layer: backbone.layer_width(layer) for layer in layers},
        )

    def width_of(self, layer: str) -> int:
        """Values per row of `layer`."""
        return self.layer_widths.get(layer, self.width)


PUBLISHED = ModelShape(
    name="MiniCPM-Llama3-V-2.5", width=4096, vocabulary=128_256, dtype="bfloat16", blocks=32, is_measured=True
)
"""The shape of the published model."""


@dataclass(frozen=True, kw_only=True)
class RowsOfItems:
    """What a store keeps of each item."""

    layers: tuple[str, ...] = (LAST,)
    poolings: tuple[Pooling, ...] = ()
    """A row for each; none where every token has a row."""

    @property
    def has_last(self) -> bool:
        """Whether W_lm, and logits, belong to it."""
        return LAST in self.layers

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"layers": list(self.layers), "pooled": [str(pooling) for pooling in self.poolings]}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a store of one encoding takes."""

    encoding: str
    rows: int
    """Of all items: one per token, or one per pooling."""
    bytes_per_token: int
    """Before compression, of a row in all layers, with the token's id and its role."""
    raw_bytes: int
    """All rows, and W_lm or bases, before compression."""
    disk_bytes: int
    """About, compressed."""
    gpu_hours: float | None
    """About, of computing and writing on one GPU, without start and planning; None where no rate was measured."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def footprints(
    counts: TokenCounts, shape: ModelShape, *, rank: int | None = None, content: RowsOfItems | None = None
) -> list[Footprint]:
    """The store of each encoding for items with `counts`; a sketch has `rank` or RANK.

    `content` is, if left out, a row of the last layer for every token. Without `last`, or W_lm, there is no store of
    logits.
    """
    content, rank = content or RowsOfItems(), RANK if rank is None else rank
    encodings = ("hidden", "sketch", "int8", *(("logits",) if content.has_last and shape.vocabulary else ()))
    return [_footprint(encoding, counts, shape, rank, content) for encoding in encodings]


def _footprint(encoding: str, counts: TokenCounts, shape: ModelShape, rank: int, content: RowsOfItems) -> Footprint:
    rows = len(counts.tokens) * len(content.poolings) if content.poolings else int(counts.tokens.sum())
    *others, last = content.layers
    of_others = "hidden" if encoding == "logits" else encoding
    row = _row_bytes(encoding, shape, rank, last) + sum(_row_bytes(of_others, shape, rank, layer) for layer in others)
    raw = rows * (row + _TOKEN_BYTES) + _constant_bytes(encoding, shape, rank, content)
    return Footprint(
        encoding=encoding,
        rows=rows,
        bytes_per_token=row + _TOKEN_BYTES,
        raw_bytes=raw,
        disk_bytes=round(raw * _STORED_SHARE[encoding]),
        gpu_hours=_gpu_hours(counts, shape, content, rows * row) if shape.is_measured else None,
    )


def _row_bytes(encoding: str, shape: ModelShape, rank: int, layer: str) -> int:
    """Of a row of one layer."""
    states = shape.width_of(layer)
    width = {"sketch": min(rank, states), "logits": shape.vocabulary}.get(encoding, states)
    dtype = "float16" if encoding == "sketch" else shape.dtype
    return width * rows_dtype(encoding, dtype).itemsize + (_SCALE_BYTES if encoding == "int8" else 0)


def _constant_bytes(encoding: str, shape: ModelShape, rank: int, content: RowsOfItems) -> int:
    """Of W_lm or of the bases of a sketch. The basis of a layer without W_lm is a map of its states alone."""
    if encoding == "logits":
        return 0
    if encoding == "sketch":
        widths = [shape.width_of(layer) for layer in content.layers]
        maps = sum(min(rank, width) * width for width in widths)
        return 4 * (maps + content.has_last * min(rank, widths[-1]) * shape.vocabulary)
    return content.has_last * shape.vocabulary * shape.width * rows_dtype("hidden", shape.dtype).itemsize


def _gpu_hours(counts: TokenCounts, shape: ModelShape, content: RowsOfItems, row_bytes: int) -> float:
    """Of computing, or of writing where that takes longer; blocks above the highest layer do not run."""
    slices = 0 if counts.slices is None else int(counts.slices.sum())
    run = 1.0 if content.has_last else int(content.layers[-1]) / shape.blocks
    computing = int(counts.tokens.sum()) * _SECONDS_PER_TOKEN * run + slices * _SECONDS_PER_SLICE
    return max(computing, row_bytes / _ROW_BYTES_PER_SECOND) / 3600
