"""`agiqa store ...`: look at a store, check it, mend it, and set its labels."""

from collections.abc import Mapping
from pathlib import Path

import click

from agiqa.commands.help import write_commands
from agiqa.commands.options import LocalStore, OneOf, StoreLocation, columns_option, shared_options
from agiqa.commands.output import print_result, table
from agiqa.commands.store_copies import convert, export_store, import_store, pull_store, push_store, sketch
from agiqa.errors import listed

_ASKED = ("variant", "aspect")
_STORE = click.argument("store", type=LocalStore())
SECTIONS = {
    "Look and check": {
        "info": "Encoding, items, tokens, bytes, labels and provenance.",
        "verify": "Find damaged units and the items that they cost.",
    },
    "Mend and finish": {
        "repair": "Remove damaged parts, so that the next run recomputes only these.",
        "gc": "Remove files that killed runs left.",
        "seal": "Finish a store by hand, once all its units are filled.",
        "labels": "Set MOS, splits and generators from a table.",
    },
    "Other encodings and formats": {
        "sketch": "A sketch of rank R, with the energy it keeps and its error.",
        "convert": "The same features in 8 bits, or as raw logits.",
        "export": "One HDF5 file.",
        "import": "A store from such a file.",
    },
    "Share": {
        "push": "Copy a store to a URL.",
        "pull": "Copy a store, or some of its items, from a URL.",
    },
}
"""The commands with their summaries, by section of `agiqa store --help`."""


class StoreGroup(click.Group):
    """The group, whose help lists the commands by section."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        """List the commands by section."""
        write_commands(formatter, SECTIONS)


@click.group("store", cls=StoreGroup)
def command() -> None:
    """Inspect, verify, repair, convert and share feature stores."""


@command.command("info")
@click.argument("store", type=StoreLocation())
@shared_options
def info(store: str | Path, *, as_json: bool) -> None:
    """Encoding, items, tokens, bytes, provenance, state and labels of STORE; unknown fields are omitted."""
    from agiqa.store import open_store, store_summary
    from agiqa.store.format.labels import range_text

    summary = store_summary(open_store(store, allow_partial=True))
    shown = {name: value for name, value in summary.items() if name != "provenance"}
    scales = shown.pop("mos_ranges")
    shown["labels"] = ", ".join(f"{aspect} ({count})" for aspect, count in summary["labels"].items()) or "none"
    shown["MOS from"] = ", ".join(f"{range_text(scale)} ({aspect})" for aspect, scale in scales.items()) or None
    spreads = ", ".join(f"{aspect} ({count})" for aspect, count in shown.pop("deviations").items())
    shown["standard deviations"] = spreads or None
    counts = ", ".join(f"{aspect} ({count})" for aspect, count in shown.pop("counts").items())
    shown["counts of ratings"] = counts or None
    shown["splits"] = ", ".join(f"{split} ({count})" for split, count in summary["splits"].items())
    shown |= {name: ", ".join(summary[name]) for name in ("views", "layers", "pooled") if name in summary}
    if summary["text_authors"] is not None:
        shown["text authors"] = "; ".join(_authors(*one) for one in shown.pop("text_authors").items())
    made = summary["provenance"]
    shown["model"] = made.get("model", {}).get("name", "unknown")
    shown |= {name: value for name, value in made.get("conversation", {}).items() if name in _ASKED}
    known = {name: value for name, value in shown.items() if value is not None}
    print_result(summary, table(known), as_json=as_json)


@command.command("verify")
@_STORE
@click.option(
    "--level",
    type=OneOf("verification level", ["quick", "full", "numeric"]),
    default="quick",
    show_default=True,
    help="What to check: sizes, also every sha256, or also logits and states of some rows.",
)
@shared_options
def check(store: Path, level: str, *, as_json: bool) -> None:
    """Check STORE and name every damaged unit and its items. Exit 1 for damage and for an unfinished store."""
    from agiqa.store import open_store, verify

    opened = open_store(store, allow_partial=True)
    report = verify(opened, level)
    lines = [f"{store}: {report.state}, {report.objects} objects checked at level {level}"]
    if report.missing_units:
        lines.append(f"  {len(report.missing_units)} units are not filled. {opened.remedy}")
    for damage in report.damage:
        unit = "" if damage.unit is None else f" (unit {damage.unit})"
        lines.append(f"  {damage.problem}{unit}{_named(damage.items)}")
    if report.probe_error is not None:
        lines.append(f"  probe: relative error {report.probe_error:.2e}")
    lines.append("sound" if report.sound else "NOT sound")
    print_result(report.as_dict(), "\n".join(lines), as_json=as_json)
    if not report.sound:
        raise SystemExit(1)


def _authors(split: str, counts: Mapping[str, int]) -> str:
    """One line: who wrote the texts of a split."""
    return f"{split}: " + ", ".join(f"{author} ({count})" for author, count in counts.items())


def _named(items: tuple[str, ...]) -> str:
    if not items:
        return ""
    return f": items {listed(items)}"


@command.command("seal")
@_STORE
@shared_options
def seal_store(store: Path, *, as_json: bool) -> None:
    """Finish STORE by hand, once all its units are filled."""
    from agiqa.store import open_store, seal

    sealed = seal(open_store(store, allow_partial=True))
    print_result({"store": str(store), "id": sealed.id, "state": "complete"}, f"{store} is complete", as_json=as_json)


@command.command("labels")
@_STORE
@click.argument("table", metavar="TABLE.csv", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--mos-range",
    nargs=2,
    type=float,
    help="Lowest and highest MOS in TABLE.csv.  [default: those that an import recorded, or of the store, or 0 5]",
)
@columns_option
@shared_options
def labels(
    store: Path,
    table: Path,
    mos_range: tuple[float, float] | None,
    columns: dict[str, str] | None,
    *,
    as_json: bool,
) -> None:
    """Set MOS, splits and generators in STORE from TABLE.csv, by item name. Features stay unchanged.

    The table has the column `name` and any of mos_quality, mos_correspondence (or mos_align), mos_authenticity, split
    and generator. An empty cell keeps the stored value. A `prompt` column must agree with the store. If the table
    replaces only some MOS of an aspect, they are converted to the scale of the others.
    """
    from agiqa.progress import say
    from agiqa.store import open_store
    from agiqa.store.deriving.labelling import join_labels
    from agiqa.store.format.labels import range_text

    report = join_labels(open_store(store, allow_partial=True), table, mos_range=mos_range, columns=columns)
    for note in report.notes:
        say(note)
    lines = [
        f"{store}: {report.matched} items named in {table}, {report.kept} items not named (they keep their values)"
    ]
    if report.unmatched_rows:
        lines.append(f"  {len(report.unmatched_rows)} rows match no item: {listed(report.unmatched_rows)}")
    lines += [f"  {column}: {counts}" for column, counts in _changes(report.filled, report.replaced).items()]
    lines += [f"  {column}: recorded as on {range_text(report.mos_ranges[column])}" for column in report.rescaled]
    if report.ignored_columns:
        lines.append(f"  columns that hold no labels: {', '.join(report.ignored_columns)}")
    if not report.changed:
        lines.append("  nothing changed: the store already has these labels")
    print_result({"store": str(store), **report.as_dict()}, "\n".join(lines), as_json=as_json)


@command.command("repair")
@_STORE
@shared_options
def repair(store: Path, *, as_json: bool) -> None:
    """Read all of STORE and remove damaged parts, so that the next `extract` or `sketch` recomputes only these.

    Of the plan, it can remove only token ids and roles. If other parts of it are damaged, nothing is changed and the
    exit code is 1.
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
        lines.append(f"{len(report.strays)} files belong to no record: `agiqa store gc {store}` removes them")
    print_result({"store": str(store), **report.as_dict()}, "\n".join(lines), as_json=as_json)


@command.command("gc")
@_STORE
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@shared_options
def gc(store: Path, *, dry_run: bool, as_json: bool) -> None:
    """Remove files that killed runs left in STORE: those that no record lists and no run uses."""
    from agiqa.store import open_store
    from agiqa.store.care.garbage import collect_garbage

    report = collect_garbage(open_store(store, allow_partial=True), dry_run=dry_run)
    lines = [f"  {found.path}  {found.bytes} bytes, {found.why}" for found in report.garbage]
    lines += [f"  {path}  kept: a run is using it" for path in report.in_use]
    verb = "would be removed" if dry_run else "removed"
    lines.append(f"{store}: {len(report.garbage)} files, {report.bytes} bytes {verb}")
    print_result({"store": str(store), **report.as_dict()}, "\n".join(lines), as_json=as_json)


def _changes(filled: Mapping[str, int], replaced: Mapping[str, int]) -> dict[str, str]:
    columns = sorted({*filled, *replaced})
    return {column: f"{filled.get(column, 0)} new, {replaced.get(column, 0)} replaced" for column in columns}


for _further in (sketch, convert, export_store, import_store, push_store, pull_store):
    command.add_command(_further)
