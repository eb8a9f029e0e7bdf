"""`agiqa stack`: the weighted sum of trained heads."""

from pathlib import Path

import click

from agiqa.commands.options import OneOf, StoreLocation, shared_options
from agiqa.commands.output import label_titles, print_result, scores_line


@click.command("stack")
@click.argument("runs", type=click.Path(path_type=Path, exists=True, file_okay=False), nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--store", type=StoreLocation(), required=True, help="Store on which all RUNS were trained.")
@click.option(
    "--weights",
    type=OneOf("kind of weights", ["fitted", "equal"]),
    default="fitted",
    show_default=True,
    help="Weights of the heads: fitted on validation items, or equal, as for several seeds of one head.",
)
@shared_options
def command(runs: tuple[Path, ...], out: Path, store: str | Path, weights: str, *, as_json: bool) -> None:
    """Add up the heads RUNS and write the run folder OUT, which contains copies of theirs.

    All RUNS must have been trained on STORE with the same split, labels and variant; encoders, layers, settings and
    seeds may differ. Fitted weights are not negative and minimise the squared error on validation items; test items
    are never used. With fewer than 30 validation items the weights are equal. evaluate, predict and score read OUT as
    any other run.
    """
    from agiqa.heads import load_run, stack_runs
    from agiqa.heads.settings.labels import of_each_label
    from agiqa.heads.training.stacking import Weighting
    from agiqa.progress import say
    from agiqa.store import open_store

    kind: Weighting = "equal" if weights == "equal" else "fitted"
    stacked = stack_runs([load_run(run) for run in runs], out, open_store(store), weights=kind)
    labels, metrics = stacked.train.labels, dict(stacked.metrics)
    for warning in metrics["warnings"]:
        say(f"warning: {warning}")
    shown = {part: of_each_label(labels, metrics[part]) for part in ("validation", "test") if metrics[part]}
    lines = [f"{out}: {metrics['chosen_by']}"]
    for number, title in enumerate(label_titles(labels)):
        lines += [*title, *(scores_line(part, scores[number]) for part, scores in shown.items())]
    print_result({"run": str(out), **metrics}, "\n".join(lines), as_json=as_json)
