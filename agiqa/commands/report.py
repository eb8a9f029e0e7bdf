"""`agiqa report`: one page, tables and pictures from the results of ablations, transfers and single trainings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.options import OneOf, columns_option, shared_options
from agiqa.commands.output import print_result

if TYPE_CHECKING:
    from agiqa.bench.report.writing import Report

COLUMNS = ("sd", "krcc", "rmse", "logistic", "slope", "runs", "seconds")
"""The columns that `--show` switches on: SWITCHES of agiqa.bench.report.tables, which imports too much for the help."""


@click.command("report")
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("more", type=click.Path(path_type=Path, exists=True, file_okay=False), nargs=-1)
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the report.  [default: OUT/report, of single runs `report` beside the first]",
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
@click.option(
    "--groups",
    type=click.Path(path_type=Path, exists=True),
    metavar="TABLE",
    help="Table of the images whose further text columns, such as the style of the prompt, get a table of scores each.",
)
@columns_option
@click.option(
    "--show",
    multiple=True,
    type=OneOf("column", COLUMNS),
    help="Further column of the tables; repeatable. Readers of the page switch them too.",
)
@click.option(
    "--fit",
    type=OneOf("fit", ["logistic", "quartic"]),
    default="logistic",
    show_default=True,
    help="Curve of scatter plots: the rising logistic of VQEG, or the polynomial of the M3-AGIQA paper.",
)
@click.option(
    "--latex", is_flag=True, help="Write each table as tables/NAME.tex too (booktabs), for papers with two columns."
)
@click.option("--pdf", is_flag=True, help="Write each picture as pictures/NAME.pdf too, 3.25 inches wide.")
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
    groups: Path | None,
    columns: dict[str, str] | None,
    show: tuple[str, ...],
    fit: str,
    latex: bool,
    pdf: bool,
    title: str | None,
    notes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a report on the folders OUT and MORE, made by `agiqa ablate`, `agiqa transfer` or `agiqa train`.

    Runs of `agiqa train`, such as `runs/*`, or a folder of such runs, are compared in one table: runs that differ in
    their seed alone share a row.

    index.html is one file with all tables and pictures, and needs no network. report.md is the same without pictures.
    tables/ has each table as markdown and CSV, pictures/ each figure as PNG and SVG. Parts without data are left out;
    the page names the command that makes the data.
    """
    from agiqa.bench.report.sections import ReportSettings
    from agiqa.bench.report.writing import write_report

    settings = ReportSettings(
        images=images,
        groups=groups,
        columns=columns,
        title=title,
        notes=notes,
        data=data,
        show=frozenset(show),
        quartic=fit == "quartic",
        latex=latex,
        pdf=pdf,
    )
    report = write_report([out, *more], to, settings)
    print_result(_record(report), _lines(report), as_json=as_json)


def _record(report: "Report") -> dict[str, Any]:
    return {
        "page": str(report.page),
        "document": str(report.document),
        "tables": [str(path) for path in report.tables],
        "pictures": [str(path) for path in report.pictures],
        "missing": [{"what": one.what, "command": one.command, "how": one.how} for one in report.missing],
        "problems": list(report.problems),
    }


def _lines(report: "Report") -> str:
    tables = sum(path.suffix == ".csv" for path in report.tables)
    pictures = sum(path.suffix == ".svg" for path in report.pictures)
    lines = [f"{report.page}  ({report.page.stat().st_size / 1e6:.1f} MB)"]
    lines += [f"{tables} tables, {pictures} pictures and {report.document.name} beside it"]
    lines += [f"not in it: {one.line()}" for one in report.missing]
    return "\n".join([*lines, *(f"left out: {problem}" for problem in report.problems)])
