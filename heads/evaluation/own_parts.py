"""The parts of a head that agiqa does not have itself: what a run records of them, and how they are found again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agiqa.heads.model.encoders import ENCODERS
from agiqa.heads.model.losses import LOSSES, names_in_loss
from agiqa.heads.model.pooling import POOLINGS, PoolingName, pooling_names
from agiqa.heads.model.projection import PROJECTIONS
from agiqa.heads.settings.config import HeadConfig
from agiqa.parts import OwnPart
from agiqa.progress import say
from agiqa.registry import Registry

OWN_PARTS = "own_parts"
"""The entry of config.json."""
CODE = "code of"
"""How the names of the entries of `code_of` begin."""


def own_parts(head: HeadConfig, loss: str | None = None) -> list[OwnPart]:
    """The parts of one's own among encoder, pooling, projection and those of `loss`. Raises UnknownName."""
    used: list[tuple[Registry[Any], str]] = [
        *([] if head.is_closed else [(ENCODERS, head.encoder)]),
        *((POOLINGS, PoolingName.parse(name).pooling) for name in pooling_names(head)),
        (PROJECTIONS, head.projection),
        *((LOSSES, name) for name in ([] if loss is None else names_in_loss(loss))),
    ]
    found = [OwnPart.of(registry.kind, name, registry.get(name)) for registry, name in used]
    return [part for part in found if part is not None]


def recorded_parts(config: Mapping[str, Any]) -> list[OwnPart]:
    """The parts of one's own that config.json records; none in old runs. Raises KeyError or TypeError."""
    return [OwnPart(**record) for record in config.get(OWN_PARTS, [])]


def code_of(parts: Sequence[OwnPart]) -> dict[str, dict[str, Any]]:
    """The entry `code` of a key: the hash of the file of each part. Empty without parts."""
    return {"code": {f"{CODE} the {part.kind} {part.name}": part.sha256 for part in parts}} if parts else {}


def remedies(config: Mapping[str, Any]) -> str:
    """How to import the parts of a recorded head that this process lacks, as sentences. The loss is not needed."""
    registries: dict[str, Registry[Any]] = {one.kind: one for one in (ENCODERS, POOLINGS, PROJECTIONS)}
    return " ".join(
        part.remedy
        for part in recorded_parts(config)
        if part.kind in registries and part.name not in registries[part.kind]
    )


def warn_of_other_code(run: Path, config: Mapping[str, Any], head: HeadConfig) -> None:
    """Say so where the file of a part of the head is not the one that the head was trained with."""
    recorded = {(part.kind, part.name): part for part in recorded_parts(config)}
    for here in own_parts(head):
        there = recorded.get((here.kind, here.name))
        if there is not None and here.sha256 != there.sha256:
            say(
                f"warning: the {there.kind} {there.name!r} of {run} was trained with another version of the module "
                f"{there.module}. Its scores are only right if the part computes the same."
            )
