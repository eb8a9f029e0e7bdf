"""`agiqa score`: description, rating word and MOS of single images, without a store."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.help import SectionedCommand
from agiqa.commands.models import ASPECT, MODEL_OPTIONS, generation_options, model_or_encoder_options, weights_option
from agiqa.commands.options import OneOf, StoreLocation, columns_option, interval_option, shared_options
from agiqa.commands.output import print_result
from agiqa.extract.data.templates import VARIANTS

if TYPE_CHECKING:
    from agiqa.scoring import ImageScore

SECTIONS = {
    "Most used": ("prompt", "prompts", "run", "model", "adapter"),
    "Model": (*MODEL_OPTIONS[2:], "weights"),
    "Data": ("columns",),
    "Head": ("basis", "aspect", "variant", "interval"),
    "Answers": ("describe", "settings", "seed", "max_new_tokens", "batch_size"),
}


@click.command("score", cls=SectionedCommand, sections=SECTIONS)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--prompt", help="The text that all these images were generated from.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Table with the columns name (of the image) and prompt.",
)
@columns_option
@click.option("--run", required=True, type=click.Path(path_type=Path, exists=True), help="Run folder of the head.")
@click.option("--basis", type=StoreLocation(), help="Sketch store that has the basis, for a head on a sketch.")
@model_or_encoder_options
@weights_option
@click.option("--aspect", type=ASPECT, help="Wording of the questions.  [default: that of the head's store]")
@click.option(
    "--variant",
    type=OneOf("variant", VARIANTS),
    help="What the head reads.  [default: that of the head's store]",
)
@click.option(
    "--describe/--mos-only",
    default=None,
    help="Generate descriptions and rating words even if the head does not read them.  [default: for the variants id "
    "and full]",
)
@interval_option
@generation_options
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images per batch.")
@shared_options
def command(
    images: tuple[Path, ...],
    *,
    as_json: bool,
    prompt: str | None,
    prompts: Path | None,
    columns: dict[str, str] | None,
    run: Path,
    model: str,
    adapter: str | None,
    **options: Any,
) -> None:
    """Describe each of IMAGES (of a folder: all in it), rate it in one word, and predict its MOS with the head RUN.

    --model, --adapter, --aspect and --variant must be those of the head's store; others are refused. A head on an image
    encoder needs no prompt. Each image is printed as soon as it is scored. Images that cannot be scored are listed at
    the end, and the exit code is 1.

    --interval .9 adds an interval that holds the true MOS of 90 % of images that are like the validation items of the
    run. For images of other generators or prompts nothing is promised.
    """
    from agiqa.errors import DataError
    from agiqa.extract import Item
    from agiqa.extract.data.datasets import expanded
    from agiqa.heads import load_run
    from agiqa.heads.data.scales import scales_record
    from agiqa.progress import track
    from agiqa.scoring import ImageScore, NotScored, items_to_score, open_scorer

    head = load_run(run)
    if head.spec.tap is not None and prompt is None and prompts is None:
        prompt = "(not read)"  # by an image encoder
    paths = list(dict.fromkeys(expanded(images)))
    items = items_to_score(paths, prompt, table=prompts, columns=columns)
    failed = {item.image: item.reason for item in items if isinstance(item, NotScored)}
    where = "the images to score"
    if len(failed) == len(items):
        raise DataError.from_problems(where, list(failed.values()))
    scorer = open_scorer(head, model, adapter=adapter, **options)
    able = [item for item in items if isinstance(item, Item)]
    scored: list[dict[str, Any]] = []
    with track("score", len(able), "images") as advance:
        for outcome in scorer.scores(scorer.readable(able, model)):
            if isinstance(outcome, ImageScore):
                scored.append(outcome.as_dict())
                if not as_json:
                    click.echo(_text(outcome, described=scorer.describes))
            else:
                failed[outcome.image] = outcome.reason
            advance(1)
    if as_json:
        aspect, variant = scorer.wording
        used = {"run": str(run), "model": model, "adapter": adapter, "aspect": aspect, "variant": variant}
        scales = scales_record(scorer.run.train.labels, scorer.run.scales)
        print_result({**used, "mos_ranges": scales, "images": scored, "failed": failed}, "", as_json=True)
    if failed:
        raise DataError.from_problems(where, list(failed.values()))


def _text(one: "ImageScore", *, described: bool) -> str:
    """The scores of an image and, if `described`, its rating word and description."""
    mos, spread, interval = (
        value if isinstance(value, dict) else {"MOS": value} for value in (one.mos, one.spread, one.interval)
    )
    scores = f"{one.image}: " + ", ".join(
        f"{name} {value:.4f}{_around(spread.get(name), interval.get(name))}" for name, value in mos.items()
    )
    if not described:
        return scores
    cut = " (cut off; see --max-new-tokens)" if one.cut else ""
    return f"{scores}, rating word: {one.rating_word or 'none'}\n{one.description}{cut}\n"


def _around(spread: float | None, interval: list[float] | None) -> str:
    """Spread and interval of a MOS, as far as there are any."""
    shown = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return shown if spread is None else f"{shown} (spread {spread:.2f})"
