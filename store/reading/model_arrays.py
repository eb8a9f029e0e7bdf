"""The arrays of a model that give the rows of a store their meaning: W_lm, bases of sketches, scales of int8 rows."""

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, ViewRefused
from agiqa.store.format.arrays import storage_dtype, to_float32
from agiqa.store.format.artefacts import Basis, Scale
from agiqa.store.format.layers import basis_group, probe_array, scale_group
from agiqa.store.format.layout import LM_HEAD_NAMED_IN, PROBE_LOGITS
from agiqa.store.format.metadata import damaged
from agiqa.store.reading.index import IndexedArrays


class ModelArrays(IndexedArrays):
    """The arrays of a store, and those of the model among them as what they mean."""

    encoding: str

    @property
    def lm_head_sha256(self) -> str:
        """The language-model head of the features: sha256 of its bits in row-major order; `""` for a store without."""
        if not self.content_of_rows.has_lm_head:
            return ""
        return str(self._attribute(LM_HEAD_NAMED_IN[self.encoding], "lm_head_sha256"))

    def lm_head(self) -> NDArray[np.float32]:
        """The language-model head W_lm, (V, D) float32. Raises ViewRefused if the store has none."""
        return to_float32(*self.lm_head_bits())

    def lm_head_bits(self) -> tuple[NDArray[Any], str]:
        """W_lm (V, D) in the bits of the model, and their logical dtype. Raises ViewRefused if the store has none."""
        if not self.content_of_rows.has_lm_head:
            message = f"{self.location} has no W_lm: {self.why_no_lm_head} Read its rows as hidden states (`hidden`)."
            raise ViewRefused(message)
        if self.encoding not in ("hidden", "int8"):
            message = f"{self.path} holds {self.encoding} features without W_lm; read it from the store it came from."
            raise ViewRefused(message)
        bits = np.ascontiguousarray(self.whole("lm_head/weight"))
        if hashlib.sha256(bits.data).hexdigest() != self.lm_head_sha256:
            message = (
                f"{self.path}: lm_head/weight does not have the sha256 that the store states. Copy the store again."
            )
            raise DamagedStore(message)
        logical_dtype = str(self._attribute("lm_head/weight", "logical_dtype"))
        if storage_dtype(logical_dtype) != bits.dtype:
            raise damaged(self.path, f"lm_head/weight is {bits.dtype}, which cannot be {logical_dtype}")
        return bits, logical_dtype

    @cached_property
    def probe_arrays(self) -> tuple[str, ...]:
        """The stored arrays of the model's own values at `probe/rows`: its logits, and its states of layers."""
        names = (PROBE_LOGITS, *map(probe_array, self.layers))
        return tuple(name for name in names if self.has_array(name))

    @property
    def why_no_lm_head(self) -> str:
        """Why a store has no W_lm, in a sentence."""
        if self.tap is not None:
            return f"its rows are those of {self.tap}, which W_lm does not read."
        return f"its last layer is {self.layers[-1]}, and W_lm reads only the layer 'last'."

    @cached_property
    def scale(self) -> Scale:
        """The scale of the `features` of an `int8` store."""
        return self._read_scale(None)

    @cached_property
    def _layer_scales(self) -> dict[str, Scale]:
        return {}

    def layer_scale(self, layer: str) -> Scale:
        """The scale of a layer of an `int8` store."""
        if layer == self.layers[-1]:
            return self.scale
        if layer not in self._layer_scales:
            self._layer_scales[layer] = self._read_scale(layer)
        return self._layer_scales[layer]

    def _read_scale(self, layer: str | None) -> Scale:
        group = scale_group(layer)
        mean, rms = self.whole(f"{group}/mean"), self.whole(f"{group}/rms")
        return Scale(mean=mean, rms=rms, calibration=str(self._attribute(f"{group}/mean", "calibration")))

    def basis(self) -> Basis:
        """The basis of a sketch. Raises ViewRefused for other encodings."""
        return self.layer_basis(self.layers[-1])

    def layer_basis(self, layer: str) -> Basis:
        """The basis of a layer of a sketch. Raises ViewRefused for other encodings."""
        if self.encoding != "sketch":
            message = (
                f"{self.path} holds {self.encoding}, which has no basis. "
                "`agiqa store sketch STORE OUT --rank R` makes a sketch of it."
            )
            raise ViewRefused(message)
        is_last = layer == self.layers[-1]
        before_head = is_last and self.content_of_rows.has_lm_head
        group, holder = basis_group(None if is_last else layer), "q" if before_head else "map"
        names = ("map", "q", "energy", "mean") if before_head else ("map", "energy", "mean")
        parts: dict[str, Any] = {name: self.whole(f"{group}/{name}") for name in names}
        rank = int(self.array(f"{group}/map").shape[0])
        if self._attribute(f"{group}/{holder}", "rank") != rank or parts["map"].shape[1:] != parts["energy"].shape:
            raise damaged(self.path, f"the arrays of its {group} do not fit each other")
        for name in ("id", "method", "lm_head_sha256", "calibration"):
            parts[name] = str(self._attribute(f"{group}/{holder}", name))
        parts.setdefault("q", parts["map"].T)
        return Basis(rank=rank, **parts)

    def layer_bases(self) -> dict[str, Basis]:
        """The bases of all layers of a sketch but the last, by layer. Raises ViewRefused for other encodings."""
        return {layer: self.layer_basis(layer) for layer in self.layers[:-1]}
