"""The basis of a sketch: an orthonormal frame of the logit space that keeps most of their energy.

With `E = W_lm h` and any square root `W_lm^T W_lm = R^T R`, the vector `R h` has the norm and inner products of
`E`. The leading `r` eigenvectors `P` of its second moment over the data give the best rank-r approximation of the
logits in the Frobenius norm: coordinates `c = P^T R h`, frame `Q = W_lm R^-1 P` with orthonormal columns, and
`E ~ Q c`. Every projection `W_proj E` becomes `(W_proj Q) c`.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import ConfigError
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.arrays import create_whole_array

METHODS = ("second-moment", "lm_head")
_BLOCK_ROWS = 8192
_LARGEST_FLOAT16 = 65504.0
_RANK_TOLERANCE = 1e-10
"""Directions of W_lm^T W_lm below this share of the largest eigenvalue count as not there."""

Eigh = Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Eigenvalues, ascending, and eigenvectors in columns of a symmetric matrix."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """An artefact of its own: stores with the same basis id are interchangeable for a head."""

    id: str
    rank: int
    method: str
    """One of METHODS: `second-moment` of the data, or `lm_head` alone."""
    lm_head_sha256: str
    calibration: str
    """Hash of what the second moment was taken over; `none` for the method `lm_head`."""
    map: NDArray[np.float32]
    """(r, D): coordinates of hidden states, c = map @ h."""
    q: NDArray[np.float32]
    """(V, r), orthonormal columns: E ~ q @ c."""
    energy: NDArray[np.float64]
    """(D,) eigenvalues of the second moment of the logits, descending."""
    mean: NDArray[np.float32]
    """(r,) mean coordinates over the calibration tokens."""

    @property
    def energy_kept(self) -> float:
        """Share of the calibration tokens' squared logits that rank r keeps, 0 to 1."""
        return float(self.energy[: self.rank].sum() / self.energy.sum())

    @property
    def logical_dtype(self) -> str:
        """float16 for the coordinates, or float32 where 16 times the largest RMS would leave its range.

        After a final norm all hidden states are of like length: on real text the largest coordinate was 2.5 RMS.
        Without calibration no RMS is known, so float32 too.
        """
        if self.method == "lm_head":
            return "float32"
        largest = 16.0 * float(np.sqrt(self.energy[0]))
        return "float16" if largest < _LARGEST_FLOAT16 else "float32"

    def coordinates(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sketch hidden states: (tokens, D) to (tokens, r)."""
        return hidden @ self.map.T

    def lift(self, weight: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """A projection of coordinates (d, r) as the projection of logits (d, V) that it is: `W (Q^T E) = (W Q^T) E`."""
        return weight @ self.q.T.astype(weight.dtype)

    def fold(self, weight: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """A projection of logits (d, V) as one of coordinates (d, r), `W_proj Q`: exact on what the rank keeps."""
        return weight @ self.q.astype(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What one pass over the calibration tokens leaves: enough to make a basis of any rank."""

    tokens: int
    second: NDArray[np.float64]
    """(D, D), the mean of h h^T."""
    first: NDArray[np.float64]
    """(D,), the mean of h."""

    @classmethod
    def of_sums(cls, tokens: int, second: NDArray[np.float64], first: NDArray[np.float64]) -> "Moments":
        """The means of sums over `tokens`. Raises ConfigError when there are none."""
        if tokens == 0:
            message = "A calibration needs tokens, and there are none. Give items of the training split."
            raise ConfigError(message)
        return cls(tokens=tokens, second=second / tokens, first=first / tokens)


def isotropic_moments(width: int) -> Moments:
    """Moments of hidden states of which nothing is known but their width D."""
    return Moments(tokens=0, second=np.eye(width), first=np.zeros(width))


def moments_of(blocks: Iterable[NDArray[np.float32]], width: int) -> Moments:
    """First and second moments of the hidden states in `blocks`, each (tokens, D), in one pass."""
    second, first, tokens = np.zeros((width, width)), np.zeros(width), 0
    for block in blocks:
        for start in range(0, len(block), _BLOCK_ROWS):
            part = block[start : start + _BLOCK_ROWS]
            second += part.T @ part
            first += part.sum(axis=0, dtype=np.float64)
            tokens += len(part)
    return Moments.of_sums(tokens, second, first)


def make_basis(
    lm_head: NDArray[np.float32],
    moments: Moments,
    *,
    rank: int,
    lm_head_sha256: str,
    calibration: str,
    method: str = "second-moment",
    gram: NDArray[np.float64] | None = None,
    eigh: Eigh = np.linalg.eigh,
) -> Basis:
    """The rank-`rank` basis of the logits `W_lm h` whose hidden states have `moments`.

    `lm_head` is (V, D). `gram` is W_lm^T W_lm where it is known already, and `eigh` stands in for NumPy's: on a GPU
    both take seconds instead of a minute. Raises ConfigError when `rank` is not between 1 and the rank of W_lm (at
    most D).
    """
    width = lm_head.shape[1]
    if not 1 <= rank <= width:
        message = f"Sketch rank {rank} is outside 1..{width} (the hidden size). Give --rank {width} or less."
        raise ConfigError(message)
    root, inverse_root = _square_root(_gram(lm_head) if gram is None else gram, eigh)
    if rank > len(root):
        message = f"Sketch rank {rank} is above the rank of this model's W_lm, {len(root)}. Give a lower --rank."
        raise ConfigError(message)
    values, vectors = eigh(root @ moments.second @ root.T)
    order = np.argsort(values)[::-1]
    leading = vectors[:, order[:rank]]
    energy = np.zeros(width)
    energy[: len(order)] = np.maximum(values[order], 0.0)
    to_coordinates = leading.T @ root
    content = {
        "method": method,
        "rank": rank,
        "lm_head_sha256": lm_head_sha256,
        "calibration": calibration,
        "map": hashlib.sha256(to_coordinates.astype("<f4").tobytes()).hexdigest(),
    }
    return Basis(
        id=hashlib.sha256(canonical_json(content).encode()).hexdigest(),
        rank=rank,
        method=method,
        lm_head_sha256=lm_head_sha256,
        calibration=calibration,
        map=to_coordinates.astype(np.float32),
        q=lm_head @ (inverse_root @ leading).astype(np.float32),
        energy=energy,
        mean=(to_coordinates @ moments.first).astype(np.float32),
    )


def _gram(lm_head: NDArray[np.float32]) -> NDArray[np.float64]:
    total = np.zeros((lm_head.shape[1], lm_head.shape[1]))
    for start in range(0, len(lm_head), _BLOCK_ROWS):
        block = lm_head[start : start + _BLOCK_ROWS].astype(np.float64)
        total += block.T @ block
    return total


def _square_root(gram: NDArray[np.float64], eigh: Eigh) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`R` (k, D) with gram = R^T R and its right inverse (D, k); k is the numerical rank of `gram`."""
    values, vectors = eigh(gram)
    kept = values > _RANK_TOLERANCE * values[-1]
    scale = np.sqrt(values[kept])
    return scale[:, None] * vectors[:, kept].T, vectors[:, kept] / scale


def save_basis(group: zarr.Group, basis: Basis) -> None:
    """Write `basis` as the arrays `basis/map`, `basis/q`, `basis/energy` and `basis/mean` of `group`."""
    attributes: dict[str, Any] = {
        "id": basis.id,
        "rank": basis.rank,
        "method": basis.method,
        "lm_head_sha256": basis.lm_head_sha256,
        "calibration": basis.calibration,
    }
    create_whole_array(group, "basis/map", basis.map)
    create_whole_array(group, "basis/energy", basis.energy)
    create_whole_array(group, "basis/mean", basis.mean)
    create_whole_array(group, "basis/q", basis.q, attributes=attributes)
