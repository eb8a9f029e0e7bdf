"""Stage 2 in one call: a model, here or on a server, describes every image of a data set and rates it in one word."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from agiqa.errors import ConfigError
from agiqa.extract import (
    Backbone,
    DataSet,
    DescriptionResult,
    DescriptionSettings,
    ExtractionSettings,
    LengthRule,
    load_data_set,
    run_descriptions,
    run_stored_descriptions,
)
from agiqa.extract.describing.rounds import preset
from agiqa.extract.describing.served import run_served_descriptions, sent
from agiqa.extract.filling.one_pass import check_one_pass
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
    store: str | Path | None = None,
    variant: str = "id",
    mos_range: tuple[float, float] | Literal["recorded"] = "recorded",
    **stored: Any,
) -> DescriptionResult:
    """Let the model describe every image of `data` and rate it in one word; run it again to resume.

    `data`, `labels`, `columns`, `prompt` and `on_bad_item` are those of `agiqa.extract.load_data_set`; MOS are not
    read without a `store`. `out` is a file that ends in .jsonl. `model`, `adapter`, `dtype`, `device` and `max_slices`
    are those of `agiqa.extract.open_backbone`; with `server`, the URL of one of OpenAI's format, `model` is its name
    there, `key_env` the environment variable with the key, and `jobs` the number of images at the same time. `settings`
    is `greedy`, or `published`: the sampling of MiniCPM-Llama3-V-2.5, with `seed`. Longer descriptions than
    `max_new_tokens` are cut. `batch_size` images are in work at the same time (None: what the memory allows), prepared
    by `workers` processes (0: by this one, None: chosen).

    With `store`, its path, the same pass fills the store that `agiqa.extract` would make of `out` for the conversation
    `variant`; the result then has its `extraction`. `mos_range` is that of `load_data_set`, and `stored` are fields of
    `agiqa.extract.ExtractionSettings`, such as `encoding="sketch"` and `rank=64`.

    Notes go to the error stream. Raises DataError for items that cannot be used, ModelError for the model, WorkerError
    for a server that fails, ConfigError or UnknownName for options.
    """
    path = Path(out)
    if path.suffix.lower() != ".jsonl":
        message = f"{path}: descriptions are JSON lines. Give a name that ends in .jsonl."
        raise ConfigError(message)
    _check_store(store, server, {**stored, **({} if variant == "id" else {"variant": variant})})
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
        mos_range=None if store is None else mos_range,  # descriptions need no MOS
        on_bad_item=on_bad_item,
    )
    if server is not None:
        return _on_server(load, path, chosen, server=server, model=str(model), variable=key_env, jobs=jobs)
    check_writes_text(str(model))
    opener = opener_of(str(model), adapter=adapter, dtype=dtype, max_slices=max_slices)
    backbone = opened(opener, device)  # a model that cannot be opened is reported before the images are checked
    if store is None:
        return _here(load, path, chosen, backbone, opener, workers=workers)
    stored = {"length": LengthRule(on_bad_item=on_bad_item), **stored}
    extraction = ExtractionSettings(variant=variant, aspect=aspect, device=device, workers=workers, **stored)
    return _into_store(load, path, Path(store), chosen, extraction, backbone, opener)


def _here(
    load: Callable[..., DataSet],
    out: Path,
    settings: DescriptionSettings,
    backbone: Backbone,
    opener: Opener,
    *,
    workers: int | None,
) -> DescriptionResult:
    data_set = _loaded(load, backbone)
    return run_descriptions(
        data_set, backbone, out, settings, rating_of=parse_rating_word, workers=workers, opener=opener
    )


def _check_store(store: str | Path | None, server: str | None, stored: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings of a store without one, and for a store with a server; TypeError for others."""
    unknown = stored.keys() - {field.name for field in fields(ExtractionSettings)}
    if unknown:
        message = f"describe() got an unexpected keyword argument {sorted(unknown)[0]!r}"
        raise TypeError(message)
    if store is None and stored:
        message = f"{', '.join(stored)}: settings of a store, and there is none. Give `store` too, or leave them out."
        raise ConfigError(message)
    if store is not None and server is not None:
        message = (
            "A server hands out no hidden states, so nothing would fill the store. Leave `store` out; then extract "
            "with the model here: agiqa extract DATA STORE --conversations OUT.jsonl."
        )
        raise ConfigError(message)


def _into_store(
    load: Callable[..., DataSet],
    out: Path,
    store: Path,
    settings: DescriptionSettings,
    extraction: ExtractionSettings,
    backbone: Backbone,
    opener: Opener,
) -> DescriptionResult:
    check_one_pass(extraction, store, backbone, opener)
    data_set = _loaded(load, backbone)
    for warning in data_set.warnings:
        say(f"warning: {warning}")
    return run_stored_descriptions(
        data_set, backbone, out, store, settings, extraction, rating_of=parse_rating_word, opener=opener
    )


def _loaded(load: Callable[..., DataSet], backbone: Backbone) -> DataSet:
    """The data set for `backbone`, after its notes are shown."""
    if not backbone.reads_images:
        say("warning: this model reads no images; it describes the prompts alone")
    return _noted(load(images=backbone.reads_images))


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
