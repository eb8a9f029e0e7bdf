"""Artefacts of a model that give stored rows their meaning: the basis of a sketch, the scale of int8 rows.

**Basis.** With `E = W_lm h` and any square root `W_lm^T W_lm = R^T R`, the vector `R h` has the norm and the inner
products of `E`. The leading `r` eigenvectors `P` of its second moment over the data give the best rank-r approximation
of the logits in the Frobenius norm: coordinates `c = P^T R h`, frame `Q = W_lm R^-1 P` with orthonormal columns, and
`E ~ Q c`. Every projection `W_proj E` becomes `(W_proj Q) c`.

**Scale.** Each channel is centred and divided by its RMS, then each token scaled to -127..127. Without the centring a
few large channels would take the whole range: on hidden states of a real model the relative error of the logits is
.0081 with it, and .0196 with one scale per token alone.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.arrays import create_whole_array, from_float32
from agiqa.store.format.layers import basis_group, scale_group

METHODS = ("second-moment", "lm_head")
SCALED_DTYPE = "float16"
"""Logical dtype of int8 rows: its rounding, 2^-11, is far below that of eight bits."""
_BLOCK_ROWS = 8192
_LARGEST_FLOAT16 = 65504.0
_LARGEST_INT8 = 127.0
_MARGIN, _MARGIN_OF_STATES = 16.0, 256.0
"""Largest coordinate that is expected, in RMS of the largest one."""
_RANK_TOLERANCE = 1e-10
"""Eigenvalues of W_lm^T W_lm below this share of the largest one count as zero."""

Eigh = Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Eigenvalues of a symmetric matrix, ascending, and its eigenvectors in columns."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments of hidden states over the calibration tokens: enough for a basis of any rank, and for a scale."""

    tokens: int
    second: NDArray[np.float64]
    """(D, D), the mean of h h^T."""
    first: NDArray[np.float64]
    """(D,), the mean of h."""

    @classmethod
    def of_sums(cls, tokens: int, second: NDArray[np.float64], first: NDArray[np.float64]) -> "Moments":
        """The means of sums over `tokens`. Raises ConfigError for 0 tokens."""
        if tokens == 0:
            message = "A calibration needs tokens, and there are none. Give items of the training split."
            raise ConfigError(message)
        return cls(tokens=tokens, second=second / tokens, first=first / tokens)


def isotropic_moments(width: int) -> Moments:
    """Moments of standardised, uncorrelated hidden states of width D."""
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


@dataclass(frozen=True, kw_only=True)
class Basis:
    """An orthonormal frame of the logit space. Sketches with one basis id are interchangeable for a head."""

    id: str
    """Hex sha256 of map, method, rank, W_lm and calibration."""
    rank: int
    method: str
    """One of METHODS: `second-moment` of the data, or `lm_head` alone."""
    lm_head_sha256: str
    """The language-model head W_lm; `""` for a basis of states, with no W_lm between."""
    calibration: str
    """Hash of the calibration items; `none` for the method `lm_head`."""
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
    def is_of_states(self) -> bool:
        """Whether it is a basis of the states themselves, with no W_lm between; `q` is the transpose of `map` then."""
        return not self.lm_head_sha256

    @property
    def logical_dtype(self) -> str:
        """Of the coordinates: float16, or float32 if 16 times the largest RMS would exceed its range.

        After a final norm all hidden states are of like length: on real text the largest coordinate was 2.5 RMS. In
        middle layers the first token can be hundreds of times as long as the others (massive activations, Sun et al.,
        arXiv 2402.17762), so the margin of states is 256. Without calibration the RMS is unknown, so the dtype is
        float32.
        """
        if self.method == "lm_head":
            return "float32"
        margin = _MARGIN_OF_STATES if self.is_of_states else _MARGIN
        largest = margin * float(np.sqrt(self.energy[0]))
        return "float16" if largest < _LARGEST_FLOAT16 else "float32"

    def coordinates(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sketch hidden states: (tokens, D) to (tokens, r)."""
        return hidden @ self.map.T

    def encode(self, hidden: NDArray[np.float32]) -> NDArray[Any]:
        """Hidden states (tokens, D) as rows of a sketch (tokens, r), in the bits of `logical_dtype`."""
        return from_float32(self.coordinates(hidden), self.logical_dtype)

    def lift(self, weight: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """The projection of logits (d, V) that equals a projection of coordinates (d, r): `W (Q^T E) = (W Q^T) E`."""
        return weight @ self.q.T.astype(weight.dtype)

    def fold(self, weight: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """A projection of logits (d, V) as one of coordinates (d, r), `W_proj Q`; exact on what the rank keeps."""
        return weight @ self.q.astype(weight.dtype)


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
    """The rank-`rank` basis of the logits `W_lm h` of hidden states with these `moments`.

    `lm_head` is (V, D). A caller with a GPU passes `gram`, which is W_lm^T W_lm, and its own `eigh`: there both take
    seconds instead of a minute. Raises ConfigError unless `rank` is between 1 and the rank of W_lm (at most D).
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
    stated = {"method": method, "rank": rank, "lm_head_sha256": lm_head_sha256, "calibration": calibration}
    return Basis(
        id=_artefact_id(stated, map=to_coordinates),
        rank=rank,
        method=method,
        lm_head_sha256=lm_head_sha256,
        calibration=calibration,
        map=to_coordinates.astype(np.float32),
        q=lm_head @ (inverse_root @ leading).astype(np.float32),
        energy=energy,
        mean=(to_coordinates @ moments.first).astype(np.float32),
    )


def make_states_basis(moments: Moments, *, rank: int, calibration: str, eigh: Eigh = np.linalg.eigh) -> Basis:
    """The rank-`rank` basis of hidden states with these `moments`: the leading eigenvectors of their second moment.

    It is that of logits with the identity as W_lm, and `energy` that of the states. Raises ConfigError unless `rank` is
    between 1 and D.
    """
    width = len(moments.first)
    if not 1 <= rank <= width:
        message = f"Sketch rank {rank} is outside 1..{width} (the width of the layer). Give --rank {width} or less."
        raise ConfigError(message)
    values, vectors = eigh(moments.second)
    order = np.argsort(values)[::-1]
    to_coordinates = vectors[:, order[:rank]].T
    stated = {"method": METHODS[0], "rank": rank, "lm_head_sha256": "", "calibration": calibration}
    coordinates = np.ascontiguousarray(to_coordinates, np.float32)
    return Basis(
        id=_artefact_id(stated, map=coordinates),
        rank=rank,
        method=METHODS[0],
        lm_head_sha256="",
        calibration=calibration,
        map=coordinates,
        q=coordinates.T,
        energy=np.maximum(values[order], 0.0),
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


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Mean and RMS deviation of every channel of hidden states."""

    mean: NDArray[np.float32]
    """(D,)"""
    rms: NDArray[np.float32]
    """(D,), above 0: the root mean square deviation from `mean`."""
    calibration: str
    """Hash of the calibration items."""

    @classmethod
    def of(cls, moments: Moments, *, calibration: str) -> "Scale":
        """The scale of hidden states with these moments; a channel that never varies gets the RMS 1."""
        variance = np.diag(moments.second) - moments.first**2
        rms = np.sqrt(np.where(variance > 0.0, variance, 1.0))
        return cls(mean=moments.first.astype(np.float32), rms=rms.astype(np.float32), calibration=calibration)

    @property
    def id(self) -> str:
        """Hex sha256 of mean, RMS and calibration."""
        return _artefact_id({"calibration": self.calibration}, mean=self.mean, rms=self.rms)

    def encode(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Hidden states (tokens, D) as int8 rows of that shape, and the scale of each token, (tokens,).

        A token with a value that is NaN, infinite, or would exceed the range of float16 in `decode` has the scale NaN,
        which no store takes.
        """
        deviations = (hidden - self.mean) / self.rms
        largest = np.abs(deviations).max(axis=1, initial=0.0)
        scale = np.where(largest > 0.0, largest / _LARGEST_INT8, 1.0).astype(np.float32)
        rounding = 0.5 * scale * self.rms.max(initial=0.0)
        sound = np.abs(hidden).max(axis=1, initial=0.0) + rounding <= _LARGEST_FLOAT16
        if not sound.all():
            deviations[~sound], scale[~sound] = 0.0, np.nan
        np.divide(deviations, scale[:, None], where=sound[:, None], out=deviations)
        return np.rint(deviations).astype(np.int8), scale

    def decode(self, rows: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float16]:
        """Rounded hidden states (tokens, D) of `rows` (tokens, D) and `scale` (tokens,).

        Raises DataError if a value exceeds the range of float16.
        """
        values = rows * (scale[:, None] * self.rms) + self.mean
        if values.size and float(np.abs(values).max()) > _LARGEST_FLOAT16:
            message = "Hidden states exceed the range of float16. Store them with the encoding hidden."
            raise DataError(message)
        return values.astype(np.float16)


def save_basis(group: zarr.Group, basis: Basis, *, layer: str | None = None) -> None:
    """Write `basis` as the arrays `basis/map`, `basis/q`, `basis/energy` and `basis/mean` of `group`.

    That of another layer than the last is `layers_basis/8/map` and so on. A basis of states has no `q`, which is the
    transpose of its `map`.
    """
    names, folder = ("id", "rank", "method", "lm_head_sha256", "calibration"), basis_group(layer)
    attributes = {name: getattr(basis, name) for name in names}
    create_whole_array(group, f"{folder}/map", basis.map, attributes=attributes if basis.is_of_states else None)
    create_whole_array(group, f"{folder}/energy", basis.energy)
    create_whole_array(group, f"{folder}/mean", basis.mean)
    if not basis.is_of_states:
        create_whole_array(group, f"{folder}/q", basis.q, attributes=attributes)


def save_scale(group: zarr.Group, scale: Scale, *, layer: str | None = None) -> None:
    """Write `scale` as the arrays `scale/mean` and `scale/rms` of `group`; of another layer in `layers_scale/8`."""
    folder, attributes = scale_group(layer), {"id": scale.id, "calibration": scale.calibration}
    create_whole_array(group, f"{folder}/mean", scale.mean, attributes=attributes)
    create_whole_array(group, f"{folder}/rms", scale.rms)


def _artefact_id(stated: dict[str, Any], **arrays: NDArray[Any]) -> str:
    """Hex sha256 of the canonical JSON of `stated` and, by name, the sha256 of each array's float32 values."""
    hashes = {name: hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() for name, values in arrays.items()}
    return hashlib.sha256(canonical_json({**stated, **hashes}).encode()).hexdigest()
