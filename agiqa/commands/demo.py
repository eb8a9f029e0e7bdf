"""`agiqa demo`: all steps in miniature on a CPU, with images and a model that it makes itself."""

from pathlib import Path

import click

from agiqa.commands.options import shared_options
from agiqa.commands.output import print_result, scores_line


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Folder for everything that the demo makes.",
)
@click.option("--images", type=click.IntRange(min=60), default=400, show_default=True, help="Number of images.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of images, MOS and heads.")
@shared_options
def command(out: Path, images: int, seed: int, *, as_json: bool) -> None:
    """Draw images with prompts and MOS, extract, train two heads, and compare them on images never seen.

    It takes a few minutes on two cores. Run it again to print the table again.
    """
    from agiqa.bench.demo.run import WHAT_IS_SHOWN, run_demo

    result = run_demo(out, images=images, seed=seed)
    width = max(len(row.name) for row in result.rows)
    lines = [f"{row.name:<{width}}  {scores_line('test', dict(row.scores))}" for row in result.rows]
    text = "\n".join([*lines, "", WHAT_IS_SHOWN, "", f"scatter plot: {result.picture}  ({result.seconds:.0f} s)"])
    print_result(result.as_dict(), text, as_json=as_json)
