"""`agiqa baseline`: Table II, image networks fine-tuned end to end on the splits of the heads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from agiqa.commands.help import SectionedCommand
from agiqa.commands.options import (
    OneOf,
    columns_option,
    labels_option,
    mos_range_option,
    on_bad_item_option,
    prompt_option,
    shared_options,
)
from agiqa.commands.output import fail_if_any, print_parts

if TYPE_CHECKING:
    from agiqa.bench.networks.config import NetworkConfig
    from agiqa.bench.networks.images import ImageSource

NETWORKS = ("vgg16", "resnet50", "vit_base_patch16_224", "vil", "hyperiqa", "dbcnn", "stairiqa")
"""TABLE_II of bench/networks/config.py, which imports too much for the help."""
ALL = "table-ii"
SECTIONS = {
    "Most used": ("models", "predictions", "label", "protocol", "seeds", "weights", "no_pretrained"),
    "Splits": ("folds", "split_seed", "validation"),
    "Training, instead of the recipe's": (
        *("epochs", "alone_epochs", "batch_size", "lr", "weight_decay", "loss"),
        *("image_size", "resize", "train_crops", "test_crops", "config"),
    ),
    "Data": ("conversations", "labels", "columns", "prompt", "mos_range", "on_bad_item"),
    "Machine": ("device", "precision", "workers", "cache", "save_seconds", "keep_weights"),
}
_CHANGES = (
    *("epochs", "alone_epochs", "batch_size", "lr", "weight_decay", "loss"),
    *("image_size", "resize", "train_crops", "test_crops", "precision"),
)


class NetworkName(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]
    """A network by name, `table-ii` for all seven, or any name of timm."""

    name = "NAME"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The networks of Table II."""
        del ctx, param
        return [CompletionItem(name) for name in (*NETWORKS, ALL) if name.startswith(incomplete)]


class NamedFile(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]
    """`NAME=FILE` as (name, path)."""

    name = "NAME=FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        """Split at the first equals sign; the file must exist."""
        if isinstance(value, tuple):
            return value  # pyright: ignore[reportUnknownVariableType]
        name, equals, path = str(value).partition("=")
        if not (name and equals and path):
            self.fail(f"{value!r} is not NAME=FILE.", param, ctx)
        found: Path = click.Path(path_type=Path, exists=True, dir_okay=False).convert(path, param, ctx)
        return name, found


class WeightsFile(NamedFile):
    """`FILE` or `NETWORK=FILE` as (network or None, path)."""

    name = "[NETWORK=]FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A value that is a file has no name."""
        if isinstance(value, str) and ("=" not in value or Path(value).is_file()):
            return None, click.Path(path_type=Path, exists=True, dir_okay=False).convert(value, param, ctx)
        return super().convert(value, param, ctx)


@click.command("baseline", cls=SectionedCommand, sections=SECTIONS)
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--model",
    "models",
    type=NetworkName(),
    multiple=True,
    help=f"{', '.join(NETWORKS)}, {ALL} (all of these), vil_tiny, vil_small, or any name of timm; repeatable.",
)
@click.option(
    "--predictions",
    type=NamedFile(),
    multiple=True,
    help="Predictions of any other tool, as a row of the table: a csv with the columns name, predicted and, if there "
    "are several, seed; repeatable.",
)
@click.option("--label", multiple=True, help="Aspect whose MOS is learned; repeatable.  [default: quality]")
@click.option(
    "--protocol",
    type=OneOf("protocol", ["published", "grouped", "leave-one-generator-out"]),
    multiple=True,
    help="Splits, as of `agiqa ablate`; repeatable.  [default: published]",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Seeds 0, 1, ... of each network."
)
@click.option("--folds", type=click.IntRange(min=2), default=5, show_default=True, help="Folds of `grouped`.")
@click.option(
    "--split-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed that draws the splits."
)
@click.option(
    "--validation",
    type=click.FloatRange(min=0.0, max=1.0, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of training (whole prompts) that chooses the epoch.",
)
@click.option(
    "--weights",
    type=WeightsFile(),
    multiple=True,
    help="Pretrained weights (safetensors, or a state dict of torch), such as vil=FILE; repeatable. The name may be "
    "left out with one --model.  [default: timm's, downloaded]",
)
@click.option("--no-pretrained", is_flag=True, help="Begin with random weights.")
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs in which all layers are trained.")
@click.option("--alone-epochs", type=click.IntRange(min=0), help="Epochs before these that train the new layers alone.")
@click.option("--batch-size", type=click.IntRange(min=2), help="Crops per step.")
@click.option("--lr", type=click.FloatRange(min=0.0, min_open=True), help="Peak learning rate of pretrained layers.")
@click.option("--weight-decay", type=click.FloatRange(min=0.0), help="Weight decay.")
@click.option("--loss", help="Loss, as of `agiqa train`.")
@click.option(
    "--image-size", type=click.IntRange(min=1), metavar="PIXELS", help="Side of the crops that networks read."
)
@click.option("--resize", type=click.IntRange(min=1), metavar="PIXELS", help="Side that images are resized to first.")
@click.option("--train-crops", type=click.IntRange(min=1), help="Random crops of each image in one epoch.")
@click.option("--test-crops", type=click.IntRange(min=1), help="Crops whose scores are averaged: 1, 5, or n x n.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.yaml",
    help="Any of the settings in bench/networks/recipes.yaml, one `setting: value` per line; options beat it.",
)
@click.option(
    "--conversations",
    multiple=True,
    metavar="[ASPECT:][SPLIT=]FILE",
    help="M3-AGIQA conversation file, of which only the split is read; repeatable.",
)
@labels_option
@columns_option
@prompt_option
@mos_range_option
@on_bad_item_option
@click.option(
    "--device",
    type=OneOf("device", ["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device; auto is the GPU if there is one.",
)
@click.option(
    "--precision",
    type=OneOf("precision", ["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Precision; auto is bf16 (mixed) on a GPU, and fp32 on a CPU.",
)
@click.option("--workers", type=click.IntRange(min=0), help="Processes that decode images.  [default: one per core]")
@click.option(
    "--cache", type=click.Path(path_type=Path, file_okay=False), help="Folder of resized images.  [default: OUT/cache]"
)
@click.option(
    "--save-seconds",
    type=click.FloatRange(min=0.0),
    default=30.0,
    show_default=True,
    help="Seconds between two saves of a training, at the end of an epoch.",
)
@click.option("--keep-weights", is_flag=True, help="Keep the trained weights in OUT/runs/NAME/network.safetensors.")
@shared_options
def command(
    data: Path,
    out: Path,
    *,
    models: tuple[str, ...],
    predictions: tuple[tuple[str, Path], ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune image networks on the images and MOS of DATA, on the same splits and seeds as heads (Table II).

    Each network has the settings of its paper. Splits, the choice of the epoch on held-out prompts, intervals and
    paired tests are those of `agiqa ablate`: `agiqa report ABLATION OUT` compares networks with heads. Run it again to
    train what is missing or failed; other networks are added to the same OUT.

    It writes OUT/results.jsonl (a line per run), OUT/rows.jsonl (a line per row) and OUT/runs. Needs `agiqa[vision]`.
    """
    from rich.console import Console

    from agiqa.bench.ablation.rows import rows_parts
    from agiqa.bench.networks.networks import Wanted, run_networks
    from agiqa.bench.networks.predicted import read_predicted
    from agiqa.bench.networks.runs import Protocols
    from agiqa.bench.networks.training import Setting
    from agiqa.bench.recording.result_folders import RESULTS, ROWS
    from agiqa.heads.settings.device import resolve_device
    from agiqa.heads.training.progress import training_progress

    chosen = _chosen(models, predictions, options)
    weights = _weights(chosen, options)
    configs = [_config(name, weights.get(name, []), options) for name in chosen]
    device, source = resolve_device(options["device"]), _source(data, options)
    wanted = Wanted(
        networks=configs,
        weights=weights,
        predictions=[read_predicted(name, path, source) for name, path in predictions],
        protocols=Protocols(
            labels=list(dict.fromkeys(options["label"])) or ["quality"],
            names=list(dict.fromkeys(options["protocol"])) or ["published"],
            seeds=range(options["seeds"]),
            folds=options["folds"],
            split_seed=options["split_seed"],
            validation=options["validation"],
        ),
    )
    machine = {name: options[name] for name in ("save_seconds", "keep_weights")}
    setting = Setting(source=source, device=device, **machine)
    progress = training_progress(Console(stderr=True))
    done = run_networks(wanted, out, setting, progress, cache=options["cache"], workers=options["workers"])
    result = {
        "results": str(out / RESULTS),
        "rows": str(out / ROWS),
        "runs": len(done.runs),
        "trained": done.trained,
        "failed": [{"name": name, "error": error} for name, error in done.failed.items()],
        "table": done.rows,
    }
    print_parts(result, rows_parts(done.rows), as_json=as_json)
    fail_if_any(done.failed, total=len(done.runs), what="runs")


def _chosen(
    models: tuple[str, ...], predictions: tuple[tuple[str, Path], ...], options: Mapping[str, Any]
) -> list[str]:
    """The networks, once each. Options that contradict each other are wrong usage."""
    chosen = list(dict.fromkeys(name for model in models for name in (NETWORKS if model == ALL else (model,))))
    names = [*chosen, *(name for name, _ in predictions)]
    repeated = next((name for name in names if names.count(name) > 1), None)
    message = None
    if not names:
        message = f"There is nothing to do: give --model NAME ({', '.join(NETWORKS)}, ...) or --predictions NAME=FILE."
    elif repeated is not None:
        message = f"Two rows are called {repeated!r}: give --predictions another NAME."
    elif options["weights"] and options["no_pretrained"]:
        message = "--weights and --no-pretrained contradict each other: give one of them."
    if message is not None:
        raise click.UsageError(message)
    return chosen


def _weights(chosen: Sequence[str], options: Mapping[str, Any]) -> dict[str, list[Path]]:
    """The files of weights by network. A file of no network, or of one that is not trained, is wrong usage."""
    found: dict[str, list[Path]] = {}
    for name, path in options["weights"]:
        network = chosen[0] if name is None and len(chosen) == 1 else name
        if network is None or network not in chosen:
            trained = ", ".join(chosen) or "none"
            whose = "its network" if name is None else f"one of the networks, not {name!r}"
            message = f"--weights {path} must name {whose}, as in --weights {(*chosen, 'vil')[0]}=FILE ({trained})."
            raise click.UsageError(message)
        found.setdefault(network, []).append(path)
    return found


def _config(name: str, weights: Sequence[Path], options: Mapping[str, Any]) -> "NetworkConfig":
    """The settings of a network: its recipe, the file of --config, the options."""
    from agiqa.bench.networks.building import RANDOM, check_network
    from agiqa.bench.networks.config import network_config, read_changes
    from agiqa.bench.networks.weights import file_sha256
    from agiqa.heads.model.losses import get_loss

    check_network(name)
    hashes = ",".join(map(file_sha256, weights)) or None
    changes = {**read_changes(options["config"]), **{key: options[key] for key in _CHANGES if options[key] is not None}}
    config = network_config(name, {**changes, "weights": RANDOM if options["no_pretrained"] else hashes})
    get_loss(config.loss)
    return config


def _source(data: Path, options: Mapping[str, Any]) -> "ImageSource":
    """The images of DATA with their MOS, each decoded once. Says the notes about them."""
    from agiqa.bench.networks.images import ImageSource
    from agiqa.extract import load_data_set
    from agiqa.progress import say

    names = ("conversations", "labels", "columns", "prompt", "on_bad_item")
    given: dict[str, Any] = {name: options[name] for name in names}
    given["mos_range"] = options["mos_range"] or "recorded"
    data_set = load_data_set(data, variant="no_id", images=True, **given)
    for note in (*data_set.notes, *(f"warning: {warning}" for warning in data_set.warnings)):
        say(note)
    return ImageSource(data_set=data_set, location=str(data))
