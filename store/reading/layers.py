"""The layers of a store, each read like a store of its own: `store.layer("8")`, `store.layer("8+16+last")`."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, UnknownName, ViewRefused
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.arrays import from_float32
from agiqa.store.format.artefacts import Basis
from agiqa.store.format.items import Items
from agiqa.store.format.layers import LAST
from agiqa.store.reading.by_name import ByName
from agiqa.store.reading.token_rows import TokenRows

JOINED = "+"
"""Between the names of layers whose channels are concatenated."""


class Identified(Protocol):
    """A basis, of which a head needs the identity only."""

    @property
    def id(self) -> str: ...


class LayerSource(Protocol):
    """What can be trained from: a store, several read as one, or layers of one of them."""

    @property
    def id(self) -> str: ...
    @property
    def content(self) -> str: ...
    @property
    def location(self) -> str: ...
    @property
    def encoding(self) -> str: ...
    @property
    def logical_dtype(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def layer_name(self) -> str: ...
    @property
    def pooled(self) -> tuple[str, ...]: ...
    @property
    def tap(self) -> str | None: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    @property
    def items(self) -> Items: ...
    @property
    def n_tokens(self) -> NDArray[np.int32]: ...
    @property
    def lm_head_sha256(self) -> str: ...
    def read(self, items: Sequence[int] | NDArray[Any], /) -> TokenRows: ...
    def tokens(self, items: Sequence[int] | NDArray[Any], /) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]: ...
    def lm_head(self) -> NDArray[np.float32]: ...
    def basis(self) -> Identified: ...


class Layered(LayerSource, Protocol):
    """A store, or several read as one, with all their layers."""

    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def layer_count(self) -> int | None: ...
    def read_layer(self, items: Sequence[int] | NDArray[Any], layer: str, /) -> TokenRows: ...
    def layer_shape(self, layer: str, /) -> tuple[int, str]: ...
    def layer_basis(self, layer: str, /) -> Basis: ...


def known_layer(source: Layered, name: str) -> str:
    """The stored layer that `name` names: a number, `last`, or a negative number that counts from `last`, -1.

    The number of the last block is `last` too. Raises UnknownName with the stored layers.
    """
    asked, count = name.strip(), source.layer_count
    found = asked
    if asked.removeprefix("-").isdecimal():
        number = int(asked)
        if number == -1 or (count is not None and number == count):
            found = LAST
        elif number < 0 and count is not None:
            found = str(count + 1 + number)
        else:
            found = str(number)
    if found in source.layers:
        return found
    hint = ""
    if found.startswith("-") and count is None:
        hint = " Negative numbers other than -1 need the number of blocks, which this store does not record."
    elif count is not None:
        hint = f" The model has {count} blocks."
    message = (
        f"{source.location} has no layer {name!r}.{hint} Stored: {', '.join(source.layers)}. "
        "`agiqa extract --layers 8,16,last` stores those that it names, in a store of their own."
    )
    raise UnknownName(message)


def known_layers(source: Layered, name: str) -> list[str]:
    """The stored layers that `name` names, such as `8+16+last`, ascending.

    Raises as `known_layer`, and ConfigError for one that is named twice.
    """
    found = [known_layer(source, part) for part in name.split(JOINED)]
    if len(set(found)) != len(found):
        message = f"{name!r} names a layer of {source.location} twice. Name each once."
        raise ConfigError(message)
    return sorted(found, key=source.layers.index)


def layer_of(source: Layered, name: str) -> LayerSource:
    """The layers `name` of `source`; `source` itself for the layer of its `features`. Raises as `known_layers`."""
    found = known_layers(source, name)
    if len(found) > 1:
        return JoinedLayers(source, found)
    return source if found[0] == source.layers[-1] else StoredLayer(source, found[0])


class _OfStore(ByName):
    """What layers have of the store that they belong to."""

    def __init__(self, source: Layered, layers: Sequence[str]) -> None:
        self.store = source
        self.layers = tuple(layers)
        """Names, ascending."""
        self.layer = layer = JOINED.join(layers)
        """The name of the layer, or of several joined by plus signs."""
        self.id: str = hashlib.sha256(canonical_json([source.id, layer]).encode()).hexdigest()
        """sha256 of the canonical JSON of the store's id and the name of the layer."""

    @property
    def layer_name(self) -> str:
        """As `layer`; stores have it too."""
        return self.layer

    @property
    def content(self) -> str:
        """sha256 of the canonical JSON of the store's content and the name of the layer."""
        return hashlib.sha256(canonical_json([self.store.content, self.layer]).encode()).hexdigest()

    @property
    def location(self) -> str:
        """Path or URL of the store, and the layer."""
        return f"{self.store.location} (layer {self.layer})"

    @property
    def provenance(self) -> Mapping[str, Any]:
        """That of the store."""
        return self.store.provenance

    @property
    def pooled(self) -> tuple[str, ...]:
        """That of the store."""
        return self.store.pooled

    @property
    def tap(self) -> str | None:
        """That of the store."""
        return self.store.tap

    @property
    def items(self) -> Items:
        """Those of the store."""
        return self.store.items

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """Rows per item, (items,)."""
        return self.store.n_tokens

    @property
    def lm_head_sha256(self) -> str:
        """The language-model head of the store, which tells its model; `""` for a store without."""
        return self.store.lm_head_sha256

    def tokens(self, items: Sequence[int] | NDArray[Any]) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """Token ids and roles of the store, as `Store.tokens`."""
        return self.store.tokens(items)

    def lm_head(self) -> NDArray[np.float32]:
        """Raises ViewRefused: W_lm reads only the layer `last`."""
        message = f"{self.location} has no W_lm, which reads only the layer {LAST!r}. Read its rows as `hidden`."
        raise ViewRefused(message)


class StoredLayer(_OfStore):
    """A layer of a store, other than that of its `features`."""

    def __init__(self, source: Layered, layer: str) -> None:
        """The stored layer called `layer`."""
        super().__init__(source, [layer])
        self.width, self.logical_dtype = source.layer_shape(layer)
        self.encoding = "hidden" if source.encoding == "logits" else source.encoding
        """That of the store; hidden states beside logits, since only the layer `last` has logits."""

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """The rows of `items`, as `Store.read`."""
        return self.store.read_layer(items, self.layer)

    def basis(self) -> Basis:
        """The basis of this layer of a sketch. Raises ViewRefused for other encodings."""
        return self.store.layer_basis(self.layer)


@dataclass(frozen=True, kw_only=True)
class JoinedBases:
    """The bases of several layers of a sketch."""

    id: str
    """sha256 of the canonical JSON of the list of their ids."""
    bases: tuple[Basis, ...]


class JoinedLayers(_OfStore):
    """Several layers of a store, the channels of one after those of the other."""

    def __init__(self, source: Layered, layers: Sequence[str]) -> None:
        """These stored layers. Raises ViewRefused where `last` holds logits and the others hidden states."""
        super().__init__(source, layers)
        if source.encoding == "logits" and source.layers[-1] in layers:
            message = (
                f"{source.location} has logits of the layer {LAST!r} and hidden states of the others, which are not "
                "read as one. Leave it out, or read the store of hidden states that this one was made from."
            )
            raise ViewRefused(message)
        shapes = [source.layer_shape(layer) for layer in layers]
        self.widths = tuple(width for width, _ in shapes)
        self.width = sum(self.widths)
        dtypes = {dtype for _, dtype in shapes}
        self.logical_dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        self.encoding = "hidden" if source.encoding == "logits" else source.encoding

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """The rows of `items`, (tokens, sum of widths), as `Store.read`."""
        first, *others = (self._as_joined(self.store.read_layer(items, layer)) for layer in self.layers)
        rows = np.concatenate([first.rows, *(block.rows for block in others)], axis=1)
        return replace(first, rows=rows)

    def _as_joined(self, block: TokenRows) -> TokenRows:
        """`block` in the dtype of the joined rows."""
        if block.logical_dtype == self.logical_dtype:
            return block
        rows = from_float32(block.float32(), self.logical_dtype)
        return replace(block, rows=rows, logical_dtype=self.logical_dtype)

    def basis(self) -> JoinedBases:
        """The bases of these layers of a sketch. Raises ViewRefused for other encodings."""
        bases = tuple(self.store.layer_basis(layer) for layer in self.layers)
        joined = hashlib.sha256(canonical_json([basis.id for basis in bases]).encode()).hexdigest()
        return JoinedBases(id=joined, bases=bases)
