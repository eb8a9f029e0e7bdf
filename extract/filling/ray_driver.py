"""A Ray cluster fills one store: actors, each with its own GPU, share the units as the processes of one host do.

The store, the images and the checkpoint lie on a file system that all nodes see. When an actor dies, another takes its
place.
"""

import math
import os
import socket
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError, WorkerError, first_line
from agiqa.extract.filling.engines import ModelProcess, Task, striped
from agiqa.extract.filling.fill import FillReport, merged
from agiqa.extract.filling.plan import PlannedItem
from agiqa.extract.filling.targets import Target
from agiqa.parts import expect_parts, modules_to_import
from agiqa.progress import Advance, said_to, say
from agiqa.store import Store, UnitWriter

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_ANSWER = 10
_DEATHS = 3
"""Actors in a row that may die without one more finished unit."""


class News:
    """Collects what the actors report to the driver; it is an actor of the cluster itself."""

    def __init__(self) -> None:
        self._items = 0
        self._said: list[str] = []

    def add(self, items: int) -> None:
        """Count `items` as done."""
        self._items += items

    def say(self, text: str) -> None:
        """Keep a line for the driver."""
        self._said.append(text)

    def collect(self) -> tuple[int, list[str]]:
        """Items done by all actors, and the lines since the last call."""
        said, self._said = self._said, []
        return self._items, said


class Worker:
    """One actor, with the one device that Ray gave it."""

    def __init__(self, name: str, folder: str, modules: Sequence[str]) -> None:
        """`folder` is the driver's working folder, where relative paths of a run begin.

        `modules` register parts of one's own; their files lie where all nodes see them.
        """
        self._name = name
        with suppress(OSError):
            os.chdir(folder)
        expect_parts(modules)

    def run(self, process: ModelProcess, task: Task, items: int) -> Any:
        """See `ModelProcess.run`."""
        return process.run(task, items=items)

    def fill(
        self,
        process: ModelProcess,
        path: Path,
        items: Sequence[PlannedItem],
        target: Target,
        news: Any,
        units: Sequence[int],
    ) -> FillReport:
        """Fill those `units` that nobody else is filling, reporting to `news`."""
        with said_to(lambda text: news.say.remote(f"{self._name}: {text}")):
            return process.fill(path, items, target, units=units, advance=lambda count: news.add.remote(count))


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """Actors of a Ray cluster, an `Engine`."""

    process: ModelProcess
    address: str
    """Of the cluster; `auto` for that of this machine, which is started if there is none."""
    actors: int | None
    """How many; None for one per GPU of the cluster, or one if it has none."""

    def run(self, task: Task, *, items: int, advance: Advance) -> Any:
        """See `Engine`."""
        del advance
        with self._connected() as ray:
            crew = _Crew(self, ray)
            actor = crew.start("actor")
            try:
                return ray.get(actor.run.remote(crew.process, task, items))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayActorError as error:
                message = f"The Ray actor died ({first_line(error)}). Run the same command again."
                raise WorkerError(message) from error
            finally:
                ray.kill(actor)

    def compiling(self) -> "OnRay":
        """See `Engine`."""
        return replace(self, process=replace(self.process, compiled=True))

    def load(self) -> None:
        """See `Engine`; does nothing, as every actor loads the weights itself."""

    def fill(
        self, store: Store, items: Sequence[PlannedItem], target: Target, *, part: tuple[int, int], advance: Advance
    ) -> FillReport:
        """See `Engine`. Raises the error of any actor, and WorkerError when actors keep dying."""
        with self._connected() as ray:
            return _Fill(_Crew(self, ray), store, part).run(items, target, advance)

    @contextmanager
    def _connected(self) -> Generator[Any]:
        """Ray, connected while inside. Raises ConfigError when Ray or the cluster is missing."""
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            message = "--ray needs the package ray: pip install 'agiqa[ray]'."
            raise ConfigError(message) from error
        with redirect_stdout(sys.stderr):  # threads of Ray print events; the output stream is for the result
            if ray.is_initialized():
                yield ray
                return
            self._connect(ray)
            try:
                yield ray
            finally:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        address = None if self.address == "auto" else self.address
        try:
            if address:
                _check_answers(address)
            dashboard = None if address else False
            ray.init(address=address, include_dashboard=dashboard, logging_level="error", log_to_driver=False)
        except (OSError, ValueError) as error:
            message = (
                f"--ray {self.address}: no such cluster ({first_line(error)}). Start it with `ray start --head` on its "
                "first machine, or give --ray without an address for one of this machine."
            )
            raise ConfigError(message) from error


def _check_answers(address: str) -> None:
    """Raise OSError when nothing answers at `address`; Ray itself would wait for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()


class _Crew:
    """How many actors the cluster runs, and on what: a GPU each, if it has any and the run does not ask for the CPU."""

    def __init__(self, engine: OnRay, ray: Any) -> None:
        """Raises ConfigError when the cluster cannot run so many actors at the same time."""
        self.ray = ray
        self._gpu = engine.process.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        kind = "GPU" if self._gpu else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        self.size = engine.actors or (there if self._gpu else 1)
        if self.size > there:
            message = (
                f"--devices {self.size} was asked for, but the Ray cluster has {there} {kind}s. Give fewer, or add "
                "machines to the cluster."
            )
            raise ConfigError(message)
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0) >= 1]
        of_a_node = math.ceil(self.size / max(1, len(nodes)))  # if they are evenly spread
        self.process = replace(engine.process, device="cuda" if self._gpu else "cpu", processes=of_a_node)

    def start(self, name: str) -> Any:
        """A new actor."""
        return self.ray.remote(num_cpus=1, num_gpus=int(self._gpu))(Worker).remote(
            name, str(Path.cwd()), modules_to_import()
        )


class _Fill:
    """One fill by actors."""

    def __init__(self, crew: _Crew, store: Store, part: tuple[int, int]) -> None:
        self._crew = crew
        self._ray = crew.ray
        self._store = store
        self._writer = UnitWriter(store)
        self._part = part
        self._actors: dict[Any, tuple[str, Any]] = {}
        self._started = 0
        self._deaths = 0
        self._died: list[str] = []
        self._left = len(self._pending())

    def run(self, items: Sequence[PlannedItem], target: Target, advance: Advance) -> FillReport:
        """Run actors until the pending units are done."""
        ray, reports, shown = self._ray, list[FillReport](), 0
        total = sum(len(self._store.items_of(unit)) for unit in self._pending())
        news = ray.remote(num_cpus=0)(News).remote()
        work = (self._store.path.resolve(), ray.put(list(items)), ray.put(target), news)
        try:
            for _ in range(self._crew.size):
                self._start(work)
            while self._actors:
                ready, _ = ray.wait(list(self._actors), timeout=_SECONDS_BETWEEN_LOOKS)
                counted, said = ray.get(news.collect.remote())
                done = min(total, counted)  # items of units that a dead actor had begun are counted twice
                for text in said:
                    say(text)
                if done > shown:
                    advance(done - shown)
                    shown = done
                for answer in ready:
                    name, _ = self._actors.pop(answer)
                    report = self._answer(answer, name)
                    if report is not None:
                        reports.append(report)
                        continue
                    if self._pending():
                        self._start(work)
        finally:
            for _, actor in self._actors.values():
                ray.kill(actor)
        left = self._pending()
        if self._died and left:
            message = (
                f"{len(self._died)} Ray actors died ({', '.join(self._died)}) and {len(left)} units are left that "
                "still seemed to belong to them. What is finished is kept: run the same command again."
            )
            raise WorkerError(message)
        return merged(reports, busy_units=len(left))

    def _start(self, work: tuple[Any, ...]) -> None:
        name, crew = f"actor {self._started}", self._crew
        units = striped(self._pending(), self._started % crew.size, crew.size)
        self._started += 1
        actor = crew.start(name)
        self._actors[actor.fill.remote(crew.process, *work, units)] = (name, actor)

    def _answer(self, answer: Any, name: str) -> FillReport | None:
        """The report of an actor that has ended; None if it died."""
        errors = self._ray.exceptions
        try:
            report: FillReport = self._ray.get(answer)
        except errors.RayTaskError as error:
            error.cause.add_note(f"in {name}")
            raise error.cause from error
        except errors.RayActorError as error:
            left = len(self._pending())
            self._deaths = 1 if left < self._left else self._deaths + 1
            self._left = left
            self._died.append(name)
            say(f"{name} died; its units are handed out again")
            if self._deaths >= _DEATHS:
                message = (
                    f"{self._deaths} Ray actors in a row died without finishing a unit ({first_line(error)}). What "
                    "is finished is kept: run the same command again when that is put right."
                )
                raise WorkerError(message) from error
            return None
        return report

    def _pending(self) -> list[int]:
        return self._writer.pending(part=self._part)
