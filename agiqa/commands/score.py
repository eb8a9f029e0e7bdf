"""`agiqa score`: images to description, rating word and MOS, by a model and a trained head, without a store."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.common import StoreLocation, print_result, shared_options
from agiqa.commands.models import ASPECTS, generation_options, model_options, open_model
from agiqa.progress import say, track

if TYPE_CHECKING:
    from agiqa.extract import Backbone, Described, Describer, Item
    from agiqa.extract.live import LiveFeatures
    from agiqa.extract.targets import Target
    from agiqa.heads import Run


@click.command("score")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--prompt", help="The text that all these images were generated from.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Table with the columns name (of the image) and prompt.",
)
@click.option("--run", required=True, type=click.Path(path_type=Path, exists=True), help="Run folder of the head.")
@click.option("--basis", type=StoreLocation(), help="Sketch store with the basis of a head on a sketch.")
@model_options
@click.option("--aspect", help=f"{ASPECTS}  [default: that of the head's store]")
@click.option(
    "--variant",
    type=click.Choice(["no_id", "id", "full"]),
    help="What the head reads.  [default: that of the head's store]",
)
@generation_options
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images at a time.")
@shared_options
def command(
    images: tuple[Path, ...],
    *,
    as_json: bool,
    prompt: str | None,
    prompts: Path | None,
    run: Path,
    basis: str | Path | None,
    model: str,
    adapter: str | None,
    max_slices: int | None,
    dtype: str,
    device: str,
    aspect: str | None,
    variant: str | None,
    settings: str,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """Describe each of IMAGES, rate it in one word, and predict its MOS with the head RUN.

    MODEL, ADAPTER, aspect and variant must be those of the store that the head was trained on; others are refused.
    """
    from agiqa.extract import Describer, DescriptionSettings
    from agiqa.extract.asking import preset
    from agiqa.extract.given_images import items_of_images
    from agiqa.extract.live import LiveFeatures
    from agiqa.heads import load_run
    from agiqa.heads.scales import scales_record

    items = items_of_images(images, prompt=prompt, table=prompts)
    head = load_run(run)
    target = _target(head, basis)
    aspect, variant = _wording(head, aspect, variant)
    describe, rate = preset(settings, max_new_tokens=max_new_tokens, seed=seed)
    chosen = DescriptionSettings(aspect=aspect, describe=describe, rate=rate, batch_size=batch_size)
    backbone = _open_as(head, model, adapter=adapter, dtype=dtype, device=device, max_slices=max_slices)
    describer = Describer(backbone, chosen)
    features = LiveFeatures(backbone, target, name=f"of {model}")
    head.check(features)
    if not backbone.reads_images:
        say(f"warning: {model} reads no images; these scores are of the prompts alone")
        items = [replace(item, image=None) for item in items]
    told = list(_scores(items, describer, features, head, variant=variant, device=device))
    result = {
        "run": str(run),
        "model": model,
        "adapter": adapter,
        "aspect": aspect,
        "variant": variant,
        "mos_ranges": scales_record(head.train.labels, head.scales),
        "images": told,
    }
    print_result(result, "\n\n".join(_text(one) for one in told), as_json=as_json)


def _wording(run: "Run", aspect: str | None, variant: str | None) -> tuple[str, str]:
    """Aspect and variant of the conversations behind the head; without a record those given, or the usual ones.

    Raises UnknownName, and HeadError for others than those recorded.
    """
    from agiqa.errors import HeadError
    from agiqa.extract.templates import VARIANTS, template_of

    if aspect is not None:
        template_of(aspect)
    recorded = run.origin.get("conversation", {})
    for option, given in (("aspect", aspect), ("variant", variant)):
        stated = recorded.get(option, given)
        if given is not None and given != stated:
            message = (
                f"The head {run.path} was trained on conversations of the {option} {stated}, and --{option} is "
                f"{given}. Leave --{option} out, or give a head that was trained on {given}."
            )
            raise HeadError(message)
    used = aspect or recorded.get("aspect", "quality"), variant or recorded.get("variant", "id")
    if used[1] not in VARIANTS:
        message = (
            f"The head {run.path} reads descriptions of several aspects ({used[1]}), and score makes those of one. Use "
            "`agiqa describe` for each aspect, then `agiqa extract` and `agiqa predict`."
        )
        raise HeadError(message)
    return used


def _open_as(
    run: "Run", model: str, *, adapter: str | None, dtype: str, device: str, max_slices: int | None
) -> "Backbone":
    """The model, if it is the one behind the head; `dtype` and `max_slices` that are left open are those of then.

    Raises HeadError, see `check_model`, and as `open_backbone`.
    """
    from agiqa.extract.origins import check_model

    recorded = run.origin.get("model", {})
    if not recorded:
        say(
            f"warning: {run.path} does not say which model its store was made by; only the language-model head is "
            "compared. Make sure that model, adapter, aspect and variant are those of that store"
        )
        return open_model(model, adapter=adapter, dtype=dtype, device=device, max_slices=max_slices)
    then = partial(open_model, model, adapter=adapter, dtype=recorded.get("dtype", dtype) if dtype == "auto" else dtype)
    backbone = then(device=device, max_slices=max_slices)
    found, slices = backbone.provenance(), recorded.get("image", {}).get("slices")
    if max_slices is None and slices is not None and found.get("image", {}).get("slices", slices) != slices:
        backbone = then(device=device, max_slices=slices)
        found = {**found, "image": {**found["image"], "slices": slices}}
    for line in check_model(recorded, found, head=f"The head {run.path}"):
        say(f"warning: {line}")
    return backbone


def _target(run: "Run", basis: str | Path | None) -> "Target":
    """What the head reads of the hidden states. Raises HeadError or ConfigError where the basis does not fit."""
    from agiqa.errors import ConfigError, HeadError
    from agiqa.extract.targets import Target
    from agiqa.store import open_store

    if run.spec.basis_id is None:
        if basis is not None:
            message = f"--basis belongs to a head on a sketch; {run.path} reads {run.spec.encoding!r} features."
            raise ConfigError(message)
        return Target(encoding=run.spec.encoding)
    if basis is None:
        message = (
            f"The head {run.path} reads a sketch in the basis {run.spec.basis_id}. Name a sketch store that has it, "
            "such as the one that it was trained on: --basis STORE."
        )
        raise HeadError(message)
    return Target(encoding="sketch", basis=open_store(basis).basis())


def _scores(
    items: "Sequence[Item]",
    describer: "Describer",
    features: "LiveFeatures",
    run: "Run",
    *,
    variant: str,
    device: str,
) -> Iterator[dict[str, Any]]:
    """What is told of each image, a batch at a time. Raises DataError for images that the model has no answer to."""
    import numpy as np

    from agiqa.errors import DataError
    from agiqa.extract import Described
    from agiqa.heads.fitting import resolve_device
    from agiqa.heads.scoring import predict_items

    head = run.load_head(features, device=resolve_device("cpu" if device == "cpu" else "auto"))
    with track("score", len(items), "images") as advance:
        for start in range(0, len(items), describer.settings.batch_size):
            outcomes = describer.describe(items[start : start + describer.settings.batch_size])
            failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
            if failed:
                where = "the images to score"
                raise DataError.from_problems(where, failed)
            batch = [outcome for outcome in outcomes if isinstance(outcome, Described)]
            features.replace([describer.item(one, variant) for one in batch])
            predicted = predict_items(head, features, np.arange(len(batch)), batch_size=len(batch))
            yield from (_told(one, mos, run.train.labels) for one, mos in zip(batch, predicted.tolist(), strict=True))
            advance(len(batch))


def _told(one: "Described", mos: list[float], labels: Sequence[str]) -> dict[str, Any]:
    """The line of one image."""
    from agiqa.heads.labels import by_label
    from agiqa.heads.rating_words import parse_word

    return {
        "image": one.item.name,
        "prompt": one.item.prompt,
        "description": one.description,
        "cut": one.cut,
        "rating_word": one.rating_word,
        "rating": parse_word(one.answer),
        "mos": by_label(labels, mos),
    }


def _text(one: Mapping[str, Any]) -> str:
    """The line of one image for people."""
    mos = one["mos"] if isinstance(one["mos"], dict) else {"MOS": one["mos"]}
    scores = ", ".join(f"{name} {value:.4f}" for name, value in mos.items())
    cut = " (cut off; see --max-new-tokens)" if one["cut"] else ""
    return f"{one['image']}: {scores}, rating word: {one['rating_word'] or 'none'}\n{one['description']}{cut}"
