"""A folder of networks: trains the missing runs, imports predictions of other tools, and computes the rows of a table.

OUT/about.json       the data set, and the runs of all commands so far
OUT/results.jsonl    a line per run, appended as it ends
OUT/runs/NAME        its run folder (training.py)
OUT/rows.jsonl       means, intervals and comparisons, as of an ablation
OUT/cache            resized images; can be removed
OUT/lock             held by the process at work

Commands add to the folder: `--model resnet50`, then `--model vil`, give one table.
"""

import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from agiqa.bench.ablation.rows import table_rows
from agiqa.bench.networks.building import Pretrained, check_network, check_weights, pretrained_weights
from agiqa.bench.networks.config import NetworkConfig
from agiqa.bench.networks.images import ImageSource
from agiqa.bench.networks.pictures import Squares, open_squares
from agiqa.bench.networks.predicted import Predicted, write_predicted
from agiqa.bench.networks.runs import NOT_COMPARED, NetworkRun, Protocols, plan_runs, predicted_runs, recorded_run
from agiqa.bench.networks.training import Setting, WrittenRun, begun, train_network
from agiqa.bench.recording.result_folders import (
    ABOUT,
    RESULTS,
    ROWS,
    RUNS,
    Line,
    LineFile,
    error_facts,
    outcome_facts,
    training_facts,
    warning_lines,
    working_in,
    write_about,
    write_rows,
)
from agiqa.errors import AgiqaError, DataError
from agiqa.heads.data.splits import Partition, make_partition
from agiqa.heads.sweeps.head_jobs import with_notes
from agiqa.heads.training.progress import TrainingProgress
from agiqa.progress import say
from agiqa.version import this_commit

CACHE = "cache"
_KEPT = "the runs before are kept"
_NETWORKS, NETWORK = "networks", "network"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one command adds to the folder."""

    networks: Sequence[NetworkConfig] = ()
    weights: Mapping[str, Sequence[Path]] = field(default_factory=dict[str, Sequence[Path]])
    """Files of pretrained weights by network; timm's for the others."""
    predictions: Sequence[Predicted] = ()
    protocols: Protocols

    def plan(self, source: ImageSource) -> list[NetworkRun]:
        """All runs. Raises as `read_protocols`."""
        imported = [
            run
            for one in self.predictions
            for run in predicted_runs(one.name, one.sha256, one.seeds, self.protocols, source)
        ]
        return plan_runs(self.networks, self.protocols, source) + imported


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The outcome of a command."""

    rows: list[Line]
    """The rows of the whole folder, as in rows.jsonl."""
    runs: list[str]
    """The runs that this command planned."""
    failed: dict[str, str]
    """Names and errors of those without a result."""
    trained: int
    """How many of them this call trained or imported."""


def run_networks(
    wanted: Wanted,
    out: Path,
    setting: Setting,
    progress: TrainingProgress,
    *,
    cache: Path | None = None,
    workers: int | None = None,
    tell: Callable[[str], None] = say,
) -> Networks:
    """Train what is missing of `wanted` in the folder `out`, and compute the rows of all that is in it.

    `cache` is where resized images are kept, `out`/cache by default; `workers` as in `open_squares`. A run that fails
    does not stop the others. Before anything is trained, raises UnknownName for a network or label, DataError for a
    split that cannot be drawn, missing MOS, and results of another data set or of other settings, ModelError for
    weights that do not fit, and ConfigError for an image size that a network cannot have.
    """
    for network in wanted.networks:
        check_network(network.network)
    source, plan, commit = setting.source, wanted.plan(setting.source), this_commit()
    parts = _partitions(plan, source)
    for one in wanted.predictions:
        _check_predictions(one, plan, parts, source)
    with working_in(out, "baseline"):
        recorded = _recorded_names(out)
        planned = {run.name: run for run in plan}
        results = _open_results(out / RESULTS, planned, {*recorded, *planned}, source)
        missing = [run for run in plan if not (results.is_done(run.name) and (out / RUNS / run.name).is_dir())]
        named = {run.row for run in missing}
        to_train = [network for network in wanted.networks if network.network in named]
        for network in to_train:
            check_weights(network, wanted.weights.get(network.network, ()))
        for network in to_train:
            _try(network, wanted)
        names = list(dict.fromkeys([*recorded, *planned]))
        write_about(out, {"kind": _NETWORKS, "stores": {"": _data_facts(source)}, "runs": names})
        if len(missing) < len(plan):
            tell(f"{len(plan) - len(missing)} of {len(plan)} runs exist already")
        work = _Work(wanted, out, setting, progress, cache or out / CACHE, workers)
        for number, run in enumerate(missing, 1):
            line = work.line(run, parts[run.name], commit)
            results.append(line)
            tell(f"[{number}/{len(missing)}] {run.name}: {_outcome_text(line)}")
        for text in warning_lines((results.lines[run.name] for run in plan), what="runs"):
            tell(text)
        rows = _rows(out, results, names, tell)
        write_rows(out / ROWS, rows)
    failed = results.failed(planned)
    return Networks(rows=rows, runs=list(planned), failed=failed, trained=len(missing) - len(failed))


class _Work:
    """Trains runs one after the other, with the images and weights of the last one at hand."""

    def __init__(
        self,
        wanted: Wanted,
        out: Path,
        setting: Setting,
        progress: TrainingProgress,
        cache: Path,
        workers: int | None,
    ) -> None:
        self._wanted, self._out, self._setting, self._progress = wanted, out, setting, progress
        self._cache, self._workers = cache, workers
        self._imported = {one.name: one for one in wanted.predictions}
        self._squares: dict[int, Squares] = {}
        self._weights: dict[str, list[Pretrained]] = {}

    def line(self, run: NetworkRun, partition: Partition, commit: str | None) -> Line:
        """The result line of a run, after it was trained or imported."""
        identity = {
            "name": run.name,
            "row": run.row,
            "protocol": run.protocol,
            "store_name": run.store,
            "config": dict(run.config),
            "seed": run.answer,
            "store": self._setting.source.id,
        }
        try:
            written = self._write(run, partition)
        except (AgiqaError, OSError) as error:
            return {**identity, **error_facts(with_notes(error), commit=commit)}
        except (RuntimeError, MemoryError) as error:  # of torch or CUDA, such as a device without memory
            return {**identity, **error_facts(f"{type(error).__name__}: {error}", commit=commit)}
        parameters = {"parameters": written.metrics["parameters"]} if "parameters" in written.metrics else {}
        return {**identity, **training_facts(written, commit=commit), **outcome_facts(written), **parameters}

    def _write(self, run: NetworkRun, partition: Partition) -> WrittenRun:
        folder, source = self._out / RUNS / run.name, self._setting.source
        if run.row in self._imported:
            return write_predicted(run, folder, partition, self._imported[run.row], source)
        config = run.network
        if config.resize not in self._squares:
            self._squares = {
                config.resize: open_squares(source.images, config.resize, self._cache, workers=self._workers)
            }
        if run.row not in self._weights:
            self._weights = {run.row: pretrained_weights(config, self._wanted.weights.get(run.row, ()))}
        squares, weights = self._squares[config.resize], self._weights[run.row]
        try:
            return train_network(run, folder, partition, squares, weights, self._setting, self._progress)
        finally:
            gc.collect()
            if self._setting.device.type == "cuda":
                torch.cuda.empty_cache()


def _partitions(plan: Sequence[NetworkRun], source: ImageSource) -> dict[str, Partition]:
    """The split of each run by name. Raises as `make_partition`, and as `ImageSource.mos` for each of its parts."""
    drawn: dict[str, Partition] = {}
    found: dict[str, Partition] = {}
    for run in plan:
        config = run.train.model_copy(update={"seed": 0, "epochs": 1})
        key = config.model_dump_json()
        if key not in drawn:
            drawn[key] = make_partition(source, config)
            for items in drawn[key].parts().values():
                source.mos(items, run.label)
            _refuse_nothing_to_learn(source, drawn[key], run.label)
        found[run.name] = drawn[key]
    return found


def _refuse_nothing_to_learn(source: ImageSource, partition: Partition, label: str) -> None:
    """Raise DataError for a training part of one item, or of items of one MOS."""
    mos = source.mos(partition.train, label)
    if len(mos) < 2 or mos.max() == mos.min():
        message = (
            f"{source.location}: the training part has {len(mos)} items of the {label} MOS "
            f"{', '.join(f'{value:g}' for value in sorted(set(mos.tolist())))}: there is nothing to learn."
        )
        raise DataError(message)


def _check_predictions(
    one: Predicted, plan: Sequence[NetworkRun], parts: Mapping[str, Partition], source: ImageSource
) -> None:
    """Raise DataError unless there is a prediction of every test item for every seed."""
    for run in plan:
        if run.row == one.name:
            one.of([source.items.names[item] for item in parts[run.name].test], run.answer)


def _try(network: NetworkConfig, wanted: Wanted) -> None:
    """Build the network with its weights once, so that what does not fit is told before anything is trained."""
    run = NetworkRun(name="", row=network.network, protocol="", config=network.model_dump(mode="json"))
    begun(run, pretrained_weights(network, wanted.weights.get(network.network, ())))


def _recorded_names(out: Path) -> list[str]:
    """The runs of earlier commands. Raises DataError for a folder of another command."""
    path = out / ABOUT
    if not path.is_file():
        return []
    try:
        about: Any = json.loads(path.read_bytes())
        kind, names = about["kind"], [str(name) for name in about["runs"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        message = f"{path} cannot be read ({error!r}). Choose another OUT, or remove it."
        raise DataError(message) from error
    if kind != _NETWORKS:
        message = f"{out} holds results of another command ({kind}). Choose another OUT; `agiqa report` reads both."
        raise DataError(message)
    return names


def _open_results(path: Path, planned: Mapping[str, NetworkRun], names: Iterable[str], source: ImageSource) -> LineFile:
    """The result lines. Raises DataError for another data set, or a run of `planned` with other settings."""

    def check(line: Line, where: str) -> None:
        if line["store"] != source.id:
            message = (
                f"{where}: a run on other images, prompts, splits or MOS than those of {source.location}. Choose "
                "another OUT."
            )
            raise DataError(message)
        run = planned.get(line["name"])
        if run is None or "error" in line:
            return
        for name in {**line["config"], **run.config}:
            there, here = line["config"].get(name), run.config.get(name)
            if name not in NOT_COMPARED and there != here:
                message = (
                    f"{where}: the run {line['name']!r} had {name} {there!r}, and this command has {here!r}. Choose "
                    "another OUT, or go on with its settings."
                )
                raise DataError(message)

    return LineFile(
        path,
        kind="a baseline",
        keys={"store": str, "config": dict, "row": str, "protocol": str},
        kept=_KEPT,
        planned=set(names),
        check=check,
    )


def _rows(out: Path, results: LineFile, names: Sequence[str], tell: Callable[[str], None]) -> list[Line]:
    """The rows of all runs; those of earlier commands whose folder is gone are left out, and told."""
    lines = {name: results.lines[name] for name in names if name in results.lines}
    gone = [name for name, line in lines.items() if "error" not in line and not (out / RUNS / name).is_dir()]
    for name in gone:
        tell(f"note: {out / RUNS / name} is gone; the run is in no row")
    kept = {name: line for name, line in lines.items() if name not in gone}
    return table_rows([recorded_run(line) for line in kept.values()], kept, out, kind=NETWORK)


def _data_facts(source: ImageSource) -> Line:
    """The data set for about.json, in the place of a store."""
    return {
        "id": source.id,
        "path": source.location,
        "data": source.data_set.name,
        "encoding": "images",
        "items": len(source.images),
        "mos_ranges": dict(source.items.mos_ranges),
    }


def _outcome_text(line: Line) -> str:
    if "error" in line:
        return f"failed ({line['error'].splitlines()[0]})"
    shown = [
        f"{part} SRCC {'undefined' if line[part]['srcc'] is None else format(line[part]['srcc'], '.4f')}"
        for part in ("validation",)
        if line[part]
    ]
    return ", ".join([*shown, f"{line['seconds']:.1f} s"])
