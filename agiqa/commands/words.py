"""`agiqa words`: how well the rating words that a model answered agree with the true MOS."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from agiqa.commands.options import OneOf, columns_option, mos_range_option, shared_options
from agiqa.commands.output import print_result


@click.command("words")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--labels", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Table with the MOS.")
@click.option(
    "--label",
    type=OneOf("label", ["quality", "correspondence", "authenticity"]),
    default="quality",
    show_default=True,
    help="MOS to compare the words with.",
)
@mos_range_option
@columns_option
@shared_options
def command(
    file: Path,
    labels: Path | None,
    label: str,
    mos_range: tuple[float, float] | None,
    columns: dict[str, str] | None,
    *,
    as_json: bool,
) -> None:
    """Accuracy, rough accuracy, precision and F1 of the rating words in FILE, with intervals over prompts.

    FILE is an M3-AGIQA conversation file, such as `agiqa describe` writes; give its MOS by --labels data.csv. Or it is
    a csv with the columns name and answer; add the columns prompt and mos_LABEL, or give --labels. An answer counts as
    wrong if it does not clearly contain one of the words bad, poor, fair, good and excellent. Rough
    accuracy also accepts a neighbouring word.
    """
    from agiqa.heads.evaluation.rating_words import score_words
    from agiqa.progress import say
    from agiqa.rated_items import read_rated_items
    from agiqa.store.format.labels import scale_of

    scale = scale_of(labels or file, mos_range)
    rated = read_rated_items(file, labels, label=label, mos_range=scale, columns=columns)
    prompts = [one.prompt for one in rated if one.prompt is not None]
    if len(prompts) < len(rated):
        say(f"warning: {file} has no column 'prompt', so the intervals treat every item as a prompt of its own")
    scores = score_words(
        [one.answer for one in rated],
        [one.mos for one in rated],
        prompts if len(prompts) == len(rated) else None,
        mos_range=scale,
    )
    print_result({"file": str(file), "label": label, **scores}, _lines(scores), as_json=as_json)


def _lines(scores: Mapping[str, Any]) -> str:
    """A line per metric, with its interval."""
    from agiqa.heads.evaluation.rating_words import RATING_WORD_METRICS

    lines = [f"{'answers':<20}n {scores['n']}, of which {scores['unknown']} without a clear word"]
    for metric in RATING_WORD_METRICS:
        interval = scores["ci"][metric]
        around = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        lines.append(f"{metric.replace('_', ' '):<20}{scores[metric]:.4f}{around}")
    if "caution" in scores:
        lines.append(f"note: {scores['caution']}")
    return "\n".join(lines)
