"""Baselines for every table of heads: predictions for the same parts of the same store, without a head.

Each gives a line like the row of a head, and a csv of its predictions. A baseline without its input (no generators, no
rating words) gives a line with `left_out`, the reason. `settings["baseline"]` is a key of BASELINES; `row` names
the predictor and its inputs.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.bench.baselines.evidence import Array, Evidence, MeanFeatures, RatingWords
from agiqa.bench.baselines.predictors import BASELINES, RATING_WORD, WORD_PROBABILITIES, Guess, features_title
from agiqa.bench.baselines.recorded import RecordedBaselines, key_of
from agiqa.bench.recording.predictions import write_predictions
from agiqa.bench.recording.result_folders import Line
from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.heads.closed.words import RATING_TOKENS
from agiqa.heads.data.features import FeatureSource, read_labels
from agiqa.heads.data.splits import Partition
from agiqa.heads.evaluation.metrics import evaluate_scores
from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.settings.labels import column_names
from agiqa.heads.sweeps.sweeping import Partitions
from agiqa.progress import say
from agiqa.store.format.items import teacher_warning

FOLDER = "baselines"
CORRELATIONS = ("srcc", "plcc", "krcc")
FEATURES = "features"
"""The baseline that reads a store's features."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One label under one protocol."""

    label: str
    parts: Sequence[Partition]
    mos: Array
    """MOS by item of the store; NaN for an item in no part."""

    @property
    def tested(self) -> NDArray[np.int64]:
        """The items of all test parts, in order."""
        return np.concatenate([part.test for part in self.parts])


def run_baselines(
    source: FeatureSource,
    configs: Sequence[TrainConfig],
    *,
    protocol: str,
    out: Path,
    words: RatingWords | None = None,
    store_name: str = "",
    means: MeanFeatures | None = None,
    shown: Mapping[str, Any] | None = None,
    names: Sequence[str] = tuple(BASELINES),
    no_kernel: str | None = None,
    recorded: RecordedBaselines | None = None,
) -> list[Line]:
    """A line for every baseline of `names` and every label of `configs`; their predictions are written below `out`.

    There is none for word probabilities where the store does not record their tokens.

    `configs` are the training settings of the heads of one protocol. Each label is predicted once per distinct split,
    from its training and validation items, and all test parts are scored together. The csv of a baseline,
    `baselines/[STORE_NAME/]PROTOCOL/NAME.csv` (for several labels `NAME_LABEL.csv`), has the columns name, prompt,
    item, mos and predicted. `means` reads mean features of `source` or of another store of the same items, and keeps
    them for the next call. `shown` are the settings by which this call differs from others for the same protocol; they
    become part of the names: `text, training_items=10`. Regressions on features are solved on the device of the heads;
    `no_kernel` is why none of them has a kernel, and becomes a note. What is `recorded` already is not fitted again.

    A line has `left_out` with a reason, or `test` as in `evaluate_scores`. Its correlations are null, with a reason in
    `undefined`, if the predictions are constant within every part. Its RMSE is null if they are on another scale.
    `reads` is the part of an item that the baseline reads, `fits` the regression chosen for each test part, and `notes`
    are caveats. The line of `features` has `features_store`, the id of the store that it read. `against` is null: the
    rows of an ablation compare baselines with heads. Raises ConfigError for splits whose test parts overlap, and
    DataError if `means` lacks an item of `source`.
    """
    rating_words, features = words or RatingWords(()), means or MeanFeatures(source)
    names = _without_idle(names, features)
    partitions = Partitions(source)
    labels = list(dict.fromkeys(label for config in configs for label in config.labels))
    settings, device = dict(shown or {}), resolve_device(configs[0].device)
    folder, lines = out / FOLDER / store_name / protocol / _spell(settings), list[Line]()
    for label, column in zip(labels, column_names(labels, ""), strict=True):
        where = {"store_name": store_name, "protocol": protocol, "label": label, "store": source.id}
        shared = {"settings": settings, **where}
        try:
            parts = _parts([config for config in configs if label in config.labels], partitions)
            mos = _mos(source, label, parts)
        except (ConfigError, DataError, UnknownName) as error:
            lines += [_left_out(name, shared, error) for name in names]
            continue
        task = _Task(label=label, parts=parts, mos=mos)
        _refuse_overlap(task)
        evidence = Evidence(source, label, mos, words=rating_words, means=features, device=device, no_kernel=no_kernel)
        fitter = _Fitter(
            source=source, task=task, evidence=evidence, means=features, shared=shared, out=out, recorded=recorded
        )
        lines += [fitter.line(name, folder / f"{_file_name(name)}{column}.csv") for name in names]
    return lines


def _without_idle(names: Sequence[str], means: MeanFeatures) -> list[str]:
    """`names` without word probabilities where the store does not record their tokens."""
    recorded = RATING_TOKENS in getattr(means.source, "provenance", {})
    return [name for name in names if recorded or name != WORD_PROBABILITIES]


def _parts(configs: Sequence[TrainConfig], partitions: Partitions) -> list[Partition]:
    """The different splits of `configs`. Raises as `make_partition`."""
    return list({found.test.tobytes(): found for found in (partitions.of(config) for config in configs)}.values())


def _mos(source: FeatureSource, label: str, parts: Sequence[Partition]) -> Array:
    """The MOS of the items of `parts`, by item of the store. Raises as `read_labels`."""
    mos = np.full(len(source.items.names), np.nan)
    used = np.unique(np.concatenate([items for part in parts for items in part.parts().values()]))
    mos[used] = read_labels(source, used, label=label)[:, 0]
    return mos


def _refuse_overlap(task: _Task) -> None:
    """Raise ConfigError for an item in two test parts."""
    if len(np.unique(task.tested)) < len(task.tested):
        message = (
            "Test parts overlap: the splits of one protocol must test every item once, so give them one split_seed."
        )
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class _Fitter:
    """Makes the lines of a task."""

    source: FeatureSource
    task: _Task
    evidence: Evidence
    means: MeanFeatures
    shared: Mapping[str, Any]
    """What the lines of the task have in common."""
    out: Path
    recorded: RecordedBaselines | None

    def line(self, name: str, path: Path) -> Line:
        """The recorded line of a baseline, or the one that is fitted now; its predictions are in `path`."""
        if self.recorded is None:
            return self._fitted(name, path)
        key = self._key(name)
        line = self.recorded.find(key)
        if line is None:
            line = self._fitted(name, path)
            line = line if "left_out" in line else self.recorded.add(line, key)
        return line

    def _key(self, name: str) -> str:
        """The hash of all that the line depends on."""
        reads = {"of_words": name == RATING_WORD, "of_features": name in (FEATURES, WORD_PROBABILITIES)}
        parts = [
            [
                self.evidence.facts(items, **reads)
                for items in (np.concatenate([part.train, part.validation]), part.test)
            ]
            for part in self.task.parts
        ]
        return key_of({**_identity(name, self.shared), "parts": parts})

    def _fitted(self, name: str, path: Path) -> Line:
        """Predict, write the csv, and score."""
        started, task, shared = time.perf_counter(), self.task, self.shared
        predict = BASELINES[name].predict
        try:
            guesses = [
                predict(self.evidence, np.concatenate([part.train, part.validation]), part.test) for part in task.parts
            ]
        except DataError as error:
            return _left_out(name, shared, error)
        predicted, tested = np.concatenate([guess.predicted for guess in guesses]), task.tested
        prompts = [self.source.items.prompts[item] for item in tested]
        test = evaluate_scores(predicted, task.mos[tested], prompts)
        if all(np.ptp(guess.predicted) == 0 for guess in guesses):
            test = _without_correlations(test)
        if not all(guess.on_scale for guess in guesses):
            test = {**test, "rmse": None, "ci": {**test["ci"], "rmse": None}}
        seconds = (time.perf_counter() - started) / len(task.parts)
        names = [self.source.items.names[item] for item in tested]
        write_predictions(
            path, [task.label], names, prompts, task.mos[tested][:, None], predicted[:, None], items=tested.tolist()
        )
        line: Line = {
            **_identity(name, shared),
            **_fit_facts(name, guesses, self.means, shared),
            "runs": len(task.parts),
            "seeds": 1,
            "failed": 0,
            "seconds": round(seconds, 3),
            "validation": None,
            "test": test,
            "against": None,
            "predictions": path.relative_to(self.out).as_posix(),
        }
        notes = "".join(f"; {note}" for note in line["notes"])
        say(f"baseline {line['row']}, {shared['protocol']}, {task.label}: {_scores_text(test)}{notes}")
        return line


def _file_name(name: str) -> str:
    """The name of a baseline as part of a file's."""
    return name.replace(" + ", "+").replace(" ", "-")


def _fit_facts(name: str, guesses: Sequence[Guess], means: MeanFeatures, shared: Mapping[str, Any]) -> Line:
    """What the baseline read and fitted. The row of `features` is named after both."""
    fits, notes = [dict(guess.fit) for guess in guesses if guess.fit], _notes(guesses)
    if teachers := sum(guess.teachers for guess in guesses):
        tested = sum(len(guess.predicted) for guess in guesses)
        notes.append(teacher_warning("test", teachers, tested, rating_words=False))
    facts = {"reads": BASELINES[name].reads, "fits": fits, "notes": notes}
    if name != FEATURES:
        return facts
    if means.source.encoding == "sketch":
        notes.append(f"reads a {means.reads} only, which holds less than the hidden states that it was made from")
    row = _named(features_title(means.reads, fits), shared)
    return {**facts, "row": row, "reads": means.reads, "features_store": means.source.id}


def _notes(guesses: Sequence[Guess]) -> list[str]:
    """The notes on all test parts. A note on only some of the parts names its part."""
    counts = Counter(note for guess in guesses for note in guess.notes)
    return list(
        dict.fromkeys(
            note if counts[note] == len(guesses) else f"test part {number} of {len(guesses)}: {note}"
            for number, guess in enumerate(guesses, 1)
            for note in guess.notes
        )
    )


def _without_correlations(test: Mapping[str, Any]) -> dict[str, Any]:
    """`test` of predictions that are constant within each part, so that correlations reflect the split alone."""
    none = dict.fromkeys(CORRELATIONS)
    reason = "all predictions of each test part are equal: this baseline cannot distinguish its items"
    return {**test, **none, "ci": {**test["ci"], **none}, "undefined": test.get("undefined", reason)}


def _identity(name: str, shared: Mapping[str, Any]) -> Line:
    settings = {"baseline": name, **shared["settings"]}
    return {"kind": "baseline", "row": _named(BASELINES[name].title, shared), **shared, "settings": settings}


def _named(title: str, shared: Mapping[str, Any]) -> str:
    """The title with the settings that distinguish its row from others."""
    return ", ".join(part for part in (title, _spell(shared["settings"])) if part)


def _spell(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={'all' if value is None else value}" for name, value in settings.items())


def _left_out(name: str, shared: Mapping[str, Any], error: BaseException) -> Line:
    reason = str(error)
    say(f"baseline {name}, {shared['protocol']}, {shared['label']}: left out ({reason.splitlines()[0]})")
    return {**_identity(name, shared), "left_out": reason}


def _scores_text(test: Mapping[str, Any]) -> str:
    shown = ["undefined" if test[metric] is None else f"{test[metric]:.4f}" for metric in ("srcc", "plcc")]
    return f"test SRCC {shown[0]}, PLCC {shown[1]}"
