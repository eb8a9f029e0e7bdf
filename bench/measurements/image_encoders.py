"""Speed of image encoders in batches and one by one: `python -m agiqa.bench.measurements.image_encoders --help`.

Prepares made-up images once, and times the states of an encoder of timm, or of the image part of a vision-language
model, with random weights: each image alone, and all images of a batch together. Preparing and storing are not timed.
"""

import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from agiqa.bench.measurements.extract import write_images
from agiqa.bench.measurements.measuring import Line, device_name, measured_table, print_tables, result_options
from agiqa.bench.measurements.random_models import SHAPES, RandomMiniCPM
from agiqa.errors import ConfigError
from agiqa.extract.data.items import Message
from agiqa.extract.filling.staging import Transfers
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.taps import TappedBackbone
from agiqa.extract.models.timm_backbone import TimmBackbone
from agiqa.extract.models.timm_models import TIMM, TimmModel, find_timm_model
from agiqa.heads.settings.device import resolve_device

USUAL = (
    "timm:vit_tiny_patch16_224",
    "timm:vit_base_patch16_224",
    "timm:efficientnet_lite0",
    "tiny/vision",
    "tiny/projector",
)
"""Encoders that two cores run in some minutes."""
_ASKED = (Message(role="user", content="?"),)


class RandomTimm(TimmModel):
    """Draws its weights instead of reading them."""

    def loaded(self) -> Any:
        """The encoder with random weights."""
        return self._built(pretrained=False, **self._size).eval().requires_grad_(requires_grad=False)


def random_encoder(name: str, folder: Path, *, device: torch.device, dtype: str) -> Backbone:
    """`timm:NAME`, or `SHAPE/TAP` of a random vision-language model whose settings are written into `folder`."""
    if name.startswith(TIMM):
        return TimmBackbone(RandomTimm(**vars(find_timm_model(name))), dtype=dtype, device=str(device))
    shape, _, tap = name.partition("/")
    if shape not in SHAPES:
        message = f"--encoder {name}: give timm:NAME, or SHAPE/TAP with one of the shapes {', '.join(SHAPES)}."
        raise ConfigError(message)
    whole = SHAPES[shape](folder / shape, device=str(device))
    assert isinstance(whole, RandomMiniCPM)  # as all shapes are
    return TappedBackbone(whole, tap)


def seconds_of(backbone: Backbone, groups: Sequence[Sequence[Prepared]]) -> float:
    """The time of the states of `groups`, whose inputs are on the device; the first group runs once before.

    On a CPU it is that of the process, which other work on the machine hardly changes.
    """
    clock = time.perf_counter if backbone.device.type == "cuda" else time.process_time
    backbone.hidden_states(groups[0])
    _synchronize(backbone.device)
    started = clock()
    for group in groups:
        backbone.hidden_states(group)
    _synchronize(backbone.device)
    return clock() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_line(name: str, folder: Path, images: Sequence[Path], options: Mapping[str, Any]) -> Line:
    """The line of one encoder: the best of `repeats` rounds, in which both ways alternate."""
    device, size = resolve_device(options["device"]), options["batch_size"]
    backbone = random_encoder(name, folder, device=device, dtype=options["dtype"])
    backbone.load()
    items = Transfers(device).upload([backbone.prepare(_ASKED, image) for image in images])
    ways = {"alone": 1, "together": size}
    rounds = [
        {
            way: seconds_of(backbone, [items[first : first + most] for first in range(0, len(items), most)])
            for way, most in ways.items()
        }
        for _ in range(options["repeats"])
    ]
    best = {way: min(one[way] for one in rounds) for way in ways}
    config = {"images": len(items), "batch_size": size, "rows": len(items[0].roles), "dtype": backbone.logical_dtype}
    return {
        "stage": "image encoders",
        "name": name,
        "config": {
            **config,
            "pixels": options["pixels"],
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        },
        "measured": {
            "alone_images_per_s": len(items) / best["alone"],
            "together_images_per_s": len(items) / best["together"],
            "ratio": best["alone"] / best["together"],
        },
    }


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """A line for each encoder that the command line asks for."""
    with tempfile.TemporaryDirectory() as place:
        images = write_images(Path(place) / "images", options["images"], options["pixels"])
        for name in options["encoder"] or USUAL:
            yield measured_line(name, Path(place), images, options)


def tables(lines: Sequence[Line]) -> str:
    """Rates of both ways, and their ratio."""
    columns = {"encoder": lambda line: line["name"]}
    columns |= {
        key.replace("_", " "): partial(lambda line, key: str(line["config"][key]), key=key)
        for key in ("device", "dtype", "images", "batch_size", "rows")
    }
    return measured_table(columns, ("alone_images_per_s", "together_images_per_s", "ratio"), lines)


@click.command()
@click.option(
    "--encoder",
    multiple=True,
    help=f"timm:NAME, or SHAPE/TAP such as minicpm-8b/vision; repeatable.  [default: {', '.join(USUAL)}]",
)
@click.option("--images", default=32, show_default=True, help="Made-up images.")
@click.option("--pixels", default=224, show_default=True, help="Side of the images.")
@click.option("--batch-size", default=8, show_default=True, help="Images together; 8 is what a CPU gets by default.")
@click.option("--repeats", default=3, show_default=True, help="Rounds, of which the fastest counts.")
@click.option("--dtype", default="auto", show_default=True, help="Of encoders of timm.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Time image encoders in batches and one by one."""
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


def _summary(line: Line) -> str:
    measured = line["measured"]
    return (
        f"{line['name']}: {measured['together_images_per_s']:.1f} images/s, {measured['ratio']:.2f} times those alone"
    )


if __name__ == "__main__":
    main()
