"""`agiqa train`: phase 2, from a feature store to a trained and evaluated head."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from agiqa.commands.common import Name, StoreLocation, output_options, print_result

Options = TypeVar("Options", bound=Callable[..., Any])


def _look_up_setting(setting: str) -> Callable[[str], None]:
    """Raises where no part of a head, or no kind of training, has the name that is given for `setting`."""

    def look_up(name: str) -> None:
        from agiqa.heads.model.head import check_parts
        from agiqa.heads.model.losses import get_loss
        from agiqa.heads.settings.config import HeadConfig, TrainConfig

        given: dict[str, Any] = {setting: name}
        if setting == "loss":
            get_loss(name)
        elif setting in HeadConfig.model_fields:
            check_parts(HeadConfig(**given))
        else:
            TrainConfig(**given)

    return look_up


def _look_up_preset(name: str) -> None:
    from agiqa.heads.settings.presets import preset_values

    preset_values(name, {})


PRESET = Name("preset", _look_up_preset)


def named(setting: str, text: str) -> Callable[[Options], Options]:
    """An option whose value is a name that the library knows: a part of a head, or a word of a training setting."""
    flag = f"--{setting.replace('_', '-')}"
    return click.option(flag, type=Name(setting, _look_up_setting(setting)), help=text)


@click.command("train")
@click.argument("store", type=StoreLocation())
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--also", type=StoreLocation(), multiple=True, help="Train on this store's items too; repeatable.")
@click.option("--config", type=click.Path(path_type=Path, exists=True), help="YAML with sections `head` and `train`.")
@click.option(
    "--preset",
    type=PRESET,
    help="Settings to start from, which the config file and the options beat: `paper` puts the same width, pooling, "
    "depth and regressor around every encoder; `published` has the sizes and the training of the code released with "
    "the paper, encoder by encoder, its bugs mended (listed in agiqa.heads.settings.presets); it trains on 90 % of the "
    "training items, and the others choose the epoch.",
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A run whose head is the beginning, with its settings, weights and scales; features must fit.",
)
@named(
    "projection",
    "vocabulary (W_proj on the logits, from hidden states), hidden, sketch or logits.  [default: the one that reads "
    "the store, vocabulary where it has hidden states]",
)
@named("encoder", "xlstm, lstm, gru, mamba2, transformer or none.  [default: xlstm]")
@named(
    "pooling",
    "mean, max, first, last, first-last-mean or attention; @special, @image, @question or @answer limits it to "
    "those tokens, as in mean@answer.  [default: mean]",
)
@click.option("--width", type=int, help="Channels of projection and encoder, per direction.  [default: 512]")
@click.option("--blocks", type=int, help="Blocks of the xLSTM.  [default: 4]")
@click.option("--num-heads", type=int, help="Heads of xlstm and transformer.  [default: 4]")
@click.option("--layers", type=int, help="Layers of lstm, gru, mamba2 and transformer.  [default: 1]")
@click.option(
    "--residual/--no-residual",
    default=None,
    help="Whether layers of lstm and gru have a norm before and a residual around them.  [default: yes]",
)
@click.option("--state-size", type=int, help="State rows of mamba2.  [default: 16]")
@click.option("--bidirectional/--causal", default=None, help="Whether tokens feel later ones too.  [default: causal]")
@click.option(
    "--standardise/--no-standardise",
    default=None,
    help="Scale or whiten features once, by the training tokens.  [default: yes]",
)
@click.option("--dropout", type=float, help="Within the encoder.  [default: 0]")
@click.option("--token-dropout", type=float, help="Share of tokens taken out in training.  [default: 0]")
@click.option("--regressor-hidden", type=int, help="Channels between the regressor's layers.  [default: 128]")
@click.option(
    "--label",
    help="Aspect whose MOS is learned, or several that one head learns, as in quality+correspondence.  "
    "[default: quality]",
)
@named(
    "split",
    "published (of the data set), grouped (whole prompts), folds (one of several parts of whole prompts) or "
    "generator (the images of one).  [default: published]",
)
@click.option("--folds", type=int, help="Parts that the split `folds` deals the prompts into.  [default: 5]")
@click.option("--fold", type=int, help="The part that the split `folds` tests on, from 0.  [default: 0]")
@click.option("--held-out", help="The generator that the split `generator` tests on.")
@click.option(
    "--split-seed", type=int, help="Draws the test part, the validation part and the training items.  [default: 0]"
)
@click.option("--test-share", type=float, help="Share that a grouped split holds out.  [default: 0.2]")
@click.option(
    "--validation", type=float, help="Share of training that chooses the epoch, by 30 items at least.  [default: 0.1]"
)
@click.option(
    "--training-items",
    type=int,
    help="Use only so many items outside of the test part; 10 are among 30.  [default: all]",
)
@click.option("--training-seed", type=int, help="Draws the training items alone.  [default: that of --split-seed]")
@named(
    "loss",
    "mse, mae, huber, plcc, fidelity, margin or ranknet, or a weighted sum such as mse+0.5*plcc.  [default: mse]",
)
@click.option("--epochs", type=int, help="Passes over the training items.  [default: 20]")
@click.option("--batch-size", type=int, help="Items per step.  [default: 32]")
@click.option("--lr", type=float, help="Peak learning rate.  [default: 1e-3]")
@click.option("--projection-lr", type=float, help="Peak learning rate of the projection.")
@click.option("--weight-decay", type=float, help="Of AdamW.  [default: 0.01]")
@named("schedule", "cosine or constant.  [default: cosine]")
@click.option("--warmup", type=float, help="Share of the steps that warm up.  [default: 0.05]")
@click.option("--gradient-clip", type=float, help="Largest norm of the gradient.  [default: 1]")
@click.option(
    "--ema",
    type=float,
    help="Decay per step of an average of the weights, kept instead; over a tenth of the steps at most.",
)
@click.option("--patience", type=int, help="Stop after so many epochs without a better validation SRCC.")
@click.option("--refit/--no-refit", default=None, help="Train again on training + validation for the chosen epochs.")
@click.option(
    "--calibrate/--no-calibrate",
    default=None,
    help="Fit a line from predictions to MOS on validation items, and put it into the head.  [default: no]",
)
@click.option(
    "--paper-compatible/--no-paper-compatible",
    default=None,
    help="Also tell the best epoch by its test score, as the paper reports it, and its bias.  [default: no]",
)
@click.option("--seed", type=int, help="Of weights and batches.  [default: 0]")
@named("device", "auto, cpu or cuda.  [default: auto]")
@named("precision", "fp32, bf16 or, on a GPU, fp16; the last two are mixed.  [default: fp32]")
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--cuda-graphs/--no-cuda-graphs", default=None, help="Replay steps on a GPU.  [default: yes]")
@click.option("--compile/--no-compile", default=None, help="Fuse on a GPU: slow start, for long trainings.")
@named(
    "keep",
    "Where decoded features are: device, ram, memmap (a decoded copy on disk) or stream (what fits in RAM, the "
    "rest from STORE for every batch); auto is the first that holds them.  [default: auto]",
)
@click.option(
    "--memory",
    help="Bytes of features to hold at most, as in 8GB.  [default: 80 % of free device memory, 60 % of free RAM]",
)
@click.option("--save-seconds", type=float, help="Time between two saves; 0 saves every epoch.  [default: 30]")
@click.option("--restart", is_flag=True, help="Throw away what a training that was broken off has kept for RUN.")
@click.option(
    "--tensorboard/--no-tensorboard", default=None, help="Write event files to RUN/tensorboard; needs tensorboard."
)
@output_options
def command(
    store: str | Path,
    run: Path,
    also: tuple[str | Path, ...],
    config: Path | None,
    preset: str | None,
    start: Path | None,
    *,
    restart: bool,
    as_json: bool,
    **overrides: Any,
) -> None:
    """Train a head on STORE and write RUN: weights, config, metrics, predictions and curves.

    The epoch is chosen on the data set's own `val` part, or else on training items held out with prompts of their
    own; the test part is read once, at the end.

    A training that is killed and run again with the same settings goes on after the last epoch that was saved, and
    ends with the same numbers. Until RUN is written its state is in .RUN.state beside it.
    """
    from rich.console import Console

    from agiqa.heads import load_run, load_settings, train_head, training_progress
    from agiqa.heads.model.projection import usual_projection
    from agiqa.heads.settings.labels import of_each_label
    from agiqa.progress import say
    from agiqa.store import open_store, union

    first = None if start is None else load_run(start)
    source = union([open_store(one) for one in (store, *also)]) if also else open_store(store)
    usual, beginning = usual_projection(source), None if first is None else first.head
    head, train = load_settings(config, overrides, preset=preset, start=beginning, projection=usual)
    asked = source.provenance.get("conversation", {}).get("aspect", train.label)
    if asked != train.label:
        learned = " and ".join(train.labels)
        say(f"warning: the conversations of {store} ask for {asked}, and the head learns {learned}")
    progress = training_progress(Console(stderr=True))
    trained = train_head(
        source, run, head=head, train=train, progress=progress, preset=preset, restart=restart, start=first
    )
    for warning in trained.metrics["warnings"]:
        say(f"warning: {warning}")
    for note in trained.metrics["notes"]:
        say(f"note: {note}")
    metrics = dict(trained.metrics)
    lines = [f"{run}: epoch {metrics['chosen_epoch']} of {metrics['epochs_run']}, chosen by {metrics['chosen_by']}"]
    shown = {part: of_each_label(train.labels, metrics[part]) for part in ("validation", "test") if metrics[part]}
    if metrics["calibration"]:
        lines += calibration_lines(train.labels, metrics["calibration"])
    for number, title in enumerate(label_titles(train.labels)):
        lines += [*title, *(scores_line(part, scores[number]) for part, scores in shown.items())]
        lines += [
            scores_line(f"test, {one['name']}", of_each_label(train.labels, one["test"])[number])
            for one in metrics.get("stores", ())
            if one["test"]
        ]
    print_result({"run": str(run), **metrics}, "\n".join(lines), as_json=as_json)


def calibration_lines(labels: Sequence[str], recorded: Any) -> list[str]:
    """What is said of each label whose predictions were put on a line; `recorded` is `calibration` of metrics.json."""
    from agiqa.heads.settings.labels import of_each_label

    return [
        f"calibrated: {label} = {one['slope']:.4g} x prediction {one['intercept']:+.4g}, fitted on {one['n']} "
        f"validation items{' before the refit' if one['applied_to_refit'] else ''}; their own errors are of the fit"
        for label, one in zip(labels, of_each_label(labels, recorded), strict=True)
        if one["slope"] is not None
    ]


def label_titles(labels: Sequence[str]) -> list[list[str]]:
    """The lines above the scores of each label: its name where there are several, else none."""
    return [[] if len(labels) == 1 else [f"{label}:"] for label in labels]


def scores_line(name: str, scores: dict[str, Any]) -> str:
    """`name` with SRCC, PLCC, KRCC and RMSE and the intervals of the first two, on one line; last what to beware of."""
    parts = [f"{name:<10} n {scores['n']}"]
    for metric in ("srcc", "plcc", "krcc", "rmse"):
        value, interval = scores[metric], scores["ci"].get(metric)
        shown = "undefined" if value is None else f"{value:.4f}"
        around = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval and metric in ("srcc", "plcc") else ""
        parts.append(f"{metric.upper()} {shown}{around}")
    return "  ".join([*parts, *([f"({scores['caution']})"] if "caution" in scores else [])])
