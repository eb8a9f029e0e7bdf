"""Whether a model is the one with which a head was trained, by the provenance of both."""

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from agiqa.errors import HeadError, listed

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pth", ".pt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_SHOWN = 12
"""Digits of a hash in a message."""

Provenance = Mapping[str, Any]
"""What `Backbone.provenance` returns; missing parts are not compared."""


class _Part(NamedTuple):
    """One thing that must be the same."""

    identity: Any
    shown: str


def check_model(recorded: Provenance, found: Provenance, *, head: str) -> list[str]:
    """Warnings about smaller differences between two models that are the same.

    `recorded` is the model of the store on which `head` was trained, `found` the one to use now. They are the same if
    the bytes of weights, adapter and tokenizer are, and chat template, slicing and dtype; paths and names do not count.
    Raises HeadError, naming both, if they are not the same.
    """
    for what, part in (
        ("model", _model),
        ("adapter", _adapter),
        ("tokenizer", _tokenizer),
        ("chat template", _template),
        ("image slices", _slicing),
        ("preparation of images", _preparation),
        ("dtype", _dtype),
    ):
        was, now = part(recorded), part(found)
        if was is not None and (now is None or was.identity != now.identity):
            given = f"no {what}" if now is None else now.shown
            message = (
                f"{head} was trained with {was.shown}; you gave {given}. Give the same {what} as to `agiqa extract`, "
                "or train a head on a store of this model."
            )
            raise HeadError(message)
    warnings = []
    was_files, files = _files(recorded), _files(found)
    settings = sorted(
        name for name in {*was_files, *files} if not name.endswith((*_WEIGHTS, ".index.json", *_TOKENIZERS))
    )
    changed = [name for name in settings if was_files.get(name) != files.get(name)]
    if was_files and changed:
        warnings.append(f"{head} was trained with another {listed(changed)} of {_name(recorded)}")
    attention = recorded.get("attention")
    if attention is not None and attention != found.get("attention"):
        warnings.append(f"{head} was trained with {attention} attention, and this is {found.get('attention')}")
    return warnings


def _model(model: Provenance) -> _Part | None:
    """By the weights, however many files hold them."""
    hashes = sorted(digest for name, digest in _files(model).items() if PurePath(name).suffix in _WEIGHTS)
    if not hashes:
        return None
    adapter = model.get("adapter") or {}
    name = _name(model).removesuffix(f"+{adapter.get('name')}")
    revision = f"revision {str(model['revision'])[:_SHOWN]}, " if model.get("revision") else ""
    return _Part(hashes, f"the model {name} ({revision}weights {_digest(hashes)})")


def _adapter(model: Provenance) -> _Part | None:
    """By weights and configuration; a model without an adapter differs from one with it."""
    adapter = model.get("adapter") or {}
    if not adapter:
        return _Part((), "no adapter") if _files(model) else None
    hashes = [digest for _, digest in sorted(_files(adapter).items())]
    return _Part(tuple(hashes), f"the adapter {adapter.get('name')} ({_digest(hashes)})")


def _tokenizer(model: Provenance) -> _Part | None:
    hashes = [digest for name, digest in sorted(_files(model).items()) if name in _TOKENIZERS]
    return _Part(hashes, f"the tokenizer of {_name(model)} ({_digest(hashes)})") if hashes else None


def _template(model: Provenance) -> _Part | None:
    digest = (model.get("chat_template") or {}).get("sha256")
    return None if digest is None else _Part(digest, f"the chat template of {_name(model)} ({digest[:_SHOWN]})")


def _slicing(model: Provenance) -> _Part | None:
    image = model.get("image")
    if not image or "slices" not in image:
        return None
    shown = f"at most {image.get('slices')} slices of {image.get('resolution')} pixels per image (--max-slices)"
    return _Part(image, shown)


def _preparation(model: Provenance) -> _Part | None:
    """Size, crop and normalisation of an image encoder of timm."""
    image = model.get("image")
    if not image or "input_size" not in image:
        return None
    shown = ", ".join(f"{name} {value}" for name, value in image.items())
    return _Part(image, f"images prepared with {shown}")


def _dtype(model: Provenance) -> _Part | None:
    """That of the weights, and so of W_lm."""
    return _Part(model["dtype"], f"the dtype {model['dtype']} (--dtype)") if "dtype" in model else None


def _files(recorded: Provenance) -> Mapping[str, str]:
    return recorded.get("files") or {}


def _name(model: Provenance) -> str:
    return str(model.get("name", "an unnamed model"))


def _digest(hashes: Sequence[str]) -> str:
    """The beginning of the hash of one file, or of the hashes of several."""
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return whole[:_SHOWN]


def versions_of(packages: Sequence[str]) -> dict[str, str | None]:
    """The installed version of each of `packages`; None for one that is missing."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
