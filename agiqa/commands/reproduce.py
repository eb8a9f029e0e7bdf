"""`agiqa reproduce`: the tables of the M3-AGIQA paper, from published data and checkpoints."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.help import SectionedCommand
from agiqa.commands.options import Share, shared_options
from agiqa.commands.output import fail_if_any, print_parts

if TYPE_CHECKING:
    from agiqa.bench.recording.tables import Parts
    from agiqa.bench.reproducing.plan import Plan
    from agiqa.bench.reproducing.steps import Step

ALL = "all"
SECTIONS = {
    "Most used": ("data", "dry_run", "only"),
    "Extraction on many devices": ("devices", "part", "ray"),
    "Plan": ("plan_file",),
}


@click.command("reproduce", cls=SectionedCommand, sections=SECTIONS)
@click.argument("tables", nargs=-1, required=True, metavar="TABLE...")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="ROOT",
    help="Folder with agiqa-3k, aigciqa2023 and aigciqa-20k, as published or as `agiqa data import` writes them.",
)
@click.option("--dry-run", is_flag=True, help="List the steps with GPU hours, disk and downloads, and stop.")
@click.option(
    "--only",
    multiple=True,
    metavar="STEP",
    help="Run only these steps, such as extract/3k-quality; repeatable.",
)
@click.option("--devices", type=click.IntRange(min=1), help="GPUs of this host that extraction uses.")
@click.option(
    "--part",
    type=Share(),
    help="Fill this share K/N of every store whose descriptions are done, as one job of an array; run nothing else.",
)
@click.option(
    "--ray", is_flag=False, flag_value="auto", metavar="[ADDRESS]", help="Extract on a Ray cluster, one actor per GPU."
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Plan of your own, in the form of bench/reproducing/plan.yaml.  [default: the shipped plan]",
)
@shared_options
def command(
    tables: tuple[str, ...],
    out: Path,
    *,
    data: Path,
    dry_run: bool,
    only: tuple[str, ...],
    devices: int | None,
    part: Any,
    ray: str | None,
    plan_file: Path | None,
    as_json: bool,
) -> None:
    """Reproduce tables of the M3-AGIQA paper in the folder OUT. Run it again to go on where it stopped.

    TABLE is table-ii, table-iii, table-iv, table-v, table-vi, or all. Checkpoints are downloaded by their hub names.
    Each step is a command of agiqa; what several tables need is made once. A step that fails stops only those that need
    it. OUT/tables.md has our numbers beside the paper's, OUT/report every table and picture.
    """
    from agiqa.bench.reproducing.plan import read_plan
    from agiqa.bench.reproducing.steps import chosen, plan_steps

    plan = read_plan(plan_file)
    names = list(plan.tables) if ALL in tables else list(dict.fromkeys(tables))
    steps = plan_steps(plan, names, data, out)
    wanted = chosen(steps, only)
    if dry_run:
        planned = _planned(plan, steps, wanted, data, out)
        print_parts(planned, _planned_parts(planned), as_json=as_json)
        return
    from agiqa.reproducing import Machine, run_steps

    machine = Machine(devices=devices, ray=ray, part=None if part is None else f"{part[0]}/{part[1]}")
    done = run_steps(plan, steps, wanted, data, out, machine)
    result: dict[str, Any] = {"done": done.done, "failed": done.failed, "blocked": done.blocked}
    parts: Parts = ["Stores are filled. Call this without --part, once all parts have ended, for the other steps."]
    if part is None:
        found, parts = _found(plan, names, out)
        result |= found
    print_parts(result, parts, as_json=as_json)
    waiting = {name: f"not begun, since {other} is not done" for name, other in done.blocked.items()}
    fail_if_any({**done.failed, **waiting}, total=len(wanted), what="steps")


def _planned(plan: "Plan", steps: "Sequence[Step]", wanted: "Sequence[Step]", root: Path, out: Path) -> dict[str, Any]:
    """The wanted steps with their costs and states, JSON-able."""
    from agiqa.bench.reproducing.costs import cost_of, rates, total_of
    from agiqa.bench.reproducing.steps import digests
    from agiqa.reproducing import is_done, missing_inputs

    digest, missing = digests(steps), missing_inputs(plan, wanted, root)
    costs = [(step.name, cost_of(plan, step)) for step in wanted]
    done = {step.name for step in wanted if is_done(step, digest[step.name], out)}
    rows = [
        {
            "step": step.name,
            "state": "done" if step.name in done else "missing" if step.name in missing else "to do",
            **cost.as_dict(),
            "tables": list(step.tables),
            "needs": list(step.needs),
            "command": ["agiqa", *step.arguments] if step.arguments else None,
        }
        for step, (_, cost) in zip(wanted, costs, strict=True)
    ]
    left = total_of([(name, cost) for name, cost in costs if name not in done])
    return {"steps": rows, "left": left.as_dict(), "rates": rates().measured, "missing": missing}


def _planned_parts(result: Mapping[str, Any]) -> "Parts":
    from agiqa.bench.recording.tables import TextTable

    def cells(row: Mapping[str, Any]) -> list[str]:
        scale = {"gpu_hours": 1.0, "disk_bytes": 1e9, "download_bytes": 1e9}
        return ["?" if row[name] is None else f"{row[name] / unit:.2f}" for name, unit in scale.items()]

    rows = [[row["step"], row["state"], *cells(row), ", ".join(row["tables"])] for row in result["steps"]]
    left = result["left"]
    rows.append(["left to do", "", *cells(left), ""])
    head = ["Step", "State", "GPU hours", "Disk, GB", "Download, GB", "For"]
    notes = [f"Rates: {result['rates']}. An estimate for one GPU, of images of the usual size."]
    if left["unknown"]:
        notes.append(f"? was not measured, and is not in the sum: something of {len(left['unknown'])} steps.")
    return [TextTable(head=head, rows=rows), "\n".join([*notes, *dict.fromkeys(result["missing"].values())])]


def _found(plan: "Plan", tables: Sequence[str], out: Path) -> "tuple[dict[str, Any], Parts]":
    """What was found so far, written as OUT/tables.md and OUT/report too."""
    from agiqa.bench.recording.tables import as_markdown
    from agiqa.bench.report.sections import ReportSettings
    from agiqa.bench.report.writing import write_report
    from agiqa.bench.reproducing.tables import NOTE, as_text, paper_rows
    from agiqa.reproducing import result_folders
    from agiqa.store.disk.files import write_text_atomically

    found = {table: paper_rows(plan, table, out) for table in tables}
    parts = [*(part for table, rows in found.items() for part in as_text(plan, table, rows)), NOTE]
    document, page, folders = out / "tables.md", None, result_folders(out)
    write_text_atomically(document, as_markdown(parts) + "\n")
    write_text_atomically(document.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    if folders:
        page = write_report(folders, out / "report", ReportSettings(title="M3-AGIQA, reproduced")).page
    return {"tables": found, "document": str(document), "page": None if page is None else str(page)}, parts
