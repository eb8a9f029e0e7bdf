"""The whole of phase 1: plan a store, fill it, seal it. Run it again to resume."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.data.items import DataSet
from agiqa.extract.filling.calibration import calibration_positions, check_rank, stored_constants
from agiqa.extract.filling.devices import OnDevices, devices_of_host
from agiqa.extract.filling.engines import Engine, Helper, Here
from agiqa.extract.filling.fill import FillReport
from agiqa.extract.filling.plan import LengthRule, TokenisedItems, plan_store, tokenise
from agiqa.extract.filling.ray_driver import OnRay
from agiqa.extract.filling.targets import Target
from agiqa.extract.models import Backbone
from agiqa.extract.models.preparing import Opener, Preparation, chosen_workers, require_opener
from agiqa.progress import say, track
from agiqa.store import ENCODINGS, Store, UnitWriter, is_planned, open_store, seal
from agiqa.store.writing.creating import check_writable


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How to extract; the defaults are those of the command line, but for `workers`, where that is None."""

    variant: str = "id"
    aspect: str = "quality"
    encoding: str = "hidden"
    rank: int | None = None
    """Sketch rank; needed for `sketch` without `basis`."""
    basis: str | Path | None = None
    """A sketch store whose basis is to be used."""
    keep_logits: bool = False
    """Keep the raw logits beside hidden states."""
    length: LengthRule = field(default_factory=LengthRule)
    batch_size: int | None = None
    """Items per forward pass at most; None lets the device's memory decide."""
    workers: int | None = 0
    """Processes that prepare items for one device: 0 prepares them in the process itself, None chooses."""
    devices: int | None = None
    """Processes, each with a device of this host, None for this process alone; with `ray` actors, None for all GPUs."""
    device: str = "auto"
    """What Ray actors run on: the GPU that they are given if the cluster has any, or cpu."""
    ray: str | None = None
    """Address of a Ray cluster; "auto" for the one of this machine, which is started where there is none."""
    part: tuple[int, int] = (1, 1)
    """Share (K, N) of the units that this run fills."""
    plan_only: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtractionResult:
    """The store and what this run did for it."""

    store: Store
    skipped: tuple[str, ...]
    truncated: int
    fill: FillReport | None
    seconds: Mapping[str, float]
    """What each phase took: plan, calibrate, load, fill, seal; those that there were."""

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

    With `plan_only` nothing is computed; with a `part` the store is sealed by whichever run completes it. `opener`
    opens `backbone` anew in other processes, which `workers`, `devices` and `ray` need.

    Raises before anything is read UnknownName for the encoding, ConfigError for settings that contradict each other or
    that need an `opener`, what `check_writable` raises of `path`, and ModelError for a checkpoint without the tensors;
    then DataError for items that cannot be used (see `LengthRule`), ConfigError for splits without an item to calibrate
    on, HeadError for a basis of another model, SettingsConflict for a store made otherwise, ModelError where the
    weights do not fit the device, and WorkerError for an item that does not, or where processes die. What is finished
    by then is kept.
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
        truncated=sum(tokenised.truncated),
        fill=report,
        seconds=phases.seconds,
    )


class _Phases:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Generator[None]:
        """Add what is done inside to `phase`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def _elsewhere(settings: ExtractionSettings) -> bool:
    """Whether the model runs in other processes."""
    return settings.ray is not None or (settings.devices or 1) > 1


def _engine(
    backbone: Backbone, preparation: Preparation, settings: ExtractionSettings, opener: Opener | None
) -> Engine:
    if opener is None or not _elsewhere(settings):
        return Here(backbone=backbone, preparation=preparation, batch_size=settings.batch_size)
    preparation.close()  # the plan is made, and the other processes have workers of their own
    helper = Helper(
        opener=opener,
        device=settings.device,
        workers=settings.workers,
        processes=settings.devices or 1,
        batch_size=settings.batch_size,
    )
    if settings.ray is not None:
        return OnRay(helper=helper, address=settings.ray, actors=settings.devices)
    devices = devices_of_host(backbone.device, settings.devices or 1)
    return OnDevices(helper=replace(helper, device=devices[0]), devices=devices)


def _check_encoding(settings: ExtractionSettings) -> None:
    """Raise UnknownName for the encoding, and ConfigError when it and its options do not go together."""
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
    """What to store, with its constants: of another sketch, of the store that is being resumed, or calibrated now."""
    if settings.basis is not None:
        basis = open_store(settings.basis).basis()
        if not is_planned(path):  # refused before there is a store; a store that is there names its model itself
            with phases.timed("load"):
                engine.check_basis(basis)
        return Target(encoding="sketch", basis=basis)
    if settings.encoding in ("hidden", "logits"):
        return Target(encoding=settings.encoding, keep_logits=settings.keep_logits)
    used = stored_constants(path, tokenised, rank=settings.rank)
    if used is not None:
        return used
    chosen = calibration_positions([item.split for item in tokenised.items])
    with phases.timed("load"):
        engine.load()
    with phases.timed("calibrate"), track("calibrate", len(chosen), "items") as advance:
        return engine.calibrate(tokenised, rank=settings.rank, advance=advance)


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
        say(f"resume: {done} of {store.geometry.units} units are there already")
    items = sum(len(store.items_of(unit)) for unit in pending)
    with phases.timed("fill"), track("extract", items, "items") as advance:
        report = engine.fill(store, tokenised.items, target, part=settings.part, advance=advance)
    left = len(UnitWriter(store).pending())
    if left:
        say(f"{left} units are left to other runs; the run that completes the last one seals the store")
        return store, report
    with phases.timed("seal"):
        return seal(store), report
