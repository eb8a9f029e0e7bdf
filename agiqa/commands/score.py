"""`agiqa score`: images to description, rating word and MOS, by a model and a trained head, without a store."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.common import StoreLocation, print_result, shared_options
from agiqa.commands.models import ASPECT, ASPECTS, generation_options, model_options, open_model
from agiqa.progress import say, track

if TYPE_CHECKING:
    from agiqa.extract import Backbone, Described, Describer, Item
    from agiqa.extract.filling.live import LiveFeatures
    from agiqa.extract.filling.targets import Target
    from agiqa.heads import Run
    from agiqa.heads.model.head import Head


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
@click.option("--aspect", type=ASPECT, help=f"{ASPECTS}  [default: that of the head's store]")
@click.option(
    "--variant",
    type=click.Choice(["no_id", "id", "full"]),
    help="What the head reads.  [default: that of the head's store]",
)
@click.option(
    "--describe/--mos-only",
    default=None,
    help="Whether description and rating word are made where the head does not read them.  [default: unless the head "
    "reads the one question of no_id]",
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
    describe: bool | None,
    settings: str,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """Describe each of IMAGES, rate it in one word, and predict its MOS with the head RUN.

    MODEL, ADAPTER, aspect and variant must be those of the store that the head was trained on; others are refused.
    Each image is printed as soon as it is scored. Images that cannot be scored are listed at the end, with exit code 1.
    """
    from agiqa.errors import DataError
    from agiqa.extract import Describer, DescriptionSettings
    from agiqa.extract.data.given_images import items_of_images
    from agiqa.extract.describing.asking import preset
    from agiqa.extract.filling.live import LiveFeatures
    from agiqa.heads import load_run
    from agiqa.heads.data.scales import scales_record
    from agiqa.heads.settings.device import resolve_device

    items, failed = items_of_images(images, prompt=prompt, table=prompts)
    where = "the images to score"
    if not items:
        raise DataError.from_problems(where, list(failed.values()))
    head = load_run(run)
    target = _target(head, basis)
    aspect, variant = _wording(head, aspect, variant)
    texts = variant != "no_id" if describe is None else describe
    first, second = preset(settings, max_new_tokens=max_new_tokens, seed=seed)
    rate = second if texts or variant == "full" else None
    chosen = DescriptionSettings(aspect=aspect, describe=first, rate=rate, batch_size=batch_size)
    backbone = _open_as(head, model, adapter=adapter, dtype=dtype, device=device, max_slices=max_slices)
    features = LiveFeatures(backbone, target, name=f"of {model}")
    head.check(features)
    if not backbone.reads_images:
        say(f"warning: {model} reads no images; these scores are of the prompts alone")
        items = [replace(item, image=None) for item in items]
    scorer = _Scorer(
        describer=Describer(backbone, chosen),
        features=features,
        run=head,
        head=head.load_head(features, device=resolve_device("cpu" if device == "cpu" else "auto")),
        variant=variant,
        texts=texts,
    )
    outcomes = {item.name: outcome for item, outcome in scorer.printed(items, quiet=as_json)}
    failed |= {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)}
    if as_json:
        told = [outcome for name, outcome in outcomes.items() if name not in failed]
        asked = {"run": str(run), "model": model, "adapter": adapter, "aspect": aspect, "variant": variant}
        scales = scales_record(head.train.labels, head.scales)
        print_result({**asked, "mos_ranges": scales, "images": told, "failed": failed}, "", as_json=True)
    if failed:
        raise DataError.from_problems(where, list(failed.values()))


def _wording(run: "Run", aspect: str | None, variant: str | None) -> tuple[str, str]:
    """Aspect and variant of the conversations behind the head; without a record those given, or the usual ones.

    Raises UnknownName, and HeadError for others than those recorded.
    """
    from agiqa.errors import HeadError
    from agiqa.extract.data.templates import VARIANTS, template_of

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
    from agiqa.extract.models.origins import check_model

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
    from agiqa.extract.filling.targets import Target
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


@dataclass(frozen=True, kw_only=True)
class _Scorer:
    """From images to what is told of them, a batch at a time."""

    describer: "Describer"
    features: "LiveFeatures"
    run: "Run"
    head: "Head"
    variant: str
    texts: bool
    """Whether descriptions and rating words are asked for where the head does not read them."""

    def printed(self, items: "Sequence[Item]", *, quiet: bool) -> "Iterator[tuple[Item, dict[str, Any] | str]]":
        """Each item with what is told of it, printed unless `quiet`, or with the line that says why it has no score."""
        size = self.describer.settings.batch_size
        with track("score", len(items), "images") as advance:
            for start in range(0, len(items), size):
                batch = items[start : start + size]
                for item, outcome in zip(batch, self._batch(batch), strict=True):
                    if not quiet and not isinstance(outcome, str):
                        click.echo(_text(outcome, texts=self.texts))
                    yield item, outcome
                advance(len(batch))

    def _batch(self, items: "Sequence[Item]") -> list[dict[str, Any] | str]:
        """The outcomes of a batch; where an item ends it, each of its items is tried alone."""
        from agiqa.errors import DataError, ModelError, WorkerError

        try:
            return self._scores(items)
        except (DataError, ModelError, WorkerError) as error:
            if len(items) == 1:
                return [str(error)]
        return [outcome for item in items for outcome in self._batch([item])]

    def _scores(self, items: "Sequence[Item]") -> list[dict[str, Any] | str]:
        """Raises DataError, ModelError or WorkerError where the model cannot read an item."""
        import numpy as np

        from agiqa.heads.evaluation.scoring import predict_items

        described: Sequence[Described | str | None] = [None] * len(items)
        if self.texts or self.variant != "no_id":
            described = self.describer.describe(items)
        able = [(item, one) for item, one in zip(items, described, strict=True) if not isinstance(one, str)]
        if not able:
            return [one for one in described if isinstance(one, str)]
        self.features.replace([self._read(item, one) for item, one in able])
        predicted = predict_items(self.head, self.features, np.arange(len(able)), batch_size=len(able))
        labels = self.run.train.labels
        told = iter([_told(item, one, mos, labels) for (item, one), mos in zip(able, predicted.tolist(), strict=True)])
        return [one if isinstance(one, str) else next(told) for one in described]

    def _read(self, item: "Item", described: "Described | None") -> "Item":
        """The item as the head reads it."""
        return self.describer.undescribed(item) if described is None else self.describer.item(described, self.variant)


def _told(item: "Item", described: "Described | None", mos: list[float], labels: Sequence[str]) -> dict[str, Any]:
    """The line of one image; without a description or a rating word these are null."""
    from agiqa.heads.evaluation.rating_words import parse_rating_word
    from agiqa.heads.settings.labels import by_label

    word = described.rating_word if described is not None else ""
    return {
        "image": item.name,
        "prompt": item.prompt,
        "description": None if described is None else described.description,
        "cut": None if described is None else described.cut,
        "rating_word": word or None,
        "rating": parse_rating_word(word),
        "mos": by_label(labels, mos),
    }


def _text(one: Mapping[str, Any], *, texts: bool) -> str:
    """The lines of one image for people: scores, and with `texts` the rating word and the description."""
    mos = one["mos"] if isinstance(one["mos"], dict) else {"MOS": one["mos"]}
    scores = f"{one['image']}: " + ", ".join(f"{name} {value:.4f}" for name, value in mos.items())
    if not texts:
        return scores
    cut = " (cut off; see --max-new-tokens)" if one["cut"] else ""
    return f"{scores}, rating word: {one['rating_word'] or 'none'}\n{one['description']}{cut}\n"
