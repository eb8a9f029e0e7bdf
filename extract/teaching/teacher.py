"""Asks the teacher about one item: until there is an answer, every model refuses, or too many answers are broken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from agiqa.errors import RemoteError
from agiqa.extract.data.journals import ITEM, Line
from agiqa.extract.teaching.answers import read_answer
from agiqa.extract.teaching.apis import Api
from agiqa.extract.teaching.chats import ChatRequest, Fault, Reply
from agiqa.extract.teaching.client import Client, Key
from agiqa.extract.teaching.costs import Budget, cost_of, most_cost
from agiqa.extract.teaching.questions import Question, input_tokens
from agiqa.extract.teaching.wording_and_prices import Price
from agiqa.store.sharing.transfers import Halted

Status = Literal["ok", "refused", "broken", "failed", "open"]
"""broken: an answer without valid explanations, asked for again; failed: the server cannot serve this request; open:
paid for, but the run or its budget ended before the last word, so that the next run asks again."""


@dataclass(frozen=True, kw_only=True)
class TeacherModel:
    """A model that explains, and where it runs."""

    api: Api
    model: str
    key: Key | None = None
    price: Price | None = None
    """None if unknown."""

    def record(self) -> dict[str, str]:
        """JSON-able form, without the key."""
        return {"api": self.api.name, "base_url": self.api.base_url, "model": self.model}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One request about an item, and what came of it."""

    teacher: TeacherModel
    reply: Reply | Fault
    cost: float | None
    """USD; None if unknown."""
    counted: float | None
    """USD that the budget counts: the most that it can cost where the cost is unknown. None without a price."""
    attempts: int = 1
    lost: int = 0
    """Attempts whose answer was lost on its way."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a reply is worth."""

    status: Status
    explanations: Mapping[str, str]
    """By aspect; empty unless the status is ok."""
    reason: str | None
    """Why there are none."""


def judge(question: Question, reply: Reply | Fault) -> Verdict:
    """Whether `reply` explains the item of `question`: whole, of the right form, about this item, without its score."""
    if isinstance(reply, Fault):
        return _without("refused" if reply.kind == "refused" else "failed", reply.reason)
    if reply.refusal is not None:
        return _without("refused", reply.refusal)
    if reply.cut:
        limit = f"{question.settings.max_tokens} tokens; allow more with --max-new-tokens"
        return _without("broken", f"the answer was cut off after {limit}")
    found = read_answer(reply.text, question.settings.aspects)
    if isinstance(found, str):
        return _without("broken", found)
    if found.id != question.id:
        return _without("broken", f"the answer repeats the id {found.id!r}, and the question has {question.id!r}")
    fault = question.fault_of(found.explanations)
    if fault is not None:
        return _without("broken", fault)
    return Verdict(status="ok", explanations=found.explanations, reason=None)


def line_of(question: Question, verdict: Verdict, trials: Sequence[Trial], earlier: Line | None = None) -> Line:
    """The journal's line about an item, after the last of its `trials`; `earlier` is the line that it replaces.

    `cost_usd` is that of the trials, `counted_usd` what the budget counts for the item, earlier lines included.
    """
    last = trials[-1]
    reply = last.reply if isinstance(last.reply, Reply) else None
    spoken = [trial.reply for trial in trials if isinstance(trial.reply, Reply)]
    before = 0.0 if earlier is None else earlier["counted_usd"] or 0.0
    counted = _sum([trial.counted for trial in trials])
    return {
        "name": question.item.name,
        "prompt": question.item.prompt,
        "status": "failed" if verdict.status == "broken" else verdict.status,
        "explanations": dict(verdict.explanations),
        "reason": verdict.reason,
        "fault": last.reply.kind if isinstance(last.reply, Fault) else None,
        "refusals": [
            {"model": trial.teacher.model, "reason": refused.reason}
            for trial in trials
            if (refused := judge(question, trial.reply)).status == "refused"
        ],
        **last.teacher.record(),
        "served_model": None if reply is None else reply.model,
        "finish_reason": None if reply is None else reply.finish_reason,
        "raw": None if reply is None else reply.text,
        "tokens": {
            "input": _sum([one.input_tokens for one in spoken]),
            "output": _sum([one.output_tokens for one in spoken]),
        },
        "cost_usd": _rounded(_sum([trial.cost for trial in trials])),
        "counted_usd": _rounded(None if counted is None else before + counted),
        "seconds": round(sum(trial.seconds for trial in trials), 3),
        "attempts": sum(trial.attempts for trial in trials),
        "lost": sum(trial.lost for trial in trials),
        "id": question.id,
        ITEM: question.key,
    }


class Teacher:
    """Asks one model about items, and a second one about those that the first refuses. For many threads."""

    def __init__(self, clients: Sequence[tuple[TeacherModel, Client]], budget: Budget, *, retries: int) -> None:
        """`retries` is how often a broken answer is asked for again."""
        self._clients = clients
        self._budget = budget
        self._retries = retries

    def explain(self, question: Question, earlier: Line | None = None, *, keep: Callable[[Line], None]) -> Line | None:
        """The line about an item; None, with nothing sent, if the budget does not allow a request.

        Raises RemoteError when no request can succeed, Halted when the run ends, and DataError for its image file.
        Before the first two, `keep` gets the line of an item that answers have been paid for.
        """
        trials = list[Trial]()
        try:
            verdict = self._verdict(question, trials)
        except (Halted, RemoteError):
            if trials:
                keep(line_of(question, _without("open", "the run ended before a whole answer"), trials, earlier))
            raise
        return line_of(question, verdict, trials, earlier) if trials else None

    def _verdict(self, question: Question, trials: list[Trial]) -> Verdict:
        """The last word about an item; `trials` gets what was asked for it."""
        verdict = None
        for teacher, client in self._clients:
            verdict = self._ask(question, teacher, client, trials)
            if verdict is None or verdict.status != "refused":
                break
        return verdict or _without("open", "the budget ended before a whole answer")

    def _ask(self, question: Question, teacher: TeacherModel, client: Client, trials: list[Trial]) -> Verdict | None:
        """The verdict on the last answer of one model; None if the budget did not allow a request."""
        request, verdict = question.request(), None
        expected = input_tokens(request, teacher.api, teacher.model)
        most = most_cost(teacher.price, expected, question.settings.max_tokens) or 0.0
        for _ in range(1 + self._retries):
            if not self._budget.reserve(most):
                return None
            trial = self._try(request, teacher, client, expected, most)
            trials.append(trial)
            if isinstance(trial.reply, Fault) and trial.reply.kind == "again":  # lost, and too dear to repeat
                return None
            verdict = judge(question, trial.reply)
            if verdict.status != "broken":
                break
        return verdict

    def _try(self, request: ChatRequest, teacher: TeacherModel, client: Client, expected: int, most: float) -> Trial:
        """One request of about `expected` tokens, for which `most` USD are reserved; as much again after a loss."""
        reserved, counted = most, 0.0

        def may_repeat() -> bool:
            nonlocal reserved
            fits = self._budget.reserve_more(most)
            reserved += most if fits else 0.0
            return fits

        try:
            answered = client.ask(request, tokens=expected, may_repeat=may_repeat)
            cost = cost_of(teacher.price, answered.reply, lost=answered.lost)
            last = most if cost is None and isinstance(answered.reply, Reply) else cost or 0.0
            counted = last + answered.lost * most
        finally:
            self._budget.settle(reserved, counted)
        return Trial(
            teacher=teacher,
            reply=answered.reply,
            cost=cost,
            counted=None if teacher.price is None else counted,
            attempts=answered.attempts,
            lost=answered.lost,
            seconds=answered.seconds,
        )


def _without(status: Status, reason: str) -> Verdict:
    return Verdict(status=status, explanations={}, reason=reason)


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum; None if one is unknown, or there are none."""
    known = [value for value in values if value is not None]
    return sum(known) if values and len(known) == len(values) else None


def _rounded(cost: float | None) -> float | None:
    return None if cost is None else round(cost, 8)
