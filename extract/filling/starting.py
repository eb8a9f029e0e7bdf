"""How an extraction starts: the model begins to load, the data set is read, and workers get ready."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from agiqa.extract.data.items import DataSet
from agiqa.extract.filling.crew import Crew
from agiqa.extract.filling.engines import Engine, Here, ModelProcess, OnDevices, to_prepare
from agiqa.extract.filling.growing import lacks_items
from agiqa.extract.filling.ray_driver import OnRay
from agiqa.extract.filling.settings import ExtractionSettings
from agiqa.extract.models import Backbone
from agiqa.extract.models.ahead import Ahead
from agiqa.extract.models.opening import devices_of_host
from agiqa.extract.models.preparing import FEWEST_ITEMS, FEWEST_TEXTS, Opener, Preparation, chosen_workers
from agiqa.store.format.layout import StoreLayout

Source = DataSet | Callable[[], DataSet]
"""A data set, or a function that reads it and checks its images."""


class Phases:
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


@dataclass(frozen=True, kw_only=True)
class Starter:
    """What an extraction starts with; what it starts ends with `stack`."""

    stack: ExitStack
    backbone: Backbone
    path: Path
    settings: ExtractionSettings
    opener: Opener | None
    crew: Crew | None

    def start(
        self, source: Source, phases: Phases, preparation: Preparation[Backbone] | None = None
    ) -> tuple[DataSet, Engine, Preparation[Backbone]]:
        """The data set, where the model runs, and what prepares the items: the given one, which stays for the caller.

        The model of a new store loads while the data set is read. Where there is a finished store, the items decide
        whether anything is computed.
        """
        new = not self.settings.plan_only and not StoreLayout(self.path).manifest.exists()
        engine = self._engine(_images(source, self.backbone), loads=True) if new else None
        if not isinstance(source, DataSet):
            with phases.timed("check"):
                source = source()
        images = to_prepare(source.items)
        if engine is None:
            engine = self._engine(images, loads=not self.settings.plan_only and lacks_items(self.path, source.items))
        fewest = FEWEST_ITEMS if images else FEWEST_TEXTS
        if preparation is None:
            workers = chosen_workers(
                self.settings.workers, self.backbone, len(source.items), opener=self.opener, fewest=fewest
            )
            preparation = self.stack.enter_context(Preparation(self.backbone, workers=workers, opener=self.opener))
        if isinstance(engine, Here):
            engine = replace(engine, preparation=preparation)
        return source, engine, preparation

    def _engine(self, images: int, *, loads: bool) -> Engine:
        """Where the model runs on `images` images; with `loads` it begins to load."""
        settings = self.settings
        if self.opener is None or not settings.elsewhere:
            loading = self.stack.enter_context(Ahead(self.backbone.load)) if loads else None
            none_yet = Preparation(self.backbone)
            return Here(backbone=self.backbone, preparation=none_yet, batch_size=settings.batch_size, loading=loading)
        process = ModelProcess(
            opener=self.opener,
            device=settings.device,
            workers=settings.workers,
            processes=settings.devices or 1,
            batch_size=settings.batch_size,
        )
        if settings.ray is not None:
            return OnRay(process=process, address=settings.ray, actors=settings.devices)
        devices = devices_of_host(self.backbone.device, settings.devices or 1)
        process = replace(process, device=devices[0])
        if not loads:
            return OnDevices(process=process, devices=devices)
        crew = self.crew or self.stack.enter_context(
            Crew(len(devices), on_cpu=devices[0].startswith("cpu"), workers=settings.workers != 0)
        )
        crew.open(process, devices, items=images // len(devices))
        return OnDevices(process=process, devices=devices, crew=crew)


def _images(source: Source, backbone: Backbone) -> int:
    """How many images the model will read; of a data set that is not read yet, as many as any process can use."""
    if isinstance(source, DataSet):
        return to_prepare(source.items)
    return sys.maxsize if backbone.reads_images else 0
