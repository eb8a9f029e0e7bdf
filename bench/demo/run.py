"""All steps in miniature on a CPU: draw images, extract, train two heads, compare them on images never seen."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.bench.baselines.predictors import group_means
from agiqa.bench.demo.images import draw_data_set
from agiqa.bench.demo.model import build_demo_model
from agiqa.bench.report.pictures import Panel, scatter
from agiqa.errors import SettingsConflict
from agiqa.extract import ExtractionSettings, load_data_set, open_backbone, run_extraction
from agiqa.heads import HeadConfig, LineProgress, TrainConfig, load_run, predict, train_head
from agiqa.heads.evaluation.metrics import evaluate_scores
from agiqa.progress import say
from agiqa.store import Store

IMAGES = 400
LABEL = "quality"
HEADS = {"gru": HeadConfig(encoder="gru", width=64), "xlstm": HeadConfig(encoder="xlstm", width=64, blocks=2)}
TRAINING = TrainConfig(label=LABEL, epochs=12, batch_size=32, lr=3e-3)

WHAT_IS_SHOWN = """\
This program drew the images, their prompts and their MOS (MOS = how badly an image was damaged + rater noise).
The multimodal model has RANDOM weights: it was never trained and understands nothing; its random image filters are laid
out to respond to sharpness, noise and block edges. The demo shows that all steps work together, and that a head can
learn quality from what such features keep of an image. Test images and their prompts were never seen in training.
No number here says anything about M3-AGIQA."""


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One line of the table: the scores of a head, or of a baseline, on the test images."""

    name: str
    scores: Mapping[str, Any]
    """See `evaluate_scores`."""
    seconds: float | None
    """Training time; None for the baseline."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The demo's table, and where its files are."""

    out: Path
    items: int
    rows: tuple[DemoRow, ...]
    picture: Path
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "out": str(self.out), "picture": str(self.picture), "what_is_shown": WHAT_IS_SHOWN}


def run_demo(out: Path, *, images: int = IMAGES, seed: int = 0) -> DemoResult:
    """Run all steps in the folder `out`; steps that an earlier run finished are kept.

    Raises SettingsConflict where `out` holds a demo of other settings.
    """
    started = time.perf_counter()
    store = _extract(out, images, seed)
    test = np.array(store.items.in_split("test"))
    rows = [_generator_baseline(store, test)]
    predictions: dict[str, NDArray[np.float64]] = {}
    for name, head in HEADS.items():
        row, predictions[name] = _train(store, out / "runs" / name, head, seed)
        rows.append(row)
    picture = out / "scatter.png"
    truth = store.items.labels[LABEL][test]
    groups = [store.items.generators[item] or "unknown" for item in test]
    panels = [
        Panel(title=name, true=truth, predicted=predicted, groups=groups) for name, predicted in predictions.items()
    ]
    scatter(picture, panels, title=f"{LABEL} of {len(test)} drawn images never seen in training (random-weight model)")
    result = DemoResult(
        out=out, items=len(store.items), rows=tuple(rows), picture=picture, seconds=time.perf_counter() - started
    )
    (out / "results.json").write_text(json.dumps(result.as_dict(), indent=2), encoding="utf-8")
    return result


def _extract(out: Path, images: int, seed: int) -> Store:
    data, model = out / "data", out / "model"
    _keep_to_settings(out / "demo.json", {"images": images, "seed": seed})
    if not (data / "data.csv").exists():
        say(f"drawing {images} images in {data}")
        draw_data_set(data, count=images, seed=seed)
    if not (model / "model.safetensors").exists():
        build_demo_model(model, seed=seed)
    backbone = open_backbone(str(model), dtype="float32", device="cpu")
    data_set = load_data_set(data, variant="no_id", aspect=LABEL, images=True)
    settings = ExtractionSettings(variant="no_id", aspect=LABEL, batch_size=16)
    return run_extraction(data_set, backbone, out / "demo.agiqa", settings).store


def _keep_to_settings(path: Path, settings: Mapping[str, int]) -> None:
    """Write the settings of a new demo to `path`. Raises SettingsConflict where it holds others."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != settings:
        message = (
            f"{path.parent} holds a demo of {found}, you asked for {dict(settings)}. Remove it, or give another --out."
        )
        raise SettingsConflict(message)


def _train(store: Store, run: Path, head: HeadConfig, seed: int) -> tuple[DemoRow, NDArray[np.float64]]:
    if not (run / "metrics.json").exists():
        settings = TRAINING.model_copy(update={"seed": seed})
        train_head(store, run, head=head, train=settings, progress=LineProgress(say))
    trained = load_run(run)
    row = DemoRow(
        name=f"{head.projection} -> {head.encoder} -> {head.pooling}",
        scores=trained.metrics["test"],
        seconds=trained.metrics["seconds"]["train"],
    )
    return row, predict(trained, store, store.items.in_split("test"), device="cpu")


def _generator_baseline(store: Store, test: NDArray[np.int64]) -> DemoRow:
    """Predict the mean MOS of the generator's training images: a head has to beat this."""
    mos, generators = store.items.labels[LABEL], [name or "unknown" for name in store.items.generators]
    train = store.items.in_split("train")
    predicted = group_means([generators[k] for k in train], mos[train], [generators[k] for k in test])
    scores = evaluate_scores(predicted, mos[test], [store.items.prompts[k] for k in test])
    return DemoRow(name="mean of the generator", scores=scores, seconds=None)
