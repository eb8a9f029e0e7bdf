"""Stage 2: the model describes each image and then rates it in one word, as the heads will read it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agiqa.errors import DataError
from agiqa.extract.asking import Described, Describer, DescriptionSettings
from agiqa.extract.backbones import Backbone
from agiqa.extract.descriptions import DescriptionFile, Line
from agiqa.extract.items import DataSet, Item, item_key
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
    data_set: DataSet, backbone: Backbone, out: Path, settings: DescriptionSettings, *, rating_of: RatingOf
) -> DescriptionResult:
    """Describe the items of `data_set` into `out`, see `descriptions`; what an earlier run finished is kept.

    Every item is prepared once before the first answer, to batch like lengths and to find bad ones early. Batches are
    the same in every run, so a run that was killed ends with the answers of one that was not. Raises DataError that
    lists the items without an answer (`on_bad_item="skip"` leaves them out), and as DescriptionFile.
    """
    started = time.perf_counter()
    describer = Describer(backbone, settings)
    provenance = _provenance(backbone, describer)
    file = DescriptionFile(out, provenance)
    keys = {item.name: _key(describer, item) for item in data_set.items}
    file.check_items(keys)
    batches, skipped = _batches(data_set, describer)
    described = 0
    with file.writing():
        pending = [batch for batch in batches if any(item.name not in file.lines for item in batch)]
        if file.lines:
            say(f"resume: {len(file.lines)} of {len(keys)} items are described already")
        with track("describe", sum(len(batch) for batch in pending), "items") as advance:
            for batch in pending:
                outcomes = describer.describe(batch)
                failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
                new = [one for one in outcomes if isinstance(one, Described) and one.item.name not in file.lines]
                file.append([_line(one, keys[one.item.name], provenance, rating_of) for one in new])
                if failed and settings.on_bad_item == "fail":
                    raise DataError.from_problems(data_set.name, failed)
                skipped.extend(failed)
                described += len(new)
                advance(len(batch))
    return DescriptionResult(
        out=out,
        lines=tuple(file.lines.values()),
        described=described,
        skipped=(*data_set.skipped, *skipped),
        seconds=time.perf_counter() - started,
    )


def _batches(data_set: DataSet, describer: Describer) -> tuple[list[list[Item]], list[str]]:
    """The items in batches of like length, the longest first, and a line for each that cannot be asked about."""
    lengths: dict[str, int] = {}
    problems: list[str] = []
    with track("plan", len(data_set.items), "items") as advance:
        for item in data_set.items:
            try:
                lengths[item.name] = len(describer.prepare(item, (describer.question(item),)).token_ids)
            except DataError as error:
                problems.append(f"{item.name}: {error}")
            advance(1)
    if problems and (describer.settings.on_bad_item == "fail" or not lengths):
        raise DataError.from_problems(data_set.name, problems)
    good = sorted((item for item in data_set.items if item.name in lengths), key=lambda item: -lengths[item.name])
    size = describer.settings.batch_size
    return [good[start : start + size] for start in range(0, len(good), size)], problems


def _provenance(backbone: Backbone, describer: Describer) -> dict[str, Any]:
    settings = describer.settings
    return {
        "aspect": settings.aspect,
        "settings": settings.generation(),
        "questions": {"describe": describer.questions.describe, "rate": describer.questions.rate},
        "model": backbone.provenance(),
        "agiqa": agiqa_version(),
    }


def _key(describer: Describer, item: Item) -> str:
    """Hash of what the model is first asked about `item`, and of its image."""
    return item_key(replace(item, conversation=(describer.question(item),))).hex()


def _line(one: Described, key: str, provenance: Mapping[str, Any], rating_of: RatingOf) -> Line:
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
