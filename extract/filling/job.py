"""All of phase 1: plan a store, fill it, seal it. Run it again to resume."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from agiqa.errors import AgiqaError, SettingsConflict
from agiqa.extract.data.items import DataSet
from agiqa.extract.describing.spool import Spool
from agiqa.extract.filling.calibration import (
    calibration_positions,
    calibration_record,
    check_rank,
    stored_target,
)
from agiqa.extract.filling.compiled import check_choice, compiles, pays
from agiqa.extract.filling.crew import Crew
from agiqa.extract.filling.engines import (
    Engine,
    Here,
    calibrate_target,
    compare_bases,
    try_layers,
)
from agiqa.extract.filling.fill import FillReport
from agiqa.extract.filling.growing import Alignment, aligned
from agiqa.extract.filling.kept import takes_kept_rows
from agiqa.extract.filling.plan import TokenisedItems, store_plan, tokenise
from agiqa.extract.filling.settings import ExtractionSettings
from agiqa.extract.filling.starting import Phases, Source, Starter
from agiqa.extract.filling.targets import Target
from agiqa.extract.filling.views import chosen_prefixes, possible_views
from agiqa.extract.models import Backbone
from agiqa.extract.models.ahead import Ahead
from agiqa.extract.models.compiling import check_compiler
from agiqa.extract.models.preparing import Opener, Preparation, require_opener
from agiqa.extract.models.rating_tokens import RATING_TOKENS
from agiqa.progress import say, track
from agiqa.store import Store, StorePlan, UnitWriter, create_store, is_planned, open_store, seal
from agiqa.store.format.prefixes import PREFIXES, Prefixes
from agiqa.store.writing.conflicts import require_same_settings
from agiqa.store.writing.creating import check_writable
from agiqa.store.writing.growing import begin_growth, copy_rows, install_growth, installed, recover_growth

_KNOWN_LATER = ("logical_dtype", "width", "layer_widths", "layer_dtypes", PREFIXES, RATING_TOKENS)
"""Entries of a store's provenance that depend on its constants, on trying out prefixes, or on the age of the store."""


@dataclass(frozen=True, kw_only=True)
class ExtractionResult:
    """The store, and what this run added to it."""

    store: Store
    skipped: tuple[str, ...]
    truncated: int
    fill: FillReport | None
    seconds: Mapping[str, float]
    """By phase: check, plan, compile, calibrate, copy, load, fill, seal; phases that did not run are omitted."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "store": str(self.store.path),
            "id": self.store.id,
            "state": "complete" if self.store.is_sealed else "unfinished",
            "items": len(self.store.items),
            "layers": list(self.store.layers),
            "pooled": list(self.store.pooled),
            "tokens": int(self.store.n_tokens.sum()),
            "units": self.store.geometry.units,
            "skipped": list(self.skipped),
            "truncated": self.truncated,
            "filled": None if self.fill is None else asdict(self.fill),
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
        }


def run_extraction(
    source: Source,
    backbone: Backbone,
    path: Path,
    settings: ExtractionSettings,
    *,
    opener: Opener | None = None,
    crew: Crew | None = None,
    preparation: Preparation[Backbone] | None = None,
    spool: Spool | None = None,
) -> ExtractionResult:
    """Plan, fill and seal the store at `path`; what an earlier run finished is kept.

    A finished store that lacks some of the items gets them: a larger store is made beside it, which takes its place
    when it is complete. The order of the items is that of the store.

    The weights load, and their files are hashed, while the items are planned, and for a new store before that, while
    `source`, if it is a function, reads the data set and checks its images. With `plan_only` nothing is computed;
    with a `part` the run that completes the store seals it. `opener` opens `backbone` anew in other processes, which
    `workers`, `devices` and `ray` need; `crew` holds the processes of `devices`, and `preparation` the workers of this
    process, if they were started before. Rows that a `spool` has are not computed, unless the model runs in other
    processes or the store was begun without a spool.

    Raises, before anything is read: UnknownName for the encoding, ConfigError for settings that contradict each other
    or need an `opener`, the errors of `check_writable` for `path`, and ModelError for a checkpoint without its tensors.
    Later: what `source` raises; DataError for items that cannot be used (see `LengthRule`), ConfigError for splits
    without training items to calibrate on, HeadError for a basis of another model, SettingsConflict for a store with
    other settings, ModelError when the weights do not fit the device, and WorkerError when an item does not, or
    processes die. Finished units are kept.
    """
    recover_growth(path)
    wanted, phases = check_settings(settings, path, backbone, opener), Phases()
    with ExitStack() as stack:
        provenance = stack.enter_context(Ahead(backbone.provenance))  # which hashes the files of the model
        starter = Starter(stack=stack, backbone=backbone, path=path, settings=settings, opener=opener, crew=crew)
        data_set, engine, preparation = starter.start(source, phases, preparation)
        alignment = aligned(path, _tokenised(data_set, preparation, settings, wanted, phases))
        if not isinstance(engine, Here):
            preparation.close()  # the other processes have their own workers
        compiled = _compiles(engine, backbone, alignment.tokenised, path, settings, wanted, phases)
        engine, kept = _with_kept_rows(engine.compiling() if compiled else engine, path, spool)
        how: dict[str, Any] = {"rule": settings.length, "grown": alignment.grown, "compiled": compiled, "kept": kept}
        how["conversation"] = {"variant": settings.variant, "aspect": settings.aspect}

        def plan(target: Target, prefixes: Prefixes | None = None) -> StorePlan:
            provenance.result()
            return store_plan(data_set, backbone, alignment.tokenised, target=target, prefixes=prefixes, **how)

        target = _choose_target(engine, alignment, path, settings, wanted, phases, plan)
        prefixes = chosen_prefixes(engine, alignment.tokenised, path, settings, wanted, phases)
        with phases.timed("plan"):
            store = _planned(path, plan(target, prefixes), alignment)
        store, report = _filled(store, path, engine, alignment, target, settings, phases)
    return ExtractionResult(
        store=store,
        skipped=(*data_set.skipped, *alignment.tokenised.skipped),
        truncated=alignment.tokenised.truncated,
        fill=report,
        seconds=phases.seconds,
    )


def _with_kept_rows(engine: Engine, path: Path, spool: Spool | None) -> tuple[Engine, bool]:
    """The engine with the rows of `spool`, and whether the store at `path` takes such rows, from this run or others."""
    kept = takes_kept_rows(path, offered=spool is not None)
    return (replace(engine, spool=spool) if kept and isinstance(engine, Here) else engine), kept


def _tokenised(
    data_set: DataSet,
    preparation: Preparation[Backbone],
    settings: ExtractionSettings,
    wanted: Target,
    phases: Phases,
) -> TokenisedItems:
    """The tokens of all items, and how many of them belong to shorter conversations."""
    with phases.timed("plan"), track("plan", len(data_set.items), "items") as advance:
        return tokenise(
            data_set,
            preparation.backbone,
            settings.length,
            poolings=wanted.poolings,
            ends=possible_views(settings, wanted),
            advance=advance,
            preparation=preparation,
        )


def _planned(path: Path, plan: StorePlan, alignment: Alignment) -> Store:
    """The store at `path`, or the larger one that will replace it, planned or resumed.

    An older agiqa recorded no tokens of rating words: its stores go on without them.
    """
    before = alignment.old or (open_store(path, allow_partial=True) if is_planned(path) else None)
    if before is not None and RATING_TOKENS not in before.provenance:
        kept = {name: value for name, value in plan.provenance.items() if name != RATING_TOKENS}
        plan = replace(plan, provenance=kept)
    if alignment.old is None:
        return create_store(path, plan)
    store = begin_growth(alignment.old, plan)
    old, new = len(alignment.old.items), len(plan.items)
    say(f"{path} has {old} of {new} items; to add: {new - old}. The larger store replaces it once it is complete")
    return store


def _filled(
    store: Store,
    path: Path,
    engine: Engine,
    alignment: Alignment,
    target: Target,
    settings: ExtractionSettings,
    phases: Phases,
) -> tuple[Store, FillReport | None]:
    """The store, filled unless it is complete or is only planned; a larger one has then taken its place at `path`."""
    old, report = alignment.old, None
    if store.is_sealed or settings.plan_only:
        return (install_growth(path) if old is not None and store.is_sealed else store), report
    if old is None:
        _tell_resumed(store)
        return _fill_and_seal(store, engine, alignment.tokenised, target, settings, phases)
    try:
        with phases.timed("copy"), track("copy", len(old.items), "items") as advance:
            copy_rows(old, store, advance)
        store, report = _fill_and_seal(store, engine, alignment.tokenised, target, settings, phases)
        return (install_growth(path) if store.is_sealed else store), report
    except (AgiqaError, OSError):
        found = installed(path, store)
        if found is None:
            raise
        say(f"another run has added these items to {path}")
        return found, report


def _compiles(
    engine: Engine,
    backbone: Backbone,
    tokenised: TokenisedItems,
    path: Path,
    settings: ExtractionSettings,
    wanted: Target,
    phases: Phases,
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
        if settings.elsewhere:
            check_compiler(backbone.device)
            return
        with phases.timed("load"):
            engine.load()
        items = [one.planned for one in tokenised.tokenised[:2]]
        with phases.timed("compile"):
            task = partial(try_layers, items=items, layers=wanted.layers)
            engine.compiling().run(task, items=0, advance=lambda _items: None)

    return compiles(settings.compile, path, worth=pays(backbone, tokens), try_out=try_out)


def check_settings(settings: ExtractionSettings, path: Path, backbone: Backbone, opener: Opener | None) -> Target:
    """What is to be stored, without its constants. Raises what `run_extraction` raises before anything is read."""
    settings.check_encoding()
    check_choice(settings.compile)
    check_writable(path)
    backbone.check_tensors()
    wanted = settings.target(backbone)
    _check_rows(path, wanted)
    if settings.rank is not None:
        check_rank(settings.rank, backbone, wanted.layers)
    require_opener(opener, "Several devices", needed=settings.elsewhere)
    require_opener(opener, "Worker processes", needed=bool(settings.workers))
    return wanted


def _check_rows(path: Path, wanted: Target) -> None:
    """Raise SettingsConflict if the store at `path` has other layers or poolings, before a model is calibrated."""
    if not is_planned(path):
        return
    store = open_store(path, allow_partial=True)
    asked = {"--layers": wanted.layers, "--pool-tokens": tuple(map(str, wanted.poolings))}
    for (option, mine), there in zip(asked.items(), (store.layers, store.pooled), strict=True):
        if mine != there:
            message = (
                f"{path} was made with {option} {_shown(there)}, and you asked for {_shown(mine)}. Give the same, or "
                "another path: all items of a store have the same rows."
            )
            raise SettingsConflict(message)


def _shown(names: Sequence[str]) -> str:
    return ",".join(names) or "none (one row per token)"


def _choose_target(
    engine: Engine,
    alignment: Alignment,
    path: Path,
    settings: ExtractionSettings,
    wanted: Target,
    phases: Phases,
    plan: Callable[[Target], StorePlan],
) -> Target:
    """`wanted` with its constants: from another sketch, from the store that is being resumed, or calibrated now.

    `plan` makes the plan of the store. Before it calibrates, raises SettingsConflict for a store of other
    settings.
    """
    if settings.basis is not None:
        sketch = wanted.with_bases_of(open_store(settings.basis))
        if not is_planned(path):  # before there is a store; an existing store names its own model
            with phases.timed("load"):
                engine.run(partial(compare_bases, target=sketch), items=0, advance=lambda _items: None)
        return sketch
    if settings.encoding in ("hidden", "logits"):
        return wanted
    tokenised = alignment.original
    stored = stored_target(path, tokenised, wanted, rank=settings.rank, finished=alignment.finished)
    if stored is not None:
        return stored
    if is_planned(path):
        _refuse_other_settings(path, plan(wanted), alignment, settings)
    chosen = calibration_positions([item.split for item in tokenised.items])
    with phases.timed("load"):
        engine.load()
    with phases.timed("calibrate"), track("calibrate", len(chosen), "items") as advance:
        task = partial(calibrate_target, tokenised=tokenised, wanted=wanted, rank=settings.rank)
        target: Target = engine.run(task, items=len(tokenised.tokenised), advance=advance)
    return target


def _refuse_other_settings(path: Path, plan: StorePlan, alignment: Alignment, settings: ExtractionSettings) -> None:
    """Raise SettingsConflict if the store at `path` has other settings than `plan`, which has no constants yet."""
    constants = calibration_record(alignment.original, rank=settings.rank)
    asked = replace(plan, provenance={**plan.provenance, **constants})
    store = open_store(path, allow_partial=True)
    require_same_settings(store, asked, unknown=_KNOWN_LATER, extends=alignment.old is not None)


def _tell_resumed(store: Store) -> None:
    if done := len(store.committed_units()):
        say(f"resume: {done} of {store.geometry.units} units are finished already")


def _fill_and_seal(
    store: Store,
    engine: Engine,
    tokenised: TokenisedItems,
    target: Target,
    settings: ExtractionSettings,
    phases: Phases,
) -> tuple[Store, FillReport]:
    with phases.timed("load"):
        engine.load()
    pending = UnitWriter(store).pending(part=settings.part)
    committed, (share, shares) = store.committed_units(), settings.part
    of_part = [unit for unit in committed if unit % shares == share - 1]
    left, done = (sum(len(store.items_of(unit)) for unit in units) for units in (pending, of_part))
    with phases.timed("fill"), track("extract", left + done, "items", done=done) as advance:
        report = engine.fill(store, tokenised.planned, target, part=settings.part, advance=advance)
    units_left = len(UnitWriter(store).pending())
    if units_left:
        say(f"{units_left} units are left to other runs; the run that completes the last one seals the store")
        return store, report
    with phases.timed("seal"):
        return seal(store), report
