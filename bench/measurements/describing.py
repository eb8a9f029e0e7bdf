"""Speed of `agiqa describe`: `python -m agiqa.bench.measurements.describing [--out FILE.jsonl]`.

MiniCPM-Llama3-V-2.5 in its real shape with random weights, drawn on the device, describes made-up images and rates
them. It can say whole words only, so that the text of an answer has the tokens that were generated, and nothing ends an
answer before its limit. The same run times the batches in which models that do not fit slots answer. Needs a GPU with
40 GB or more, and two to three minutes.
"""

import json
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from agiqa.bench.measurements.decoding import Work, agreement_line, free, phase_line, profiled, synchronize
from agiqa.bench.measurements.extract import write_images
from agiqa.bench.measurements.measuring import (
    Line,
    device_name,
    goal_cells,
    goal_table,
    joined,
    measured_table,
    print_tables,
    result_options,
)
from agiqa.bench.measurements.random_models import SHAPES
from agiqa.extract import DataSet, DescriptionSettings, GenerationSettings, Item
from agiqa.extract.describing.asking import Describer
from agiqa.extract.describing.continuous import Conversations
from agiqa.extract.describing.describing import write_descriptions
from agiqa.extract.describing.rounds import Described
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.preparing import Preparation, default_workers
from agiqa.progress import say

TOKENS_PER_SECOND, IMAGES_PER_SECOND = 8000.0, 20.0
"""Goals: decoding, and from files to lines."""
RATING = GenerationSettings(max_new_tokens=16)
_OLD_BATCH = 8
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' }}"
    "{{ ' ' if message['role'] == 'assistant' }}{{ message['content'] | trim }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
"""Writes the space before the first word that the text of an answer has lost."""


@contextmanager
def made_up_work(options: Mapping[str, Any]) -> Generator[Work]:
    """Images in a temporary folder, and a model that says words alone."""
    with tempfile.TemporaryDirectory(dir=options["folder"]) as made:
        folder = Path(made)
        opener = partial(SHAPES[options["model_shape"]], folder / "model")
        opener(device="cpu")  # writes the settings
        (folder / "model" / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
        backbone = opener(device=options["device"])
        assert isinstance(backbone, HuggingFaceBackbone)  # it is a MiniCPM
        backbone.load()
        with torch.inference_mode():
            backbone.lm_head()[~torch.from_numpy(words_of(backbone))] = 0.0
        random = np.random.default_rng(2)
        items = [
            Item(
                name=path.name,
                prompt="a dog and a cat " * int(random.integers(1, 5)),
                conversation=(),
                image=path,
                labels={},
                split="train",
                generator=None,
                description=None,
            )
            for path in write_images(folder / "images", options["items"], options["pixels"])
        ]
        data = DataSet(name="made up", items=tuple(items), skipped=())
        yield Work(folder=folder, opener=opener, backbone=backbone, data=data)


def words_of(backbone: HuggingFaceBackbone) -> Any:
    """(V,) whether a token is a whole word with a space before it: such words stay as they are when read again."""
    tokenizer = backbone.renderer.tokenizer
    found = np.zeros(backbone.vocab_size, bool)
    for token in range(min(len(tokenizer), backbone.vocab_size)):
        text = tokenizer.decode([token])
        if text.startswith(" ") and text[1:].isalpha():
            found[token] = tokenizer(text, add_special_tokens=False)["input_ids"] == [token]
    return found


class TimedPreparation(Preparation[Any]):
    """Counts the seconds that the reader waits for prepared items."""

    waited = 0.0

    def groups(self, *args: Any, **options: Any) -> Iterator[Any]:
        """As Preparation."""
        found = super().groups(*args, **options)
        while True:
            started = time.perf_counter()
            group = next(found, None)
            self.waited += time.perf_counter() - started
            if group is None:
                return
            yield group


class TimedDescriber(Describer):
    """Counts the seconds of all answers."""

    answering = 0.0

    def batches(self, batches: Sequence[Sequence[Item]]) -> Iterator[list[Described | str]]:
        """As Describer."""
        self.preparation.waited = 0.0  # type: ignore[attr-defined]
        started = time.perf_counter()
        for outcomes in super().batches(batches):
            self.answering += time.perf_counter() - started
            yield outcomes
            started = time.perf_counter()
        self.answering += time.perf_counter() - started


class BatchDescriber(TimedDescriber):
    """Answers in batches, as for a model that does not fit slots."""

    @cached_property
    def conversations(self) -> Conversations | None:
        """None: no slots."""
        return None


def whole_line(name: str, kind: type[TimedDescriber], work: Work, settings: DescriptionSettings) -> Line:
    """One run from files to lines. The weights are loaded and the workers have started, which a command does at once.

    The time of the plan includes the trial that decides whether the model fits slots.
    """
    backbone, data, out = work.backbone, work.data, file_of(work, name)
    synchronize(backbone.device)
    if backbone.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    workers = default_workers(backbone.device, len(data.items))
    with TimedPreparation(backbone, workers=workers, opener=work.opener) as preparation:
        preparation.start()
        describer = kind(backbone, settings, preparation=preparation)
        describer.prepare([describer.first(item) for item in data.items[: max(1, workers)]])
        start, started = time.perf_counter() - started, time.perf_counter()
        result = write_descriptions(data, describer, out, rating_of=lambda _answer: None)
        waited = preparation.waited
    seconds = time.perf_counter() - started
    new = sum(line["tokens"]["description"] + line["tokens"]["answer"] for line in result.lines)
    prompts = [line["tokens"]["prompt"] for line in result.lines]
    measured = {
        "images_per_second": len(result.lines) / seconds,
        "answering_images_per_second": len(result.lines) / describer.answering,
        "new_tokens_per_second": new / describer.answering,
        "seconds": seconds,
        "start_seconds": start,
        "plan_seconds": seconds - describer.answering,
        "waited_seconds": waited,
        "peak_gb": torch.cuda.max_memory_reserved() / 1e9 if backbone.device.type == "cuda" else 0.0,
    }
    config = {
        "items": len(result.lines),
        "prompt_tokens": float(np.mean(prompts)),
        "new_tokens": new / len(result.lines),
        "workers": workers,
        "decoder": result.lines[0]["decoder"],
    }
    return {"stage": "describe", "name": name, "config": config, "measured": measured}


def file_of(work: Work, name: str) -> Path:
    """The descriptions of a run."""
    return work.folder / f"{name.replace(' ', '-')}.jsonl"


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """Lines of both ways from files to lines, of the phases, and of the agreement with single items."""
    first = GenerationSettings(max_new_tokens=options["new_tokens"])
    settings = DescriptionSettings(describe=first, rate=RATING, batch_size=options["slots"])
    with made_up_work(options) as work:
        backbone, data = work.backbone, work.data
        shape = {"model": options["model_shape"], "pixels": options["pixels"], "device": device_name(backbone.device)}

        def dated(line: Line) -> Line:
            return {**line, "config": {**line["config"], **shape}}

        yield dated(whole_line("slots", TimedDescriber, work, settings))
        free(backbone.device)
        few = replace(data, items=data.items[: options["old_items"]])
        old = replace(settings, batch_size=_OLD_BATCH)
        yield dated(whole_line("batches of 8", BatchDescriber, replace(work, data=few), old))
        free(backbone.device)
        for slots in options["phase_slots"]:
            yield dated(phase_line(work, slots))
            free(backbone.device)
        for name in ("slots", "batches of 8"):
            yield dated(agreement_line(work, name, file_of(work, name)))
        if options["profile"]:
            say(profiled(work, options["phase_slots"][-1]))


def tables(lines: Sequence[Line]) -> str:
    """Markdown tables of result lines, and the goals."""
    name = {"name": lambda line: line["name"]}
    by_stage = {
        stage: [line for line in lines if line["stage"] == stage]
        for stage in ("describe", "describe phases", "describe agreement")
    }
    whole = {
        key.replace("_", " "): lambda line, key=key: f"{line['config'][key]:.0f}"
        for key in ("items", "prompt_tokens", "new_tokens")
    }
    rates = ("images_per_second", "answering_images_per_second", "new_tokens_per_second", "seconds")
    others = ("start_seconds", "plan_seconds", "waited_seconds", "peak_gb")
    phases = ("images_ms", "read_ms", "step_ms", "tokens_per_second", "capture_ms", "read_on_ms")
    agreement = ("answers", "differing", "median_first_token", "median_lead", "largest_lead", "median_lead_anywhere")
    return joined(
        measured_table({**name, **whole}, (*rates, *others), by_stage["describe"]),
        measured_table(name, (*phases, "step_without_graph_ms", "trial_ms"), by_stage["describe phases"]),
        measured_table(name, agreement, by_stage["describe agreement"]),
        goal_table(_goal_rows(by_stage)),
    )


def _goal_rows(by_stage: Mapping[str, Sequence[Line]]) -> Iterator[list[str]]:
    for line in by_stage["describe"]:
        if line["name"] == "slots" and line["config"]["device"] != "cpu":
            rate = line["measured"]["images_per_second"]
            yield ["images per second, from files to lines", *goal_cells(rate, at_least=IMAGES_PER_SECOND)]
    for line in by_stage["describe phases"]:
        if line["config"]["device"] != "cpu":
            rate = line["measured"]["tokens_per_second"]
            yield [f"{line['name']}: new tokens per second", *goal_cells(rate, at_least=TOKENS_PER_SECOND)]


def _summary(line: Line) -> str:
    return f"{line['name']}: {json.dumps({key: round(value, 3) for key, value in line['measured'].items()})}"


@click.command()
@click.option("--model-shape", type=click.Choice(list(SHAPES)), default="minicpm-8b", show_default=True)
@click.option("--items", default=256, show_default=True, help="Images.")
@click.option("--old-items", default=16, show_default=True, help="Images of the run in batches of 8.")
@click.option("--pixels", default=512, show_default=True, help="Side of the images in pixels.")
@click.option("--new-tokens", default=128, show_default=True, help="Tokens of each description.")
@click.option("--slots", type=int, help="Slots of the decoder [default: what the memory allows].")
@click.option("--phase-slots", multiple=True, type=int, default=(32, 128, 256), show_default=True)
@click.option("--profile", is_flag=True, help="Print the kernels of a step.")
@click.option("--device", default="auto", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for temporary images and descriptions.")
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Time descriptions in slots and in batches, and what a step of the decoder takes."""
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


if __name__ == "__main__":
    main()
