"""From an image and its prompt to description, rating word and MOS, by a model and a trained head, without a store."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.errors import ConfigError, DataError, ModelError, WorkerError
from agiqa.extract import Backbone, Described, Describer, DescriptionSettings, Item
from agiqa.extract.data.datasets import expanded, items_of_pairs, prompts_of_images
from agiqa.extract.data.templates import reads_description
from agiqa.extract.describing.rounds import preset
from agiqa.extract.filling.live import LiveFeatures
from agiqa.extract.filling.targets import Target
from agiqa.heads import Run, load_run
from agiqa.heads.closed.combined import AnyHead
from agiqa.heads.evaluation.conformal import ConformalScores
from agiqa.heads.evaluation.intervals import conformal_scores
from agiqa.heads.evaluation.rating_words import parse_rating_word
from agiqa.heads.evaluation.scoring import Moments, predict_moments
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.settings.labels import by_label
from agiqa.progress import say
from agiqa.recorded_inputs import open_model_of, recorded_wording, target_of
from agiqa.store.format.columns import ColumnNames


@dataclass(frozen=True, kw_only=True)
class ImageScore:
    """The outputs of the model and the head for one image; None for outputs that were not requested."""

    image: str
    prompt: str
    description: str | None
    cut: bool | None
    """Whether the description reached the limit of tokens."""
    rating_word: str | None
    """The model's answer to the rating question, verbatim."""
    rating: str | None
    """The rating word in that answer; None if it is not clear."""
    mos: Any
    """A number; for a head with several labels, a dict of numbers by label."""
    spread: Any = None
    """The predicted standard deviation, as `mos`; None for a head that predicts none."""
    interval: Any = None
    """[lowest, highest] MOS, or a dict of them by label; None if no intervals were requested."""

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class NotScored:
    """An image that could not be scored."""

    image: str
    prompt: str
    reason: str
    """One line."""

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


Outcome = ImageScore | NotScored


@dataclass(frozen=True, kw_only=True)
class ImageScorer:
    """Scores images, a batch at a time."""

    describer: Describer
    features: LiveFeatures
    run: Run
    head: AnyHead
    variant: str
    """The variant of the conversation that the head reads."""
    describes: bool
    """Whether to generate descriptions and rating words even if the head does not read them."""
    level: float | None = None
    """The level of the intervals (see heads/evaluation/conformal.py); None for no intervals."""
    errors: ConformalScores | None = None
    """What the intervals are made from."""

    @classmethod
    def make(
        cls,
        run: Run,
        backbone: Backbone,
        *,
        model: str,
        target: Target,
        wording: tuple[str, str],
        describe: bool | None,
        settings: str = "greedy",
        max_new_tokens: int = 1024,
        seed: int = 0,
        batch_size: int = 8,
        level: float | None = None,
    ) -> "ImageScorer":
        """A scorer of the head `run` over `backbone`, whose weights it loads.

        `wording` is from `recorded_wording`, `target` from `target_of`. If `describe` is None, it describes for all
        variants whose conversations hold a description. Raises HeadError if the head cannot read the model's features,
        and ConfigError if the run has too few validation items for intervals of the `level`.
        """
        errors = None if level is None else conformal_scores(run)
        if errors is not None and level is not None:
            errors.check(level)
        aspect, variant = wording
        describes = reads_description(variant) if describe is None else describe
        if describe and target.tap is not None:
            message = f"{run.path} reads {target.tap!r} of {model} alone, which writes no text. Leave --describe out."
            raise ConfigError(message)
        first, second = preset(settings, max_new_tokens=max_new_tokens, seed=seed)
        rate = second if describes or variant == "full" else None
        asked = DescriptionSettings(aspect=aspect, describe=first, rate=rate, batch_size=batch_size)
        features = LiveFeatures(backbone, target, name=f"of {model}")
        run.check(features)
        device = resolve_device("cpu" if backbone.device.type == "cpu" else "auto")
        return cls(
            describer=Describer(backbone, asked),
            features=features,
            run=run,
            head=run.load_head(features, device=device),
            variant=variant,
            describes=describes,
            level=level,
            errors=errors,
        )

    @property
    def wording(self) -> tuple[str, str]:
        """The aspect and variant of the conversations."""
        return self.describer.settings.aspect, self.variant

    def scores(self, items: Sequence[Item | NotScored]) -> Iterator[Outcome]:
        """The outcome of each item, in their order, as soon as its batch is done."""
        size = self.describer.batch_size
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            able = [item for item in batch if isinstance(item, Item)]
            outcomes = iter(self._outcomes(able) if able else [])
            yield from (item if isinstance(item, NotScored) else next(outcomes) for item in batch)

    def readable(self, items: Sequence[Item | NotScored], model: str) -> list[Item | NotScored]:
        """`items` as the model reads them: without images, said once, for a model of texts."""
        if self.describer.backbone.reads_images:
            return list(items)
        say(f"warning: {model} reads no images; these scores are of the prompts alone")
        return [replace(item, image=None) if isinstance(item, Item) else item for item in items]

    def _outcomes(self, items: Sequence[Item]) -> list[Outcome]:
        """The outcomes of a batch. If the batch fails because of an item, each item is tried alone."""
        try:
            return self._batch(items)
        except (DataError, ModelError, WorkerError) as error:
            if len(items) == 1:
                return [_not_scored(items[0], str(error))]
        return [outcome for item in items for outcome in self._outcomes([item])]

    def _batch(self, items: Sequence[Item]) -> list[Outcome]:
        """Raises DataError, ModelError or WorkerError if the model cannot read an item."""
        described: Sequence[Described | str | None] = [None] * len(items)
        if self.describes or reads_description(self.variant):
            described = self.describer.describe(items)
        able = [(item, one) for item, one in zip(items, described, strict=True) if not isinstance(one, str)]
        scored: Iterator[ImageScore] = iter(())
        if able:
            self.features.replace([self._read(item, one) for item, one in able])
            read = self.run.features_of(self.features)
            found = predict_moments(self.head, read, np.arange(len(able)), batch_size=len(able))
            scored = iter(self._scores(able, found))
        return [
            _not_scored(item, one) if isinstance(one, str) else next(scored)
            for item, one in zip(items, described, strict=True)
        ]

    def _read(self, item: Item, described: Described | None) -> Item:
        """The item with the conversation that the head reads."""
        if described is None:
            return self.describer.undescribed(item, self.variant)
        return self.describer.item(described, self.variant)

    def _scores(self, able: Sequence[tuple[Item, Described | None]], found: Moments) -> list[ImageScore]:
        """The outcomes of items whose scores are `found`."""
        ends = None
        if self.errors is not None and self.level is not None:
            low, high = self.errors.intervals(found.mos, found.spread, level=self.level, scales=self.run.scales)
            ends = np.stack([low, high], axis=2)
        labels, scores = self.run.train.labels, list[ImageScore]()
        for row, (item, described) in enumerate(able):
            word = described.rating_word if described is not None else ""
            scores.append(
                ImageScore(
                    image=item.name,
                    prompt=item.prompt,
                    description=None if described is None else described.description,
                    cut=None if described is None else described.cut,
                    rating_word=word or None,
                    rating=parse_rating_word(word),
                    mos=by_label(labels, found.mos[row].tolist()),
                    spread=None if found.spread is None else by_label(labels, found.spread[row].tolist()),
                    interval=None if ends is None else by_label(labels, ends[row].tolist()),
                )
            )
        return scores


def _not_scored(item: Item, reason: str) -> NotScored:
    return NotScored(image=item.name, prompt=item.prompt, reason=reason)


def items_to_score(
    images: str | Path | Iterable[str | Path],
    prompts: str | Iterable[str] | None = None,
    *,
    table: str | Path | None = None,
    columns: ColumnNames | None = None,
) -> list[Item | NotScored]:
    """An item per image, in their order, or why it makes none: it has no prompt, or cannot be read.

    `images` are paths, or one path. `prompts` is the prompt of all images, or one for each; or else `table` has the
    columns `prompt` and `name`, which ends an image's path, and `columns` say which these are. A folder stands for all
    images below it, unless each image has its own prompt. Raises ConfigError unless one of both is given or for another
    number of prompts than images, and DataError for a table that cannot be read.
    """
    given = [images] if isinstance(images, str | Path) else images
    paths, file = [Path(image) for image in given], None if table is None else Path(table)
    if prompts is None or isinstance(prompts, str):
        paths = list(expanded(paths))
        texts = prompts_of_images(paths, prompt=prompts, table=file, columns=columns)
    else:
        texts = list(prompts)
        if table is not None or len(texts) != len(paths):
            message = f"{len(texts)} prompts for {len(paths)} images: give one for each, or one text for all."
            raise ConfigError(message)
    pairs = list(zip(paths, texts, strict=True))
    return [
        NotScored(image=str(path), prompt=text, reason=one) if isinstance(one, str) else one
        for (path, text), one in zip(pairs, items_of_pairs(pairs, table=file), strict=True)
    ]


def open_scorer(
    run: str | Path | Run,
    model: str | Path,
    *,
    adapter: str | None = None,
    max_slices: int | None = None,
    weights: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    basis: str | Path | None = None,
    aspect: str | None = None,
    variant: str | None = None,
    describe: bool | None = None,
    settings: str = "greedy",
    max_new_tokens: int = 1024,
    seed: int = 0,
    batch_size: int = 8,
    interval: float | None = None,
) -> ImageScorer:
    """Open a model and a head that score images: the arguments of `score` but for the images.

    Keep it to score again and again: `scorer.scores(items_to_score(images, prompts))`. Raises as `score`.
    """
    head = run if isinstance(run, Run) else load_run(run)
    target, wording = target_of(head, basis), recorded_wording(head, aspect, variant)
    backbone = open_model_of(
        head, str(model), adapter=adapter, dtype=dtype, device=device, max_slices=max_slices, weights=weights
    )
    return ImageScorer.make(
        head,
        backbone,
        model=str(model),
        target=target,
        wording=wording,
        describe=describe,
        settings=settings,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        level=interval,
    )


def score(
    images: str | Path | Iterable[str | Path],
    prompts: str | Iterable[str] | None = None,
    *,
    run: str | Path | Run,
    model: str | Path,
    table: str | Path | None = None,
    columns: ColumnNames | None = None,
    **options: Any,
) -> Iterator[Outcome]:
    """Description, rating word and MOS of images, by a model and a trained head, without a store.

    Yields an ImageScore for each image, in their order, as soon as its batch is done, or a NotScored with the reason.
    The images are checked and the model is opened before this returns. `images`, `prompts`, `table` and `columns` are
    those of `items_to_score`. `model` must be the one behind the head `run`; `options` are those of `open_scorer`:
    `adapter`, `dtype`, `device`, `max_slices`, `weights` (of `timm:NAME`), `basis` (a sketch store, for a head on a
    sketch), `aspect` and `variant` (by default those of the head's store), `describe` (whether to generate descriptions
    that the head does not read), `settings` (greedy or published), `max_new_tokens`, `seed`, `batch_size` (images) and
    `interval` (the share of MOS that intervals shall hold, such as .9).

    Raises HeadError for another model than the head was trained with, ModelError for one that cannot be opened,
    ConfigError, UnknownName and DataError as `items_to_score`.
    """
    items = items_to_score(images, prompts, table=table, columns=columns)
    if not any(isinstance(item, Item) for item in items):
        return iter([item for item in items if isinstance(item, NotScored)])
    scorer = open_scorer(run, model, **options)
    return scorer.scores(scorer.readable(items, str(model)))
