"""`agiqa teach --batch`: the provider gets the questions in files and answers within a day, at half the price.

A run sends what is missing, waits, and joins the answers to the journal, until nothing is left to send. The next run
after a stop or a kill goes on with the same batches, see `batch_records.py`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from agiqa.extract.data.journals import Journal, Line
from agiqa.extract.teaching.apis import ChatRequest, Fault, Reply
from agiqa.extract.teaching.asking import TeacherModel, Trial, Verdict, cost_of, judge, line_of
from agiqa.extract.teaching.batch_records import BatchRecord, BatchRecords, Tried
from agiqa.extract.teaching.batch_steps import BatchSettings, BatchSteps
from agiqa.extract.teaching.client import Client
from agiqa.extract.teaching.explanations import read_answer
from agiqa.extract.teaching.joining import Joined, join
from agiqa.extract.teaching.questions import Question, input_tokens
from agiqa.progress import say, track
from agiqa.store.sharing.transfers import Halted

CAUTION = 1.5
"""Factor on the expected cost of a request, for its share of the budget."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """An item that the journal has no last word about."""

    question: Question
    earlier: Line | None = None
    """The line that its new one replaces."""


@dataclass(kw_only=True)
class BatchOutcome:
    """What a run over batches did."""

    joined: int = 0
    """Lines that it added to the journal."""
    open: list[str] = field(default_factory=list[str])
    """Ids of batches that are still at work."""
    left: set[str] = field(default_factory=set[str])
    """Items whose batch ended without them: the next run asks again."""
    unaffordable: bool = False
    """Whether the budget held items back."""
    misplaced: int = 0
    """Answers that came under the key of another request."""


class Batches:
    """The batches of one journal, which is locked by the caller."""

    def __init__(
        self,
        pending: Sequence[Pending],
        clients: Sequence[tuple[TeacherModel, Client]],
        journal: Journal,
        records: BatchRecords,
        settings: BatchSettings,
        *,
        retries: int,
        budget: float | None,
        answer_tokens: float,
    ) -> None:
        """`clients` are the teacher and, for what it refuses, a fallback. `retries` is how often a broken answer is
        asked for again, `budget` USD with all earlier costs, `answer_tokens` the expected length of an answer.
        """
        self._pending = {one.question.item.name: one for one in pending}
        self._clients = clients
        self._journal = journal
        self._records = records
        self._settings = settings
        self._retries = retries
        self._budget = budget
        self._answer_tokens = answer_tokens
        self._outcome = BatchOutcome()

    def run(self) -> BatchOutcome:
        """Take all batches on until they are joined and nothing can be sent; without `wait`, until they are created.

        Raises RemoteError when the provider refuses or is gone, and DataError for an image file.
        """
        total = len(self._pending)
        with track("batches", total, "items") as add:
            left = total

            def advance(count: int) -> None:  # an item that is asked again is done twice
                nonlocal left
                add(min(count, left))
                left -= min(count, left)

            steps = {
                teacher.model: BatchSteps(client, self._records, self._settings, advance)
                for teacher, client in self._clients
            }
            while True:
                for record in self._records.batches:
                    steps[record.model].send(record)
                for record in self._records.batches:
                    if steps[record.model].fetch(record):
                        self._join(self._records.of(record.tag), steps[record.model])
                self._send_missing(steps)
                open_ = self._records.batches
                waiting = all(one.step == "created" for one in open_)
                self._outcome.open = [str(one.batch) for one in open_ if one.batch is not None]
                if not open_ or (waiting and not self._settings.wait):
                    return self._outcome
                if self._clients[0][1].halt.wait(self._settings.interval):
                    raise Halted

    def _send_missing(self, steps: Mapping[str, BatchSteps]) -> None:
        """Send batches of what is neither answered nor in a batch, as far as budget and provider allow."""
        for number, (teacher, _) in enumerate(self._clients):
            while all(one.step == "created" for one in self._records.batches):
                reserve = self._reserve_of(teacher)
                if not steps[teacher.model].write(self._missing(number), reserve):
                    break
                steps[teacher.model].send(self._records.batches[-1])

    def _missing(self, number: int) -> Iterator[Question]:
        """The questions that go to the model of this number next."""
        sent = {one.name for record in self._records.batches for one in record.requests.values()}
        for name, one in self._pending.items():
            if name not in sent | self._outcome.left and self._next_model(name) == number:
                yield one.question

    def _next_model(self, name: str) -> int:
        """The number of the model that is asked about an item next: the one after the last that refused."""
        models = [teacher.model for teacher, _ in self._clients]
        tries = self._records.tries.get(name, ())
        if not tries:
            return 0
        last = models.index(tries[-1].model)
        return last + (self._verdict(self._pending[name].question, tries[-1].reply).status == "refused")

    def _reserve_of(self, teacher: TeacherModel) -> Callable[[ChatRequest], float | None]:
        """A function from a request to the USD set aside for it; None if too little is left."""
        planned = 0.0
        spent = sum(line["counted_usd"] or 0.0 for line in self._journal.lines.values())
        spent += sum(one.counted or 0.0 for tries in self._records.tries.values() for one in tries)
        spent += sum(record.reserve_usd for record in self._records.batches)

        def reserve(request: ChatRequest) -> float | None:
            nonlocal planned
            expected = input_tokens(request, teacher.api)
            usd = 0.0 if teacher.price is None else CAUTION * teacher.price.cost(expected, self._answer_tokens)
            if self._budget is not None and spent + planned + usd > self._budget:
                self._outcome.unaffordable = True
                return None
            planned += usd
            return usd

        return reserve

    def _join(self, record: BatchRecord, steps: BatchSteps) -> None:
        """Write the lines of what `record` answers for good, and note the rest as tries, in this order."""
        aspects = next(iter(self._pending.values())).question.settings.aspects if self._pending else ()
        joined = join(record.requests.keys(), steps.results(record), lambda text: _echoed(text, aspects))
        lines, tries = list[Line](), {name: of for name, of in self._records.tries.items() if name in self._pending}
        for own_id, requested in record.requests.items():
            pending = self._pending.get(requested.name)
            if pending is None:  # a run that was killed here has written its line
                continue
            tried = self._tried(record, own_id, joined)
            if tried is None:
                self._outcome.left.add(requested.name)
                continue
            tries[requested.name] = (*tries.get(requested.name, ()), tried)
            line = self._line(pending, tries[requested.name], record)
            if line is not None:
                lines.append(line)
        if lines:
            self._journal.append(lines)
        for line in lines:
            del tries[line["name"]], self._pending[line["name"]]
        self._records.close(record, tries)
        self._outcome.joined += len(lines)
        self._outcome.misplaced += joined.misplaced
        again, left = len(record.requests) - len(lines), len(self._outcome.left & _names(record))
        say(
            f"batch {record.batch}: {record.word}; {len(lines)} of {len(record.requests)} items done"
            + (f", {again - left} to be asked again" if again > left else "")
            + (f", {left} not worked on" if left else "")
            + (f"; {joined.misplaced} answers came under the keys of others" if joined.misplaced else "")
        )

    def _tried(self, record: BatchRecord, own_id: str, joined: Joined) -> Tried | None:
        """What came of a request; None if the provider did not work on it."""
        if own_id in joined.replies:
            reply = billed = joined.replies[own_id]
        elif own_id in joined.doubts:
            reply, billed = Fault(kind="again", reason=joined.doubts[own_id]), joined.doubtful.get(own_id)
        else:
            return None
        price = next(teacher.price for teacher, _ in self._clients if teacher.model == record.model)
        cost = None if billed is None else cost_of(price, billed)
        reserve = record.requests[own_id].reserve_usd
        counted = None if price is None else (reserve if cost is None else cost)
        seconds = max(time.time() - (record.created or record.since), 0.0)
        return Tried(model=record.model, reply=reply, cost=cost, counted=counted, seconds=round(seconds, 3))

    def _verdict(self, question: Question, reply: Reply | Fault) -> Verdict:
        verdict = judge(question, reply)
        passing = isinstance(reply, Fault) and reply.kind in ("again", "busy")
        return Verdict(status="broken", explanations={}, reason=verdict.reason) if passing else verdict

    def _line(self, pending: Pending, tries: Sequence[Tried], record: BatchRecord) -> Line | None:
        """The line of the journal; None if the item is to be asked about again."""
        verdict = self._verdict(pending.question, tries[-1].reply)
        of_model = [one for one in tries if one.model == tries[-1].model]
        if verdict.status == "broken" and len(of_model) <= self._retries:
            return None
        if verdict.status == "refused" and tries[-1].model != self._clients[-1][0].model:
            return None
        teachers = {teacher.model: teacher for teacher, _ in self._clients}
        trials = [
            Trial(
                teacher=teachers[one.model],
                reply=one.reply,
                cost=one.cost,
                counted=one.counted,
                seconds=one.seconds,
            )
            for one in tries
        ]
        return line_of(pending.question, verdict, trials, pending.earlier) | {"batch": record.batch}


def _names(record: BatchRecord) -> set[str]:
    return {one.name for one in record.requests.values()}


def _echoed(text: str, aspects: Sequence[str]) -> str | None:
    """The id that an answer repeats; None if it cannot be read."""
    found = read_answer(text, aspects)
    return None if isinstance(found, str) else found.id
