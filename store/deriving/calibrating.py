"""The bases of a sketch and the scales of `int8`, calibrated on the training items of a store of hidden states."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, HeadError, UnknownName, ViewRefused
from agiqa.store.format.artefacts import (
    METHODS,
    Basis,
    Moments,
    Scale,
    isotropic_moments,
    make_basis,
    make_states_basis,
    moments_of,
)
from agiqa.store.reading.store import Store


def basis_from(store: Store, rank: int, *, method: str = "second-moment") -> Basis:
    """The rank-`rank` basis of the logits of `store`, or of the states of its `features` if it has no W_lm.

    `second-moment` is calibrated on the training split, or on all items if there are no splits, and never on test or
    validation items; `lm_head` uses W_lm alone, as if hidden states were isotropic. Raises ConfigError for a rank
    outside 1..D or a store whose splits include no training items, UnknownName for another method, and ViewRefused
    when `store` holds no hidden states, or has no W_lm for the method `lm_head`.
    """
    require_hidden(store)
    if method not in METHODS:
        raise UnknownName.of(kind="basis method", name=method, known=METHODS)
    if not 1 <= rank <= store.width:
        message = (
            f"Sketch rank {rank} is outside 1..{store.width} (the hidden size of {store.path}). Give another --rank."
        )
        raise ConfigError(message)
    isotropic = method == "lm_head"
    if not isotropic and not store.content_of_rows.has_lm_head:
        return layer_basis_from(store, store.layer_name, rank)
    lm_head = store.lm_head()
    moments, calibration = (isotropic_moments(store.width), "none") if isotropic else _calibration(store)
    return make_basis(
        lm_head,
        moments,
        rank=rank,
        method=method,
        lm_head_sha256=store.lm_head_sha256,
        calibration=calibration,
    )


def layer_basis_from(store: Store, layer: str, rank: int) -> Basis:
    """The basis of the states of a stored layer, calibrated as `basis_from`; all channels if the layer has fewer."""
    require_hidden(store)
    moments, calibration = _calibration(store, layer)
    return make_states_basis(moments, rank=min(rank, len(moments.first)), calibration=calibration)


def layer_bases_from(store: Store, rank: int) -> dict[str, Basis]:
    """The bases of all layers of `store` but the last, as `layer_basis_from`."""
    return {layer: layer_basis_from(store, layer, rank) for layer in store.layers[:-1]}


def bases_of(sketch: Store, layers: Sequence[str], *, tap: str | None) -> dict[str, Basis]:
    """The bases in `sketch` for states of these `layers` at `tap`.

    Raises HeadError where `sketch` has rows of another tap, or lacks a layer, and ViewRefused unless it is a sketch.
    """
    if sketch.tap != tap:
        here, there = (f"the tap {one}" if one else "the language model" for one in (tap, sketch.tap))
        message = (
            f"The states to sketch are those of {here}, and {sketch.location} has a basis for those of {there}. Give a "
            f"sketch of states of {here}, or make a basis with --rank."
        )
        raise HeadError(message)
    if missing := [layer for layer in layers if layer not in sketch.layers]:
        message = (
            f"{sketch.location} has no basis for the layer {missing[0]}; it has the layers {', '.join(sketch.layers)}. "
            "Make own bases with --rank, or give a sketch that has this layer."
        )
        raise HeadError(message)
    return {layer: sketch.layer_basis(layer) for layer in layers}


def scale_from(store: Store, layer: str) -> Scale:
    """The scale of a stored layer for `int8`, calibrated as `basis_from`."""
    moments, calibration = _calibration(store, layer)
    return Scale.of(moments, calibration=calibration)


def require_hidden(store: Store) -> None:
    """Raise ViewRefused unless `store` holds hidden states in the bits of the model."""
    if store.encoding != "hidden":
        message = f"{store.path} holds {store.encoding} features; this needs the store of hidden states they came from."
        raise ViewRefused(message)


def _calibration(store: Store, layer: str | None = None) -> tuple[Moments, str]:
    """Moments of the hidden states of the training split (all items without splits), and what they were taken over.

    The states are those of `features`, or of the stored `layer`. Raises ConfigError where there are splits and no
    training items.
    """
    items = np.arange(len(store.items))
    if any(store.items.splits):
        items = np.array(store.items.in_split("train"), np.int64)
    if not len(items):
        message = (
            f"{store.path} has splits but no item in 'train', and sketch and int8 are never calibrated on test items. "
            "Join a split column with `agiqa store labels`."
        )
        raise ConfigError(message)

    chosen = layer or store.layer_name

    def blocks() -> Iterator[NDArray[np.float32]]:
        for unit in np.unique(store.units[items]).tolist():
            yield store.read_layer(items[store.units[items] == unit], chosen).float32()

    return moments_of(blocks(), store.layer_shape(chosen)[0]), f"{store.id}:{len(items)} items"
