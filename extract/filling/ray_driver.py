"""A Ray cluster fills one store: actors, each with a GPU of its own, are handed units until none is left.

The store, the images and the checkpoint lie on a file system that all nodes see. An actor that dies gives back the
units that it was handed, and another takes its place.
"""

import os
import socket
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError, WorkerError, first_line
from agiqa.extract.data.items import Item
from agiqa.extract.filling.engines import Advance, Helper
from agiqa.extract.filling.fill import FillReport, merged
from agiqa.extract.filling.plan import TokenisedItems
from agiqa.extract.filling.targets import Target
from agiqa.progress import said_to, say
from agiqa.store import Basis, Store, UnitWriter

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_ANSWER = 10
_DEATHS = 3
"""Actors in a row that may die without one more finished unit."""


class UnitQueue:
    """Units to be handed out, and who was handed which; one actor of the cluster runs it."""

    def __init__(self, units: Sequence[int]) -> None:
        self._units = deque(units)
        self._taken: dict[str, list[int]] = {}
        self._items = 0
        self._said: list[str] = []

    def take(self, who: str) -> int | None:
        """The next unit, handed to `who`; None when there is none."""
        if not self._units:
            return None
        unit = self._units.popleft()
        self._taken.setdefault(who, []).append(unit)
        return unit

    def give_back(self, who: str) -> None:
        """Hand out once more what `who` was handed; what it finished is passed over by whoever gets it."""
        self._units.extend(self._taken.pop(who, []))

    def add(self, items: int) -> None:
        """Count `items` as done."""
        self._items += items

    def say(self, text: str) -> None:
        """Pass a line on to the driver."""
        self._said.append(text)

    def news(self) -> tuple[int, list[str]]:
        """Items done by all, and what they said since this was last asked."""
        said, self._said = self._said, []
        return self._items, said


class Worker:
    """What one actor does: an engine for the one device that Ray gave it."""

    def __init__(self, name: str, folder: str) -> None:
        """`folder` is the driver's working folder, which relative paths of a run mean."""
        self._name = name
        with suppress(OSError):
            os.chdir(folder)

    def check_basis(self, helper: Helper, basis: Basis) -> None:
        """See `Engine`."""
        helper.check_basis(basis)

    def calibrate(self, helper: Helper, tokenised: TokenisedItems, rank: int | None) -> Target:
        """See `Engine`."""
        return helper.calibrate(tokenised, rank)

    def fill(self, helper: Helper, path: Path, items: Sequence[Item], target: Target, queue: Any) -> FillReport:
        """Fill the units that `queue` hands out."""
        import ray  # pyright: ignore[reportMissingImports]

        def handed_out() -> Iterator[int]:
            get: Any = ray.get  # typed for lists of references
            while (unit := get(queue.take.remote(self._name))) is not None:
                yield unit

        with said_to(lambda text: queue.say.remote(f"{self._name}: {text}")):
            return helper.fill(path, items, target, units=handed_out(), advance=lambda count: queue.add.remote(count))


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """Actors of a Ray cluster, an `Engine`."""

    helper: Helper
    address: str
    """Of the cluster, or `auto`: the one of this machine, started where there is none."""
    actors: int | None
    """How many; None for one per GPU of the cluster, or one where it has none."""

    def check_basis(self, basis: Basis) -> None:
        """See `Engine`."""
        with self._cluster() as ray:
            self._one_task(ray, "check_basis", basis)

    def calibrate(self, tokenised: TokenisedItems, *, rank: int | None, advance: Advance) -> Target:
        """See `Engine`."""
        del advance
        with self._cluster() as ray:
            target: Target = self._one_task(ray, "calibrate", tokenised, rank)
        return target

    def load(self) -> None:
        """See `Engine`. Every actor loads the weights by itself."""

    def fill(
        self, store: Store, items: Sequence[Item], target: Target, *, part: tuple[int, int], advance: Advance
    ) -> FillReport:
        """See `Engine`. Raises what an actor raises, and WorkerError when actors keep dying."""
        with self._cluster() as ray:
            return _Handing(self, ray, store, part).run(items, target, advance)

    def uses_gpus(self, ray: Any) -> bool:
        """Whether actors get a GPU each: if the cluster has any and the run does not ask for the CPU."""
        return self.helper.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1

    def number_of_actors(self, ray: Any) -> int:
        """How many actors the cluster runs at once. Raises ConfigError when more are asked for."""
        kind = "GPU" if self.uses_gpus(ray) else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        wanted = self.actors or (there if kind == "GPU" else 1)
        if wanted > there:
            message = (
                f"--devices {wanted} was asked for, but the Ray cluster has {there} {kind}s. Give fewer, or add "
                "machines to the cluster."
            )
            raise ConfigError(message)
        return wanted

    def start(self, ray: Any, name: str) -> tuple[Any, Helper]:
        """A new actor, and the helper that fits its device."""
        gpu = self.uses_gpus(ray)
        actor = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0)(Worker).remote(name, str(Path.cwd()))
        device = "cuda" if gpu else "cpu"
        return actor, replace(self.helper, device=device, processes=self._actors_of_a_node(ray))

    def _actors_of_a_node(self, ray: Any) -> int:
        """How many actors share a machine, and its cores, at most as they are spread evenly."""
        kind = "GPU" if self.uses_gpus(ray) else "CPU"
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0) >= 1]
        return -(-self.number_of_actors(ray) // max(1, len(nodes)))

    def _one_task(self, ray: Any, method: str, *arguments: Any) -> Any:
        actor, helper = self.start(ray, "actor")
        try:
            return ray.get(getattr(actor, method).remote(helper, *arguments))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            message = f"The Ray actor died ({first_line(error)}). Run the same command again."
            raise WorkerError(message) from error
        finally:
            ray.kill(actor)

    @contextmanager
    def _cluster(self) -> Generator[Any]:
        """Ray, connected while inside. Raises ConfigError when it is not installed or the cluster not there."""
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            message = "--ray needs the package ray: pip install 'agiqa[ray]'."
            raise ConfigError(message) from error
        with redirect_stdout(sys.stderr):  # threads of Ray print what befalls it; the output stream is for the result
            yield from self._connected(ray)

    def _connected(self, ray: Any) -> Iterator[Any]:
        if ray.is_initialized():
            yield ray
            return
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
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise OSError where nothing answers at `address`, for which Ray itself would wait minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()


class _Handing:
    """One fill by actors."""

    def __init__(self, engine: OnRay, ray: Any, store: Store, part: tuple[int, int]) -> None:
        self._engine = engine
        self._ray = ray
        self._store = store
        self._writer = UnitWriter(store)
        self._part = part
        self._actors: dict[Any, tuple[str, Any]] = {}
        self._started = 0
        self._deaths = 0
        self._died: list[str] = []
        self._left = len(self._pending())

    def run(self, items: Sequence[Item], target: Target, advance: Advance) -> FillReport:
        """Hand out the pending units until they are done."""
        ray, reports, shown = self._ray, list[FillReport](), 0
        total = sum(len(self._store.items_of(unit)) for unit in self._pending())
        queue = ray.remote(num_cpus=0)(UnitQueue).remote(self._pending())
        work = (self._store.path.resolve(), ray.put(list(items)), ray.put(target), queue)
        try:
            for _ in range(self._engine.number_of_actors(ray)):
                self._start(work)
            while self._actors:
                ready, _ = ray.wait(list(self._actors), timeout=_SECONDS_BETWEEN_LOOKS)
                counted, said = ray.get(queue.news.remote())
                done = min(total, counted)  # what a dead actor had begun is counted twice
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
                    ray.get(queue.give_back.remote(name))
                    if self._pending():
                        self._start(work)
        finally:
            for _, actor in self._actors.values():
                ray.kill(actor)
        left = self._pending()
        if self._died and left:
            message = (
                f"{len(self._died)} Ray actors died ({', '.join(self._died)}) and {len(left)} units are left that "
                "seemed to be theirs still. What is finished is kept: run the same command again."
            )
            raise WorkerError(message)
        return merged(reports, busy_units=len(left))

    def _start(self, work: tuple[Any, ...]) -> None:
        name = f"actor {self._started}"
        self._started += 1
        actor, helper = self._engine.start(self._ray, name)
        self._actors[actor.fill.remote(helper, *work)] = (name, actor)

    def _answer(self, answer: Any, name: str) -> FillReport | None:
        """The report of an actor that is through; None of one that died."""
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
