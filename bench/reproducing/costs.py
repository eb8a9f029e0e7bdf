"""What each step takes before anything runs: GPU hours, disk and downloads, from measured rates (rates.yaml)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from agiqa.bench.ablation.grids import PlannedRun, read_grid, with_defaults
from agiqa.bench.networks.config import NetworkConfig, network_config
from agiqa.bench.reproducing.grids import merged_grid
from agiqa.bench.reproducing.plan import Plan
from agiqa.bench.reproducing.steps import Step
from agiqa.extract.data.items import Item, Message
from agiqa.extract.data.templates import aspects_of, ended, reads_rating_word, template_of
from agiqa.extract.filling.footprints import PUBLISHED, footprints
from agiqa.extract.filling.token_estimates import estimated
from agiqa.heads.settings.config import HeadConfig, TrainConfig

RATES = Path(__file__).with_name("rates.yaml")
_TRAIN_SHARE = 0.8
"""Of the items, in estimates."""
_BYTES = 4
"""Of a number in the weights of a head."""


class Rates(BaseModel):
    """The content of rates.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measured: str
    describe_images_per_second: float
    description_characters: int
    described_bytes: int
    head_milliseconds: dict[str, float]
    """Per image and epoch, in batches, by encoder."""
    head_milliseconds_alone: dict[str, float]
    """The same with one image per step."""
    vocabulary: int
    width: int
    networks: dict[str, float | None]
    """Training crops per second, by network."""
    download_gigabytes: dict[str, float]
    """By hub name; `adapter` is any adapter."""
    network_gigabytes: dict[str, float]
    """Of pretrained weights, by network."""


@cache
def rates() -> Rates:
    """The shipped rates."""
    return Rates.model_validate(yaml.safe_load(RATES.read_text(encoding="utf-8")))


def with_network_rates(text: str, measured: Mapping[str, float]) -> str:
    """The content of rates.yaml with these crops per second of networks, whole numbers; its comments stay."""
    known = yaml.safe_load(text)["networks"]
    values = {name: round(measured[name]) if name in measured else old for name, old in known.items()}
    shown = ", ".join(f"{name}: {'null' if value is None else value}" for name, value in values.items())
    return re.sub(r"^networks: .*$", f"networks: {{{shown}}}", text, count=1, flags=re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step takes; None where no rate was measured."""

    gpu_hours: float | None = 0.0
    disk_bytes: float | None = 0.0
    download_bytes: float | None = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Total(Cost):
    """The sum of costs that are known."""

    unknown: tuple[str, ...] = ()
    """Steps of which something is unknown, and left out of the sums."""


def total_of(costs: Sequence[tuple[str, Cost]]) -> Total:
    """The sum over (step, cost)."""

    def summed(values: Iterable[float | None]) -> float:
        return sum(value for value in values if value is not None)

    return Total(
        gpu_hours=summed(cost.gpu_hours for _, cost in costs),
        disk_bytes=summed(cost.disk_bytes for _, cost in costs),
        download_bytes=summed(cost.download_bytes for _, cost in costs),
        unknown=tuple(name for name, cost in costs if None in cost.as_dict().values()),
    )


def cost_of(plan: Plan, step: Step) -> Cost:
    """What the step takes on one GPU, of the published model and images of the usual size."""
    if step.kind == "fetch":
        sizes = rates().download_gigabytes
        size = sizes.get(step.entry, sizes["adapter"] if step.entry in plan.adapters else None)
        return Cost(download_bytes=None if size is None else size * 1e9)
    if step.kind == "describe":
        images = plan.data[plan.descriptions[step.entry].data].images
        hours = images / rates().describe_images_per_second / 3600
        return Cost(gpu_hours=hours, disk_bytes=images * rates().described_bytes)
    known = {"extract": _of_store, "ablate": _of_ablation, "transfer": _of_transfer}
    if step.kind in known:
        return known[step.kind](plan, step.entry)
    if step.kind == "baseline":
        return _of_network(plan, step.entry, step.name.rpartition("/")[2])
    return Cost()


def _of_store(plan: Plan, name: str) -> Cost:
    """As `agiqa data check` estimates it, with descriptions of the usual length."""
    store, first = plan.stores[name], plan.first(name)
    data = plan.data[first.data]
    description = "x" * rates().description_characters
    asked = [template_of(aspect) for aspect in aspects_of(store.variant, first.aspect)]
    words = [text for one in asked for text in (one.describe, description)]
    words += [asked[0].rate, *(["good"] if reads_rating_word(store.variant) else [])]
    if store.variant == "no_id":
        words = [asked[0].one_round]
    talk = [Message(role=("user", "assistant")[turn % 2], content=text) for turn, text in enumerate(words)]
    one = Item(
        name="",
        prompt="",
        image=None,
        conversation=tuple(ended(talk, store.variant)),
        image_size=(data.side, data.side),
    )
    counts = estimated([one] * data.images, max_slices=data.max_slices)
    encoding, rank = (plan.options.get("extract", {}).get(key) for key in ("encoding", "rank"))
    found = {each.encoding: each for each in footprints(counts, PUBLISHED, rank=rank)}[encoding or "hidden"]
    return Cost(gpu_hours=found.gpu_hours, disk_bytes=found.disk_bytes)


def _of_ablation(plan: Plan, name: str) -> Cost:
    """Every run over its epochs; the closed-form baselines take no GPU."""
    ablation = plan.ablations[name]
    data = plan.data[plan.first(next(iter(ablation.stores.values()))).data]
    names = [*ablation.stores] if len(ablation.stores) > 1 else [""]
    with merged_grid(plan, name) as file:
        runs = read_grid(file, stores=names, variant=ablation.variant)
    return _of_runs([(run.head, run.train, data.images * _share(run)) for run in runs])


def _share(run: PlannedRun) -> float:
    """Of the items, those that the run trains on, and validates on in less time."""
    return 1.0 - 1.0 / run.train.folds if run.train.split == "folds" else _TRAIN_SHARE


def _of_transfer(plan: Plan, name: str) -> Cost:
    """The head of the source, that of the target, and two few-shot heads on all items of the target, with each seed."""
    one, given = plan.transfers[name], plan.options.get("transfer", {})
    values = with_defaults({}, given.get("preset"), None)
    head = HeadConfig(**{key: value for key, value in values.items() if key in HeadConfig.model_fields})
    train = TrainConfig(**{key: value for key, value in values.items() if key in TrainConfig.model_fields})
    source, target = (plan.data[plan.first(store).data].images * _TRAIN_SHARE for store in (one.source, one.target))
    trained = [(head, train, images) for images in (source, target, target, target)]
    return _of_runs(trained * int(given.get("seeds", 5)))


def _of_runs(runs: Sequence[tuple[HeadConfig, TrainConfig, float]]) -> Cost:
    """Heads with the training images of each."""
    milliseconds: float | None = 0.0
    disk = 0.0
    for head, train, images in runs:
        known = rates().head_milliseconds_alone if train.batch_size == 1 else rates().head_milliseconds
        each = known.get(head.encoder)
        milliseconds = None if each is None or milliseconds is None else milliseconds + each * images * train.epochs
        if head.projection in (None, "vocabulary"):
            disk += _BYTES * (head.width * rates().vocabulary + rates().width ** 2)
    return Cost(gpu_hours=None if milliseconds is None else milliseconds / 3.6e6, disk_bytes=disk)


def _of_network(plan: Plan, name: str, model: str) -> Cost:
    """All runs of a network, and its cache of resized images unless a network before it has one of that size.

    Epochs of the new layers alone count as whole ones.
    """
    one, given = plan.networks[name], plan.options.get("baseline", {})
    data = plan.data[one.data]
    named = {key.replace("-", "_"): value for key, value in given.items()}
    changes = {key: value for key, value in named.items() if key in NetworkConfig.model_fields}
    config = network_config(model, changes)
    before = {network_config(other, changes).resize for other in one.models[: one.models.index(model)]}
    earlier = [*plan.networks][: [*plan.networks].index(name)]
    is_there = "no-pretrained" in given or any(model in plan.networks[other].models for other in earlier)
    protocols = given.get("protocol", ["published"])
    parts = sum(int(given.get("folds", 5)) if protocol == "grouped" else 1 for protocol in protocols)
    runs = len(one.labels) * int(given.get("seeds", 5)) * parts
    rate, size = rates().networks.get(model), rates().network_gigabytes.get(model)
    crops = data.images * _TRAIN_SHARE * config.all_epochs * config.train_crops * runs
    return Cost(
        gpu_hours=None if rate is None else crops / rate / 3600,
        disk_bytes=0.0 if config.resize in before else data.images * 3 * config.resize**2,
        download_bytes=0.0 if is_there else None if size is None else size * 1e9,
    )
