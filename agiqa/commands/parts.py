"""`agiqa parts`: the registered encoders, poolings, losses and other parts."""

from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.options import shared_options
from agiqa.commands.output import print_result

if TYPE_CHECKING:
    from agiqa.registry import Registry

REGISTRIES = (
    "agiqa.heads.model.encoders:ENCODERS",
    "agiqa.heads.closed.choosing:FORMS",
    "agiqa.heads.model.pooling:POOLINGS",
    "agiqa.heads.model.projection:PROJECTIONS",
    "agiqa.heads.model.losses:LOSSES",
    "agiqa.heads.settings.presets:PRESETS",
    "agiqa.extract.data.importers.sets:IMPORTERS",
    "agiqa.extract.models.opening:BACKBONES",
    "agiqa.store.format.tables:TABLE_FORMATS",
)
"""Every registry, as MODULE:NAME."""


@click.command("parts")
@shared_options
def command(*, as_json: bool) -> None:
    """List what is registered: the kind, its names, where each comes from, and what it is.

    Parts of your own are listed with the module that registers them.
    """
    found = [row for place in REGISTRIES for row in _rows(_registry(place))]
    widths = {column: max(len(str(row[column])) for row in found) for column in ("kind", "name", "from")}
    lines = ["  ".join([*(f"{row[column]:<{widths[column]}}" for column in widths), row["summary"]]) for row in found]
    print_result({"parts": found}, "\n".join(line.rstrip() for line in lines), as_json=as_json)


def _registry(place: str) -> "Registry[Any]":
    from importlib import import_module

    module, _, name = place.partition(":")
    registry: Registry[Any] = getattr(import_module(module), name)
    return registry


def _rows(registry: "Registry[Any]") -> list[dict[str, Any]]:
    """A row per part, those of agiqa first."""
    from agiqa.parts import Origin

    rows: list[dict[str, Any]] = []
    for name in registry:
        origin = Origin.of(registry.get(name))
        rows.append(
            {
                "kind": registry.kind,
                "name": name,
                "from": "agiqa" if origin.is_built_in else origin.module,
                "file": None if origin.is_built_in or origin.file is None else str(origin.file),
                "summary": origin.summary,
            }
        )
    return sorted(rows, key=lambda row: row["from"] != "agiqa")
