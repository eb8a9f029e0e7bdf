"""Results folders as `agiqa ablate` and `agiqa transfer` leave them: every number is of a real training."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.heads import HeadConfig, TrainConfig, train_head
from agiqa.heads.data.splits import make_partition
from agiqa.heads.evaluation.metrics import SeedScores
from agiqa.heads.evaluation.significance import METRICS, holm

FOLDS = 2
Line = dict[str, Any]
Predictions = dict[tuple[str, str], tuple[float, float]]
"""True and predicted MOS by name and prompt."""


def cells_of(table: Any) -> list[dict[str, str]]:
    """The rows of a table of the report, from its CSV."""
    return list(csv.DictReader(io.StringIO(table.csv())))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    baselines: list[Row] = []
    for store_name, store in stores.items():
        for protocol in protocols:
            for settings in grid:
                for seed in seeds:
                    lines += _trained(out, store_name, store, protocol, settings, {**base, "seed": seed})
            baselines += _baselines(out, store_name, store, protocol, base)
    about = {"kind": "ablation", "stores": {name: about_store(store) for name, store in stores.items()}, "grid": base}
    return write_results(out, about, lines, baselines)


def write_transfer(
    out: Path, stores: Mapping[str, Any], *, shots: Sequence[int], seeds: Sequence[int] = (0, 1), **base: Any
) -> Path:
    """Both directions between two stores: each head on its own data set, unchanged, retrained and few-shot."""
    from agiqa.heads import predict

    lines: list[Line] = []
    for source, target in (tuple(stores), tuple(stores)[::-1]):
        for seed in seeds:
            settings = {"split": "published", "seed": seed, **base}
            runs = {"within": (source, source, "all", settings), "tp": (source, target, "all", settings)}
            for count in (*shots, "all"):
                few = {"training_items": count} if isinstance(count, int) else {}
                runs[f"fresh {count}"] = (source, target, count, {**settings, **few, "validation": 0.0})
            for name, (start, end, count, chosen) in runs.items():
                head, train = configs(chosen)
                way = name.split()[0]
                line = train_line(out, stores[end], f"{source}-{target}-{name}-{seed}".replace(" ", "-"), head, train)
                told = {"from": start, "to": end, "way": way, "training_items": count}
                lines.append(line | _where(told, "published", ""))
            run = out / "runs" / f"{source}-{target}-within-{seed}"
            lines.append(_applied(out, run, stores[target], predict, source, target, seed))
    about = {"kind": "transfer", "stores": {name: about_store(store) for name, store in stores.items()}}
    return write_results(out, about, lines, [])


def write_results(out: Path, about: Line, lines: Sequence[Line], baselines: Sequence["Row"]) -> Path:
    """The files of a folder from its result lines."""
    write_lines(out / "results.jsonl", lines)
    write_lines(out / "baselines.jsonl", [row.line for row in baselines])
    write_lines(out / "rows.jsonl", compared([*rows_of(out, lines), *baselines]))
    (out / "about.json").write_text(json.dumps(about), encoding="utf-8")
    return out


def about_store(store: Any) -> Line:
    """What about.json says of a store."""
    about = {
        "id": store.id,
        "data": store.provenance.get("data_set", {}).get("name", ""),
        "encoding": store.encoding,
        "width": store.width,
        "items": len(store.items),
        "model": store.provenance["model"]["name"],
        "path": str(store.path),
    }
    return about | ({"energy": store.basis().energy.tolist()} if store.encoding == "sketch" else {})


def configs(settings: Mapping[str, Any]) -> tuple[HeadConfig, TrainConfig]:
    head = {name: value for name, value in settings.items() if name in HeadConfig.model_fields}
    train = {name: value for name, value in settings.items() if name in TrainConfig.model_fields}
    return HeadConfig(**head), TrainConfig(**train)


def splits_of(protocol: str) -> list[Line]:
    """The settings of the runs that make a protocol."""
    if protocol == "published":
        return [{"split": "published"}]
    return [{"split": "folds", "folds": FOLDS, "fold": fold} for fold in range(FOLDS)]


def train_line(out: Path, store: Any, name: str, head: HeadConfig, train: TrainConfig) -> Line:
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
        "trained_at": metrics["trained_at"],
        "seconds": round(sum(metrics["seconds"].values()), 3),
        **{key: metrics[key] for key in ("chosen_epoch", "epochs_run", "split", "warnings", "validation", "test")},
    }


def _where(settings: Line, protocol: str, store_name: str) -> Line:
    return {"row": spell(settings), "settings": settings, "protocol": protocol, "store_name": store_name}


def _trained(
    out: Path, store_name: str, store: Any, protocol: str, settings: Mapping[str, Any], base: Mapping[str, Any]
) -> list[Line]:
    lines = []
    for split in splits_of(protocol):
        head, train = configs({**base, **settings, **split})
        shown = {**settings, "seed": base["seed"], **({"fold": split["fold"]} if "fold" in split else {})}
        name = "@".join(part for part in (spell(shown), protocol, store_name) if part)
        line = train_line(out, store, name, head, train)
        lines.append(line | _where(dict(settings), protocol, store_name))
    return lines


def _applied(out: Path, path: Path, store: Any, predict: Any, source: str, target: str, seed: int) -> Line:
    """A head on the test part of the other store; its predictions are in a run folder of their own."""
    from agiqa.heads import load_run

    run = load_run(path)
    test = np.array(store.items.in_split("test"))
    predicted = predict(run, store, test, device="cpu")
    name = f"{source}-{target}-apply-{seed}"
    (out / "runs" / name).mkdir()
    mos = store.items.labels[run.train.label]
    with (out / "runs" / name / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [
            [store.items.names[k], store.items.prompts[k], "test", mos[k], p]
            for k, p in zip(test, predicted, strict=True)
        ]
        csv.writer(file).writerows([["name", "prompt", "split", "mos", "predicted"], *rows])
    settings = {"from": source, "to": target, "way": "apply", "training_items": "all"}
    config = {"label": run.train.label}
    return {"name": name, "config": config, "seed": seed, "seconds": 0.1, **_where(settings, "published", "")}


class Row:
    """A line of rows.jsonl, and the scores that it is compared by."""

    def __init__(self, line: Line, tests: Sequence[Predictions]) -> None:
        """`tests`: the predictions of each seed, every one of the same items."""
        self.line = line
        if tests:
            names = list(tests[0])
            true = np.array([tests[0][name][0] for name in names])
            predicted = np.array([[test[name][1] for name in names] for test in tests])
            seedless = line["kind"] == "baseline"
            self.scores = SeedScores.of(predicted, true, [prompt for _, prompt in names], seedless=seedless)
            self.line["test"] = self.scores.score()


def predictions_of(path: Path, label: str | None = None) -> Predictions:
    """The test rows of a csv of predictions, in the order of their names."""
    end = "" if label is None else f"_{label}"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("split", "test") == "test"]
    return {(row["name"], row["prompt"]): (float(row[f"mos{end}"]), float(row[f"predicted{end}"])) for row in rows}


def rows_of(out: Path, lines: Sequence[Line]) -> list[Row]:
    """A row for each store, protocol, row and label of result lines."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["store_name"], line["protocol"], line["row"]), []).append(line)
    return [_row(out, group, label) for group in groups.values() for label in group[0]["config"]["label"].split("+")]


def _row(out: Path, group: Sequence[Line], label: str) -> Row:
    several = "+" in group[0]["config"]["label"]
    done = [line for line in group if "error" not in line]
    tests: dict[int, Predictions] = {}
    for line in done:
        path = out / "runs" / line["name"] / "predictions.csv"
        tests.setdefault(line["seed"], {}).update(predictions_of(path, label if several else None))
    parts = [line["validation"] for line in done if line.get("validation")]
    chosen = [part[label] if several else part for part in parts]
    line = {
        "kind": "head",
        **{key: group[0][key] for key in ("row", "settings", "store_name", "protocol")},
        "label": label,
        "runs": len(done),
        "seeds": len(tests),
        "failed": len(group) - len(done),
        "seconds": float(np.mean([line["seconds"] for line in done])) if done else None,
        "validation": {metric: _spread([one[metric] for one in chosen]) for metric in ("srcc", "plcc")}
        if chosen
        else None,
        "test": None,
        "against": None,
    }
    return Row(line, [dict(sorted(test.items())) for test in tests.values()])


def _spread(values: Sequence[float]) -> list[float | None]:
    return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None]


def _baselines(out: Path, store_name: str, store: Any, protocol: str, base: Mapping[str, Any]) -> list[Row]:
    """The mean over training items, and ridge on the mean hidden state, of each label; and a baseline that is left out."""
    means = np.array([store.read([item]).rows.astype(np.float64).mean(0) for item in range(len(store.items))])
    rows = []
    for label in str(base.get("label", "quality")).split("+"):
        tests: dict[str, Predictions] = {"mean hidden state": {}, "prompt": {}}
        mos = store.items.labels[label]
        for split in splits_of(protocol):
            parts = make_partition(store, configs({**base, **split})[1])
            fitted = np.concatenate([parts.train, parts.validation])
            for name, predicted in zip(tests, _fitted(means, mos, fitted, parts.test), strict=True):
                for item, value in zip(parts.test, predicted.tolist(), strict=True):
                    tests[name][store.items.names[item], store.items.prompts[item]] = (float(mos[item]), value)
        rows += [_baseline(out, name, store_name, protocol, label, test) for name, test in tests.items()]
        rows.append(_baseline(out, "rating word", store_name, protocol, label, {}))
        rows[-1].line["left_out"] = "no --words were given"
    return rows


def _fitted(means: np.ndarray, mos: np.ndarray, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaled = (means - means[train].mean(0)) / (means[train].std(0) + 1e-9)
    gram = scaled[train].T @ scaled[train] + 10.0 * np.eye(scaled.shape[1])
    centre = mos[train].mean()
    ridge = centre + scaled[test] @ np.linalg.solve(gram, scaled[train].T @ (mos[train] - centre))
    return ridge, np.full(len(test), centre)


def _baseline(out: Path, name: str, store_name: str, protocol: str, label: str, test: Predictions) -> Row:
    path = out / "baselines" / (store_name or "store") / protocol / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [[*key, *pair] for key, pair in test.items()]
        csv.writer(file).writerows([["name", "prompt", "mos", "predicted"], *rows])
    where = {"row": name, "settings": {}, "store_name": store_name, "protocol": protocol, "label": label}
    counts = {"runs": 1, "seeds": 1, "failed": 0, "seconds": None, "validation": None, "test": None, "against": None}
    return Row({"kind": "baseline", **where, **counts}, [dict(sorted(test.items()))] if test else [])


def compared(rows: Sequence[Row]) -> list[Line]:
    """The lines of rows, with `against` the best validation SRCC of their store, protocol and label."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.line[key] for key in ("store_name", "protocol", "label")), []).append(row)
    for group in groups.values():
        heads = [row for row in group if row.line["validation"] and "way" not in row.line["settings"]]
        best = max(heads, key=lambda row: row.line["validation"]["srcc"][0], default=None)
        others = [row for row in group if best is not None and row is not best and row.line["test"]]
        for row in others:
            row.line["against"] = {
                "row": best.line["row"],
                **row.scores.against(best.scores),
                "p_holm": dict.fromkeys(METRICS),
            }
        for metric in METRICS:
            known = [row.line["against"] for row in others if row.line["against"]["p"][metric] is not None]
            for told, p in zip(known, holm([told["p"][metric] for told in known]), strict=True):
                told["p_holm"][metric] = p
    return [row.line for row in rows]
