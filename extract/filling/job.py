"""All of phase 1: plan a store, fill it, seal it. Run it again to resume."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.data.items import DataSet
from agiqa.extract.filling.calibration import calibration_positions, check_rank, stored_target
from agiqa.extract.filling.engines import (
    Engine,
    Here,
    ModelProcess,
    OnDevices,
    calibrate_target,
    compare_basis,
)
from agiqa.extract.filling.fill import FillReport
from agiqa.extract.filling.plan import LengthRule, TokenisedItems, plan_store, tokenise
from agiqa.extract.filling.ray_driver import OnRay
from agiqa.extract.filling.targets import Target
from agiqa.extract.models import Backbone
from agiqa.extract.models.opening import devices_of_host
from agiqa.extract.models.preparing import Opener, Preparation, chosen_workers, require_opener
from agiqa.progress import say, track
from agiqa.store import ENCODINGS, Store, UnitWriter, is_planned, open_store, seal
from agiqa.store.writing.creating import check_writable


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How to extract; the defaults are those of the command line, except `workers`, whose default there is None."""

    variant: str = "id"
    aspect: str = "quality"
    encoding: str = "hidden"
    rank: int | None = None
    """Sketch rank; needed for `sketch` without `basis`."""
    basis: str | Path | None = None
    """A sketch store whose basis is used."""
    keep_logits: bool = False
    """Keep the raw logits beside hidden states."""
    length: LengthRule = field(default_factory=LengthRule)
    batch_size: int | None = None
    """Most items per forward pass; None lets the device's memory decide."""
    workers: int | None = 0
    """Processes that prepare items for one device: 0 prepares them in the process itself, None chooses."""
    devices: int | None = None
    """Processes with a device of this host each, None for this process alone; with `ray`, actors, None for all GPUs."""
    device: str = "auto"
    """What Ray actors run on: a GPU each if the cluster has any, or cpu."""
    ray: str | None = None
    """Address of a Ray cluster; "auto" for that of this machine, which is started if there is none."""
    part: tuple[int, int] = (1, 1)
    """Share (K, N) of the units that this run fills."""
    plan_only: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtractionResult:
    """The store, and what this run added to it."""

    store: Store
    skipped: tuple[str, ...]
    truncated: int
    fill: FillReport | None
    seconds: Mapping[str, float]
    """By phase: plan, calibrate, load, fill, seal; phases that did not run are omitted."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "store": str(self.store.path),
            "id": self.store.id,
            "state": "complete" if self.store.is_sealed else "unfinished",
            "items": len(self.store.items),
            "tokens": int(self.store.n_tokens.sum()),
            "units": self.store.geometry.units,
            "skipped": list(self.skipped),
            "truncated": self.truncated,
            "filled": None if self.fill is None else asdict(self.fill),
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
        }


def run_extraction(
    data_set: DataSet, backbone: Backbone, path: Path, settings: ExtractionSettings, *, opener: Opener | None = None
) -> ExtractionResult:
    """Plan, fill and seal the store at `path`; what an earlier run finished is kept.

    With `plan_only` nothing is computed; with a `part` the run that completes the store seals it. `opener` opens
    `backbone` anew in other processes, which `workers`, `devices` and `ray` need.

    Raises, before anything is read: UnknownName for the encoding, ConfigError for settings that contradict each other
    or need an `opener`, the errors of `check_writable` for `path`, and ModelError for a checkpoint without its tensors.
    Later: DataError for items that cannot be used (see `LengthRule`), ConfigError for splits without training items to
    calibrate on, HeadError for a basis of another model, SettingsConflict for a store with other settings, ModelError
    when the weights do not fit the device, and WorkerError when an item does not, or processes die. Finished units are
    kept.
    """
    _check_encoding(settings)
    check_writable(path)
    backbone.check_tensors()
    if settings.rank is not None:
        check_rank(settings.rank, backbone)
    require_opener(opener, "Several devices", needed=_elsewhere(settings))
    workers = chosen_workers(settings.workers, backbone, len(data_set.items), opener=opener)
    phases = _Phases()
    with Preparation(backbone, workers=workers, opener=opener) as preparation:
        with phases.timed("plan"), track("plan", len(data_set.items), "items") as advance:
            tokenised = tokenise(data_set, backbone, settings.length, advance=advance, preparation=preparation)
        engine = _engine(backbone, preparation, settings, opener)
        target = _choose_target(engine, tokenised, path, settings, phases)
        conversation = {"variant": settings.variant, "aspect": settings.aspect}
        with phases.timed("plan"):
            store = plan_store(
                path, data_set, backbone, tokenised, rule=settings.length, conversation=conversation, target=target
            )
        report = None
        if not store.is_sealed and not settings.plan_only:
            store, report = _fill_and_seal(store, engine, tokenised, target, settings, phases)
    return ExtractionResult(
        store=store,
        skipped=(*data_set.skipped, *tokenised.skipped),
        truncated=tokenised.truncated,
        fill=report,
        seconds=phases.seconds,
    )


class _Phases:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Generator[None]:
        """Add the time spent inside to `phase`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def _elsewhere(settings: ExtractionSettings) -> bool:
    """Whether the model runs in other processes."""
    return settings.ray is not None or (settings.devices or 1) > 1


def _engine(
    backbone: Backbone, preparation: Preparation[Backbone], settings: ExtractionSettings, opener: Opener | None
) -> Engine:
    if opener is None or not _elsewhere(settings):
        return Here(backbone=backbone, preparation=preparation, batch_size=settings.batch_size)
    preparation.close()  # the plan is made, and the other processes start their own workers
    process = ModelProcess(
        opener=opener,
        device=settings.device,
        workers=settings.workers,
        processes=settings.devices or 1,
        batch_size=settings.batch_size,
    )
    if settings.ray is not None:
        return OnRay(process=process, address=settings.ray, actors=settings.devices)
    devices = devices_of_host(backbone.device, settings.devices or 1)
    return OnDevices(process=replace(process, device=devices[0]), devices=devices)


def _check_encoding(settings: ExtractionSettings) -> None:
    """Raise UnknownName for the encoding, and ConfigError for options that do not belong to it."""
    if settings.encoding not in ENCODINGS:
        raise UnknownName.of(kind="encoding", name=settings.encoding, known=ENCODINGS)
    given = [option for option in (settings.rank, settings.basis) if option is not None]
    if settings.encoding != "sketch" and given:
        message = f"--rank and --basis belong to --encoding sketch, not to {settings.encoding}."
        raise ConfigError(message)
    if settings.encoding == "sketch" and len(given) != 1:
        message = "--encoding sketch needs either --rank R, or --basis STORE to use the basis of another sketch."
        raise ConfigError(message)
    if settings.keep_logits and settings.encoding != "hidden":
        message = f"--keep-logits keeps raw logits beside hidden states, not beside {settings.encoding}."
        raise ConfigError(message)
    if settings.plan_only and (settings.rank is not None or settings.encoding == "int8"):
        message = (
            f"--plan-only computes nothing, and {settings.encoding} needs a calibration by the model: plan with "
            "--encoding hidden, or a sketch with --basis STORE."
        )
        raise ConfigError(message)


def _choose_target(
    engine: Engine, tokenised: TokenisedItems, path: Path, settings: ExtractionSettings, phases: _Phases
) -> Target:
    """What to store, with constants from another sketch, from the store that is being resumed, or calibrated now."""
    if settings.basis is not None:
        basis = open_store(settings.basis).basis()
        if not is_planned(path):  # before there is a store; an existing store names its own model
            with phases.timed("load"):
                engine.run(partial(compare_basis, basis=basis), items=0, advance=lambda _items: None)
        return Target(encoding="sketch", basis=basis)
    if settings.encoding in ("hidden", "logits"):
        return Target(encoding=settings.encoding, keep_logits=settings.keep_logits)
    stored = stored_target(path, tokenised, rank=settings.rank)
    if stored is not None:
        return stored
    chosen = calibration_positions([item.split for item in tokenised.items])
    with phases.timed("load"):
        engine.load()
    with phases.timed("calibrate"), track("calibrate", len(chosen), "items") as advance:
        task = partial(calibrate_target, tokenised=tokenised, rank=settings.rank)
        target: Target = engine.run(task, items=len(tokenised.tokenised), advance=advance)
    return target


def _fill_and_seal(
    store: Store,
    engine: Engine,
    tokenised: TokenisedItems,
    target: Target,
    settings: ExtractionSettings,
    phases: _Phases,
) -> tuple[Store, FillReport]:
    with phases.timed("load"):
        engine.load()
    pending = UnitWriter(store).pending(part=settings.part)
    done = len(store.committed_units())
    if done:
        say(f"resume: {done} of {store.geometry.units} units are finished already")
    items = sum(len(store.items_of(unit)) for unit in pending)
    with phases.timed("fill"), track("extract", items, "items") as advance:
        report = engine.fill(store, tokenised.items, target, part=settings.part, advance=advance)
    left = len(UnitWriter(store).pending())
    if left:
        say(f"{left} units are left to other runs; the run that completes the last one seals the store")
        return store, report
    with phases.timed("seal"):
        return seal(store), report
