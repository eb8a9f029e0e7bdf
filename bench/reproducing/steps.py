"""The steps of a reproduction: commands of agiqa with their arguments, what each needs, and which tables need it.

OUT/data/SET             the data set, with its split (sets.py)
OUT/described/NAME.jsonl descriptions and rating words
OUT/stores/NAME.agiqa    hidden states
OUT/heads, networks, transfers, words   results
OUT/steps/               a record of each finished step, and what it printed
OUT/report, tables.md    everything beside the paper's numbers
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agiqa.bench.networks.config import VIL_WEIGHTS, network_config
from agiqa.bench.reproducing.plan import Options, Plan
from agiqa.errors import UnknownName
from agiqa.extract.data.templates import label_of
from agiqa.store.disk.files import canonical_json

KINDS = ("fetch", "data", "describe", "words", "extract", "ablate", "transfer", "baseline")
"""Of steps, in their order."""
_WEIGHTS = (".safetensors", ".pth", ".pt", ".th", ".pkl", ".bin")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One piece of work, done once for all tables."""

    name: str
    """KIND/NAME."""
    entry: str
    """Name of its entry in the plan; of `fetch`, a hub name."""
    needs: tuple[str, ...] = ()
    """Steps that must be done before."""
    arguments: tuple[str, ...] = ()
    """Of `agiqa`; none for `fetch` and `data`, which no command does alone."""
    settings: str = ""
    """What changes its work beside the arguments: the grid of an ablation."""
    out: Path | None = None
    """What it makes."""
    tables: tuple[str, ...] = ()
    """The tables that need it."""

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.name.partition("/")[0]


def digests(steps: Sequence[Step]) -> dict[str, str]:
    """By name what identifies the work of each step: its arguments, and the work of the steps that it needs."""
    found: dict[str, str] = {}
    for step in steps:
        content = [step.name, step.entry, list(step.arguments), step.settings, [found[name] for name in step.needs]]
        found[step.name] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return found


def plan_steps(plan: Plan, tables: Sequence[str], root: Path, out: Path) -> list[Step]:
    """The steps of `tables`, each after those that it needs. Raises UnknownName for a table."""
    every = {step.name: step for step in _Steps(plan, root, out).every()}
    users: dict[str, list[str]] = {}
    for table in tables:
        if table not in plan.tables:
            kind = "table of the plan"
            raise UnknownName.of(kind, table, (*plan.tables, "all"))
        for name in _closure(_ends(plan, table), every):
            users.setdefault(name, []).append(table)
    return [replace(step, tables=tuple(users[name])) for name, step in every.items() if name in users]


def chosen(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps that `only` names, as KIND or KIND/NAME or the beginning of one up to a slash; all if it is empty.

    Raises UnknownName.
    """
    names = [step.name for step in steps]
    for wanted in only:
        if not any(_begins(name, wanted) for name in names):
            kind = "step of these tables"
            raise UnknownName.of(kind, wanted, names)
    return [step for step in steps if not only or any(_begins(step.name, wanted) for wanted in only)]


def _begins(name: str, wanted: str) -> bool:
    return f"{name}/".startswith(f"{wanted.rstrip('/')}/")


def _ends(plan: Plan, table: str) -> Iterator[str]:
    """The last steps that a table of the plan needs."""
    wanted = plan.tables[table]
    yield from (f"ablate/{name}" for name in (*(one.ablation for one in wanted.heads), *wanted.also))
    yield from (f"words/{one.descriptions}" for one in wanted.words)
    yield from (f"transfer/{name}" for name in wanted.transfers)
    yield from (f"baseline/{name}/{model}" for name in wanted.networks for model in plan.networks[name].models)


def _closure(names: Iterable[str], steps: Mapping[str, Step]) -> set[str]:
    """`names` and all that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += steps[name].needs
    return found


class _Steps:
    """Makes the steps of a plan in the folder `out`."""

    def __init__(self, plan: Plan, root: Path, out: Path) -> None:
        self.plan, self.root, self.out = plan, root, out

    def every(self) -> Iterator[Step]:
        """All steps, each after those that it needs."""
        plan = self.plan
        for name in (plan.model, *plan.adapters):
            yield Step(name=self._fetch(name), entry=name)
        for name in plan.data:
            yield Step(name=f"data/{name}", entry=name, out=self.out / "data" / name)
        yield from (self._describe(name) for name in plan.descriptions)
        for table in plan.tables.values():
            yield from (self._words(one.descriptions, one.label) for one in table.words)
        yield from (self._extract(name) for name in plan.stores)
        yield from (self._ablate(name) for name in plan.ablations)
        yield from (self._transfer(name) for name in plan.transfers)
        for name, networks in plan.networks.items():
            yield from (self._baseline(name, model) for model in networks.models)

    def _describe(self, name: str) -> Step:
        one, out = self.plan.descriptions[name], described(self.out, name)
        given = [*self._model(name), "--aspect", one.aspect, *self._options("describe")]
        return Step(
            name=f"describe/{name}",
            entry=name,
            needs=(*self._fetched(one.adapter), f"data/{one.data}"),
            arguments=("describe", str(self._data(one.data)), str(out), *given),
            out=out,
        )

    def _words(self, name: str, label: str) -> Step:
        """The rating words of the test items: the model was tuned on the others."""
        labels = self._data(self.plan.descriptions[name].data) / "data.csv"
        file = self.out / "words" / f"{name}.jsonl"
        return Step(
            name=f"words/{name}",
            entry=name,
            needs=(f"describe/{name}",),
            arguments=("words", str(file), "--labels", str(labels), "--label", label, *self._options("words")),
            out=file,
        )

    def _extract(self, name: str) -> Step:
        store, first, out = self.plan.stores[name], self.plan.first(name), store_path(self.out, name)
        files = [described(self.out, one) for one in store.descriptions]
        aspects = [self.plan.descriptions[one].aspect for one in store.descriptions]
        talks = [
            str(path) if len(files) == 1 else f"{aspect}:{path}" for aspect, path in zip(aspects, files, strict=True)
        ]
        given = [*self._model(store.descriptions[0]), "--aspect", first.aspect, "--variant", store.variant]
        return Step(
            name=f"extract/{name}",
            entry=name,
            needs=(*self._fetched(first.adapter), *(f"describe/{one}" for one in store.descriptions)),
            arguments=(
                *("extract", str(self._data(first.data)), str(out), *given),
                *(word for talk in talks for word in ("--conversations", talk)),
                *self._options("extract"),
            ),
            out=out,
        )

    def _ablate(self, name: str) -> Step:
        one, out = self.plan.ablations[name], self.out / "heads" / name
        main, *others = one.stores.items()
        given = [] if one.variant is None else ["--variant", one.variant]
        stores = [word for key, store in others for word in ("--store", f"{key}={store_path(self.out, store)}")]
        words = described(self.out, self.plan.stores[main[1]].descriptions[0])
        grid, file = self.out / "grids" / f"{name}.yaml", self.plan.grid_file(name)
        return Step(
            name=f"ablate/{name}",
            entry=name,
            needs=tuple(f"extract/{store}" for store in one.stores.values()),
            arguments=(
                *("ablate", str(store_path(self.out, main[1])), str(out), "--grid", str(grid)),
                *(*stores, *given, "--words", str(words), *self._options("ablate")),
            ),
            settings=canonical_json([one.grid, file and file.read_text(encoding="utf-8"), one.settings]),
            out=out,
        )

    def _transfer(self, name: str) -> Step:
        one, out = self.plan.transfers[name], self.out / "transfers" / name
        ends = (one.source, one.target)
        names = ",".join(self.plan.first(store).data for store in ends)
        given = ["--names", names, "--label", label_of(one.label), "--one-way"]
        given += [] if one.variant is None else ["--variant", one.variant]
        return Step(
            name=f"transfer/{name}",
            entry=name,
            needs=tuple(f"extract/{store}" for store in ends),
            arguments=(
                *("transfer", *(str(store_path(self.out, store)) for store in ends), str(out)),
                *(*given, *self._options("transfer")),
            ),
            out=out,
        )

    def _baseline(self, name: str, model: str) -> Step:
        one, out = self.plan.networks[name], self.out / "networks" / name
        labels = [word for label in one.labels for word in ("--label", label)]
        files = sorted(path for path in (self.root / "weights").glob(f"{model}.*") if path.suffix in _WEIGHTS)
        weights = [word for path in files for word in ("--weights", str(path))]
        return Step(
            name=f"baseline/{name}/{model}",
            entry=name,
            needs=(f"data/{one.data}",),
            arguments=(
                *("baseline", str(self._data(one.data)), str(out), "--model", model),
                *(*labels, *weights, *self._options("baseline")),
            ),
            out=out,
        )

    def _model(self, descriptions: str) -> list[str]:
        """The options of the model that wrote these descriptions."""
        one = self.plan.descriptions[descriptions]
        slices = self.plan.data[one.data].max_slices
        given = ["--model", self.plan.model]
        given += [] if one.adapter is None else ["--adapter", one.adapter]
        return given if slices is None else [*given, "--max-slices", str(slices)]

    def _fetched(self, adapter: str | None) -> tuple[str, ...]:
        return tuple(self._fetch(name) for name in (self.plan.model, adapter) if name is not None)

    def _fetch(self, name: str) -> str:
        return f"fetch/{name.rpartition('/')[2]}"

    def _data(self, name: str) -> Path:
        return self.out / "data" / name

    def _options(self, command: str) -> list[str]:
        return as_arguments(self.plan.options.get(command, {}))


def described(out: Path, name: str) -> Path:
    """The file of descriptions of the entry `name`."""
    return out / "described" / f"{name}.jsonl"


def store_path(out: Path, name: str) -> Path:
    """The store of the entry `name`."""
    return out / "stores" / f"{name}.agiqa"


def missing_weights(step: Step, root: Path) -> str | None:
    """Why the network of a step `baseline` lacks pretrained weights, and what to do; None if it does not."""
    model = step.name.rpartition("/")[2]
    if {"--weights", "--no-pretrained"} & {*step.arguments} or not network_config(model, {}).needs_file:
        return None
    return (
        f"{root / 'weights' / model}.*: no such file. timm has no pretrained weights of {model}. Put the authors' file "
        f"({VIL_WEIGHTS}) there, as {model}.th, or set the option no-pretrained of baseline in a plan of your own."
    )


def as_arguments(options: Options) -> list[str]:
    """Options as words of a command line: True is a flag, and a list is repeated."""
    words: list[str] = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    return words


def record_path(out: Path, step: str) -> Path:
    """The record of the finished step of this name."""
    return out / "steps" / f"{step.replace('/', ',')}.json"
