"""Whether a model is the one behind the features that a head was trained on, by what both say of themselves."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from agiqa.errors import HeadError, listed

_WEIGHTS = (".safetensors", ".bin", ".gguf")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_SHOWN = 12
"""Digits of a hash in a message."""

Provenance = Mapping[str, Any]
"""What `Backbone.provenance` says; a part that it does not state is not compared."""


class _Part(NamedTuple):
    """One thing that must be the same."""

    identity: Any
    shown: str


def check_model(recorded: Provenance, found: Provenance, *, head: str) -> list[str]:
    """What else differs between two models that are the same, a line each.

    `recorded` is the model of the store that `head` was trained on, `found` the one that is to be asked now. They are
    the same by the bytes of their weights, adapter and tokenizer, and by chat template, slicing and dtype, wherever
    they lie and whatever they are called. Raises HeadError, naming both sides, where they are not.
    """
    for what, part in (
        ("model", _model),
        ("adapter", _adapter),
        ("tokenizer", _tokenizer),
        ("chat template", _template),
        ("slicing of images", _slicing),
        ("dtype", _dtype),
    ):
        was, now = part(recorded), part(found)
        if was is not None and (now is None or was.identity != now.identity):
            asked = "none" if now is None else now.shown
            message = (
                f"{head} was trained on features of the {what} {was.shown}; asked now is the {what} {asked}. Give the "
                f"same {what} as `agiqa extract` was given, or train a head on a store of this one."
            )
            raise HeadError(message)
    return list(_lesser(recorded, found, head))


def _lesser(recorded: Provenance, found: Provenance, head: str) -> Iterator[str]:
    """What changes numbers in their rounding only, or may."""
    was, now = _files(recorded), _files(found)
    settings = sorted(name for name in {*was, *now} if not name.endswith((*_WEIGHTS, ".index.json", *_TOKENIZERS)))
    changed = [name for name in settings if was.get(name) != now.get(name)]
    if was and changed:
        yield f"{head} was trained on features of another {listed(changed)} of {_name(recorded)}"
    then, here = recorded.get("attention"), found.get("attention")
    if then is not None and then != here:
        yield f"{head} was trained on features of {then} attention, and this is {here}"


def _model(model: Provenance) -> _Part | None:
    """By the weights, however many files they lie in."""
    hashes = sorted(digest for name, digest in _files(model).items() if PurePath(name).suffix in _WEIGHTS)
    if not hashes:
        return None
    adapter = model.get("adapter") or {}
    name = _name(model).removesuffix(f"+{adapter.get('name')}")
    revision = f"revision {str(model['revision'])[:_SHOWN]}, " if model.get("revision") else ""
    return _Part(hashes, f"{name} ({revision}weights {_digest(hashes)})")


def _adapter(model: Provenance) -> _Part | None:
    """By weights and configuration; its absence counts."""
    adapter = model.get("adapter") or {}
    if not adapter:
        return _Part((), "none") if _files(model) else None
    hashes = [digest for _, digest in sorted(_files(adapter).items())]
    return _Part(tuple(hashes), f"{adapter.get('name')} ({_digest(hashes)})")


def _tokenizer(model: Provenance) -> _Part | None:
    hashes = [digest for name, digest in sorted(_files(model).items()) if name in _TOKENIZERS]
    return _Part(hashes, f"of {_name(model)} ({_digest(hashes)})") if hashes else None


def _template(model: Provenance) -> _Part | None:
    digest = (model.get("chat_template") or {}).get("sha256")
    return None if digest is None else _Part(digest, f"of {_name(model)} ({digest[:_SHOWN]})")


def _slicing(model: Provenance) -> _Part | None:
    image = model.get("image")
    if not image:
        return None
    return _Part(image, f"into at most {image.get('slices')} slices of {image.get('resolution')} pixels (--max-slices)")


def _dtype(model: Provenance) -> _Part | None:
    """That of the weights, and so of W_lm."""
    return _Part(model["dtype"], f"{model['dtype']} (--dtype)") if "dtype" in model else None


def _files(made: Provenance) -> Mapping[str, str]:
    return made.get("files") or {}


def _name(model: Provenance) -> str:
    return str(model.get("name", "an unnamed model"))


def _digest(hashes: Sequence[str]) -> str:
    """The beginning of the hash of one file, or of the hashes of several."""
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return whole[:_SHOWN]
