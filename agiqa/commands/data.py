"""`agiqa data ...`: import published data sets as downloaded, and check what the other commands would read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from agiqa.commands.data_options import DATA_OPTIONS, data_options, length_rule, load
from agiqa.commands.data_text import print_summary, problems_of
from agiqa.commands.help import SectionedCommand, write_commands
from agiqa.commands.models import max_slices_option
from agiqa.commands.options import (
    OneOf,
    columns_option,
    layers_option,
    on_bad_item_option,
    pool_tokens_option,
    shared_options,
)
from agiqa.commands.output import print_result, table

PUBLISHED_SETS = ("agiqa-1k", "agiqa-3k", "aigciqa2023", "aigiqa-20k", "evalmi-50k", "pku-i2iqa", "q-eval-100k")
"""The sets that agiqa brings; the registry of `agiqa.extract.data.importers.sets` may have more."""
SECTIONS = {
    "Before a model runs": {
        "import": "A published data set as downloaded, in its own layout.",
        "check": "What extract would read: counts, leaks, MOS, sizes, tokens, disk, GPU hours.",
    }
}
"""The commands with their summaries, by section of `agiqa data --help`."""
_SHOWN = 5


class DataGroup(click.Group):
    """The group, whose help lists the commands by section."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        """List the commands by section."""
        write_commands(formatter, SECTIONS)


@click.group("data", cls=DataGroup)
def command() -> None:
    """Import published data sets, and check a data set before a model runs."""


def _look_up_set(name: str) -> None:
    from agiqa.extract.data.importers.sets import IMPORTERS

    IMPORTERS.get(name)


@command.command(
    "import", cls=SectionedCommand, sections={"Images": ("copy", "on_bad_item"), "Labels": ("mos_range", "columns")}
)
@click.argument("name", metavar="SET", type=OneOf("published set", PUBLISHED_SETS, look_up=_look_up_set))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--copy", is_flag=True, help="Copy the images instead of linking to them.")
@on_bad_item_option
@click.option("--mos-range", nargs=2, type=float, help="Lowest and highest MOS.  [default: the scale of the set]")
@columns_option
@shared_options
def import_set(
    name: str,
    folder: Path,
    out: Path,
    *,
    copy: bool,
    on_bad_item: Literal["fail", "skip"],
    mos_range: tuple[float, float] | None,
    columns: dict[str, str] | None,
    as_json: bool,
) -> None:
    """Import the published SET from FOLDER, as downloaded, into the folder OUT, which all commands read as DATA.

    SET is agiqa-3k, aigciqa2023, aigiqa-20k, agiqa-1k, pku-i2iqa, evalmi-50k or q-eval-100k. FOLDER holds its label
    files and images, unpacked, in any sub-folders. OUT gets data.csv, images/ (links), and source.json, which records
    the files read, their hashes and the scale of the MOS. Run it again to complete an import.
    """
    from agiqa.extract.data.importers.importing import import_data_set
    from agiqa.progress import say

    result = import_data_set(
        name, folder, out, copy=copy, on_bad_item=on_bad_item, mos_range=mos_range, columns=columns
    ).as_dict()
    for note in result["notes"]:
        say(f"note: {note}")
    for kind, lines in (("missing image", result["missing"]), ("left out", result["problems"])):
        for line in lines[:_SHOWN]:
            say(f"{kind}: {line}")
        if len(lines) > _SHOWN:
            say(f"{kind}: and {len(lines) - _SHOWN} more, all listed in {out / 'source.json'}")
    print_result(result, _import_text(result), as_json=as_json)


def _import_text(result: Mapping[str, Any]) -> str:
    shown: dict[str, Any] = {name: result[name] for name in ("out", "set", "items")}
    low, high = result["mos_range"]
    shown["MOS"] = ", ".join(f"{aspect} ({count})" for aspect, count in result["labels"].items())
    shown["MOS from"] = f"{low:g} to {high:g}"
    for name in ("splits", "generators"):
        shown[name] = ", ".join(f"{key} ({count})" for key, count in result[name].items()) or "none"
    for name in ("missing", "problems"):
        shown["images missing" if name == "missing" else "rows left out"] = len(result[name])
    shown["images without labels"] = result["unlabelled"]
    shown["state"] = "imported" if result["changed"] else "unchanged: the same import is there already"
    return table(shown)


@command.command(
    "check",
    cls=SectionedCommand,
    sections={"Model": ("model", "max_slices", "layers", "pool_tokens", "rank"), "Data": DATA_OPTIONS},
)
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--model",
    help="Model that counts the tokens; its weights are not read.  [default: estimates for MiniCPM-Llama3-V-2.5]",
)
@max_slices_option
@layers_option
@pool_tokens_option
@click.option("--rank", type=click.IntRange(min=1), help="Rank of the sketch.  [default: 512]")
@data_options
@shared_options
def check(data: Path, *, as_json: bool, **options: Any) -> None:
    """Say what `agiqa extract` would read of DATA. Needs no GPU, and loads no weights.

    Counts items, splits, generators and MOS; finds prompts and images that two splits share, equal images, missing MOS
    and unusable rows; and says what a store of each encoding takes. Exits with 1 if extract would refuse something.
    Without descriptions, tokens are those of --variant no_id. DATA and its options are those of `agiqa extract`.
    """
    from agiqa.errors import DataError

    summary = _checked(data, options)
    print_summary(summary, as_json=as_json)
    problems = problems_of(summary)
    if problems and options["on_bad_item"] == "fail":
        error = DataError.from_problems(str(data), problems)
        error.add_note("`agiqa extract` refuses these. Mend them, or leave them out by --on-bad-item skip.")
        raise error


def _checked(data: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of DATA, with what a store of it would take."""
    from agiqa.data_summary import costs_summary, summary_of, tokens_summary
    from agiqa.extract.filling.footprints import PUBLISHED, ModelShape, RowsOfItems, footprints
    from agiqa.extract.filling.pooling import parse_poolings
    from agiqa.extract.filling.token_estimates import estimated
    from agiqa.extract.models.layers import parse_layers

    model, slices, poolings = options["model"], options["max_slices"], parse_poolings(options["pool_tokens"] or ())
    changes = {"variant": _variant(data, options), "on_bad_item": "skip"}
    if model is None:
        layers, shape = parse_layers(options["layers"], PUBLISHED.blocks, model=PUBLISHED.name), PUBLISHED
        data_set = load(data, options, images=True, **changes)
        counts = estimated(data_set.items, max_slices=slices)
    else:
        from agiqa.extract.filling.token_counts import counted
        from agiqa.extract.models.opening import open_backbone

        backbone = open_backbone(model, device="cpu", max_slices=slices)
        layers = parse_layers(options["layers"], backbone.layer_count, model=model, first=backbone.first_layer)
        shape = ModelShape.of(backbone, model, layers)
        data_set = load(data, options, images=backbone.reads_images, **changes)
        rule = length_rule(options, on_bad_item="skip")
        counts = counted(data_set, backbone, rule, poolings=poolings, layers=layers)
    content = RowsOfItems(layers=layers, poolings=poolings)
    costs = costs_summary(shape, footprints(counts, shape, rank=options["rank"], content=content), content)
    return {**summary_of(data_set), "tokens": tokens_summary(counts), "cost": costs}


def _variant(data: Path, options: Mapping[str, Any]) -> str:
    """The variant asked for, or no_id where it is the default and there are no descriptions yet."""
    from agiqa.extract.data.sources import find_sources
    from agiqa.progress import said_to, say
    from agiqa.store.format.columns import open_labels

    variant: str = options["variant"]
    source = click.get_current_context().get_parameter_source("variant")
    if source is not ParameterSource.DEFAULT:
        return variant
    with said_to(lambda _line: None):  # the data set's own reader says it
        sources = find_sources(data, options["conversations"], options["labels"], aspect=options["aspect"])
        header = [] if sources.without_table else open_labels(sources.table, options["columns"]).header
    if sources.conversations or any(column.startswith("description") for column in header):
        return variant
    say(
        f"note: {sources.table} has no descriptions, so this is the check of --variant no_id; `agiqa describe` writes "
        "descriptions, and --conversations reads them"
    )
    return "no_id"
