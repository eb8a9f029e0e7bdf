"""Whether several stores can be read as one: rows of one meaning, and no item twice."""

from collections.abc import Mapping, Sequence
from typing import Any

from agiqa.errors import DataError, HeadError, SchemaError
from agiqa.store.format.metadata import differing
from agiqa.store.reading.store import AnyStore

_SAME_MAKING = ("model", "conversation")


def require_same_meaning(first: AnyStore, other: AnyStore) -> None:
    """Raise SchemaError or HeadError where the rows of the two stores cannot be read as one."""
    _require_same("layer in `features`", first, other, first.layer_name, other.layer_name)
    _require_same("pooling", first, other, _told(first.pooled), _told(other.pooled))
    _require_same("tap", first, other, first.tap or "none", other.tap or "none")
    heads = (first.lm_head_sha256, other.lm_head_sha256)
    if not heads[0] and (found := _differing_models(first, other)):
        message = (
            f"{first.path} and {other.path} have no W_lm, and their models differ in {', '.join(found)}: their rows "
            "live in different spaces. Extract both with one model."
        )
        raise HeadError(message)
    if heads[0] != heads[1]:
        message = (
            f"{first.path} belongs to the language-model head {heads[0][:12]}, {other.path} to {heads[1][:12]}: their "
            "rows live in different spaces. Extract both with one model."
        )
        raise HeadError(message)
    _require_same("encoding", first, other, first.encoding, other.encoding)
    _require_same_basis(first, other, first.layer_name)
    _require_same("logical dtype", first, other, first.logical_dtype, other.logical_dtype)
    _require_same("width", first, other, first.width, other.width)


def require_same_layer(first: AnyStore, other: AnyStore, layer: str) -> None:
    """Raise SchemaError or HeadError where the rows of a layer that both stores have cannot be read as one."""
    (width, dtype), (other_width, other_dtype) = first.layer_shape(layer), other.layer_shape(layer)
    _require_same_basis(first, other, layer)
    _require_same(f"width of layer {layer}", first, other, width, other_width)
    _require_same(f"logical dtype of layer {layer}", first, other, dtype, other_dtype)


def _require_same_basis(first: AnyStore, other: AnyStore, layer: str) -> None:
    if first.encoding != "sketch":
        return
    here, there = first.layer_basis(layer).id, other.layer_basis(layer).id
    if here != there:
        message = (
            f"Layer {layer}: {first.path} is a sketch in the basis {here[:12]}, {other.path} in {there[:12]}. "
            f"Make the second anew, from the store of hidden states: "
            f"`agiqa store sketch HIDDEN_STORE OUT --basis {first.path}`."
        )
        raise HeadError(message)


def _told(pooled: Sequence[str]) -> str:
    return ", ".join(pooled) or "none, its rows are tokens"


def _differing_models(first: AnyStore, other: AnyStore) -> list[str]:
    """What tells the models of two stores apart: their files and those of adapters, or all that is recorded of them."""
    here, there = (_told_of_model(store.provenance.get("model") or {}) for store in (first, other))
    return [name for name, _, _ in differing(here, there, "model")]


def _told_of_model(model: Mapping[str, Any]) -> Mapping[str, Any]:
    if not model.get("files"):
        return model
    return {"files": model["files"], "adapter": (model.get("adapter") or {}).get("files")}


def _require_same(what: str, first: AnyStore, other: AnyStore, here: object, there: object) -> None:
    if here == there:
        return
    message = f"{first.path} has the {what} {here}, {other.path} has {there}. {_remedy(first, other)}"
    raise SchemaError(message)


def _remedy(first: AnyStore, other: AnyStore) -> str:
    sketch, hidden = (first, other) if first.encoding == "sketch" else (other, first)
    if (sketch.encoding, hidden.encoding) == ("sketch", "hidden"):
        return f"Sketch the hidden states in that basis: `agiqa store sketch {hidden.path} OUT --basis {sketch.path}`."
    return "Extract or convert one of them anew, with the settings of the other."


def require_no_item_twice(stores: Sequence[AnyStore]) -> None:
    """Raise DataError for images with the same conversation in two stores."""
    seen: dict[bytes, tuple[AnyStore, str]] = {}
    problems: list[str] = []
    for store in stores:
        names = dict(zip((key.tobytes() for key in store.item_keys), store.items.names, strict=True))
        for key, name in names.items():
            if key in seen:
                before, called = seen[key]
                problems.append(f"{called!r} of {before.path} is {name!r} of {store.path}")
        seen.update({key: (store, name) for key, name in names.items()})
    if problems:
        error = DataError.from_problems("The stores hold the same image and conversation", problems)
        error.add_note("An item must not be read twice: leave out one of the stores, or extract without these items.")
        raise error


def differences_in_making(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted names of the differences between two provenances in model and conversation."""
    return [name for key in _SAME_MAKING for name, _, _ in differing(first.get(key), other.get(key), key)]
