"""`agiqa predict`: the scores of a trained head, item by item."""

import csv
from pathlib import Path

import click

from agiqa.commands.options import StoreLocation, prediction_options, shared_options
from agiqa.commands.output import print_result


@click.command("predict")
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=StoreLocation())
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@prediction_options
@shared_options
def command(run: Path, store: str | Path, out: Path, device: str, batch_size: int, *, as_json: bool) -> None:
    """Write the scores of the head RUN for every item of STORE to the csv OUT (name, prompt, predicted).

    A head with several labels writes a column predicted_LABEL for each. Scores are on the MOS scale that the head was
    trained on.
    """
    from agiqa.errors import DataError
    from agiqa.extract.data.image_names import images_below
    from agiqa.heads import load_run, predict
    from agiqa.heads.data.scales import scales_record
    from agiqa.heads.settings.labels import column_names
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
    source = open_store(store)
    head = load_run(run)
    columns = column_names(head.train.labels, "predicted")
    scores = predict(head, source, device=device, batch_size=batch_size).reshape(-1, len(columns))
    temporary = out.with_name(f".{out.name}.new")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "prompt", *columns])
        writer.writerows(
            [name, prompt, *(f"{score:.6f}" for score in row)]
            for name, prompt, row in zip(source.items.names, source.items.prompts, scores.tolist(), strict=True)
        )
    temporary.replace(out)
    result = {"out": str(out), "items": len(scores), "mos_ranges": scales_record(head.train.labels, head.scales)}
    scales = dict.fromkeys(range_text(scale) for scale in head.scales)
    print_result(result, f"{out}: {len(scores)} scores, on {' and '.join(scales)}", as_json=as_json)
