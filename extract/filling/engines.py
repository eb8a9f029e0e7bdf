"""Where the model runs: in this process, or in processes that are sent what to do. All fill the same units alike."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agiqa.extract.data.items import Item
from agiqa.extract.filling.calibration import calibrated
from agiqa.extract.filling.fill import Filler, FillReport
from agiqa.extract.filling.model_arrays import check_basis, lm_head_of
from agiqa.extract.filling.plan import TokenisedItems
from agiqa.extract.filling.targets import Target
from agiqa.extract.models import Backbone
from agiqa.extract.models.preparing import Opener, Preparation, default_workers
from agiqa.store import Basis, Store, open_store

Advance = Callable[[int], None]


class Engine(Protocol):
    """What needs the model's weights."""

    def check_basis(self, basis: Basis) -> None:
        """Raise HeadError unless `basis` was made for this model."""
        ...

    def calibrate(self, tokenised: TokenisedItems, *, rank: int | None, advance: Advance) -> Target:
        """See `agiqa.extract.filling.calibration.calibrated`."""
        ...

    def load(self) -> None:
        """Get ready to fill."""
        ...

    def fill(
        self, store: Store, items: Sequence[Item], target: Target, *, part: tuple[int, int], advance: Advance
    ) -> FillReport:
        """Store what the model is asked for, then fill the pending units of share `part`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Here:
    """This process and its one device."""

    backbone: Backbone
    preparation: Preparation
    batch_size: int | None

    def check_basis(self, basis: Basis) -> None:
        """See `Engine`."""
        check_basis(basis, lm_head_of(self.backbone))

    def calibrate(self, tokenised: TokenisedItems, *, rank: int | None, advance: Advance) -> Target:
        """See `Engine`."""
        return calibrated(
            self.backbone,
            tokenised,
            rank=rank,
            batch_size=self.batch_size,
            advance=advance,
            preparation=self.preparation,
        )

    def load(self) -> None:
        """See `Engine`."""
        self.backbone.load()

    def fill(
        self, store: Store, items: Sequence[Item], target: Target, *, part: tuple[int, int], advance: Advance
    ) -> FillReport:
        """See `Engine`."""
        filler = Filler(
            store,
            self.backbone,
            items,
            target=target,
            batch_size=self.batch_size,
            preparation=self.preparation,
        )
        filler.write_model_arrays()
        return filler.fill(part=part, advance=advance)


@dataclass(frozen=True, kw_only=True)
class Helper:
    """What another process needs to do the model's part of a run. Picklable."""

    opener: Opener
    device: str
    workers: int | None
    """Worker processes that prepare items for it; None for as many as it has cores for."""
    processes: int
    """How many such processes share the machine."""
    batch_size: int | None

    def check_basis(self, basis: Basis) -> None:
        """See `Engine`."""
        check_basis(basis, lm_head_of(self.opener(device=self.device)))

    def calibrate(self, tokenised: TokenisedItems, rank: int | None) -> Target:
        """See `Engine`."""
        backbone = self.opener(device=self.device)
        with self._preparation(backbone, len(tokenised.items)) as preparation:
            preparation.start()
            here = Here(backbone=backbone, preparation=preparation, batch_size=self.batch_size)
            return here.calibrate(tokenised, rank=rank, advance=lambda _items: None)

    def fill(
        self,
        path: Path,
        items: Sequence[Item],
        target: Target,
        *,
        units: Iterable[int],
        advance: Advance,
    ) -> FillReport:
        """Fill the `units` of the store at `path` that nobody else is at work on."""
        backbone = self.opener(device=self.device)
        store = open_store(path, allow_partial=True)
        with self._preparation(backbone, len(items) // self.processes) as preparation:
            preparation.start()
            filler = Filler(store, backbone, items, target=target, batch_size=self.batch_size, preparation=preparation)
            filler.write_model_arrays()
            return filler.fill(units=units, advance=advance)

    def _preparation(self, backbone: Backbone, items: int) -> Preparation:
        workers = self.workers
        if workers is None:
            workers = default_workers(backbone.device, items, processes=self.processes)
        return Preparation(backbone, workers=workers, opener=self.opener)
