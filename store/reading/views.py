"""Views of a store: hidden states, logits or sketch coordinates, as far as its encoding has them.

| encoding | `hidden` | `logits` | `sketch` |
|---|---|---|---|
| hidden | as stored | `H W_lm^T`, or as stored with kept logits | - |
| int8 | rounded | rounded | - |
| logits | - | as stored | - |
| sketch | - | - | as stored |
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import UnknownName, ViewRefused
from agiqa.store.format.arrays import to_float32
from agiqa.store.format.layers import LAST
from agiqa.store.reading.layers import known_layer
from agiqa.store.reading.store import Store

VIEWS = ("hidden", "logits", "sketch")
_VOCABULARY_BLOCK = 8192
_ANSWERS = {"hidden": ("hidden", "logits"), "int8": ("hidden", "logits"), "logits": ("logits",), "sketch": ("sketch",)}
"""Views by encoding."""
_REMEDIES = {
    "hidden": "they cannot be recovered; read the store of hidden states it was made from.",
    "logits": "its approximation of a token's logits is `store.basis().q @ coordinates`.",
    "sketch": "make one with `agiqa store sketch STORE OUT --rank R`, of a store of hidden states.",
}


@dataclass(frozen=True, kw_only=True)
class View:
    """A view of a store; `view` makes one."""

    store: Store
    name: str
    width: int
    """Values per token."""
    exact: bool
    """Whether the values are the model's, up to the rounding of the stored dtype and of float32 products."""
    _rows: Callable[[int, int, int], NDArray[np.float32]]

    def item(self, item: int) -> NDArray[np.float32]:
        """All tokens of item number `item`, (tokens, width)."""
        return self._rows(item, 0, int(self.store.n_tokens[item]))

    def blocks(self, item: int, *, rows: int = 64) -> Iterator[NDArray[np.float32]]:
        """As `item`, in blocks of at most `rows` tokens, so that memory does not grow with the item."""
        length = int(self.store.n_tokens[item])
        for start in range(0, length, rows):
            yield self._rows(item, start, min(start + rows, length))


def view(store: Store, name: str, *, layer: str | None = None) -> View:
    """The view `name` of `store`: `hidden`, `logits` or `sketch`; of a stored layer, or else of `features`.

    Raises UnknownName for another name or layer, and ViewRefused, with the remedy, if the encoding, or the layer, does
    not have the view.
    """
    if name not in VIEWS:
        raise UnknownName.of(kind="view", name=name, known=VIEWS)
    chosen = store.layer_name if layer is None else known_layer(store, layer)
    is_other = chosen != store.layer_name
    encoding = "hidden" if is_other and store.encoding == "logits" else store.encoding
    if name == "logits" and "logits" in _ANSWERS[encoding]:
        _require_logits(store, chosen)
    if name not in _ANSWERS[encoding]:
        message = f"{store.path} holds the encoding {encoding!r}, which has no view {name!r}: {_REMEDIES[name]}"
        raise ViewRefused(message)
    array = "logits" if name == "logits" and store.keeps_logits else store.array_of_layer(chosen)
    width, rows = int(store.array(array).shape[1]), _stored_rows(store, array, store.layer_shape(chosen)[1])
    if name == "logits" and store.encoding in ("hidden", "int8") and not store.keeps_logits:
        width, rows = _logits_of(store, rows)
    return View(store=store, name=name, width=width, exact=store.encoding != "int8", _rows=rows)


def _require_logits(store: Store, layer: str) -> None:
    """Raise ViewRefused unless W_lm makes logits of the states of the layer."""
    if not store.content_of_rows.has_lm_head:
        message = f"{store.path} has no view 'logits': {store.why_no_lm_head} Take the view 'hidden'."
        raise ViewRefused(message)
    if layer != store.layer_name:
        message = (
            f"Layer {layer} of {store.path} has no view 'logits': W_lm reads only the layer {LAST!r}. Take the view "
            "'hidden' of it."
        )
        raise ViewRefused(message)


def _stored_rows(store: Store, array: str, dtype: str) -> Callable[[int, int, int], NDArray[np.float32]]:
    def rows(item: int, start: int, stop: int) -> NDArray[np.float32]:
        return to_float32(store.rows_of(item, start, stop, array=array), dtype)

    return rows


def _logits_of(
    store: Store, hidden: Callable[[int, int, int], NDArray[np.float32]]
) -> tuple[int, Callable[[int, int, int], NDArray[np.float32]]]:
    """Vocabulary V, and logits `H W_lm^T`. W_lm stays in its own bits; a block of V at a time becomes float32."""
    bits, dtype = store.lm_head_bits()

    def rows(item: int, start: int, stop: int) -> NDArray[np.float32]:
        states = hidden(item, start, stop)
        logits = np.empty((len(states), len(bits)), np.float32)
        for first in range(0, len(bits), _VOCABULARY_BLOCK):
            block = slice(first, first + _VOCABULARY_BLOCK)
            np.matmul(states, to_float32(bits[block], dtype).T, out=logits[:, block])
        return logits

    return len(bits), rows
