"""Features in memory: every token row of chosen items in one flat tensor, decoded once.

`FeatureSource` is what this room needs of a store; `agiqa.store.Store` satisfies it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from agiqa.errors import DataError, UnknownName

_ITEMS_PER_READ = 256
_ROWS_PER_CHECK = 65_536
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


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """What a projection may learn from the training tokens before training."""

    mean: Float[Tensor, " channel"]
    """Mean of each channel, float64."""
    std: Float[Tensor, " channel"]
    """Standard deviation of each channel, float64."""
    sample: Float[Tensor, "some_tokens channel"]
    """Up to 16,384 tokens, evenly spaced over the training tokens, float32."""


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The tokens of some items, flat, in the store's own dtype, on one device."""

    rows: Float[Tensor, "all_tokens channel"]
    roles: UInt8[Tensor, " all_tokens"]
    offsets: Int64[Tensor, " items_and_end"]
    """On the CPU always: item k owns the rows from `offsets[k]` to `offsets[k + 1]`."""
    targets: Float[Tensor, " items"] | None
    """The label of each item, float64 on the CPU; None when read without a label."""
    items: NDArray[np.int64]
    """Where each item stands in the store."""

    @classmethod
    def from_store(
        cls, source: FeatureSource, items: Sequence[int] | NDArray[Any], *, label: str | None
    ) -> "FeatureSet":
        """Read and check `items`. Raises DataError for missing labels, items without tokens, NaN and inf."""
        chosen = np.asarray(items, dtype=np.int64)
        targets = None if label is None else torch.from_numpy(read_labels(source, chosen, label=label))
        lengths = np.asarray(source.n_tokens, dtype=np.int64)[chosen]
        names = [source.items.names[item] for item in chosen]
        empty = [names[k] for k in np.flatnonzero(lengths == 0)]
        if empty:
            raise DataError.from_problems(source.id, [f"{name!r} has no tokens to pool" for name in empty])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        rows = torch.empty((int(offsets[-1]), source.width), dtype=_DTYPES[source.logical_dtype])
        roles = torch.empty(len(rows), dtype=torch.uint8)
        bits = rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
        for start in range(0, len(chosen), _ITEMS_PER_READ):
            block = source.read(chosen[start : start + _ITEMS_PER_READ])
            where = slice(int(offsets[start]), int(offsets[start]) + len(block.rows))
            bits[where] = block.rows
            roles.numpy()[where] = block.roles
        _refuse_non_finite(source.id, rows, offsets, names)
        return cls(rows=rows, roles=roles, offsets=torch.from_numpy(offsets), targets=targets, items=chosen)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each item."""
        return np.diff(self.offsets.numpy())

    def to(self, device: torch.device) -> "FeatureSet":
        """The same set with its rows and roles on `device`."""
        return replace(self, rows=self.rows.to(device), roles=self.roles.to(device))

    def statistics(self, positions: NDArray[np.int64], *, sample: int = 16_384) -> TokenStatistics:
        """Mean and standard deviation (two passes in float64) and a sample of the tokens of these positions."""
        offsets = self.offsets.numpy()
        tokens = np.concatenate([np.arange(int(offsets[k]), int(offsets[k + 1])) for k in positions])
        chunks = [torch.from_numpy(c) for c in np.array_split(tokens, -(-len(tokens) // _ROWS_PER_CHECK))]
        mean = torch.zeros(self.rows.shape[1], dtype=torch.float64)
        for chunk in chunks:
            mean += self._take(chunk).double().sum(0)
        mean /= len(tokens)
        variance = torch.zeros_like(mean)
        for chunk in chunks:
            variance += (self._take(chunk).double() - mean).square().sum(0)
        spread = np.linspace(0, len(tokens) - 1, min(sample, len(tokens))).astype(np.int64)
        return TokenStatistics(
            mean=mean,
            std=(variance / len(tokens)).sqrt(),
            sample=self._take(torch.from_numpy(tokens[spread])).float(),
        )

    def _take(self, tokens: Tensor) -> Tensor:
        """These rows, on the CPU."""
        return self.rows[tokens.to(self.rows.device)].cpu()


def read_labels(source: FeatureSource, items: NDArray[np.int64], *, label: str) -> NDArray[np.float64]:
    """The label of each item. Raises UnknownName or DataError, with the labels that the store has."""
    labels = source.items.labels
    if label not in labels:
        kind = f"label of {source.id}"
        raise UnknownName.of(kind, label, labels)
    values = np.asarray(labels[label], dtype=np.float64)[items]
    missing = [source.items.names[item] for item in items[~np.isfinite(values)]]
    if missing:
        counts = ", ".join(
            f"{name} on {np.isfinite(column).sum()} of {len(column)} items" for name, column in labels.items()
        )
        problems = [f"{name!r} has no {label} MOS" for name in missing]
        error = DataError.from_problems(source.id, problems)
        error.add_note(f"Labels of this store: {counts}. Join more with `agiqa store labels`.")
        raise error
    return values


def _refuse_non_finite(where: str, rows: Tensor, offsets: NDArray[np.int64], names: Sequence[str]) -> None:
    """Raise DataError with the name of each item that holds NaN or inf."""
    bad: set[int] = set()
    for start in range(0, len(rows), _ROWS_PER_CHECK):
        finite = rows[start : start + _ROWS_PER_CHECK].isfinite().all(dim=1)
        tokens = (~finite).nonzero().flatten().numpy() + start
        bad.update((np.searchsorted(offsets, tokens, side="right") - 1).tolist())
    if bad:
        raise DataError.from_problems(where, [f"{names[k]!r} holds NaN or inf features" for k in sorted(bad)])
