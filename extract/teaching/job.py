"""A data set to explain, its journal, and what is still to ask: what single requests and batches have in common."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError, SettingsConflict
from agiqa.extract.data.items import DataSet
from agiqa.extract.data.journals import Journal, Line
from agiqa.extract.teaching.chats import ChatRequest
from agiqa.extract.teaching.client import ClientSettings
from agiqa.extract.teaching.conversation_files import conversations_path, write_conversations
from agiqa.extract.teaching.questions import USUAL_ANSWER_TOKENS, Question, QuestionSettings, input_tokens, questions
from agiqa.extract.teaching.teacher import TeacherModel
from agiqa.extract.teaching.wording_and_prices import price_advice
from agiqa.progress import track
from agiqa.version import agiqa_version

FORMAT, FORMAT_VERSION = "agiqa.explanations", 1

_FREE = ("agiqa", "base_url", "fallback", "prices", "max_tokens", "schema")
"""Provenance that may differ between two runs on one journal: it does not change the text of whole answers."""


@dataclass(frozen=True, kw_only=True)
class TeachingSettings:
    """How to teach; the defaults are those of the command line."""

    question: QuestionSettings = field(default_factory=QuestionSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    jobs: int = 8
    """Requests at the same time."""
    retries: int = 2
    """Times that a broken answer is asked for again, before the item counts as failed."""
    budget: float | None = None
    """Most USD to spend on the file, earlier runs included; None for no limit."""
    retry_failed: bool = False
    """Whether items that were refused or failed in an earlier run are asked about again."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a number out of range."""
        if self.jobs < 1 or self.retries < 0 or (self.budget is not None and self.budget <= 0.0):
            message = (
                f"{self.jobs} jobs, {self.retries} retries and a budget of {self.budget} USD: one is out of range."
            )
            raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The split of each item in the conversation files."""

    of: Mapping[str, str | None]
    """train, val, test or None, by item name."""
    rule: Mapping[str, Any]
    """How they were made, JSON-able, for the provenance."""


@dataclass(frozen=True, kw_only=True)
class TeachingResult:
    """The journal, and what this run added to it."""

    out: Path
    conversations: Mapping[str, Path]
    """By aspect."""
    lines: Mapping[str, Line]
    """By item name, those of earlier runs too."""
    asked: int
    """Lines that this run wrote."""
    missing: int
    """Items without a line, or with one that is open."""
    skipped: tuple[str, ...]
    stopped: str | None
    """Why this run ended before all items were done, such as budget; None if it did not."""
    cost: float | None
    """USD of this run's lines; None if unknown."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        states = [line["status"] for line in self.lines.values()]
        return {
            "out": str(self.out),
            "conversations": {aspect: str(path) for aspect, path in self.conversations.items()},
            "items": len(states) - states.count("open") + self.missing,
            "explained": states.count("ok"),
            "refused": states.count("refused"),
            "failed": states.count("failed"),
            "missing": self.missing,
            "asked": self.asked,
            "skipped": list(self.skipped),
            "stopped": self.stopped,
            "tokens": {kind: _total_tokens(self.lines.values(), kind) for kind in ("input", "output")},
            "cost_usd": self.cost,
            "counted_usd": _total(self.lines.values(), "counted_usd"),
            "seconds": round(self.seconds, 3),
        }


def _total(lines: Iterable[Line], kind: str) -> float | None:
    """USD of the lines; None if that of one is unknown."""
    costs = [line[kind] for line in lines]
    return None if None in costs else round(sum(costs), 6)


def _total_tokens(lines: Iterable[Line], kind: str) -> int | None:
    """Tokens of a kind, input or output; None if those of one line are unknown. A fault has none."""
    counts = [line["tokens"][kind] for line in lines if line["fault"] is None]
    return None if None in counts else sum(counts)


@dataclass(kw_only=True)
class Mean:
    """A mean that grows, or a guess while nothing is known."""

    guess: float = 0.0
    sum: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        """The mean, or the guess."""
        return self.sum / self.count if self.count else self.guess

    def add(self, value: float) -> None:
        """Count one more value."""
        self.sum += value
        self.count += 1


def costs_note(spent: float, left: int, each: Mean | None) -> str:
    """For the progress: USD that are spent, and what they will come to with `left` more items at the cost `each`."""
    return "" if each is None else f"{spent:.2f} of about {spent + left * each.mean:.2f} USD"


class TeachingJob:
    """A data set, its journal, and what is still to ask; `teaching.py` and `batches.py` ask."""

    def __init__(
        self,
        data_set: DataSet,
        out: Path,
        models: Sequence[TeacherModel],
        settings: TeachingSettings,
        splits: Splits,
    ) -> None:
        """Read the journal `out`, if there is one. `models` are the teacher, and the fallback for what it refuses.

        Raises DataError for items without a MOS, SettingsConflict for a journal of other settings or items and for
        files of conversations that are not of this journal, ConfigError for a budget without prices.
        """
        self.data_set = data_set
        self.settings = settings
        self.models = tuple(models)
        self._splits = splits
        self.questions = {one.item.name: one for one in questions(data_set.items, settings.question)}
        if settings.budget is not None:
            for model in models:
                if model.price is None:
                    message = (
                        f"--budget needs the price of {model.model} on {model.api.base_url}, which is not known. "
                        f"{price_advice(model.api.base_url, model.model)}."
                    )
                    raise ConfigError(message)
        self.journal = Journal(
            out,
            self._provenance(),
            command="agiqa teach",
            verb="explains",
            free=_FREE,
        )
        self.journal.check_items({name: one.key for name, one in self.questions.items()})
        self._refuse_to_overwrite()

    def pending(self) -> list[Question]:
        """The questions to ask, in the order of the table."""
        return [one for name, one in self.questions.items() if not self._is_done(self.journal.lines.get(name))]

    def spent(self) -> float:
        """USD that the budget counts for all lines, of earlier runs too."""
        return sum(line["counted_usd"] or 0.0 for line in self.journal.lines.values())

    def expected_cost(self) -> Mean | None:
        """USD per item, by the lines so far, or else by an estimate. None if unknown, or if nothing is to ask."""
        teacher = self.models[0]
        if teacher.price is None or not self.questions:
            return None
        counted = [line["counted_usd"] for line in self.journal.lines.values() if line["counted_usd"] is not None]
        if counted:
            return Mean(sum=sum(counted), count=len(counted))
        request = next(iter(self.questions.values())).request()
        return Mean(guess=teacher.price.cost(input_tokens(request, teacher.api, teacher.model), USUAL_ANSWER_TOKENS))

    def answer_tokens(self) -> float:
        """Tokens of an answer, by the lines so far, or else as usual."""
        said = [line["tokens"]["output"] for line in self.journal.lines.values() if line["status"] == "ok"]
        counted = [tokens for tokens in said if tokens is not None]
        return sum(counted) / len(counted) if counted else USUAL_ANSWER_TOKENS

    def dry_run(
        self, pending: Sequence[Question], seen: Callable[[ChatRequest], None] = lambda _request: None
    ) -> dict[str, Any]:
        """What the questions `pending` will take: requests, tokens and USD. Sends nothing; `seen` gets each request."""
        teacher = self.models[0]
        with track("estimate", len(pending), "items") as advance:
            incoming = 0
            for question in pending:
                request = question.request()
                incoming += input_tokens(request, teacher.api, teacher.model)
                seen(request)
                advance(1)
        outgoing = round(self.answer_tokens() * len(pending))
        price = teacher.price
        return {
            "items": len(self.questions),
            "requests": len(pending),
            "tokens": {"input": incoming, "output": outgoing},
            "price": None if price is None else price.model_dump(),
            "cost_usd": None if price is None else round(price.cost(incoming, outgoing), 4),
            "spent_usd": round(self.spent(), 4),
        }

    def is_rejected_again(self, line: Line) -> bool:
        """Whether the server rejects the item of a new `line`, as it did in an earlier run."""
        known = self.journal.lines.get(line["name"])
        return line["fault"] == "item" and known is not None and known["fault"] == "item"

    def was_ever_served(self) -> bool:
        """Whether a server has answered about any item."""
        return any(line["fault"] is None for line in self.journal.lines.values())

    def decisive(self) -> dict[str, Any]:
        """The provenance that may not differ between two runs on one journal."""
        return {name: value for name, value in self.journal.provenance.items() if name not in _FREE}

    def finish(self) -> dict[str, Path]:
        """Write the conversations of all lines."""
        return write_conversations(
            self.journal.path, self.data_set.items, self.journal.lines, self.settings.question, self._splits.of
        )

    def result(
        self,
        conversations: Mapping[str, Path],
        written: Sequence[Line],
        *,
        stopped: str | None,
        since: float,
    ) -> TeachingResult:
        """What a run came to that wrote the lines `written`, and began at `since` by time.perf_counter."""
        lines = self.journal.lines
        return TeachingResult(
            out=self.journal.path,
            conversations=conversations,
            lines=lines,
            asked=len(written),
            missing=sum(lines.get(name, {"status": "open"})["status"] == "open" for name in self.questions),
            skipped=self.data_set.skipped,
            stopped=stopped,
            cost=_total(written, "cost_usd"),
            seconds=time.perf_counter() - since,
        )

    def _refuse_to_overwrite(self) -> None:
        """Before the first run, nothing may have the names of the files that `finish` writes: it may be the data."""
        paths = [conversations_path(self.journal.path, aspect) for aspect in self.settings.question.aspects]
        found = [] if self.journal.provenance_path.exists() else [path for path in paths if path.exists()]
        if found:
            message = (
                f"{found[0]} exists, and this run would write its conversations there. Choose another OUT, or move "
                "that file."
            )
            raise SettingsConflict(message)

    def _is_done(self, line: Line | None) -> bool:
        if line is None or line["status"] == "open":
            return False
        return line["status"] == "ok" or not self.settings.retry_failed

    def _provenance(self) -> dict[str, Any]:
        teacher, *others = self.models
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "teacher": {"api": teacher.api.name, "model": teacher.model},
            "base_url": teacher.api.base_url,
            **self.settings.question.record(),
            "splits": dict(self._splits.rule),
            "fallback": [model.record() for model in others],
            "prices": {model.model: None if model.price is None else model.price.model_dump() for model in self.models},
            "agiqa": agiqa_version(),
        }
