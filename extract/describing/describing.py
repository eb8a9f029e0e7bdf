"""Stage 2: the model describes each image and then rates it in one word, as the heads will read it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from agiqa.errors import DataError
from agiqa.extract.data.items import DataSet, Item, item_key, read_image
from agiqa.extract.describing.asking import Asked, Described, Describer, DescriptionSettings, prepare_asked, unprepared
from agiqa.extract.describing.descriptions import DescriptionFile, Line
from agiqa.extract.models import Backbone
from agiqa.extract.models.preparing import Opener, Preparation, chosen_workers
from agiqa.progress import say, track
from agiqa.version import agiqa_version

RatingOf = Callable[[str], str | None]
"""From a free answer to the rating word in it, None where there is no clear one."""


@dataclass(frozen=True, kw_only=True)
class DescriptionResult:
    """The file, and what this run did for it."""

    out: Path
    lines: tuple[Line, ...]
    """All of the file, of earlier runs too."""
    described: int
    """Items of this run."""
    skipped: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        ratings = [line["rating"] for line in self.lines]
        words = sorted({rating for rating in ratings if rating is not None})
        return {
            "out": str(self.out),
            "items": len(self.lines),
            "described": self.described,
            "skipped": list(self.skipped),
            "cut": sum(bool(line["cut"]) for line in self.lines),
            "ratings": {word: ratings.count(word) for word in words},
            "unknown": ratings.count(None),
            "seconds": round(self.seconds, 3),
        }


def run_descriptions(
    data_set: DataSet,
    backbone: Backbone,
    out: Path,
    settings: DescriptionSettings,
    *,
    rating_of: RatingOf,
    workers: int | None = 0,
    opener: Opener | None = None,
) -> DescriptionResult:
    """Describe the items of `data_set` into `out`, see `descriptions`; what an earlier run finished is kept.

    Every item is prepared once before the first answer, to batch like lengths and to find bad ones early, and once
    per round. Batches are the same in every run, so a run that was killed ends with the answers of one that was not.
    `workers` processes, each with a backbone by `opener`, prepare items ahead of the model; None chooses how many.
    Raises DataError that lists the items without an answer (`on_bad_item="skip"` leaves them out), and as
    DescriptionFile.
    """
    started = time.perf_counter()
    backbone.check_tensors()
    count = chosen_workers(workers, backbone, len(data_set.items), opener=opener)
    with Preparation(backbone, workers=count, opener=opener) as preparation:
        describer = Describer(backbone, settings, preparation=preparation)
        file = DescriptionFile(out, _provenance(backbone, describer))
        planned = _plan(data_set, describer)
        file.check_items({name: one.key for name, one in planned.items() if one.key is not None})
        problems = [one.problem for one in planned.values() if one.problem is not None]
        if problems and (settings.on_bad_item == "fail" or len(problems) == len(planned)):
            raise DataError.from_problems(data_set.name, problems)
        described, failed = _describe(data_set, describer, file, planned, rating_of)
    return DescriptionResult(
        out=out,
        lines=tuple(file.lines.values()),
        described=described,
        skipped=(*data_set.skipped, *problems, *failed),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """What is known of an item before the first answer."""

    length: int
    """Tokens of the first question, the image included."""
    key: str | None
    """Hash of what the model is first asked about the item, and of its image; None where that cannot be read."""
    problem: str | None
    """Why the model cannot be asked about it."""


def _plan(data_set: DataSet, describer: Describer) -> dict[str, _Planned]:
    """Every item of `data_set` by its name."""
    asked = [describer.first(item) for item in data_set.items]
    with track("plan", len(asked), "items") as advance:
        planned: dict[str, _Planned] = {}
        answers = describer.preparation.each(_planned, asked, lost=_unplanned)
        for item, one in zip(data_set.items, answers, strict=True):
            planned[item.name] = one
            advance(1)
    return planned


def _unplanned(asked: Asked, reason: str) -> _Planned:
    return _Planned(length=0, key=None, problem=unprepared(asked, reason))


def _planned(backbone: Backbone, asked: Asked) -> _Planned:
    try:
        image = read_image(asked.item)
    except DataError as error:
        return _Planned(length=0, key=None, problem=f"{asked.item.name}: {error}")
    key = item_key(replace(asked.item, conversation=asked.conversation), image).hex()
    prepared = prepare_asked(backbone, asked)
    if isinstance(prepared, str):
        return _Planned(length=0, key=key, problem=prepared)
    return _Planned(length=len(prepared.token_ids), key=key, problem=None)


def _describe(
    data_set: DataSet,
    describer: Describer,
    file: DescriptionFile,
    planned: Mapping[str, _Planned],
    rating_of: RatingOf,
) -> tuple[int, list[str]]:
    """Write the lines that `file` lacks: how many, and the lines of items that got no answer."""
    batches, described, skipped = _batches(data_set, planned, describer.settings.batch_size), 0, list[str]()
    line_of = partial(_line, provenance=file.provenance, rating_of=rating_of)
    with file.writing():
        pending = [batch for batch in batches if any(item.name not in file.lines for item in batch)]
        if file.lines:
            say(f"resume: {len(file.lines)} of {len(data_set.items)} items are described already")
        with track("describe", sum(len(batch) for batch in pending), "items") as advance:
            for outcomes in describer.batches(pending):
                failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
                new = [one for one in outcomes if isinstance(one, Described) and one.item.name not in file.lines]
                file.append([line_of(one, str(planned[one.item.name].key)) for one in new])
                if failed and describer.settings.on_bad_item == "fail":
                    raise DataError.from_problems(data_set.name, failed)
                skipped.extend(failed)
                described += len(new)
                advance(len(outcomes))
    return described, skipped


def _batches(data_set: DataSet, planned: Mapping[str, _Planned], size: int) -> list[list[Item]]:
    """The items that can be asked about in batches of like length, the longest first."""
    able = [item for item in data_set.items if planned[item.name].problem is None]
    able.sort(key=lambda item: -planned[item.name].length)
    return [able[start : start + size] for start in range(0, len(able), size)]


def _provenance(backbone: Backbone, describer: Describer) -> dict[str, Any]:
    settings = describer.settings
    return {
        "aspect": settings.aspect,
        "settings": settings.generation(),
        "questions": {"describe": describer.questions.describe, "rate": describer.questions.rate},
        "model": backbone.provenance(),
        "agiqa": agiqa_version(),
    }


def _line(one: Described, key: str, *, provenance: Mapping[str, Any], rating_of: RatingOf) -> Line:
    model = provenance["model"]
    return {
        "name": one.item.name,
        "prompt": one.item.prompt,
        "aspect": provenance["aspect"],
        "description": one.description,
        "rating_word": one.rating_word,
        "rating": rating_of(one.answer),
        "answer": one.answer,
        "cut": one.cut,
        "generated": dict(one.generated),
        "tokens": dict(one.tokens),
        "seconds": {name: round(value, 4) for name, value in one.seconds.items()},
        "model": model["name"],
        "adapter": model.get("adapter"),
        "settings": provenance["settings"],
        "item_sha256": key,
        "id": one.item.name,
        "image": one.item.name,
        "conversations": [{"role": turn.role, "content": turn.content} for turn in one.conversation],
        "response_0": one.description,
        "response_1": one.answer or None,
    }
