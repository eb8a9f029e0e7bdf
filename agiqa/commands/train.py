"""`agiqa train`: phase 2, from a feature store to a trained and evaluated head."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from agiqa.commands.help import SectionedCommand
from agiqa.commands.options import OneOf, StoreLocation, output_options
from agiqa.commands.output import calibration_lines, label_titles, print_result, scores_line, spread_lines
from agiqa.heads.settings.config import OWN_SETTINGS, HeadConfig, TrainConfig

if TYPE_CHECKING:
    from agiqa.heads import Run

Command = TypeVar("Command", bound=Callable[..., Any])

SECTIONS = {
    "Most used": (
        "preset",
        "encoder",
        "pooling",
        "projection",
        "layer",
        "label",
        "split",
        "loss",
        "epochs",
        "lr",
        "seed",
    ),
    "Settings from elsewhere": ("config", "start"),
    "Head": (
        *("width", "blocks", "num_heads", "layers", "residual", "state_size", "bidirectional", "standardise"),
        *("dropout", "token_dropout", "regressor_hidden", "layer_mix", "own_settings"),
    ),
    "Closed forms": (
        "init",
        "init_pooling",
        "kernel",
        "kernel_width",
        "strength",
        "ngrams",
        "members",
        "inner_folds",
        "rating_tokens",
    ),
    "Items and splits": (
        *("variant", "also", "folds", "fold", "held_out", "test_share", "validation", "split_seed"),
        *("training_items", "training_seed"),
    ),
    "Optimisation": (
        *("batch_size", "projection_lr", "weight_decay", "schedule", "warmup", "gradient_clip", "ema"),
        *("patience", "refit", "calibrate", "weights", "paper_compatible"),
        *("soft_labels", "label_std", "calibration_share"),
    ),
    "Device and memory": ("device", "precision", "threads", "cuda_graphs", "compile", "keep", "memory"),
    "Interruption and logs": ("save_seconds", "restart", "tensorboard"),
}


def preset_option(command: Command) -> Command:
    """Add `--preset`, settings under one name."""

    def look_up(name: str) -> None:
        from agiqa.heads.settings.presets import preset_values

        preset_values(name, {})

    option = click.option(
        "--preset",
        type=OneOf("preset", ["paper", "published"], look_up=look_up),
        help="Settings to start from: one setting for all encoders, or those of the code released with the paper.",
    )
    return option(command)


def setting_options(command: Command) -> Command:
    """Add an option for every setting of HeadConfig and TrainConfig. One that was not given is None."""
    fields = {**HeadConfig.model_fields, **TrainConfig.model_fields}
    for name, field in reversed(fields.items()):
        command = (own_setting_option if name == OWN_SETTINGS else _setting_option(name, field))(command)
    return command


def _own_settings(_ctx: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str] | None:
    """The values by name, as texts, which the encoder gives their types. A mapping comes from a file of options."""
    pairs = [text.partition("=") for text in given]
    wrong = next((text for text, (name, equals, _) in zip(given, pairs, strict=True) if not (name and equals)), None)
    if wrong is not None:
        message = f"{wrong!r} is not NAME=VALUE, such as kernel_size=5."
        raise click.BadParameter(message)
    return {name.strip(): value.strip() for name, _, value in pairs} or None


own_setting_option = click.option(
    "--set",
    OWN_SETTINGS,
    multiple=True,
    callback=_own_settings,
    metavar="NAME=VALUE",
    help="Setting that an encoder of your own declares; repeatable.",
)
"""Adds `--set`; the command receives a dict, or None."""


def _setting_option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    flag = f"--{name.replace('_', '-')}"
    kind = field.annotation
    if kind is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    return click.option(flag, name, type=_option_type(name, field), default=None, help=_option_help(name, field))


def _option_help(name: str, field: FieldInfo) -> str:
    """The first sentence of the field's docstring, and the default where it is a value."""
    said = " ".join((field.description or "").split()).split(". ")[0].rstrip(".") + "."
    if name == "projection":
        default = "the one that reads STORE, vocabulary for final hidden states"
    elif name == "layer":
        default = "the last one of STORE (closed forms: up to five), or that of --start"
    elif name == "encoder":
        default = "see above"
    elif name == "pooling":
        default = f"{field.default}; auto for closed forms; see above for stores of pooled rows"
    else:
        default = {True: "yes", False: "no"}[field.default] if field.annotation is bool else field.default
    return said if default is None else f"{said}  [default: {default}]"


def _option_type(name: str, field: FieldInfo) -> Any:
    """The type that click parses; pydantic checks ranges, so that files and options obey the same rules."""
    if field.annotation is bool:
        return None
    if get_origin(field.annotation) is Literal:
        return OneOf(name, [str(value) for value in get_args(field.annotation)])
    if field.examples:
        return OneOf(name, field.examples, look_up=_looked_up(name))
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind in (int, float)]
    return kinds[0] if kinds else str


def _looked_up(setting: str) -> Callable[[str], None]:
    """A check for names that are not built in; it raises if no part is registered under the name."""

    def look_up(name: str) -> None:
        from agiqa.heads.model.head import check_parts
        from agiqa.heads.model.losses import get_loss

        if setting == "loss":
            get_loss(name)
        else:
            given: dict[str, Any] = {setting: name}
            check_parts(HeadConfig(**given))

    return look_up


@click.command("train", cls=SectionedCommand, sections=SECTIONS)
@click.argument("store", type=StoreLocation())
@click.argument("run", type=click.Path(path_type=Path))
@preset_option
@setting_options
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True),
    metavar="FILE.yaml",
    help="Settings of the head, in sections `head` and `train`.",
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="RUN",
    help="Trained run to start from: its head settings, weights and scales. The features must fit.",
)
@click.option("--also", type=StoreLocation(), multiple=True, help="Further store to train on; repeatable.")
@click.option("--restart", is_flag=True, help="Discard the saved state of an interrupted training of RUN.")
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

    By default the head is `--encoder stack`, a sum of closed forms on up to five layers of STORE. `--pooling`, or a
    setting that only networks have, such as `--epochs` or `--preset`, makes the default `--encoder xlstm`; so do stored
    logits.

    The epoch of a network is chosen on the data set's own `val` part, or else on held-out prompts of the training part.
    The test part is read once, at the end.

    If STORE holds pooled rows instead of tokens, a network reads the row that `--pooling` names. Its defaults are then
    `--encoder none` and `--pooling mean@answer`, or else `mean`, or else the first row of STORE.

    Run the same command again after a kill: training resumes from the last saved epoch, and ends with the same
    numbers. The saved state is in .RUN.state beside RUN until RUN is written.
    """
    from agiqa.heads.settings.labels import of_each_label
    from agiqa.training import train

    trained = train(store, run, also=also, config=config, preset=preset, start=start, restart=restart, **overrides)
    labels, metrics = trained.train.labels, dict(trained.metrics)
    lines = [f"{run}: {_choice(trained)}"]
    shown = {part: of_each_label(labels, metrics[part]) for part in ("validation", "test") if metrics[part]}
    if "layer_weights" in metrics:
        shares = ", ".join(f"{name} {share:.3f}" for name, share in metrics["layer_weights"].items())
        lines.append(f"weights of the layers: {shares}")
    if metrics["calibration"]:
        lines += calibration_lines(labels, metrics["calibration"])
    for number, title in enumerate(label_titles(labels)):
        lines += [*title, *(scores_line(part, scores[number]) for part, scores in shown.items())]
        lines += spread_lines(shown["test"][number])
        lines += [
            scores_line(f"test, {one['name']}", of_each_label(labels, one["test"])[number])
            for one in metrics.get("stores", ())
            if one["test"]
        ]
    print_result({"run": str(run), **metrics}, "\n".join(lines), as_json=as_json)


def _choice(run: "Run") -> str:
    """What was kept, and how it was chosen."""
    metrics, chosen = run.metrics, f"chosen by {run.metrics['chosen_by']}"
    if run.head.encoder == "rating-words":
        return "nothing is fitted"
    return chosen if run.head.is_closed else f"epoch {metrics['chosen_epoch']} of {metrics['epochs_run']}, {chosen}"
