"""Other encodings of a store of hidden states: eight bits for less disk, raw logits for tools that know no W_lm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import UnknownName
from agiqa.store.deriving.deriving import Derivation, derive_store, require_hidden
from agiqa.store.deriving.sketching import calibration_moments
from agiqa.store.format.arrays import create_whole_array, from_float32
from agiqa.store.format.artefacts import SCALED_DTYPE, Scale, save_scale
from agiqa.store.reading.store import Store
from agiqa.store.writing.creating import check_writable


def convert_store(
    source: Store, out: Path, encoding: str, *, advance: Callable[[int], None] = lambda _tokens: None
) -> Store:
    """Write `source` as `int8` or `logits` to `out`, or finish the one begun there; then seal it.

    The scale of `int8` is calibrated as a basis is, never on test items. `advance` is called with the tokens of every
    finished unit. Raises UnknownName for another encoding, ViewRefused where `source` holds no hidden states,
    SettingsConflict when `out` is a store made otherwise.
    """
    require_hidden(source)
    makers = {"int8": _to_int8, "logits": _to_logits}
    if encoding not in makers:
        raise UnknownName.of(kind="encoding to convert to", name=encoding, known=makers)
    check_writable(out)
    return derive_store(source, out, makers[encoding](source), advance=advance)


def _to_int8(source: Store) -> Derivation:
    moments, calibration = calibration_moments(source)
    scale = Scale.of(moments, calibration=calibration)

    def write_model(group: zarr.Group) -> None:
        save_scale(group, scale)
        bits, dtype = source.lm_head_bits()
        attributes = {"logical_dtype": dtype, "lm_head_sha256": source.lm_head_sha256}
        create_whole_array(group, "lm_head/weight", bits, attributes=attributes)

    return Derivation(
        encoding="int8",
        logical_dtype=SCALED_DTYPE,
        width=source.width,
        provenance={"scale": scale.id},
        encode=scale.encode,
        write_model=write_model,
        probe_attributes={},
    )


def _to_logits(source: Store) -> Derivation:
    weight = source.lm_head()

    def encode(hidden: NDArray[np.float32]) -> tuple[NDArray[Any], None]:
        return from_float32(hidden @ weight.T, source.logical_dtype), None

    return Derivation(
        encoding="logits",
        logical_dtype=source.logical_dtype,
        width=len(weight),
        provenance={},
        encode=encode,
        write_model=lambda _group: None,
        probe_attributes={"lm_head_sha256": source.lm_head_sha256},
    )
