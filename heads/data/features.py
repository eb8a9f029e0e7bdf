"""What heads are trained from: a source of items with labels and rows of features, and the rows of some items, decoded.

`FeatureSource` is what this room needs of a store; `agiqa.store.Store` satisfies it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from agiqa.errors import DataError, UnknownName
from agiqa.heads.settings.labels import parse_labels
from agiqa.progress import track
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.arrays import finite_rows

_BYTES_PER_READ = 64 << 20
_ROWS_PER_CHUNK = 65_536
_CHANNELS_PER_SUM = 1024
_SAMPLED_VALUES = 1 << 26
"""A sample of tokens has at most 256 MiB."""
_CPU = torch.device("cpu")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@runtime_checkable
class ItemColumns(Protocol):
    """The item table of a store, one entry per item in every column."""

    @property
    def names(self) -> list[str]: ...
    @property
    def prompts(self) -> list[str]: ...
    @property
    def splits(self) -> list[str | None]: ...
    @property
    def generators(self) -> list[str | None]: ...
    @property
    def labels(self) -> Mapping[str, NDArray[np.float64]]: ...


@runtime_checkable
class RowBlock(Protocol):
    """Decoded rows of some items: item k is `rows[offsets[k]:offsets[k + 1]]`."""

    @property
    def rows(self) -> NDArray[Any]: ...
    @property
    def roles(self) -> NDArray[np.uint8]: ...
    @property
    def offsets(self) -> NDArray[np.int64]: ...


@runtime_checkable
class SketchBasis(Protocol):
    """The basis of a sketch, of which a head needs the identity only."""

    @property
    def id(self) -> str: ...


@runtime_checkable
class ItemSource(Protocol):
    """Items with labels, which a split can be drawn from: a store, or images without features."""

    @property
    def id(self) -> str: ...
    @property
    def items(self) -> ItemColumns: ...


@runtime_checkable
class FeatureSource(Protocol):
    """What can be trained from: items with labels, and a row of features per token."""

    @property
    def id(self) -> str: ...
    @property
    def encoding(self) -> str: ...
    @property
    def logical_dtype(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def items(self) -> ItemColumns: ...
    @property
    def n_tokens(self) -> NDArray[np.int32]: ...
    @property
    def lm_head_sha256(self) -> str: ...
    def read(self, items: Sequence[int] | NDArray[Any], /) -> RowBlock: ...
    def lm_head(self) -> NDArray[np.float32]: ...
    def basis(self) -> SketchBasis: ...


@runtime_checkable
class Located(Protocol):
    """A source that has a path or a URL, as stores have."""

    @property
    def location(self) -> str: ...


def location_of(source: ItemSource) -> str:
    """The name of `source` in messages: path or URL of a store, of each of several read as one; else the id."""
    return source.location if isinstance(source, Located) else source.id


@runtime_checkable
class Joined(Protocol):
    """Several stores read as one, as by `agiqa.store.reading.union`."""

    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def scale_notes(self) -> Sequence[str]: ...
    @property
    def parts(self) -> Sequence[tuple[FeatureSource, NDArray[np.int64]]]: ...


@runtime_checkable
class Hashed(Protocol):
    """A FeatureSource that knows a hash of its bytes, as stores do."""

    @property
    def content(self) -> str: ...


def content_of(source: FeatureSource) -> str:
    """The hash of the bytes of `source`; its id, which does not depend on every byte, where it knows no hash."""
    return source.content if isinstance(source, Hashed) else source.id


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """What a projection may learn from the training tokens before training."""

    mean: Float[Tensor, " channel"]
    """Mean of each channel, float64."""
    std: Float[Tensor, " channel"]
    """Standard deviation of each channel, float64."""
    sample: Float[Tensor, "some_tokens channel"]
    """Up to 16,384 tokens and 256 MiB, evenly spaced over the training tokens, float32."""


class ItemRows(NamedTuple):
    """The tokens of one item."""

    rows: Float[Tensor, "token channel"]
    """In the store's own dtype."""
    roles: UInt8[Tensor, " token"]


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The tokens of some items. Roles are in memory; the rows of an item are in memory or stay in the store."""

    rows: Float[Tensor, "kept_tokens channel"]
    """The kept rows in the store's own dtype: on a device, in RAM, or in a file that is mapped there."""
    starts: NDArray[np.int64]
    """Where each item's rows begin in `rows`; -1 for an item whose rows are read from `source` at every use."""
    roles: UInt8[Tensor, " all_tokens"]
    """On the device of `rows`: item k owns those from `offsets[k]` to `offsets[k + 1]`."""
    offsets: Int64[Tensor, " items_and_end"]
    """Always on the CPU."""
    items: NDArray[np.int64]
    """The number of each item in the store."""
    source: FeatureSource

    @classmethod
    def from_store(
        cls,
        source: FeatureSource,
        items: Sequence[int] | NDArray[Any],
        *,
        kept: int | None = None,
        device: torch.device = _CPU,
    ) -> "FeatureSet":
        """Read and check `items`, and keep the rows of the first `kept` of them (None: of all) on `device`.

        The kept rows lie in the order of `items`. Raises DataError for items without tokens, NaN and inf.
        """
        chosen = np.asarray(items, dtype=np.int64)
        offsets = token_offsets(source, chosen)
        count = len(chosen) if kept is None else kept
        rows = torch.empty((int(offsets[count]), source.width), dtype=row_dtype(source), device=device)
        roles = torch.empty(int(offsets[-1]), dtype=torch.uint8, device=device)
        with track("read", len(chosen), "items", brief=True) as advance:
            for position, item in read_checked(source, chosen):
                where = slice(int(offsets[position]), int(offsets[position + 1]))
                roles[where] = item.roles
                if position < count:
                    rows[where] = item.rows
                advance(1)
        return cls(
            rows=rows,
            starts=np.where(np.arange(len(chosen)) < count, offsets[:-1], -1),
            roles=roles,
            offsets=torch.from_numpy(offsets),
            items=chosen,
            source=source,
        )

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each item."""
        return np.diff(self.offsets.numpy())

    @property
    def row_bytes(self) -> int:
        """Bytes of the decoded rows of all items, kept or not."""
        return int(self.offsets[-1]) * row_bytes(self.source)

    @property
    def is_streamed(self) -> bool:
        """Whether the rows of some items are read from the store at every use."""
        return bool((self.starts < 0).any())

    def positions_of(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of `items` is in this set, whose own `items` must ascend."""
        return np.searchsorted(self.items, items)

    def subset(self, positions: NDArray[np.int64]) -> "FeatureSet":
        """The items at `positions`, with a copy of their roles on the CPU and the rows of this set."""
        bounds, lengths, roles = self.offsets.tolist(), self.lengths[positions], self.roles.cpu()
        pieces = [roles[bounds[k] : bounds[k + 1]] for k in positions.tolist()]
        return replace(
            self,
            starts=self.starts[positions],
            roles=torch.cat([*pieces, roles[:0]]),
            offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
            items=self.items[positions],
        )

    def take(self, positions: NDArray[np.int64]) -> list[ItemRows]:
        """The tokens of each of these items; one call of the source reads all rows that are not kept."""
        starts, offsets = self.starts[positions], self.offsets.numpy()
        firsts, lasts = offsets[positions], offsets[positions + 1]
        away = starts < 0
        read = iter(_read(self.source, self.items[positions[away]]) if away.any() else ())
        return [
            next(read) if start < 0 else ItemRows(self.rows[start : start + last - first], self.roles[first:last])
            for start, first, last in zip(starts.tolist(), firsts.tolist(), lasts.tolist(), strict=True)
        ]

    def statistics(
        self, positions: NDArray[np.int64], *, sample: int = 16_384, device: torch.device = _CPU
    ) -> TokenStatistics:
        """Mean and standard deviation (two passes in float64) and a sample of the tokens of these positions.

        They are computed on `device` and returned on the CPU.
        """
        tokens, width = int(self.lengths[positions].sum()), self.rows.shape[1]
        count = min(sample, max(1, _SAMPLED_VALUES // width), tokens)
        spread = np.linspace(0, tokens - 1, count).astype(np.int64)
        mean = torch.zeros(width, dtype=torch.float64, device=device)
        sampled: list[Tensor] = []
        for first, chunk in self._chunks(positions, device):
            mean += _channel_sums(chunk)
            here = spread[(spread >= first) & (spread < first + len(chunk))]
            sampled.append(chunk[torch.from_numpy(here - first).to(device)].float().cpu())
        mean /= tokens
        squares = torch.zeros_like(mean)
        for _, chunk in self._chunks(positions, device):
            squares += _channel_sums(chunk, minus=mean)
        return TokenStatistics(mean=mean.cpu(), std=(squares / tokens).sqrt().cpu(), sample=torch.cat(sampled))

    def _chunks(self, positions: NDArray[np.int64], device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """All rows of these items in turn, in even chunks of at most 65,536 on `device`, each with its first token.

        The sums of the chunks, hence the statistics to the last bit, do not depend on where the rows are kept.
        """
        ends = np.cumsum(self.lengths[positions])
        begins = ends - self.lengths[positions]
        tokens = int(ends[-1])
        count = -(-tokens // _ROWS_PER_CHUNK)
        short, longer = divmod(tokens, count)
        bounds = np.cumsum([0, *([short + 1] * longer), *([short] * (count - longer))]).tolist()
        for first, last in pairwise(bounds):
            reach = slice(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(begins, last, "left")))
            rows = torch.cat([item.rows for item in self.take(positions[reach])])
            skipped = first - int(begins[reach.start])
            yield first, rows[skipped : skipped + last - first].to(device)


def _channel_sums(rows: Tensor, *, minus: Tensor | None = None) -> Tensor:
    """Sum of each channel in float64, of squared differences from `minus` where given; some channels at a time."""
    sums: list[Tensor] = []
    for first in range(0, rows.shape[1], _CHANNELS_PER_SUM):
        channels = slice(first, first + _CHANNELS_PER_SUM)
        wide = rows[:, channels].double()
        sums.append((wide if minus is None else wide.sub_(minus[channels]).square_()).sum(0))
    return torch.cat(sums)


def row_dtype(source: FeatureSource) -> torch.dtype:
    """The dtype of the rows of `source`."""
    return _DTYPES[source.logical_dtype]


def row_bytes(source: FeatureSource) -> int:
    """Bytes of one decoded row."""
    return source.width * row_dtype(source).itemsize


def item_bytes(source: FeatureSource, items: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of the decoded rows of each of these items."""
    return np.asarray(source.n_tokens, dtype=np.int64)[items] * row_bytes(source)


def token_offsets(source: FeatureSource, items: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the tokens of each item begin if the items lie one after the other, and the end of the last; (items + 1,).

    Raises DataError for items without tokens.
    """
    lengths = np.asarray(source.n_tokens, dtype=np.int64)[items]
    empty = [source.items.names[item] for item in items[lengths == 0]]
    if empty:
        raise DataError.from_problems(location_of(source), [f"{name!r} has no tokens to pool" for name in empty])
    return np.concatenate([[0], np.cumsum(lengths)])


def items_identity(source: FeatureSource, items: NDArray[np.int64]) -> str:
    """A sha256 of the store's id and of the numbers, names, prompts and token counts of these items, in this order."""
    names, prompts = source.items.names, source.items.prompts
    n_tokens = np.asarray(source.n_tokens)[items].tolist()
    entries = [[item, names[item], prompts[item], n] for item, n in zip(items.tolist(), n_tokens, strict=True)]
    return hashlib.sha256(canonical_json([source.id, entries]).encode()).hexdigest()


def read_checked(source: FeatureSource, items: NDArray[np.int64]) -> Iterator[tuple[int, ItemRows]]:
    """Every item with its position in `items`, in the order of the store, so that the store decodes no chunk twice.

    Reads about 64 MiB at a time. After the last item, raises DataError with the names of items that hold NaN or inf.
    """
    if not len(items):
        return
    order = np.argsort(items, kind="stable")
    sizes = item_bytes(source, items[order])
    pieces = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // _BYTES_PER_READ)) + 1
    bad: list[int] = []
    for positions in np.split(order, pieces):
        for position, item in zip(positions.tolist(), _read(source, items[positions]), strict=True):
            if not _is_finite(item.rows):
                bad.append(position)
            yield position, item
    if bad:
        names = [source.items.names[items[position]] for position in sorted(bad)]
        raise DataError.from_problems(location_of(source), [f"{name!r} holds NaN or inf features" for name in names])


def _is_finite(rows: Tensor) -> bool:
    """Whether there is no NaN and no inf. NumPy takes a twentieth of torch's time on bfloat16."""
    if rows.dtype == torch.bfloat16:
        return bool(finite_rows(rows.view(torch.uint16).numpy(), "bfloat16").all())
    return bool(np.isfinite(rows.numpy()).all())


def _read(source: FeatureSource, items: NDArray[np.int64]) -> list[ItemRows]:
    """The tokens of each item, by one call of the source."""
    block = source.read(items)
    rows, roles = torch.from_numpy(block.rows), torch.from_numpy(block.roles)
    rows = rows.view(torch.bfloat16) if source.logical_dtype == "bfloat16" else rows
    bounds = block.offsets.tolist()
    return [ItemRows(rows[a:b], roles[a:b]) for a, b in pairwise(bounds)]


def read_labels(source: FeatureSource, items: NDArray[np.int64], *, label: str) -> NDArray[np.float64]:
    """The labels of each item, (items, labels); `label` is one name, or several as in `quality+correspondence`.

    Of several labels an item may lack some, which are NaN, but not all. Raises UnknownName or DataError with the labels
    that the store has, and ConfigError as `parse_labels`.
    """
    labels, wanted = source.items.labels, parse_labels(label)
    for name in wanted:
        if name not in labels:
            kind = f"label of {location_of(source)}"
            raise UnknownName.of(kind, name, labels)
    values = np.stack([np.asarray(labels[name], dtype=np.float64)[items] for name in wanted], axis=1)
    absent = ~np.isfinite(values)
    values[absent] = np.nan
    missing = np.argwhere(absent & absent.all(axis=1, keepdims=True)).tolist()
    if missing:
        of_columns = ((name, int(np.isfinite(column).sum()), len(column)) for name, column in labels.items())
        counts = ", ".join(f"{name} on {known} of {items_in_all} items" for name, known, items_in_all in of_columns)
        problems = [f"{source.items.names[items[row]]!r} has no {wanted[column]} MOS" for row, column in missing]
        error = DataError.from_problems(location_of(source), problems)
        error.add_note(f"Labels of this store: {counts}. Join more with `agiqa store labels`.")
        raise error
    return values
