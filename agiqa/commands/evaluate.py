"""`agiqa evaluate`: how well a trained head does on a store, with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from agiqa.commands.options import OneOf, StoreLocation, prediction_options, run_variant_option, shared_options
from agiqa.commands.output import interval_lines, label_titles, print_result, scores_line, spread_lines


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=StoreLocation())
@click.option(
    "--on",
    "part",
    type=OneOf("part", ["test", "validation", "train", "all"]),
    default="test",
    show_default=True,
    help="Items to evaluate.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
    metavar="LEVEL",
    default=0.9,
    show_default=True,
    help="Level of the intervals whose coverage is measured.",
)
@run_variant_option
@prediction_options
@shared_options
def command(
    run: Path,
    store: str | Path,
    part: str,
    variant: str | None,
    device: str,
    batch_size: int,
    *,
    interval: float,
    as_json: bool,
) -> None:
    """SRCC, PLCC, KRCC and RMSE of the head RUN on STORE, with intervals over prompts.

    On its training store, --on names the parts of its training. On another store of the same model (or basis) it names
    that store's own parts. PLCC and RMSE are also reported after the 4-parameter logistic mapping that the run fitted
    to its validation part (a line if that has fewer than 100 items). MOS on another scale are converted to the
    scale of the head, which is also that of RMSE. A head with several labels is scored on each of them; STORE must have
    them all.

    Coverage is the share of true MOS inside the intervals of `agiqa predict --interval`, of all items and by generator.
    Intervals hold for images like the validation items of the run, not for other generators or prompts.
    """
    from agiqa.heads import evaluate, load_run
    from agiqa.heads.settings.labels import of_each_label
    from agiqa.progress import say
    from agiqa.store import open_store

    head = load_run(run)
    source = open_store(store)
    scores = evaluate(head, source, part, variant=variant, interval=interval, device=device, batch_size=batch_size)
    for warning in scores["warnings"]:
        say(f"warning: {warning}")
    labels = head.train.labels
    lines: list[str] = []
    for title, of_label in zip(label_titles(labels), of_each_label(labels, scores), strict=True):
        lines += [*title, scores_line(part, of_label), *_mapped_lines(of_label), *spread_lines(of_label)]
        lines += interval_lines(of_label["intervals"])
    print_result(scores, "\n".join(lines), as_json=as_json)


def _mapped_lines(scores: Mapping[str, Any]) -> list[str]:
    """A line per mapping with its PLCC and RMSE, or why there is none. A reason that all share is printed once."""
    absent = {entry["absent"] for entry in scores["logistic"].values() if "absent" in entry}
    if len(absent) == 1 and all("absent" in entry for entry in scores["logistic"].values()):
        return [f"{'logistic':<10} none: {absent.pop()}"]
    return [_mapped_line(kind, entry, scores) for kind, entry in scores["logistic"].items()]


def _mapped_line(kind: str, entry: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    if "absent" in entry:
        return f"{kind:<10} none: {entry['absent']}"
    parts = [f"{kind:<10}"]
    for metric in ("plcc", "rmse"):
        value, interval = scores[f"{metric}_{kind}"], scores["ci"][f"{metric}_{kind}"]
        around = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        parts.append(f"{metric.upper()} {'undefined' if value is None else f'{value:.4f}'}{around}")
    return "  ".join(parts)
