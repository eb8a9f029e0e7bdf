"""Where a store comes from, as JSON, and what two stores of one name differ in."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from agiqa.store.disk.files import canonical_json


def store_id(provenance: Mapping[str, Any]) -> str:
    """Hex sha256 of the canonical JSON of `provenance`; equal ids mean interchangeable features."""
    return hashlib.sha256(canonical_json(provenance).encode()).hexdigest()


def content_hash(objects: Iterable[tuple[str, str]]) -> str:
    """Hex sha256 of what a store consists of: of the path and sha256 of each of its objects, in any order.

    Stores of one id may differ in it, since the same settings may give other last bits; labels are no part of it.
    """
    return hashlib.sha256(canonical_json(sorted(objects)).encode()).hexdigest()


def differing(there: Any, here: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted name of every leaf in which two JSON values differ, below `where`, and both its values.

    A key that one of them lacks counts as None.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}):
            yield from differing(there.get(key), here.get(key), f"{where}.{key}" if where else str(key))
    elif there != here:
        yield where, there, here


def differences(there: Any, here: Any, where: str = "") -> Iterator[str]:
    """One line `dotted.path: stored X, asked Y` for every leaf of `differing`."""
    for name, stored, asked in differing(there, here, where):
        yield f"{name}: stored {stored!r}, asked {asked!r}"
