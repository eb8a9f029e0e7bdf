"""`agiqa demo`: the whole way in miniature, on a CPU, with nothing but what it makes itself."""

from pathlib import Path

import click

from agiqa.commands.common import print_result, shared_options


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Folder of everything that is made.",
)
@click.option("--images", type=click.IntRange(min=60), default=400, show_default=True, help="Images to draw.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws images, MOS and heads.")
@shared_options
def command(out: Path, images: int, seed: int, *, as_json: bool) -> None:
    """Draw images with prompts and MOS, extract, train two heads, and compare them on images never seen.

    Takes a few minutes on two cores. Everything lands in the folder --out; run it again to see the table again.
    """
    from agiqa.bench.demo.run import WHAT_IS_SHOWN, run_demo
    from agiqa.commands.train import scores_line

    result = run_demo(out, images=images, seed=seed)
    width = max(len(row.name) for row in result.rows)
    lines = [f"{row.name:<{width}}  {scores_line('test', dict(row.scores))}" for row in result.rows]
    text = "\n".join([*lines, "", WHAT_IS_SHOWN, "", f"scatter plot: {result.picture}  ({result.seconds:.0f} s)"])
    print_result(result.as_dict(), text, as_json=as_json)
