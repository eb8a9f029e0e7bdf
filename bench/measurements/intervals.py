"""Ways to make conformal intervals where a head predicts a spread, compared; LOG.md has the figures.

python -m agiqa.bench.measurements.intervals simulated --out FILE
python -m agiqa.bench.measurements.intervals heads DATA --conversations FILE ... --work WORK --out FILE
python -m agiqa.bench.measurements.intervals tables FILE

`simulated`  Gaussian errors of items whose true spread varies, and a predicted spread that tells it well or badly
`heads`      heads of each loss with a spread, on the singular vectors of TF-IDF of the descriptions of a data set, in 3
             folds of whole prompts

A way makes 80 % or 90 % intervals from some of the test items of a head (a third of their prompts), for the others:

absolute, scaled, quantile  the scores of heads/evaluation/conformal.py
levels                      CQR from quantiles of the predicted shares of five levels: those of the mid-distribution
                            function, P(below) + P(at) / 2, linear between levels (Ma, Genton and Parzen 2011)

Besides coverage and mean width, `least` is the coverage of the fifth of the items, by predicted MOS (simulated: by true
spread), that is covered least, and `score` the mean interval score of Gneiting and Raftery (2007), which adds to the
width 2 / (1 - level) times the distance of a MOS outside: small is good.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from agiqa.bench.measurements.measuring import Line, append_line, out_option
from agiqa.bench.recording.tables import as_table, read_results
from agiqa.errors import DataError
from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.filling.plan import item_table
from agiqa.heads import HeadConfig, Run, TrainConfig, load_run, train_head
from agiqa.heads.data.features import SketchBasis
from agiqa.heads.evaluation.conformal import ConformalScores, ScoreKind
from agiqa.heads.evaluation.scoring import predict_moments
from agiqa.heads.model.head import Head
from agiqa.progress import say
from agiqa.store import Items
from agiqa.store.format.layout import TOKEN_ROLES

Array = NDArray[np.float64]
Ends = tuple[Array, Array]

LEVELS = (0.8, 0.9)
LOSSES = ("mse", "kl", "ordinal", "nll")
NEED_DEVIATIONS = ("kl", "ordinal")
WORLDS = ("right", "4 times too large", "roughly", "unrelated")
"""What the predicted spread of a made-up head tells of the true one."""
_KINDS: tuple[ScoreKind, ...] = ("absolute", "scaled", "quantile")
_CALIBRATING, _NEW = 240, 600
_FOLDS, _FIFTHS = 3, 5
_WIDTH = 200
"""Singular vectors."""
_HEAD = HeadConfig(projection="hidden", encoder="none", width=128, regressor_hidden=64, dropout=0.5)
_TRAIN = TrainConfig(split="folds", folds=_FOLDS, epochs=25, lr=2e-3, validation=0.1, calibrate=True, threads=1)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Predictions for some items, (items,) each."""

    mos: Array
    """The true MOS."""
    guess: Array
    spread: Array | None
    by: Array
    """By which items are put into fifths."""
    shares: Array | None = None
    """(items, 5): of the levels, for heads that predict them."""
    levels: Array | None = None
    """(5,): their MOS."""

    def of(self, chosen: NDArray[np.bool_]) -> "Predicted":
        """The items that are `chosen` (items,)."""
        return Predicted(
            mos=self.mos[chosen],
            guess=self.guess[chosen],
            spread=None if self.spread is None else self.spread[chosen],
            by=self.by[chosen],
            shares=None if self.shares is None else self.shares[chosen],
            levels=self.levels,
        )


def level_quantile(shares: Array, levels: Array, share: float) -> Array:
    """The quantile (items,) of distributions `shares` (items, 5) over `levels` (5,), see above."""
    middles = np.cumsum(shares, axis=1) - shares / 2
    return np.array([np.interp(share, row, levels) for row in middles])


def intervals(way: str, known: Predicted, new: Predicted, level: float) -> Ends:
    """The ends (items,) of the intervals of `new` items, made from `known` ones."""
    if way in _KINDS:
        spreads = [None if one.spread is None else one.spread[:, None] for one in (known, new)]
        scores = ConformalScores.of(way, known.guess[:, None], known.mos[:, None], spreads[0])
        low, high = scores.intervals(new.guess[:, None], spreads[1], level=level, scales=(None,))
        return low[:, 0], high[:, 0]
    (low, high), (new_low, new_high) = (_level_quantiles(one, level) for one in (known, new))
    outside = np.maximum(low - known.mos, known.mos - high)
    addend = np.sort(outside)[int(np.ceil((len(outside) + 1) * level - 1e-9)) - 1]
    middle = (new_low + new_high) / 2
    return np.minimum(new_low - addend, middle), np.maximum(new_high + addend, middle)


def _level_quantiles(items: Predicted, level: float) -> Ends:
    assert items.shares is not None
    assert items.levels is not None
    low, high = (level_quantile(items.shares, items.levels, 0.5 + end * level / 2) for end in (-1, 1))
    return low, high


def judged(ends: Ends, new: Predicted, level: float) -> dict[str, float]:
    """Coverage, mean width, coverage of the worst fifth, and mean interval score."""
    low, high = ends
    inside = (low <= new.mos) & (new.mos <= high)
    outside = np.maximum(low - new.mos, 0.0) + np.maximum(new.mos - high, 0.0)
    fifths = np.searchsorted(np.quantile(new.by, np.arange(1, _FIFTHS) / _FIFTHS), new.by)
    return {
        "coverage": float(inside.mean()),
        "width": float((high - low).mean()),
        "least": min(float(inside[fifths == fifth].mean()) for fifth in range(_FIFTHS) if (fifths == fifth).any()),
        "score": float((high - low + 2.0 / (1.0 - level) * outside).mean()),
    }


def made_up(world: str, random: np.random.Generator, count: int) -> Predicted:
    """Items with errors of their own size, whose head tells that size as `world` says."""
    true = np.exp(random.normal(-0.7, 0.5, count))
    spread = {
        "right": true,
        "4 times too large": 4.0 * true,
        "roughly": true * np.exp(random.normal(0.0, 0.5, count)),
        "unrelated": random.permutation(true),
    }[world]
    guess = random.uniform(1.0, 4.0, count)
    return Predicted(mos=guess + true * random.normal(size=count), guess=guess, spread=spread, by=true)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    rows: NDArray[np.float32]
    roles: NDArray[np.uint8]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """A source of features with one row for each item: singular vectors of TF-IDF of its prompt and description."""

    id: str
    items: Items
    values: NDArray[np.float32]
    encoding: str = "hidden"
    logical_dtype: str = "float32"
    lm_head_sha256: str = ""

    @classmethod
    def of(cls, name: str, items: Items) -> "TextFeatures":
        """Of the texts of `items`; the vectors are those of all texts, which takes no label."""
        texts = [f"{prompt} {text or ''}" for prompt, text in zip(items.prompts, items.descriptions, strict=True)]
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
        found = vectorizer.fit_transform(texts)
        width = min(_WIDTH, len(vectorizer.get_feature_names_out()))
        values = TruncatedSVD(width, random_state=0).fit_transform(found) * np.sqrt(width)
        return cls(id=name, items=items, values=np.asarray(values, np.float32))

    @property
    def width(self) -> int:
        """Channels."""
        return int(self.values.shape[1])

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """1 for each item, (items,)."""
        return np.ones(len(self.values), np.int32)

    def read(self, items: Sequence[int] | NDArray[Any], /) -> _Rows:
        """The row of each of `items`."""
        rows = self.values[np.asarray(items, np.int64)]
        roles = np.full(len(rows), TOKEN_ROLES["answer"], np.uint8)
        return _Rows(rows=rows, roles=roles, offsets=np.arange(len(rows) + 1))

    def lm_head(self) -> NDArray[np.float32]:
        """None to read."""
        raise NotImplementedError

    def basis(self) -> SketchBasis:
        """None to read."""
        raise NotImplementedError


def test_predictions(run: Run, source: TextFeatures) -> tuple[Predicted, list[str]]:
    """The predictions of a run for its test items, and their prompts."""
    head = run.load_head(source, device=torch.device("cpu"))
    assert isinstance(head, Head)
    rows = [row for row in run.predictions if row["split"] == "test"]
    items = np.array([row["item"] for row in rows], np.int64)
    found, levels = predict_moments(head, source, items, batch_size=64), head.regressor.levels
    shares = None
    if levels is not None:
        with torch.inference_mode():
            values = torch.from_numpy(source.values[items])[:, None]
            outputs = head.regressor.outputs(head.pooled(values, torch.ones(len(items), 1, dtype=torch.bool)))
            shares = levels.log_probabilities(outputs).exp()[:, 0].double().numpy()
    predicted = Predicted(
        mos=np.array([row["mos"] for row in rows]),
        guess=found.mos[:, 0],
        spread=None if found.spread is None else found.spread[:, 0],
        by=found.mos[:, 0],
        shares=shares,
        levels=None if levels is None else levels.levels[0].double().numpy(),
    )
    return predicted, [row["prompt"] for row in rows]


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}


def simulated_lines(draws: int) -> Iterator[Line]:
    """A line for each world, level and way."""
    for world in WORLDS:
        for level in LEVELS:
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in _KINDS}
            for draw in range(draws):
                random = np.random.default_rng(draw)
                known, new = (made_up(world, random, count) for count in (_CALIBRATING, _NEW))
                for way, values in found.items():
                    values.append(judged(intervals(way, known, new, level), new, level))
            for way, values in found.items():
                yield {
                    "bench": "simulated",
                    "spread": world,
                    "level": level,
                    "way": way,
                    "draws": draws,
                    **_means(values),
                }


def head_lines(source: TextFeatures, label: str, work: Path, draws: int) -> Iterator[Line]:
    """A line for each loss, level and way; runs in `work` that are there are not trained again."""
    rated = label in source.items.deviations
    for loss in LOSSES:
        if loss in NEED_DEVIATIONS and not rated:
            continue
        folds: list[tuple[Predicted, list[str]]] = []
        for fold in range(_FOLDS):
            path = work / f"{source.id}-{label}-{loss}-{fold}"
            config = _TRAIN.model_copy(update={"fold": fold, "loss": loss, "label": label})
            run = load_run(path) if path.exists() else train_head(source, path, head=_HEAD, train=config)
            folds.append(test_predictions(run, source))
        first = folds[0][0]
        ways = [
            *(_KINDS if first.spread is not None else _KINDS[:1]),
            *(["levels"] if first.shares is not None else []),
        ]
        for level in LEVELS:
            for way in ways:
                found = [one for fold in folds for one in _drawn(way, *fold, level, draws)]
                about = {"bench": "heads", "data": source.id, "label": label, "loss": loss}
                yield {**about, "level": level, "way": way, "draws": len(found), **_means(found)}


def _drawn(way: str, items: Predicted, prompts: list[str], level: float, draws: int) -> Iterator[dict[str, float]]:
    """The judgement of each draw of the prompts that make intervals."""
    names, groups = np.unique(np.array(prompts, dtype=object).astype(str), return_inverse=True)
    for draw in range(draws):
        some = np.random.default_rng(draw).choice(len(names), len(names) // 3, replace=False)
        making = np.isin(groups, some)
        new = items.of(~making)
        yield judged(intervals(way, items.of(making), new, level), new, level)


def interval_tables(lines: Sequence[Line]) -> str:
    """A table for each kind of line, a row for each way."""
    found: list[str] = []
    numbers = ("coverage", "width", "least", "score")
    for kind, columns in {
        "simulated": ("spread", "level", "way"),
        "heads": ("data", "label", "loss", "level", "way"),
    }.items():
        rows = [line for line in lines if line["bench"] == kind]
        body = [[*(str(line[name]) for name in columns), *(f"{line[name]:.3f}" for name in numbers)] for line in rows]
        found += [as_table([*columns, *numbers], body)] if rows else []
    return "\n\n".join(found)


_DRAWS = click.option("--draws", default=60, show_default=True, type=click.IntRange(min=1), help="Draws of items.")


@click.group()
def main() -> None:
    """Compare ways to make conformal intervals."""


@main.command()
@_DRAWS
@out_option
def simulated(draws: int, out: Path | None) -> None:
    """Made-up predictions."""
    _print(simulated_lines(draws), out)


@main.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option("--conversations", multiple=True, help="Conversation file with the descriptions; repeatable.")
@click.option("--label", default="quality", show_default=True)
@click.option("--work", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the runs.")
@_DRAWS
@out_option
def heads(data: Path, conversations: tuple[str, ...], label: str, work: Path, draws: int, out: Path | None) -> None:
    """Heads on the texts of the data set DATA."""
    found = load_data_set(data, conversations=conversations, images=False)
    items = item_table(found.items, mos_range=found.mos_range)
    if label not in items.labels:
        message = (
            f"{data} has no MOS of {label}; it has those of {', '.join(items.labels)}. Give one of them by --label."
        )
        raise DataError(message)
    work.mkdir(parents=True, exist_ok=True)
    _print(head_lines(TextFeatures.of(found.name, items), label, work, draws), out)


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def tables(file: Path) -> None:
    """The result lines of FILE as tables in markdown."""
    click.echo(interval_tables(read_results(file)))


def _print(lines: Iterator[Line], out: Path | None) -> None:
    for line in lines:
        say(str(line))
        append_line(line, out)


if __name__ == "__main__":
    main()
