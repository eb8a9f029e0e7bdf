"""Stage 1, second half: a model is tuned on conversations, and its adapter written to a folder."""

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError, ModelError, WorkerError
from agiqa.extract.data.items import DataSet, Item, OnBadItem
from agiqa.extract.models.compiling import compile_layers
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.opening import devices_of_host
from agiqa.extract.models.preparing import Opener, Preparation, chosen_workers, default_workers
from agiqa.extract.tuning.adapting import adapt, recompute
from agiqa.extract.tuning.estimates import (
    GB,
    Load,
    estimate,
    memory_of,
    recipes_that_fit,
    settled,
)
from agiqa.extract.tuning.examples import Limited, Planned, plan_example, template_warnings, unplanned
from agiqa.extract.tuning.folder import AdapterFolder
from agiqa.extract.tuning.group import Group
from agiqa.extract.tuning.learner import Learner, OutOfMemory, naming_memory
from agiqa.extract.tuning.parts import find_parts
from agiqa.extract.tuning.processes import run_on_devices
from agiqa.extract.tuning.recipes import Recipe
from agiqa.extract.tuning.reporting import Reporter, check_tensorboard, reporting
from agiqa.extract.tuning.schedule import Schedule, held_out
from agiqa.extract.tuning.training import Material, Trainer
from agiqa.progress import say, track
from agiqa.store.format.items import MODEL
from agiqa.version import agiqa_version, this_commit

_LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How to tune; the defaults are those of the command line, except `workers`, whose default there is None."""

    recipe: Recipe
    seed: int = 0
    """Of the order of the items, the dropout, the LoRA pairs, and the prompts that are held out."""
    val_share: float = 0.1
    """Share of the prompts held out for validation, if no item is in the split val; 0 for none."""
    devices: int = 1
    """GPUs of this host; processes, on a CPU."""
    workers: int | None = 0
    """Processes per device that prepare items ahead of the model; None chooses how many."""
    checkpoint_minutes: float = 15.0
    tensorboard: bool = False
    """Write event files to ADAPTER/tensorboard."""
    on_bad_item: OnBadItem = "fail"


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """What a training would do."""

    material: Material
    longest: Load
    """The load of the largest item."""
    steps: int
    skipped: tuple[str, ...]
    data: Mapping[str, Any]
    """Counts and hash of the items."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**self.data, "steps": self.steps, "skipped": list(self.skipped)}


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """The adapter, and how it was made."""

    out: Path
    record: Mapping[str, Any]
    skipped: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"adapter": str(self.out), **self.record["result"], "skipped": list(self.skipped)}


def plan_tuning(
    data_set: DataSet, backbone: HuggingFaceBackbone, settings: TuningSettings, opener: Opener
) -> TuningPlan:
    """Choose training and validation items, and prepare each once. Needs no weights.

    Items of the split test are never used. Raises DataError listing the items that cannot be trained on
    (`on_bad_item="skip"` leaves them out), or if no training item is left; ModelError for a part that the model lacks.
    """
    recipe = settings.recipe
    find_parts(backbone, backbone.empty_model(), recipe)
    items = [item for item in data_set.items if item.split != "test"]
    plans = _plans(items, backbone, settings, opener)
    problems = tuple(plan.problem for plan in plans if plan.problem is not None)
    if problems and (settings.on_bad_item == "fail" or len(problems) == len(plans)):
        raise DataError.from_problems(data_set.name, problems)
    for warning in template_warnings(backbone):
        say(f"warning: {warning}")
    usable = [(item, plan) for item, plan in zip(items, plans, strict=True) if plan.problem is None]
    chosen = _validation_items([item for item, _ in usable], settings)
    train = [pair for pair, held in zip(usable, chosen.tolist(), strict=True) if not held]
    validation = [pair for pair, held in zip(usable, chosen.tolist(), strict=True) if held]
    if not train:
        message = f"{data_set.name}: no item is left to train on; {len(data_set.items)} items, none in the split train."
        raise DataError(message)
    if not validation and settings.val_share > 0:
        say("warning: nothing is held out for validation, since all items have one prompt; the last step is kept")
    tokens, labels, patches = (max(getattr(one, key) for _, one in usable) for key in ("tokens", "labels", "patches"))
    return TuningPlan(
        material=Material(
            train=[item for item, _ in train],
            validation=[item for item, _ in validation],
            labels=[plan.labels for _, plan in train],
            tokens=[plan.tokens for _, plan in train],
        ),
        longest=Load(tokens=tokens, labels=labels, patches=patches),
        steps=Schedule(recipe, items=len(train), seed=settings.seed).steps,
        skipped=(*data_set.skipped, *problems),
        data={
            "name": data_set.name,
            "train": len(train),
            "validation": len(validation),
            "longest": tokens,
            "tokens": sum(plan.tokens for _, plan in train),
            "labels": sum(plan.labels for _, plan in train),
            "sha256": _hash(train, validation),
        },
    )


def _plans(
    items: Sequence[Item], backbone: HuggingFaceBackbone, settings: TuningSettings, opener: Opener
) -> list[Planned]:
    plans: list[Planned] = []
    count = chosen_workers(settings.workers, backbone, len(items), opener=opener)
    limited = [Limited(item=item, max_length=settings.recipe.max_length) for item in items]
    with (
        Preparation(backbone, workers=count, opener=opener) as preparation,
        track("plan", len(items), "items") as advance,
    ):
        for plan in preparation.each(plan_example, limited, lost=unplanned):
            plans.append(plan)
            advance(1)
    return plans


def _validation_items(items: Sequence[Item], settings: TuningSettings) -> NDArray[np.bool_]:
    """Which items are held out: those of the split val, else those of a share of the prompts."""
    stated = np.array([item.split == "val" for item in items], np.bool_)
    if not stated.any():
        return held_out([item.prompt for item in items], share=settings.val_share, seed=settings.seed)
    seen = {item.prompt for item in items if item.split != "val"}
    shared = sum(item.prompt in seen for item in items if item.split == "val")
    if shared:
        say(f"warning: {shared} of {stated.sum()} validation items have a prompt that training items have too")
    return stated


def _hash(*parts: Sequence[tuple[Item, Planned]]) -> str:
    """Over the names and contents of training and validation items, in order."""
    lines = [f"{number} {plan.key} {item.name}" for number, part in enumerate(parts) for item, plan in part]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_start(out: Path, backbone: HuggingFaceBackbone, settings: TuningSettings, plan: TuningPlan) -> None:
    """Raise what `run_tuning` would raise about its options and the folder `out`. Needs no weights for a new one."""
    if settings.tensorboard:
        check_tensorboard()
    _refuse_float16(backbone)
    if out.exists():
        AdapterFolder(out, _identity(backbone, settings, plan))


def run_tuning(
    data_set: DataSet,
    backbone: HuggingFaceBackbone,
    out: Path,
    settings: TuningSettings,
    *,
    opener: Opener,
    plan: TuningPlan | None = None,
) -> TuningResult:
    """Tune the model of `backbone` on the conversations of `data_set` and write its adapter to the folder `out`.

    Run it again with the same arguments to resume a run that was killed: on the CPU, the result is the same to the
    bit. `backbone` is tuned in place; with several devices, `opener` opens the model on each. `plan` is that of
    `plan_tuning`, if made before.

    Raises DataError as `plan_tuning`, SettingsConflict for a folder with an adapter or another training, BusyStore
    while another run trains it, and ModelError for a part that the model lacks, lack of memory, or a loss that is not
    finite.
    """
    if settings.tensorboard:
        check_tensorboard()
    backbone.check_tensors()
    _refuse_float16(backbone)
    plan = plan or plan_tuning(data_set, backbone, settings, opener)
    memory = memory_of(backbone.device)
    chosen = settled(backbone, settings.recipe, plan.longest, steps=plan.steps, memory=memory, devices=settings.devices)
    identity = _identity(backbone, settings, plan)
    folder = AdapterFolder(out, identity)
    _warn_of_own_texts(plan.material)
    devices = devices_of_host(backbone.device, settings.devices) if settings.devices > 1 else [str(backbone.device)]
    work = Work(opener=opener, settings=settings, plan=plan, folder=folder, recipe=chosen)
    with folder.writing():
        try:
            if len(devices) == 1:
                work.run(backbone, Group())
            else:
                run_on_devices(work, devices, folder.training)
        except OutOfMemory as error:
            raise _memory_error(backbone, chosen, plan.longest, str(error)) from error
        record = {**identity, "devices": devices, "chosen": _choices(chosen), "result": _outcome(folder)}
        folder.finish(record)
    return TuningResult(out=out, record=record, skipped=plan.skipped)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one process of a training. Picklable."""

    opener: Opener
    settings: TuningSettings
    plan: TuningPlan
    folder: AdapterFolder
    recipe: Recipe
    """As `settled`."""

    def open_and_run(self, device: str, group: Group) -> None:
        """Open the model on `device` and train it."""
        backbone = self.opener(device=device)
        assert isinstance(backbone, HuggingFaceBackbone)  # as the one that was checked before
        self.run(backbone, group)

    def run(self, backbone: HuggingFaceBackbone, group: Group) -> None:
        """Train `backbone` as one process of `group`."""
        settings, recipe = self.settings, self.recipe
        backbone.load()
        with naming_memory():
            trained = adapt(backbone, recipe, seed=settings.seed)
        recompute(trained, recipe.checkpointing)
        if recipe.compile == "always":
            compile_layers(trained.model)
        material = self.plan.material
        schedule = Schedule(recipe, items=len(material.train), seed=settings.seed)
        workers = settings.workers
        if workers is None:
            workers = default_workers(backbone.device, len(material.train), processes=group.size)

        def trainer(reporter: Reporter, preparation: Preparation[HuggingFaceBackbone]) -> Trainer:
            return Trainer(
                learner=Learner(backbone, trained, recipe, group),
                schedule=schedule,
                material=material,
                folder=self.folder,
                preparation=preparation,
                reporter=reporter,
                checkpoint_seconds=60 * settings.checkpoint_minutes,
            )

        with Preparation(backbone, workers=workers, opener=self.opener) as preparation:
            if not group.first:
                trainer(Reporter(), preparation).run()
                return
            events = self.folder.path / "tensorboard" if settings.tensorboard else None
            with reporting(schedule.steps, (self.folder.state_facts() or {}).get("done", 0), events) as reporter:
                trainer(reporter, preparation).run()


def _refuse_float16(backbone: HuggingFaceBackbone) -> None:
    if backbone.logical_dtype == "float16":
        message = (
            f"{backbone.checkpoint.name}: gradients in float16 become 0 or infinite. Give --dtype bfloat16, or float32 "
            "on a device without it."
        )
        raise ModelError(message)


def _warn_of_own_texts(material: Material) -> None:
    own = sum(item.text_author == MODEL for item in material.train)
    if own:
        say(
            f"warning: {own} of {len(material.train)} training items have texts that a model of this kind wrote itself "
            "(response_0 in the conversation file), not a teacher"
        )


def _identity(backbone: HuggingFaceBackbone, settings: TuningSettings, plan: TuningPlan) -> dict[str, Any]:
    """Everything that changes the result, JSON-able."""
    return {
        "recipe": settings.recipe.as_dict(),
        "seed": settings.seed,
        "steps": plan.steps,
        "data": dict(plan.data),
        "model": backbone.provenance(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "agiqa": agiqa_version(),
        "commit": this_commit(),
    }


def _outcome(folder: AdapterFolder) -> dict[str, Any]:
    """Steps, best step and scores, by curves.csv."""
    rows = folder.curves()
    validations = [row for row in rows if row["validation_loss"] and int(row["step"]) > 0]
    steps = [row for row in rows if row["loss"]]
    best = min(validations, key=lambda row: float(row["validation_loss"]), default=None)
    seconds, tokens = (sum(float(row[key]) for row in steps) for key in ("seconds", "tokens"))
    return {
        "steps": int(steps[-1]["step"]) if steps else 0,
        "best_step": None if best is None else int(best["step"]),
        "validation_loss": None if best is None else float(best["validation_loss"]),
        "word_accuracy": None if best is None else float(best["word_accuracy"]),
        "loss": float(steps[-1]["loss"]) if steps else None,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "seconds": round(seconds, 3),
    }


def _choices(recipe: Recipe) -> dict[str, Any]:
    """What `settled` has chosen."""
    return {key: getattr(recipe, key) for key in ("micro_batch", "checkpointing", "compile")}


def _memory_error(backbone: HuggingFaceBackbone, recipe: Recipe, longest: Load, why: str) -> WorkerError:
    """What to do about too little memory: a recipe that would fit, by the estimates; `recipe` is as `settled`."""
    memory, load = memory_of(backbone.device), longest.times(recipe.micro_batch or 1)
    needed = estimate(backbone, recipe, load, checkpointing="all")
    fitting = recipes_that_fit(backbone, longest, memory)
    least = estimate(backbone, recipe, longest, checkpointing="all").total
    fitting = {name: one for name, one in fitting.items() if one.total < least}
    names = " or ".join(f"{name} (about {one.total / GB:.0f} GB)" for name, one in fitting.items())
    less = [] if recipe.checkpointing == "all" else ["--set checkpointing=all"]
    less += [] if recipe.micro_batch == 1 else ["--set micro_batch=1"]
    less += [f"--recipe {names}"] if names else ["a device with more memory"]
    size = "" if memory is None else f" has {memory / GB:.0f} GB and"
    message = (
        f"The device {backbone.device}{size} ran out of memory ({why}). The recipe {recipe.name} needs about "
        f"{needed.total / GB:.0f} GB for {load.tokens} tokens. Use {', or '.join(less)}."
    )
    return WorkerError(message)
