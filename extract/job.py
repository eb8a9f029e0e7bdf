"""The whole of phase 1: plan a store, fill it, seal it. Run it again to resume."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.backbones import Backbone
from agiqa.extract.calibration import calibrated, calibration_positions, stored_constants
from agiqa.extract.fill import Filler, FillReport, check_basis
from agiqa.extract.items import DataSet
from agiqa.extract.plan import LengthRule, TokenisedItems, plan_store, tokenise
from agiqa.extract.targets import Target
from agiqa.progress import say, track
from agiqa.store import ENCODINGS, Store, is_planned, open_store, seal


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How to extract; the defaults are those of the command line."""

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
    batch_size: int = 8
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

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "store": str(self.store.path),
            "id": self.store.id,
            "state": "complete" if self.store.is_complete else "unfinished",
            "items": len(self.store.items),
            "tokens": int(self.store.n_tokens.sum()),
            "units": self.store.geometry.units,
            "skipped": list(self.skipped),
            "truncated": self.truncated,
            "filled": None if self.fill is None else asdict(self.fill),
        }


def run_extraction(data_set: DataSet, backbone: Backbone, path: Path, settings: ExtractionSettings) -> ExtractionResult:
    """Plan, fill and seal the store at `path`; what an earlier run finished is kept.

    With `plan_only` nothing is computed; with a `part` the store is sealed by whichever run completes it.
    """
    _check_encoding(settings)
    with track("plan", len(data_set.items), "items") as advance:
        tokenised = tokenise(data_set, backbone, settings.length, advance=advance)
    target = _choose_target(backbone, tokenised, path, settings)
    conversation = {"variant": settings.variant, "aspect": settings.aspect}
    store = plan_store(
        path, data_set, backbone, tokenised, rule=settings.length, conversation=conversation, target=target
    )
    report = None
    if not store.is_complete and not settings.plan_only:
        store, report = _fill_and_seal(store, backbone, tokenised, target, settings)
    return ExtractionResult(
        store=store,
        skipped=(*data_set.skipped, *tokenised.skipped),
        truncated=sum(tokenised.truncated),
        fill=report,
    )


def _check_encoding(settings: ExtractionSettings) -> None:
    """Raise ConfigError when the encoding and its options do not go together."""
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


def _choose_target(backbone: Backbone, tokenised: TokenisedItems, path: Path, settings: ExtractionSettings) -> Target:
    """What to store, with its constants: of another sketch, of the store that is being resumed, or calibrated now."""
    if settings.encoding not in ENCODINGS:
        raise UnknownName.of(kind="encoding", name=settings.encoding, known=ENCODINGS)
    if settings.basis is not None:
        basis = open_store(settings.basis).basis()
        if not is_planned(path):  # refused before there is a store; a store that is there names its model itself
            check_basis(backbone, basis)
        return Target(encoding="sketch", basis=basis)
    if settings.encoding in ("hidden", "logits"):
        return Target(encoding=settings.encoding, keep_logits=settings.keep_logits)
    used = stored_constants(path, tokenised, rank=settings.rank)
    if used is not None:
        return used
    chosen = calibration_positions([item.split for item in tokenised.items])
    with track("calibrate", len(chosen), "items") as advance:
        return calibrated(backbone, tokenised, rank=settings.rank, batch_size=settings.batch_size, advance=advance)


def _fill_and_seal(
    store: Store, backbone: Backbone, tokenised: TokenisedItems, target: Target, settings: ExtractionSettings
) -> tuple[Store, FillReport]:
    filler = Filler(store, backbone, tokenised.items, target=target, batch_size=settings.batch_size)
    filler.write_model_arrays()
    pending = filler.writer.pending(part=settings.part)
    done = len(store.committed_units())
    if done:
        say(f"resume: {done} of {store.geometry.units} units are there already")
    with track("extract", sum(len(store.items_of(unit)) for unit in pending), "items") as advance:
        report = filler.fill(part=settings.part, advance=advance)
    left = len(filler.writer.pending())
    if left:
        say(f"{left} units are left to other runs; the run that completes the last one seals the store")
        return store, report
    return seal(store), report
