"""`agiqa predict`: the scores of a trained head, item by item."""

import csv
from pathlib import Path
from typing import Any

import click

from agiqa.commands.options import (
    StoreLocation,
    interval_option,
    prediction_options,
    run_variant_option,
    shared_options,
)
from agiqa.commands.output import print_result


@click.command("predict")
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=StoreLocation())
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@interval_option
@run_variant_option
@prediction_options
@shared_options
def command(
    run: Path,
    store: str | Path,
    out: Path,
    variant: str | None,
    device: str,
    batch_size: int,
    *,
    interval: float | None,
    as_json: bool,
) -> None:
    """Write the scores of the head RUN for every item of STORE to the csv OUT (name, prompt, predicted).

    A head with several labels writes a column predicted_LABEL for each. Scores are on the MOS scale that the head was
    trained on. A head that predicts a spread (losses kl, ordinal and nll) writes it, a standard deviation on that
    scale. --interval .9 writes low and high: they hold the true MOS of 90 % of images that are like the validation
    items of the run. For other generators, prompts or data sets nothing is promised; `agiqa evaluate` measures it.
    """
    from agiqa.errors import DataError
    from agiqa.extract.data.image_names import images_below
    from agiqa.heads import load_run
    from agiqa.heads.data.scales import scales_record
    from agiqa.heads.data.variants import as_variant
    from agiqa.heads.evaluation.intervals import UNLIKE, conformal_scores, predicted_columns
    from agiqa.progress import say
    from agiqa.store import open_store
    from agiqa.store.format.labels import range_text

    if not out.parent.is_dir():
        message = f"{out.parent} is not a folder. Create it, or write to another path."
        raise DataError(message)
    if isinstance(store, Path) and not (store / "store.zarr").exists() and store.is_dir() and images_below(store):
        message = (
            f"{store} is a folder of images, not a store. `agiqa score {store} --run {run} --model MODEL --prompt "
            "TEXT` predicts their MOS without a store."
        )
        raise DataError(message)
    head = load_run(run)
    source = as_variant(open_store(store), variant or head.train.variant)
    columns = predicted_columns(head, source, level=interval, device=device, batch_size=batch_size)
    if interval is not None and source.id != head.store_id:
        say(f"warning: {UNLIKE}")
    temporary = out.with_name(f".{out.name}.new")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "prompt", *columns])
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        writer.writerows(
            [name, prompt, *(f"{value:.6f}" for value in row)]
            for name, prompt, row in zip(source.items.names, source.items.prompts, rows, strict=True)
        )
    temporary.replace(out)
    count, scales = len(source.items.names), dict.fromkeys(range_text(scale) for scale in head.scales)
    result: dict[str, Any] = {"out": str(out), "items": count}
    result["mos_ranges"] = scales_record(head.train.labels, head.scales)
    text = f"{out}: {count} scores, on {' and '.join(scales)}"
    if interval is not None:
        errors = len(conformal_scores(head, source).errors)
        result |= {"interval": interval, "validation_items": errors}
        text += f", with {100 * interval:.4g} % intervals from {errors} validation items"
    print_result(result, text, as_json=as_json)
