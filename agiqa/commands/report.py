"""`agiqa report`: one page, tables and pictures from the results of ablations and transfers."""

from pathlib import Path

import click

from agiqa.commands.options import shared_options
from agiqa.commands.output import print_result


@click.command("report")
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("more", type=click.Path(path_type=Path, exists=True, file_okay=False), nargs=-1)
@click.option(
    "--to", type=click.Path(path_type=Path, file_okay=False), help="Folder of the report.  [default: OUT/report]"
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the images, by item name, to show the best and worst items.",
)
@click.option(
    "--data",
    metavar="NAME",
    help="Data set for the comparison with the paper, if the stores' names do not show it: agiqa-3k, aigciqa2023 or "
    "aigciqa-20k.",
)
@click.option("--title", help="Title of the page.  [default: the names of the folders]")
@click.option("--note", "notes", multiple=True, help="Note on the data that readers need; repeatable.")
@shared_options
def command(
    out: Path,
    more: tuple[Path, ...],
    *,
    to: Path | None,
    images: Path | None,
    data: str | None,
    title: str | None,
    notes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a report on the folders OUT and MORE, which `agiqa ablate` or `agiqa transfer` made.

    index.html is one file with all tables and pictures, and needs no network. report.md is the same without pictures.
    tables/ has each table as markdown and CSV, pictures/ each figure as PNG and SVG. Parts without data are left out;
    the page names the command that makes the data.
    """
    from agiqa.bench.report.writing import write_report

    report = write_report([out, *more], to or out / "report", images=images, title=title, notes=notes, data=data)
    result = {
        "page": str(report.page),
        "document": str(report.document),
        "tables": [str(path) for path in report.tables],
        "pictures": [str(path) for path in report.pictures],
        "missing": [{"what": one.what, "command": one.command, "how": one.how} for one in report.missing],
        "problems": list(report.problems),
    }
    lines = [f"{report.page}  ({report.page.stat().st_size / 1e6:.1f} MB)"]
    lines += [
        f"{len(report.tables) // 2} tables, {len(report.pictures) // 2} pictures and {report.document.name} beside it"
    ]
    lines += [f"not in it: {one.line()}" for one in report.missing]
    lines += [f"left out: {problem}" for problem in report.problems]
    print_result(result, "\n".join(lines), as_json=as_json)
