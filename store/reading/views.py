"""One interface to what a store can answer: hidden states, logits or sketch coordinates, whatever its encoding.

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
from agiqa.store.format.bits import to_float32
from agiqa.store.reading.store import Store

VIEWS = ("hidden", "logits", "sketch")
_VOCABULARY_BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class View:
    """One reading of a store; get one from `view`."""

    store: Store
    name: str
    width: int
    """Values per token."""
    exact: bool
    """Whether these are the model's values, up to the rounding of the stored dtype and of float32 products."""
    _rows: Callable[[int, int, int], NDArray[np.float32]]

    def item(self, item: int) -> NDArray[np.float32]:
        """All tokens of item number `item`, (tokens, width)."""
        return self._rows(item, 0, int(self.store.n_tokens[item]))

    def blocks(self, item: int, *, rows: int = 64) -> Iterator[NDArray[np.float32]]:
        """The same in blocks of at most `rows` tokens, so that memory does not grow with the item."""
        length = int(self.store.n_tokens[item])
        for start in range(0, length, rows):
            yield self._rows(item, start, min(start + rows, length))


def view(store: Store, name: str) -> View:
    """The view `name` of `store`: `hidden`, `logits` or `sketch`.

    Raises UnknownName for another name, and ViewRefused, with the remedy, where the encoding cannot answer.
    """
    if name not in VIEWS:
        raise UnknownName.of(kind="view", name=name, known=VIEWS)
    if name == "logits" and store.encoding == "hidden" and not store.keeps_logits:
        return _logits_from_hidden(store, exact=True)
    if name == "logits" and store.encoding == "int8":
        return _logits_from_hidden(store, exact=False)
    if name == "logits" and store.encoding == "hidden":
        return _stored(store, name, "logits", width=store.array("logits").shape[1])
    if name == "hidden" and store.encoding == "int8":
        return View(store=store, name=name, width=store.width, exact=False, _rows=_reader(store, "features"))
    if name == store.encoding:
        return _stored(store, name, "features", width=store.width)
    raise ViewRefused(_refusal(store, name))


def _refusal(store: Store, name: str) -> str:
    remedy = {
        "hidden": "they cannot be had back; read the store of hidden states it was made from.",
        "logits": "its approximation of a token's logits is `store.basis().q @ coordinates`.",
        "sketch": "make one with `agiqa store sketch STORE OUT --rank R`, of a store of hidden states.",
    }[name]
    return f"{store.path} holds the encoding {store.encoding!r}, which cannot answer {name!r}: {remedy}"


def _stored(store: Store, name: str, array: str, *, width: int) -> View:
    return View(store=store, name=name, width=width, exact=True, _rows=_reader(store, array))


def _reader(store: Store, array: str) -> Callable[[int, int, int], NDArray[np.float32]]:
    def rows(item: int, start: int, stop: int) -> NDArray[np.float32]:
        return to_float32(store.rows_of(item, start, stop, array=array), store.logical_dtype)

    return rows


def _logits_from_hidden(store: Store, *, exact: bool) -> View:
    """W_lm stays in its own bits, and only a block of the vocabulary is widened at a time."""
    bits, dtype = store.lm_head_bits()
    hidden = _reader(store, "features")

    def rows(item: int, start: int, stop: int) -> NDArray[np.float32]:
        states = hidden(item, start, stop)
        logits = np.empty((len(states), len(bits)), np.float32)
        for first in range(0, len(bits), _VOCABULARY_BLOCK):
            block = slice(first, first + _VOCABULARY_BLOCK)
            np.matmul(states, to_float32(bits[block], dtype).T, out=logits[:, block])
        return logits

    return View(store=store, name="logits", width=len(bits), exact=exact, _rows=rows)
