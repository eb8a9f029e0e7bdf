"""Results folders as `agiqa ablate` and `agiqa transfer` leave them: every number is of a real training."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.heads import HeadConfig, TrainConfig, train_head
from agiqa.heads.bootstrap import bootstrap_metrics
from agiqa.heads.metrics import METRICS, score
from agiqa.heads.prompts import prompt_groups
from agiqa.heads.splits import make_partition

RESAMPLES = 200
Line = dict[str, Any]
Predictions = dict[tuple[str, str], tuple[float, float]]
"""True and predicted MOS by name and prompt."""


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def about_store(store, *, path: bool = True) -> Line:
    """What about.json says of a store."""
    about = {
        "id": store.id,
        "data": store.provenance.get("data_set", {}).get("name", ""),
        "encoding": store.encoding,
        "width": store.width,
        "items": len(store.items),
        "model": store.provenance["model"]["name"],
    }
    if store.encoding == "sketch":
        about["energy"] = store.basis().energy.tolist()
    return about | ({"path": str(store.path)} if path else {})


def spell(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items())


def write_ablation(
    out: Path,
    stores: Mapping[str, Any],
    grid: Sequence[Mapping[str, Any]],
    *,
    protocols: Sequence[str] = ("published", "grouped"),
    seeds: Sequence[int] = (0, 1),
    **base: Any,
) -> Path:
    """Train every row of `grid` on every store, and write what the contract of an ablation says."""
    lines: list[Line] = []
    baselines: list[Line] = []
    for store_name, store in stores.items():
        for protocol in protocols:
            for settings in grid:
                lines += [_train(out, store_name, store, protocol, settings, seed, base) for seed in seeds]
            baselines += _baselines(out, store_name, store, protocol, base)
    write_lines(out / "results.jsonl", lines)
    write_lines(out / "baselines.jsonl", baselines)
    rows = rows_of(out, lines) + baselines
    about = {"kind": "ablation", "stores": {name: about_store(store) for name, store in stores.items()}, "grid": base}
    write_lines(out / "rows.jsonl", compared(out, rows))
    (out / "about.json").write_text(json.dumps(about), encoding="utf-8")
    return out


def configs(settings: Mapping[str, Any]) -> tuple[HeadConfig, TrainConfig]:
    head = {name: value for name, value in settings.items() if name in HeadConfig.model_fields}
    train = {name: value for name, value in settings.items() if name in TrainConfig.model_fields}
    return HeadConfig(**head), TrainConfig(**train)


def _train(
    out: Path,
    store_name: str,
    store: Any,
    protocol: str,
    settings: Mapping[str, Any],
    seed: int,
    base: Mapping[str, Any],
) -> Line:
    head, train = configs({**base, **settings, "split": protocol, "seed": seed})
    name = "@".join(part for part in (spell({**settings, "seed": seed}), protocol, store_name) if part)
    return trained_line(out, store, name, head, train) | {
        "row": spell(settings),
        "settings": dict(settings),
        "protocol": protocol,
        "store_name": store_name,
    }


def trained_line(out: Path, store: Any, name: str, head: HeadConfig, train: TrainConfig) -> Line:
    """A training in OUT/runs, and its result line."""
    run = train_head(store, out / "runs" / name, head=head, train=train)
    metrics = run.metrics
    return {
        "name": name,
        "config": {**head.model_dump(mode="json"), **train.model_dump(mode="json")},
        "seed": train.seed,
        "store": store.id,
        "agiqa": run.config["agiqa"],
        "commit": "e8f7ded",
        "torch": run.config["torch"],
        "device": run.config["device"],
        "kernels": run.config["kernels"],
        "seconds": round(sum(metrics["seconds"].values()), 3),
        **{key: metrics[key] for key in ("chosen_epoch", "epochs_run", "split", "warnings", "validation", "test")},
    }


def predictions_of(path: Path, label: str | None = None) -> Predictions:
    """The test rows of a csv of predictions."""
    end = "" if label is None else f"_{label}"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("split", "test") == "test"]
    return {(row["name"], row["prompt"]): (float(row[f"mos{end}"]), float(row[f"predicted{end}"])) for row in rows}


def rows_of(out: Path, lines: Sequence[Line]) -> list[Line]:
    """A row for each store, protocol, row and label of result lines that did not fail."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["store_name"], line["protocol"], line["row"]), []).append(line)
    return [_row(out, group, label) for group in groups.values() for label in group[0]["config"]["label"].split("+")]


def _row(out: Path, group: Sequence[Line], label: str) -> Line:
    first, several = group[0], "+" in group[0]["config"]["label"]
    done = [line for line in group if "error" not in line]

    def part(line: Line, name: str) -> Line:
        return line[name][label] if several else line[name]

    tests = [
        predictions_of(out / "runs" / line["name"] / "predictions.csv", label if several else None) for line in done
    ]
    validation = {
        metric: [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None]
        for metric in ("srcc", "plcc")
        for values in [[part(line, "validation")[metric] for line in done if line["validation"]]]
        if values
    }
    return {
        "kind": "head",
        **{key: first[key] for key in ("row", "settings", "store_name", "protocol")},
        "label": label,
        "runs": len(done),
        "seeds": len({line["seed"] for line in done}),
        "failed": len(group) - len(done),
        "seconds": float(np.mean([line["seconds"] for line in done])) if done else None,
        "validation": validation or None,
        "test": seeds_score(tests) if tests else None,
        "against": None,
        "tests": [list(test.items()) for test in tests],
    }


def _draws(test: Predictions) -> np.ndarray:
    true, predicted = np.array(list(test.values())).T
    groups = prompt_groups([prompt for _, prompt in test])
    return bootstrap_metrics(predicted, true, groups, seed=0, resamples=RESAMPLES)


def seeds_score(tests: Sequence[Predictions]) -> Line:
    """Means over seeds, deviations, and intervals of the mean over resamples of prompts."""
    scores = [score(np.array([p for _, p in test.values()]), np.array([t for t, _ in test.values()])) for test in tests]
    drawn = np.mean([_draws(test) for test in tests], axis=0)
    values = {metric: [one[metric] for one in scores] for metric in METRICS}
    return {
        "n": len(tests[0]),
        **{metric: _finite(np.mean(values[metric])) for metric in METRICS},
        "sd": {metric: _finite(np.std(values[metric], ddof=1)) if len(tests) > 1 else None for metric in METRICS},
        "ci": {metric: _interval(drawn[:, k]) for k, metric in enumerate(METRICS)},
        "seeds": len(tests),
        "confidence": 0.95,
        "resamples": RESAMPLES,
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(drawn: np.ndarray) -> list[float] | None:
    defined = drawn[np.isfinite(drawn)]
    return np.quantile(defined, [0.025, 0.975]).tolist() if len(defined) else None


def _baselines(out: Path, store_name: str, store: Any, protocol: str, base: Mapping[str, Any]) -> list[Line]:
    """The mean over training items, and ridge on the mean hidden state, of each label."""
    _, train = configs({**base, "split": protocol})
    parts = make_partition(store, train)
    fitted = np.concatenate([parts.train, parts.validation])
    means = np.array([store.read([item]).rows.astype(np.float64).mean(0) for item in range(len(store.items))])
    scale = means[fitted].std(0) + 1e-9
    inputs = np.column_stack([(means - means[fitted].mean(0)) / scale, np.ones(len(means))])
    lines = []
    for label in train.label.split("+"):
        mos = store.items.labels[label]
        gram = inputs[fitted].T @ inputs[fitted] + np.eye(inputs.shape[1]) * 10.0
        ridge = inputs[parts.test] @ np.linalg.solve(gram, inputs[fitted].T @ mos[fitted])
        constant = np.full(len(parts.test), mos[fitted].mean())
        for name, predicted in (("mean hidden state", ridge), ("prompt", constant)):
            keys = [(store.items.names[item], store.items.prompts[item]) for item in parts.test]
            test = dict(zip(keys, zip(mos[parts.test].tolist(), predicted.tolist(), strict=True), strict=True))
            path = out / "baselines" / (store_name or "store") / protocol / f"{name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(
                    [["name", "prompt", "mos", "predicted"], *([*key, *pair] for key, pair in test.items())]
                )
            lines.append(_baseline(name, store_name, protocol, label, test))
        lines.append(_baseline("rating word", store_name, protocol, label, {}) | {"left_out": "no --words were given"})
    return lines


def _baseline(name: str, store_name: str, protocol: str, label: str, test: Predictions) -> Line:
    return {
        "kind": "baseline",
        "row": name,
        "settings": {},
        "store_name": store_name,
        "protocol": protocol,
        "label": label,
        "runs": 1,
        "seeds": 1,
        "failed": 0,
        "seconds": None,
        "validation": None,
        "test": seeds_score([test]) if test else None,
        "against": None,
        "tests": [list(test.items())] if test else [],
    }


def compared(out: Path, rows: list[Line]) -> list[Line]:
    """Rows with `against` the best validation SRCC of their store, protocol and label."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for row in rows:
        groups.setdefault((row["store_name"], row["protocol"], row["label"]), []).append(row)
    for group in groups.values():
        heads = [row for row in group if row["validation"]]
        best = max(heads, key=lambda row: row["validation"]["srcc"][0]) if heads else None
        others = [row for row in group if best and row is not best and row["tests"]]
        for row in others:
            row["against"] = {"row": best["row"], **_paired(row, best)}
        _correct([row["against"] for row in others])
    return [{key: value for key, value in row.items() if key != "tests"} for row in rows]


def _paired(row: Line, best: Line) -> Line:
    drawn = [
        np.mean([_draws({tuple(key): pair for key, pair in test}) for test in one["tests"]], axis=0)
        for one in (row, best)
    ]
    gap = drawn[0] - drawn[1]
    told: Line = {"difference": {}, "ci": {}, "p": {}}
    for k, metric in enumerate(METRICS):
        values, pair = gap[np.isfinite(gap[:, k]), k], (row["test"][metric], best["test"][metric])
        told["difference"][metric] = None if None in pair else pair[0] - pair[1]
        told["ci"][metric] = _interval(values)
        tails = [(1 + np.sum(values <= 0)) / (1 + len(values)), (1 + np.sum(values >= 0)) / (1 + len(values))]
        told["p"][metric] = float(min(1.0, 2 * min(tails))) if len(values) else None
    return told


def _correct(told: Sequence[Line]) -> None:
    """Holm's correction of the p of each metric."""
    for metric in METRICS:
        ordered = sorted((one for one in told if one["p"][metric] is not None), key=lambda one: one["p"][metric])
        largest = 0.0
        for place, one in enumerate(ordered):
            largest = min(1.0, max(largest, one["p"][metric] * (len(ordered) - place)))
            one.setdefault("p_holm", {})[metric] = largest
        for one in told:
            one.setdefault("p_holm", {}).setdefault(metric, None)
