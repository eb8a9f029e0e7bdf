"""All of phase 1: plan a store, fill it, seal it. Run it again to resume."""

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.data.items import DataSet
from agiqa.extract.filling.calibration import calibration_positions, check_rank, stored_target
from agiqa.extract.filling.compiled import check_choice, compiles, pays
from agiqa.extract.filling.crew import Crew
from agiqa.extract.filling.engines import (
    Engine,
    Here,
    ModelProcess,
    OnDevices,
    calibrate_target,
    compare_basis,
    to_prepare,
    try_layers,
)
from agiqa.extract.filling.fill import FillReport
from agiqa.extract.filling.plan import LengthRule, TokenisedItems, plan_store, tokenise
from agiqa.extract.filling.ray_driver import OnRay
from agiqa.extract.filling.targets import Target
from agiqa.extract.models import Backbone
from agiqa.extract.models.ahead import Ahead
from agiqa.extract.models.compiling import check_compiler
from agiqa.extract.models.opening import devices_of_host
from agiqa.extract.models.preparing import (
    FEWEST_ITEMS,
    FEWEST_TEXTS,
    Opener,
    Preparation,
    chosen_workers,
    require_opener,
)
from agiqa.progress import say, track
from agiqa.store import ENCODINGS, Store, UnitWriter, is_planned, open_store, seal
from agiqa.store.format.layout import StoreLayout
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
    compile: str = "auto"
    """One of COMPILING: whether the model's layers are compiled, see `agiqa.extract.filling.compiled`."""
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
    """By phase: check, plan, compile, calibrate, load, fill, seal; phases that did not run are omitted."""

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
    data_set: DataSet | Callable[[], DataSet],
    backbone: Backbone,
    path: Path,
    settings: ExtractionSettings,
    *,
    opener: Opener | None = None,
    crew: Crew | None = None,
) -> ExtractionResult:
    """Plan, fill and seal the store at `path`; what an earlier run finished is kept.

    The weights load, and their files are hashed, while the items are planned, and before that while `data_set`, if it
    is a function, reads the data set and checks its images. With `plan_only` nothing is computed; with a `part` the
    run that completes the store seals it. `opener` opens `backbone` anew in other processes, which
    `workers`, `devices` and `ray` need; `crew` holds the processes of `devices`, if they were started before.

    Raises, before anything is read: UnknownName for the encoding, ConfigError for settings that contradict each other
    or need an `opener`, the errors of `check_writable` for `path`, and ModelError for a checkpoint without its tensors.
    Later: what `data_set` raises; DataError for items that cannot be used (see `LengthRule`), ConfigError for splits
    without training items to calibrate on, HeadError for a basis of another model, SettingsConflict for a store with
    other settings, ModelError when the weights do not fit the device, and WorkerError when an item does not, or
    processes die. Finished units are kept.
    """
    _check(settings, path, backbone, opener)
    phases = _Phases()
    with ExitStack() as stack:
        provenance = stack.enter_context(Ahead(backbone.provenance))  # which hashes the files of the model
        computes = not settings.plan_only and not StoreLayout(path).manifest.exists()
        engine = _engine(stack, backbone, settings, opener, crew, images=_images(data_set, backbone), loads=computes)
        if not isinstance(data_set, DataSet):
            with phases.timed("check"):
                data_set = data_set()
        fewest = FEWEST_ITEMS if to_prepare(data_set.items) else FEWEST_TEXTS
        workers = chosen_workers(settings.workers, backbone, len(data_set.items), opener=opener, fewest=fewest)
        preparation = stack.enter_context(Preparation(backbone, workers=workers, opener=opener))
        if isinstance(engine, Here):
            engine = replace(engine, preparation=preparation)
        with phases.timed("plan"), track("plan", len(data_set.items), "items") as advance:
            tokenised = tokenise(data_set, backbone, settings.length, advance=advance, preparation=preparation)
        if not isinstance(engine, Here):
            preparation.close()  # the other processes have their own workers
        compiled = _compiles(engine, backbone, tokenised, path, settings, phases)
        engine = engine.compiling() if compiled else engine
        target = _choose_target(engine, tokenised, path, settings, phases)
        plan = partial(plan_store, rule=settings.length, target=target, compiled=compiled)
        with phases.timed("plan"):
            provenance.result()
            conversation = {"variant": settings.variant, "aspect": settings.aspect}
            store = plan(path, data_set, backbone, tokenised, conversation=conversation)
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


def _images(data_set: DataSet | Callable[[], DataSet], backbone: Backbone) -> int:
    """How many images the model will read; of a data set that is not read yet, as many as any process can use."""
    if isinstance(data_set, DataSet):
        return to_prepare(data_set.items)
    return sys.maxsize if backbone.reads_images else 0


def _elsewhere(settings: ExtractionSettings) -> bool:
    """Whether the model runs in other processes."""
    return settings.ray is not None or (settings.devices or 1) > 1


def _engine(
    stack: ExitStack,
    backbone: Backbone,
    settings: ExtractionSettings,
    opener: Opener | None,
    crew: Crew | None,
    *,
    images: int,
    loads: bool,
) -> Engine:
    """Where the model runs on `images` images; with `loads` it begins to load, until `stack` ends."""
    if opener is None or not _elsewhere(settings):
        loading = stack.enter_context(Ahead(backbone.load)) if loads else None
        nothing = Preparation(backbone)
        return Here(backbone=backbone, preparation=nothing, batch_size=settings.batch_size, loading=loading)
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
    process = replace(process, device=devices[0])
    if not loads:
        return OnDevices(process=process, devices=devices)
    crew = crew or stack.enter_context(
        Crew(len(devices), on_cpu=devices[0].startswith("cpu"), workers=settings.workers != 0)
    )
    crew.open(process, devices, items=images // len(devices))
    return OnDevices(process=process, devices=devices, crew=crew)


def _compiles(
    engine: Engine,
    backbone: Backbone,
    tokenised: TokenisedItems,
    path: Path,
    settings: ExtractionSettings,
    phases: _Phases,
) -> bool:
    """Whether layers are compiled for the store at `path`.

    A model of this process compiles them before the store is planned, so that the plan says what is used. Other
    processes compile when they fill, and this one only checks that its compiler works.
    """
    shares = (settings.devices or 1) * settings.part[1]
    tokens = sum(len(one.token_ids) for one in tokenised.tokenised) // shares

    def try_out() -> None:
        if settings.plan_only:
            return
        if _elsewhere(settings):
            check_compiler(backbone.device)
            return
        with phases.timed("load"):
            engine.load()
        items = [one.planned for one in tokenised.tokenised[:2]]
        with phases.timed("compile"):
            engine.compiling().run(partial(try_layers, items=items), items=0, advance=lambda _items: None)

    return compiles(settings.compile, path, worth=pays(backbone, tokens), try_out=try_out)


def _check(settings: ExtractionSettings, path: Path, backbone: Backbone, opener: Opener | None) -> None:
    """Raise what `run_extraction` raises before anything is read."""
    _check_encoding(settings)
    check_choice(settings.compile)
    check_writable(path)
    backbone.check_tensors()
    if settings.rank is not None:
        check_rank(settings.rank, backbone)
    require_opener(opener, "Several devices", needed=_elsewhere(settings))
    require_opener(opener, "Worker processes", needed=bool(settings.workers))


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
