"""Stage 2: the model describes each image and rates it in one word, into a file of one line per item.

Each line is an M3-AGIQA conversation too, so that `agiqa extract --conversations` and `agiqa words` read the file.
`NAME.provenance.json` beside `NAME.jsonl` records model, questions and settings; each line says how it was decoded.
Lines are appended group by group, and read again after a kill.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from agiqa.errors import DataError
from agiqa.extract.data.items import DataSet, Item, item_key, read_image
from agiqa.extract.data.journals import ITEM, Journal, Line
from agiqa.extract.describing.asking import Describer
from agiqa.extract.describing.rounds import Described, DescriptionSettings, Question, full_prompt, is_safe, unprepared
from agiqa.extract.describing.spool import Spool
from agiqa.extract.models import AnsweringModel, Backbone
from agiqa.extract.models.ahead import Ahead
from agiqa.extract.models.preparing import Opener, Preparation, chosen_workers
from agiqa.notebooks import one_line
from agiqa.progress import say, track
from agiqa.version import agiqa_version

FORMAT, FORMAT_VERSION = "agiqa.descriptions", 1

RatingOf = Callable[[str], str | None]
"""From a free answer to the rating word in it; None if there is no clear one."""


@dataclass(frozen=True, kw_only=True)
class DescriptionResult:
    """The file, and what this run added to it."""

    out: Path
    lines: tuple[Line, ...]
    """All lines of the file, those of earlier runs too."""
    described: int
    """Items that this run described."""
    skipped: tuple[str, ...]
    seconds: float

    def __repr__(self) -> str:
        """The file and the numbers, without the lines."""
        shown = {"items": len(self.lines), "described": self.described, "skipped": len(self.skipped)}
        return one_line(f"DescriptionResult {self.out}", shown)

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
    preparation: Preparation[Backbone] | None = None,
    spool: Spool | None = None,
) -> DescriptionResult:
    """Describe the items of `data_set` into the file `out`, keeping the lines of earlier runs.

    The tokens of every item are counted before the first answer, to group like lengths and to find bad items early,
    while the weights load. Models that answer in batches prepare an item a second time for the rating. Groups are
    the same in every run, and an item's draws have a seed of their own, so a run that was killed and resumed gives
    the same answers (but for rounding, if the last bits of a GPU's results differ with the other rows).
    `workers` processes, each with a backbone by `opener`, prepare items ahead of the model; None chooses how many. With
    a `preparation` its workers do, and stay for the caller. A `spool` gets the hidden states of the conversations.
    Raises DataError that lists the items without an answer (`on_bad_item="skip"` leaves them out), ModelError for a
    `spool` and a model that hands out no states, and as DescriptionFile.
    """
    backbone.check_tensors()
    with ExitStack() as stack:
        if preparation is None:
            count = chosen_workers(workers, backbone, len(data_set.items), opener=opener)
            preparation = stack.enter_context(Preparation(backbone, workers=count, opener=opener))
        preparation.start()
        # without a file there is something to do: the weights load while they are hashed and items are planned
        loading = None if out.exists() else stack.enter_context(Ahead(backbone.load))
        if spool is not None:
            stack.enter_context(spool)
        describer = Describer(backbone, settings, preparation=preparation, spool=spool)
        stack.callback(describer.release)
        return write_descriptions(data_set, describer, out, rating_of=rating_of, loading=loading)


def write_descriptions(
    data_set: DataSet, describer: Describer, out: Path, *, rating_of: RatingOf, loading: Ahead[None] | None = None
) -> DescriptionResult:
    """Describe the items of `data_set` by `describer`, as `run_descriptions`; `loading` loads its model meanwhile."""
    started = time.perf_counter()
    settings = describer.settings
    file = DescriptionFile(out, _provenance(describer))
    plan = _plan(data_set, describer, loading)
    file.check_items({name: one.key for name, one in plan.items() if one.key is not None})
    problems = [one.problem for one in plan.values() if one.problem is not None]
    if problems and (settings.on_bad_item == "fail" or len(problems) == len(plan)):
        raise DataError.from_problems(data_set.name, problems)
    if loading is not None:
        loading.result()
    if describer.spool is not None and any(
        one.problem is None and name not in file.lines for name, one in plan.items()
    ):
        describer.check_spooling()
    described, failed = _describe(data_set, describer, file, plan, rating_of)
    if failed and not file.lines:
        raise DataError.from_problems(data_set.name, failed)
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

    length: int = 0
    """Tokens of the first question, the image included; 0 if a server counts them."""
    key: str | None = None
    """Hash of the first question and the image; None if the image cannot be read."""
    problem: str | None = None
    """Why the model cannot answer."""


def _plan(data_set: DataSet, describer: Describer, loading: Ahead[None] | None) -> dict[str, _Planned]:
    """Every item of `data_set` by its name. A model that cannot be loaded ends the plan."""
    questions = [describer.first(item) for item in data_set.items]
    plan: dict[str, _Planned] = {}
    with track("plan", len(questions), "items") as advance:
        answers = describer.preparation.each(_planned, questions, lost=_unplanned, is_safe=is_safe)
        for question, one in zip(questions, answers, strict=True):
            plan[question.item.name] = one
            advance(1)
            if loading is not None:
                loading.check()
    return plan


def _unplanned(question: Question, reason: str) -> _Planned:
    return _Planned(problem=unprepared(question, reason))


def _planned(backbone: AnsweringModel, question: Question) -> _Planned:
    try:
        image = read_image(question.item)
    except DataError as error:
        return _Planned(problem=f"{question.item.name}: {error}")
    key = item_key(replace(question.item, conversation=question.conversation), image).hex()
    try:
        outline = backbone.outline(question.conversation, image, size=question.item.checked_size, answer=True)
    except DataError as error:
        return _Planned(key=key, problem=f"{question.item.name}: {error}")
    length = len(outline.token_ids)
    return _Planned(length=length, key=key, problem=full_prompt(question.item.name, length, backbone.max_positions))


def _describe(
    data_set: DataSet,
    describer: Describer,
    file: "DescriptionFile",
    plan: Mapping[str, _Planned],
    rating_of: RatingOf,
) -> tuple[int, list[str]]:
    """Write the lines that `file` lacks; how many, and the problems of items without an answer."""
    described, skipped = 0, list[str]()
    with file.writing():
        pending = _pending(data_set, plan, describer, file)
        if file.lines:
            say(f"resume: {len(file.lines)} of {len(data_set.items)} items are described already")
        left = sum(len(batch) for batch in pending)
        able = sum(one.problem is None for one in plan.values())
        with track("describe", able, "items", done=able - left) as advance:
            for outcomes in describer.batches(pending):
                failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
                new = [one for one in outcomes if isinstance(one, Described) and one.item.name not in file.lines]
                file.append([_line(one, str(plan[one.item.name].key), file.provenance, rating_of) for one in new])
                if failed and describer.settings.on_bad_item == "fail":
                    raise DataError.from_problems(data_set.name, failed)
                skipped.extend(failed)
                described += len(new)
                advance(len(outcomes))
    return described, skipped


def _pending(
    data_set: DataSet, plan: Mapping[str, _Planned], describer: Describer, file: "DescriptionFile"
) -> list[list[Item]]:
    """The items without a problem in batches of like length, the longest first; no batch whose lines are all there."""
    able = [item for item in data_set.items if plan[item.name].problem is None]
    able.sort(key=lambda item: -plan[item.name].length)
    if all(item.name in file.lines for item in able):
        return []  # before the model is loaded, which decides the size of batches
    size = describer.group_size
    batches = [able[start : start + size] for start in range(0, len(able), size)]
    return [batch for batch in batches if any(item.name not in file.lines for item in batch)]


def _provenance(describer: Describer) -> dict[str, Any]:
    settings = describer.settings
    return {
        "aspect": settings.aspect,
        "settings": settings.generation(),
        "questions": {"describe": describer.wording.describe, "rate": describer.wording.rate},
        "model": describer.backbone.provenance(),
        "agiqa": agiqa_version(),
    }


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
        "generated": dict(one.generated),
        "tokens": dict(one.tokens),
        "seconds": {name: round(value, 4) for name, value in one.seconds.items()},
        "decoder": one.decoder,
        "model": model["name"],
        "adapter": model.get("adapter"),
        "settings": provenance["settings"],
        "item_sha256": key,
        "id": one.item.name,
        "image": one.item.name,
        "split": one.item.split,
        "conversations": [{"role": turn.role, "content": turn.content} for turn in one.conversation],
        "response_0": one.description,
        "response_1": one.answer or None,
    }


class DescriptionFile(Journal):
    """The file of `agiqa describe`."""

    def __init__(self, path: Path, provenance: Mapping[str, Any]) -> None:
        """Read the file at `path`, if there is one. Raises as Journal."""
        whole = {"format": FORMAT, "version": FORMAT_VERSION, **provenance}
        super().__init__(path, whole, command="agiqa describe", verb="describes")


def images_without_answer(path: Path) -> frozenset[str]:
    """The images of the file at `path` for which the model answered nothing at all to the rating question.

    Empty for a conversation file that `agiqa describe` did not write.
    """
    found: set[str] = set()
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            line: Any = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and ITEM in line and cast("Line", line).get("answer") == "":
            found.add(str(cast("Line", line).get("image")))
    return frozenset(found)
