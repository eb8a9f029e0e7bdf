"""`agiqa teach`: stage 1, an online model explains the MOS of every image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from agiqa.commands.help import SectionedCommand
from agiqa.commands.options import shared_options
from agiqa.commands.output import print_result, table
from agiqa.commands.teach_options import (
    ASPECTS,
    SECTIONS,
    batch_options,
    data_options,
    patience_options,
    question_options,
    teacher_options,
)

if TYPE_CHECKING:
    from agiqa.extract import DataSet, Item
    from agiqa.extract.teaching.batch_steps import BatchSettings
    from agiqa.extract.teaching.job import Splits, TeachingSettings
    from agiqa.extract.teaching.teacher import TeacherModel


@click.command("teach", cls=SectionedCommand, sections=SECTIONS)
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@teacher_options
@question_options
@batch_options
@patience_options
@data_options
@shared_options
def command(data: Path, out: Path, *, as_json: bool, **options: Any) -> None:
    """Let an online model explain the MOS of every image of DATA. Run it again to resume.

    DATA is a folder with data.csv (and images/), a table (csv, xlsx, json, parquet), or an M3-AGIQA conversation file
    with --labels. OUT is a journal of JSON lines, one per image. Beside OUT.jsonl, each run writes OUT.ASPECT.jsonl:
    conversations that `agiqa tune` and `agiqa extract --conversations` read.

    With --batch, OUT.batches.json records what has been sent, so that a run that was stopped or killed pays for
    nothing twice.

    The key of the provider comes from an environment variable: OPENAI_API_KEY for --api openai, GEMINI_API_KEY for
    --api gemini. A server given by --base-url gets no key unless --key-env names its variable.
    """
    from agiqa.errors import ConfigError
    from agiqa.progress import say

    if out.suffix.lower() != ".jsonl":
        message = f"{out}: explanations are JSON lines. Give a name that ends in .jsonl."
        raise ConfigError(message)
    models = _models(options)  # a missing key is reported before the images are checked
    data_set = _load(data, options)
    settings, splits = _settings(data_set, options), _splits(data_set.items, options)
    if options["dry_run"]:
        estimate = _estimate(options, data_set, out, models, settings, splits)
        print_result(estimate, _estimate_text(estimate), as_json=as_json)
        return
    result = _run(options, data_set, out, models, settings, splits)
    for line in result["skipped"]:
        say(f"skipped {line}")
    left = result["refused"] + result["failed"]
    if left:
        say(f"note: {left} items were refused or failed, see `reason` in {out}; --retry-failed asks about them again")
    print_result(result, _text(result), as_json=as_json)
    if result["stopped"] == "budget":
        message = (
            f"The budget of {options['budget']:g} USD allows no further request: {result['missing']} of "
            f"{result['items']} items are missing. Run the same command again with a larger --budget."
        )
        raise ConfigError(message)


def _estimate(
    options: Mapping[str, Any],
    data_set: "DataSet",
    out: Path,
    models: "Sequence[TeacherModel]",
    settings: "TeachingSettings",
    splits: "Splits",
) -> dict[str, Any]:
    """What the run would send, in tokens and USD."""
    from agiqa.extract.teaching.batches import estimate_batches
    from agiqa.extract.teaching.job import TeachingJob

    if options["batch"]:
        return estimate_batches(data_set, out, models, settings, _batches(options), splits=splits)
    job = TeachingJob(data_set, out, models, settings, splits)
    return job.dry_run(job.pending())


def _run(
    options: Mapping[str, Any],
    data_set: "DataSet",
    out: Path,
    models: "Sequence[TeacherModel]",
    settings: "TeachingSettings",
    splits: "Splits",
) -> dict[str, Any]:
    """The result of the run, JSON-able."""
    from agiqa.extract.teaching.batches import run_batches
    from agiqa.extract.teaching.teaching import run_teaching

    if options["batch"]:
        result, outcome = run_batches(data_set, out, models, settings, _batches(options), splits=splits)
        return result.as_dict() | {"batches": outcome.as_dict()}
    return run_teaching(data_set, out, models, settings, splits=splits).as_dict()


def _batches(options: Mapping[str, Any]) -> "BatchSettings":
    from agiqa.extract.teaching.batch_steps import BatchSettings

    return BatchSettings(most_requests=options["batch_requests"], interval=options["poll"], wait=options["wait"])


def _models(options: Mapping[str, Any]) -> "list[TeacherModel]":
    """The teacher, and the fallback if there is one."""
    from agiqa.extract.teaching.apis import api_of
    from agiqa.extract.teaching.client import key_for
    from agiqa.extract.teaching.teacher import TeacherModel
    from agiqa.extract.teaching.wording_and_prices import PriceTable, read_yaml, shipped_prices

    prices = shipped_prices() if options["prices"] is None else read_yaml(options["prices"], PriceTable)
    chosen = [(options["teacher"], options["api"], options["base_url"], options["key_env"])]
    if options["fallback"] is not None:
        api, base_url, key_env = (options[f"fallback_{name}"] for name in ("api", "base_url", "key_env"))
        if api is None and base_url is None:  # the server of the teacher
            base_url, key_env = options["base_url"], key_env or options["key_env"]
        chosen.append((options["fallback"], api or options["api"], base_url, key_env))
    found: list[TeacherModel] = []
    for model, api_name, base_url, key_env in chosen:
        api = api_of(api_name, base_url)
        key = None if options["dry_run"] else key_for(api, key_env)
        price = prices.price(api.base_url, model, batch=options["batch"])
        found.append(TeacherModel(api=api, model=model, key=key, price=price))
    return found


def _load(data: Path, options: Mapping[str, Any]) -> Any:
    """The data set, its images checked."""
    from agiqa.extract import load_data_set
    from agiqa.progress import say

    on_bad_item: Literal["fail", "skip"] = options["on_bad_item"]
    data_set = load_data_set(
        data,
        labels=options["labels"],
        columns=options["columns"],
        variant="no_id",
        images=True,
        mos_range=options["mos_range"] or "recorded",
        on_bad_item=on_bad_item,
    )
    for note in data_set.notes:
        say(note)
    return data_set


def _settings(data_set: "DataSet", options: Mapping[str, Any]) -> "TeachingSettings":
    from agiqa.extract.teaching.client import ClientSettings
    from agiqa.extract.teaching.job import TeachingSettings
    from agiqa.extract.teaching.questions import QuestionSettings
    from agiqa.extract.teaching.wording_and_prices import Wording, read_yaml, shipped_wording
    from agiqa.store.format.labels import DEFAULT_RANGE

    labelled = tuple(aspect for aspect in ASPECTS if any(aspect in item.labels for item in data_set.items))
    wording = shipped_wording() if options["wording"] is None else read_yaml(options["wording"], Wording)
    question = QuestionSettings(
        aspects=options["aspects"] or labelled or ASPECTS,
        blind=options["blind"],
        mos_range=data_set.mos_range or DEFAULT_RANGE,
        wording=wording,
        max_tokens=options["max_new_tokens"],
        temperature=options["temperature"],
        schema=options["schema"],
    )
    client = ClientSettings(
        timeout=options["timeout"],
        patience=60.0 * options["patience"],
        requests_per_minute=options["requests_per_minute"],
        tokens_per_minute=options["tokens_per_minute"],
    )
    own = {name: options[name] for name in ("jobs", "retries", "budget", "retry_failed")}
    return TeachingSettings(question=question, client=client, **own)


def _splits(items: "Sequence[Item]", options: Mapping[str, Any]) -> "Splits":
    """The splits of the table, or whole prompts drawn for test and val."""
    import numpy as np

    from agiqa.errors import ConfigError
    from agiqa.extract.teaching.job import Splits
    from agiqa.heads.data.splits import hold_out

    given = any(item.split is not None for item in items)
    if (options["split"] or ("table" if given else "prompts")) == "table":
        return Splits(of={item.name: item.split for item in items}, rule={"by": "table"})
    if given:
        message = "DATA has splits, which drawn ones would contradict. Leave --split out, or remove the column `split`."
        raise ConfigError(message)
    prompts, seed = [item.prompt for item in items], options["seed"]
    left, of = np.arange(len(items)), dict[str, str | None]()
    for stream, part in enumerate(("test", "val")):
        share = options[f"{part}_share"]
        if share:
            drawn = hold_out(prompts, left, share, [seed, stream], remedy=f"Or give --{part}-share 0.")
            of |= {items[k].name: part for k in drawn.tolist()}
            left = np.setdiff1d(left, drawn)
    rule = {"by": "prompts", "seed": seed, "test_share": options["test_share"], "val_share": options["val_share"]}
    return Splits(of=of | {items[k].name: "train" for k in left.tolist()}, rule=rule)


def _text(result: Mapping[str, Any]) -> str:
    """The result for people."""
    shown = {name: result[name] for name in ("out", "items", "explained", "refused", "failed", "missing", "asked")}
    cost = {name: _usd(result[name]) for name in ("cost_usd", "counted_usd")}
    files = ", ".join(result["conversations"].values()) or "none"
    batches = result.get("batches")
    open_ = {} if batches is None else {"open batches": ", ".join(batches["open"]) or "none"}
    return table(shown | {"skipped": len(result["skipped"]), **cost, **open_, "conversations": files})


def _estimate_text(estimate: Mapping[str, Any]) -> str:
    tokens, batches = estimate["tokens"], estimate.get("batches")
    return table(
        {
            "items": estimate["items"],
            "requests": estimate["requests"],
            "tokens": f"about {tokens['input']} sent and {tokens['output']} received",
            "cost": _usd(estimate["cost_usd"]),
            "spent": _usd(estimate["spent_usd"]),
            **({} if batches is None else {"batches": f"{batches['to_create']} to create, {batches['open']} open"}),
        }
    )


def _usd(cost: float | None) -> str:
    return "unknown" if cost is None else f"{cost:.4f} USD"
