"""`agiqa store labels | repair | gc`: what a store needs after it was made. Part of the group `agiqa store`."""

from collections.abc import Mapping
from pathlib import Path

import click

from agiqa.commands.common import LocalStore, print_result, shared_options
from agiqa.errors import listed

_STORE = click.argument("store", type=LocalStore())


@click.command("labels")
@_STORE
@click.argument("table", metavar="TABLE.csv", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--mos-range",
    nargs=2,
    type=float,
    help="Lowest and highest MOS of the scale of TABLE.csv.  [default: that of the store, or 0 5 where it has none]",
)
@shared_options
def labels(store: Path, table: Path, mos_range: tuple[float, float] | None, *, as_json: bool) -> None:
    """Set MOS, split and generator in STORE from TABLE.csv, by item name; features are not touched.

    The table has the column `name` and any of mos_quality, mos_correspondence (or mos_align), mos_authenticity, split
    and generator. An empty cell leaves the value as it is; a `prompt` column must agree with the store. Where the table
    has only some of the MOS of an aspect, on another scale than the others, they are converted to that of the others.
    """
    from agiqa.progress import say
    from agiqa.store import open_store
    from agiqa.store.deriving.labelling import join_labels
    from agiqa.store.format.labels import range_text

    report = join_labels(open_store(store, allow_partial=True), table, mos_range=mos_range)
    for note in report.notes:
        say(note)
    lines = [f"{store}: {report.matched} items named in {table}, {report.kept} items not (they keep what they have)"]
    if report.unmatched_rows:
        lines.append(f"  {len(report.unmatched_rows)} rows name no item: {listed(report.unmatched_rows)}")
    lines += [f"  {column}: {counts}" for column, counts in _changes(report.filled, report.replaced).items()]
    lines += [f"  {column}: recorded as on {range_text(report.mos_ranges[column])}" for column in report.rescaled]
    if report.ignored_columns:
        lines.append(f"  columns that are no label: {', '.join(report.ignored_columns)}")
    if not report.changed:
        lines.append("  nothing changed: the store has these labels already")
    print_result({"store": str(store), **report.as_dict()}, "\n".join(lines), as_json=as_json)


@click.command("repair")
@_STORE
@shared_options
def repair(store: Path, *, as_json: bool) -> None:
    """Read all of STORE and drop what is damaged, so that the next `extract` or `sketch` computes only that again.

    Exit 1, and nothing changed, if other parts of the plan than token ids and roles are damaged.
    """
    from agiqa.store import open_store
    from agiqa.store.care.repairing import repair as repair_store

    report = repair_store(open_store(store, allow_partial=True))
    opened = open_store(store, allow_partial=True)
    lines = [f"  {damage.problem}" for damage in report.damage]
    if report.changed:
        what = [f"{len(report.units)} units ({report.items} items)"] if report.units else []
        what += ["the model's own arrays"] if report.model else []
        what += [f"{len(report.tokens)} objects of token ids and roles"] if report.tokens else []
        lines.append(f"{store}: dropped {' and '.join(what)}. {opened.remedy} A store that was pulled: pull it again.")
    else:
        lines.append(f"{store}: nothing to repair")
    if report.strays:
        lines.append(f"{len(report.strays)} files are not listed: `agiqa store gc {store}` removes them")
    print_result({"store": str(store), **report.as_dict()}, "\n".join(lines), as_json=as_json)


@click.command("gc")
@_STORE
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@shared_options
def gc(store: Path, *, dry_run: bool, as_json: bool) -> None:
    """Remove from STORE what killed runs left and no record lists; what a run is at work on stays."""
    from agiqa.store import open_store
    from agiqa.store.care.garbage import collect_garbage

    report = collect_garbage(open_store(store, allow_partial=True), dry_run=dry_run)
    lines = [f"  {found.path}  {found.bytes} bytes, {found.why}" for found in report.garbage]
    lines += [f"  {path}  left: a run is at work on it" for path in report.in_use]
    verb = "would be removed" if dry_run else "removed"
    lines.append(f"{store}: {len(report.garbage)} files, {report.bytes} bytes {verb}")
    print_result({"store": str(store), **report.as_dict()}, "\n".join(lines), as_json=as_json)


def _changes(filled: Mapping[str, int], replaced: Mapping[str, int]) -> dict[str, str]:
    columns = sorted({*filled, *replaced})
    return {column: f"{filled.get(column, 0)} new, {replaced.get(column, 0)} replaced" for column in columns}
