"""`agiqa evaluate`: how well a trained head does on a store, with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from agiqa.commands.common import StoreLocation, one_of, print_result, shared_options


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=StoreLocation())
@click.option(
    "--split",
    type=one_of("part", ["test", "validation", "train", "all"]),
    default="test",
    show_default=True,
    help="test, validation, train or all.",
)
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
    """SRCC, PLCC, KRCC and RMSE of the head RUN on STORE, with intervals over prompts.

    On the store that it was trained on, the parts are those of its training; on another store of the same model
    (or basis) they are that store's own. PLCC and RMSE are also given after the 4-parameter logistic mapping that the
    run fitted to its validation part, or a line where that has fewer than 100 items. MOS of STORE on another scale than
    that of the head are converted to it, and RMSE is on it. A head with several labels is scored on each, and STORE
    must have all.
    """
    from agiqa.commands.train import label_titles, scores_line
    from agiqa.heads import evaluate, load_run
    from agiqa.heads.settings.labels import of_each_label
    from agiqa.progress import say
    from agiqa.store import open_store

    head = load_run(run)
    scores = evaluate(head, open_store(store), split, device=device, batch_size=batch_size)
    for warning in scores["warnings"]:
        say(f"warning: {warning}")
    labels = head.train.labels
    lines: list[str] = []
    for title, of_label in zip(label_titles(labels), of_each_label(labels, scores), strict=True):
        lines += [*title, scores_line(split, of_label), *_mapped_lines(of_label)]
    print_result(scores, "\n".join(lines), as_json=as_json)


def _mapped_lines(scores: Mapping[str, Any]) -> list[str]:
    """For people: what each mapping gives, or why there is none; a reason of them all stands once."""
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
