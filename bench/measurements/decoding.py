"""The parts of `agiqa.bench.measurements.describing`: times of the decoder's passes, and whose answers differ."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agiqa.bench.measurements.measuring import Line
from agiqa.extract import DataSet, DescriptionSettings, GenerationSettings
from agiqa.extract.describing.asking import Describer
from agiqa.extract.describing.continuous import GROUP
from agiqa.extract.describing.rounds import prepare_question
from agiqa.extract.models import Prepared
from agiqa.extract.models.decoding.choosing import Policy
from agiqa.extract.models.decoding.decoder import SUFFIX_ROWS, SUFFIX_WIDTH, Ask, Decoder
from agiqa.extract.models.decoding.eligibility import slot_shapes
from agiqa.extract.models.decoding.slot_model import Suffix
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.preparing import Opener

LENGTH, LIMIT = 1536, 1024
"""Tokens of a slot and of the longest answer, as by default with prompts of 400 tokens."""
GREEDY = Policy.of(GenerationSettings())
_REPEATS = 20


@dataclass(frozen=True, kw_only=True)
class Work:
    """Made-up images, and a loaded model for them."""

    folder: Path
    opener: Opener
    backbone: HuggingFaceBackbone
    data: DataSet

    def prepared(self, count: int) -> list[Prepared]:
        """The first questions about the first `count` images."""
        describer = Describer(self.backbone, DescriptionSettings())
        found = describer.prepare([describer.first(item) for item in self.data.items[:count]])
        return [one for one in found if isinstance(one, Prepared)]

    def decoder(self, slots: int, *, graphs: bool = True) -> Decoder:
        """Of slots as by default."""
        loaded = self.backbone.answering_parts()
        shapes = slot_shapes(loaded)
        return Decoder(
            loaded, shapes, slots=slots, length=LENGTH, policies=[GREEDY], limit=LIMIT, stops=[], graphs=graphs
        )


def phase_line(work: Work, slots: int) -> Line:
    """The time of each part of the work in milliseconds: reading prompts, a step, and reading on."""
    device, loaded = work.backbone.device, work.backbone.answering_parts()
    items = work.prepared(min(GROUP, slots))
    measured = {"trial_ms": timed(lambda: slot_shapes(loaded), device, 1)}
    with torch.inference_mode():
        measured["images_ms"] = timed(lambda: loaded.collate(items), device, 3)
    measured |= pass_times(work.decoder(slots), items, device)
    free(device)
    plain = work.decoder(slots, graphs=False)
    measured["step_without_graph_ms"] = timed(lambda: plain.step(2), device, 2) / 2
    config = {"slots": slots, "group": len(items), "held": len(items[0].token_ids)}
    return {"stage": "describe phases", "name": f"{slots} slots", "config": config, "measured": measured}


def pass_times(decoder: Decoder, items: Sequence[Prepared], device: torch.device) -> dict[str, float]:
    """Milliseconds of the passes of `decoder`, all of whose slots hold one of `items`."""
    rows, asks = range(len(items)), [Ask(limit=LIMIT, policy=GREEDY)] * len(items)
    found = {"read_ms": timed(lambda: decoder.begin(rows, items, asks), device, 3)}
    for start in range(0, decoder.slots, len(items)):
        count = min(len(items), decoder.slots - start)
        decoder.begin(range(start, start + count), items[:count], asks[:count])
    found["capture_ms"] = timed(lambda: decoder.step(1), device, 1)
    found["step_ms"] = timed(lambda: decoder.step(_REPEATS), device, 1) / _REPEATS
    found["tokens_per_second"] = decoder.slots / found["step_ms"] * 1e3
    ids = [5] * (SUFFIX_WIDTH - 10)
    suffixes = [Suffix(row=row, start=len(items[row].token_ids), ids=ids) for row in rows[:SUFFIX_ROWS]]
    found["read_on_ms"] = timed(lambda: decoder.go_on(suffixes, asks[: len(suffixes)]), device, 3)
    return found


def agreement_line(work: Work, name: str, lines: Path) -> Line:
    """How many answers differ from those of passes over one item, and by how much logits lead where they first do.

    A pass over prompt and answer gives, at every place, the token that greedy decoding of this item alone takes next,
    as long as the tokens before agree.
    """
    backbone = work.backbone
    describer = Describer(backbone, DescriptionSettings())
    by_name = {item.name: item for item in work.data.items}
    differing: list[int] = []
    leads: list[float] = []
    all_leads: list[float] = []
    told = [json.loads(text) for text in lines.read_text(encoding="utf-8").splitlines()]
    for line in told:
        prepared = prepare_question(backbone, describer.first(by_name[line["name"]]))
        assert isinstance(prepared, Prepared)  # it was answered
        ids = backbone.renderer.tokenizer(" " + line["description"], add_special_tokens=False)["input_ids"]
        roles = np.zeros(len(ids), np.uint8)
        whole = replace(
            prepared,
            token_ids=np.append(prepared.token_ids, np.array(ids, np.int32)),
            roles=np.append(prepared.roles, roles),
        )
        with torch.inference_mode():
            states = backbone.hidden_states([whole])[0][-len(ids) - 1 : -1]
            logits = backbone.project(states).float()
        best, said = logits.topk(2, dim=-1), torch.tensor(ids, device=logits.device)
        all_leads.append(float((best.values[:, 0] - best.values[:, 1]).median()))
        wrong = (best.indices[:, 0] != said).nonzero()
        if len(wrong):
            place = int(wrong[0])
            differing.append(place)
            leads.append(float(best.values[place, 0] - logits[place, said[place]]))
    measured = {
        "answers": len(told),
        "differing": len(differing),
        "median_first_token": float(np.median(differing)) if differing else float("nan"),
        "largest_lead": max(leads, default=float("nan")),
        "median_lead": float(np.median(leads)) if leads else float("nan"),
        "median_lead_anywhere": float(np.median(all_leads)),
    }
    return {
        "stage": "describe agreement",
        "name": name,
        "config": {"dtype": backbone.logical_dtype},
        "measured": measured,
    }


def profiled(work: Work, slots: int) -> str:
    """The kernels of a few steps, the longest first."""
    device = work.backbone.device
    (item,) = work.prepared(1)
    decoder = work.decoder(slots)
    for row in range(slots):
        decoder.begin([row], [item], [Ask(limit=LIMIT, policy=GREEDY)])
    decoder.step(2)
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profile:
        decoder.step(4)
        synchronize(device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    text: str = profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)
    return text


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Milliseconds of `work`, the fastest of `repeats`."""
    fastest = float("inf")
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give a GPU's unused memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
