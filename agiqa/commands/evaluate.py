"""`agiqa evaluate`: how well a trained head does on a store, with intervals."""

from pathlib import Path

import click

from agiqa.commands.common import StoreLocation, print_result, shared_options


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=StoreLocation())
@click.option("--split", default="test", show_default=True, help="test, validation, train or all.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto is the GPU if there is one.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Items at a time.")
@shared_options
def command(run: Path, store: str | Path, split: str, device: str, batch_size: int, *, as_json: bool) -> None:
    """SRCC, PLCC, KRCC and RMSE of the head RUN on STORE, with prompt-clustered bootstrap intervals.

    On the store that it was trained on, the parts are those of its training; on another store of the same model
    (or basis) they are that store's own.
    """
    from agiqa.commands.train import scores_line
    from agiqa.heads import evaluate, load_run
    from agiqa.progress import say
    from agiqa.store import open_store

    scores = evaluate(load_run(run), open_store(store), split, device=device, batch_size=batch_size)
    for warning in scores["warnings"]:
        say(f"warning: {warning}")
    print_result(scores, scores_line(split, scores), as_json=as_json)
