"""Stage 2 in one call: a model, here or on a server, describes every image of a data set and rates it in one word."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from agiqa.errors import ConfigError
from agiqa.extract import DataSet, DescriptionResult, DescriptionSettings, load_data_set, run_descriptions
from agiqa.extract.describing.rounds import preset
from agiqa.extract.describing.served import run_served_descriptions, sent
from agiqa.extract.models.opening import check_writes_text, opened, opener_of
from agiqa.extract.models.preparing import Opener
from agiqa.heads.evaluation.rating_words import parse_rating_word
from agiqa.progress import say


def describe(
    data: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    adapter: str | None = None,
    max_slices: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    server: str | None = None,
    key_env: str | None = None,
    jobs: int = 8,
    labels: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    aspect: str = "quality",
    settings: str = "greedy",
    seed: int = 0,
    max_new_tokens: int = 1024,
    on_bad_item: Literal["fail", "skip"] = "fail",
    batch_size: int | None = None,
    workers: int | None = 0,
) -> DescriptionResult:
    """Let the model describe every image of `data` and rate it in one word; run it again to resume.

    `data`, `labels`, `columns`, `prompt` and `on_bad_item` are those of `agiqa.extract.load_data_set`; MOS are not
    read. `out` is a file that ends in .jsonl. `model`, `adapter`, `dtype`, `device` and `max_slices` are those of
    `agiqa.extract.open_backbone`; with `server`, the URL of one of OpenAI's format, `model` is its name there,
    `key_env` the environment variable with the key, and `jobs` the number of images at the same time. `settings` is
    `greedy`, or `published`: the sampling of MiniCPM-Llama3-V-2.5, with `seed`. Longer descriptions than
    `max_new_tokens` are cut. `batch_size` images are in work at the same time (None: what the memory allows), prepared
    by `workers` processes (0: by this one, None: chosen).

    Notes go to the error stream. Raises DataError for items that cannot be used, ModelError for the model, WorkerError
    for a server that fails, ConfigError or UnknownName for options.
    """
    path = Path(out)
    if path.suffix.lower() != ".jsonl":
        message = f"{path}: descriptions are JSON lines. Give a name that ends in .jsonl."
        raise ConfigError(message)
    first, second = preset(settings, max_new_tokens=max_new_tokens, seed=seed)
    chosen = DescriptionSettings(
        aspect=aspect, describe=first, rate=second, batch_size=batch_size, on_bad_item=on_bad_item
    )
    load = partial(
        load_data_set,
        data,
        labels=labels,
        columns=columns,
        prompt=prompt,
        variant="no_id",
        aspect=aspect,
        mos_range=None,  # MOS are not needed
        on_bad_item=on_bad_item,
    )
    if server is not None:
        return _on_server(load, path, chosen, server=server, model=str(model), variable=key_env, jobs=jobs)
    check_writes_text(str(model))
    opener = opener_of(str(model), adapter=adapter, dtype=dtype, max_slices=max_slices)
    return _here(load, path, chosen, opener, device=device, workers=workers)


def _here(
    load: Callable[..., DataSet],
    out: Path,
    settings: DescriptionSettings,
    opener: Opener,
    *,
    device: str,
    workers: int | None,
) -> DescriptionResult:
    backbone = opened(opener, device)  # a model that cannot be opened is reported before the images are checked
    if not backbone.reads_images:
        say("warning: this model reads no images; it describes the prompts alone")
    data_set = _noted(load(images=backbone.reads_images))
    return run_descriptions(
        data_set, backbone, out, settings, rating_of=parse_rating_word, workers=workers, opener=opener
    )


def _on_server(
    load: Callable[..., DataSet],
    out: Path,
    settings: DescriptionSettings,
    *,
    server: str,
    model: str,
    variable: str | None,
    jobs: int,
) -> DescriptionResult:
    from agiqa.extract.teaching.apis import api_of
    from agiqa.extract.teaching.client import Client, key_for  # httpx2

    api = api_of("openai", server)
    with Client(api, model, key=key_for(api, variable)) as client:
        data_set = _noted(load(images=True))
        if sent(settings).describe != settings.describe:
            say("note: OpenAI's format has no top_k and no repetition penalty, so the server uses its own")
        return run_served_descriptions(data_set, client, out, settings, rating_of=parse_rating_word, jobs=jobs)


def _noted(data_set: DataSet) -> DataSet:
    """`data_set`, after its notes are shown."""
    for note in data_set.notes:
        say(note)
    return data_set
