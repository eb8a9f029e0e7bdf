"""`agiqa teach --batch`: the provider gets the questions in files and answers within a day, at half the price.

A run sends what is missing, waits, and joins the answers to the journal, until nothing is left to send. The next run
after a stop or a kill goes on with the same batches, see `batch_records.py`.
"""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agiqa.errors import ConfigError, RemoteError
from agiqa.extract.data.items import DataSet
from agiqa.extract.data.journals import Line
from agiqa.extract.teaching.answers import read_answer
from agiqa.extract.teaching.batch_apis import batch_limits
from agiqa.extract.teaching.batch_records import BatchRecord, BatchRecords, Tried
from agiqa.extract.teaching.batch_steps import BatchSettings, BatchSteps
from agiqa.extract.teaching.chats import ChatRequest, Fault, Reply
from agiqa.extract.teaching.client import Client
from agiqa.extract.teaching.costs import CAUTION, cost_of
from agiqa.extract.teaching.job import Splits, TeachingJob, TeachingResult, TeachingSettings, costs_note
from agiqa.extract.teaching.joining import Joined, join
from agiqa.extract.teaching.questions import Question, input_tokens
from agiqa.extract.teaching.teacher import TeacherModel, Trial, Verdict, judge, line_of
from agiqa.extract.teaching.teaching import conversations_at_the_end
from agiqa.progress import Advance, Note, say, track

_ENOUGH_ANSWERS = 20
"""From so many answers on, their mean tells what a request will cost. Before, the budget counts the most possible."""

_AROUND = 200
"""Bytes of a line of a file around the body of its request, about."""

_NONE_SERVED = 10
"""When the provider rejects all requests of a batch of this many or more, the fault is not in the items; nor when it
rejects all items that there are."""


@dataclass(kw_only=True)
class BatchOutcome:
    """What a run over batches did, besides the lines of the journal."""

    open: list[str] = field(default_factory=list[str])
    """The provider's ids of batches that are still at work."""
    left: set[str] = field(default_factory=set[str])
    """Items whose batch ended without them: the next run asks again."""
    misplaced: int = 0
    """Answers that came under the key of another request."""
    unaffordable: bool = False
    """Whether the budget held items back."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"open": self.open, "not_worked_on": sorted(self.left), "misplaced": self.misplaced}


def run_batches(
    data_set: DataSet,
    out: Path,
    models: Sequence[TeacherModel],
    settings: TeachingSettings,
    batches: BatchSettings,
    *,
    splits: Splits,
) -> tuple[TeachingResult, BatchOutcome]:
    """As `run_teaching`, in batches; `models` have the prices of batches.

    On Ctrl-C the batches go on at the provider. Raises RemoteError when the provider refuses or is gone,
    SettingsConflict for open batches of other settings or items, ConfigError for a fallback of the teacher's name, and
    as `run_teaching`.
    """
    since = time.perf_counter()
    if len({model.model for model in models}) < len(models):
        message = f"The fallback is {models[-1].model!r}, as the teacher is; name another model."
        raise ConfigError(message)
    job = TeachingJob(data_set, out, models, settings, splits)
    with job.journal.writing(), conversations_at_the_end(job) as conversations, ExitStack() as stack:
        records = _records_of(job)
        clients = [Client(one.api, one.model, key=one.key, settings=settings.client) for one in models]
        pairs = [(one, stack.enter_context(client)) for one, client in zip(models, clients, strict=True)]
        run = _Run(job, pairs, records, batches)
        run.work()
    stopped: Literal["budget"] | None = "budget" if run.outcome.unaffordable else None
    return job.result(conversations, run.written, stopped=stopped, since=since), run.outcome


def estimate_batches(
    data_set: DataSet,
    out: Path,
    models: Sequence[TeacherModel],
    settings: TeachingSettings,
    batches: BatchSettings,
    *,
    splits: Splits,
) -> dict[str, Any]:
    """What `run_batches` would send: as TeachingJob.dry_run, and the number of batches. Sends and writes nothing."""
    job = TeachingJob(data_set, out, models, settings, splits)
    records = _records_of(job)
    in_work = {one.name for record in records.batches for one in record.requests.values()}
    most_requests, most_bytes = batch_limits(models[0].api)
    sizes = list[int]()

    def measure(request: ChatRequest) -> None:
        sizes.append(len(json.dumps(models[0].api.body(models[0].model, request))) + _AROUND)

    estimate = job.dry_run([one for one in job.pending() if one.item.name not in in_work], measure)
    files = _files(sizes, min(most_requests, batches.most_requests or most_requests), most_bytes)
    return estimate | {"batches": {"open": len(records.batches), "requests_in_work": len(in_work), "to_create": files}}


def _files(sizes: Sequence[int], most_requests: int, most_bytes: int) -> int:
    """How many files requests of these `sizes` in bytes need, in their order."""
    files, requests, size = 0, most_requests, 0
    for one in sizes:
        if requests >= most_requests or size + one > most_bytes:
            files, requests, size = files + 1, 0, 0
        requests, size = requests + 1, size + one
    return files


def _records_of(job: TeachingJob) -> BatchRecords:
    """The records beside the journal. Raises SettingsConflict for open batches of other settings or items."""
    models = [model.record() for model in job.models]
    records = BatchRecords(job.journal.path, {**job.decisive(), "models": models})
    records.check_items({name: one.key for name, one in job.questions.items()})
    return records


class _Run:
    """Takes the batches of one journal on, and writes its lines."""

    def __init__(
        self,
        job: TeachingJob,
        clients: Sequence[tuple[TeacherModel, Client]],
        records: BatchRecords,
        settings: BatchSettings,
    ) -> None:
        self.written: list[Line] = []
        self.outcome = BatchOutcome()
        self._job = job
        self._clients = clients
        self._records = records
        self._settings = settings
        self._each = job.expected_cost()
        self._pending = self._missing_or_in_work()
        records.keep_tries(self._pending)

    def _missing_or_in_work(self) -> dict[str, Question]:
        """The questions without an answer, by item; those in batches also if their failure was the last word before."""
        in_work = {one.name for record in self._records.batches for one in record.requests.values()}
        names = {question.item.name for question in self._job.pending()}
        names |= {name for name in in_work if self._job.journal.lines.get(name, {}).get("status") != "ok"}
        return {name: question for name, question in self._job.questions.items() if name in names}

    def work(self) -> None:
        """Go on until all batches are joined and nothing can be sent; without `wait`, until they are created."""
        with _progress(len(self._pending), self._costs) as advance:
            steps = {
                teacher.model: BatchSteps(client, self._records, self._settings, advance)
                for teacher, client in self._clients
            }
            try:
                while self._look(steps):
                    time.sleep(self._settings.interval)
            except KeyboardInterrupt:
                if self._records.batches:
                    say("the batches go on at the provider: run the same command again to fetch the answers")
                raise

    def _costs(self) -> str:
        return costs_note(self._job.spent(), len(self._pending), self._each)

    def _look(self, steps: Mapping[str, BatchSteps]) -> bool:
        """Take each batch as far as it goes now, and send what is missing. Whether there is more to do."""
        for record in self._records.batches:
            steps[record.model].send(record)
        for record in self._records.batches:
            if steps[record.model].fetch(record):
                self._join(self._records.of(record.tag), steps[record.model])
        self._send_missing(steps)
        batches = self._records.batches
        self.outcome.open = [one.batch for one in batches if one.batch is not None]
        return bool(batches) and (self._settings.wait or any(one.step != "created" for one in batches))

    def _send_missing(self, steps: Mapping[str, BatchSteps]) -> None:
        """Send batches of what is neither answered nor in a batch, as far as budget and provider allow."""
        self.outcome.unaffordable = False
        for number, (teacher, _) in enumerate(self._clients):
            while all(one.step == "created" for one in self._records.batches):
                if not steps[teacher.model].write(self._missing(number), self._reserve_of(teacher)):
                    break
                steps[teacher.model].send(self._records.batches[-1])

    def _missing(self, number: int) -> Iterator[Question]:
        """The questions that go to the model of this number next."""
        sent = {one.name for record in self._records.batches for one in record.requests.values()}
        for name, question in self._pending.items():
            if name not in sent | self.outcome.left and self._next_model(question) == number:
                yield question

    def _next_model(self, question: Question) -> int:
        """The number of the model that is asked next: the one after the last that refused."""
        tries = self._records.tries.get(question.item.name, ())
        if not tries:
            return 0
        last = [teacher.model for teacher, _ in self._clients].index(tries[-1].model)
        return last + (_verdict(question, tries[-1].reply).status == "refused")

    def _reserve_of(self, teacher: TeacherModel) -> Callable[[ChatRequest], float | None]:
        """A function from a request to the USD set aside for it; None if too little is left."""
        spent = self._job.spent() + sum(record.reserve_usd for record in self._records.batches)
        spent += sum(one.counted or 0.0 for tries in self._records.tries.values() for one in tries)
        budget, longest = self._job.settings.budget, self._job.settings.question.max_tokens
        said = [line["tokens"]["output"] for line in self._job.journal.lines.values()]
        known = [tokens for tokens in said if tokens is not None]
        usual = sum(known) / len(known) if len(known) >= _ENOUGH_ANSWERS else longest / CAUTION

        def reserve(request: ChatRequest) -> float | None:
            nonlocal spent
            expected = input_tokens(request, teacher.api, teacher.model)
            usd = 0.0 if teacher.price is None else CAUTION * teacher.price.cost(expected, min(usual, longest))
            if budget is not None and spent + usd > budget:
                self.outcome.unaffordable = True
                return None
            spent += usd
            return usd

        return reserve

    def _join(self, record: BatchRecord, steps: BatchSteps) -> None:
        """Write the lines of what `record` answers for good, then note the rest as tries."""
        aspects = self._job.settings.question.aspects
        joined = join(record.requests.keys(), steps.results(record), lambda text: _echoed(text, aspects))
        lines, tries = list[Line](), {name: of for name, of in self._records.tries.items() if name in self._pending}
        left = set[str]()
        for own_id, requested in record.requests.items():
            name = requested.name
            if self._job.journal.lines.get(name, {}).get("batch") == record.batch:  # by a run that was killed here
                self._pending.pop(name, None)
            elif name in self._pending and (tried := self._tried(record, own_id, joined)) is not None:
                tries[name] = (*tries.get(name, ()), tried)
                line = self._line(self._pending[name], tries[name], record)
                lines += [] if line is None else [line]
            else:
                left.add(name)
        self._refuse_if_all_rejected(record, lines)
        if lines:
            self._job.journal.append(lines)
        for line in lines:
            del tries[line["name"]], self._pending[line["name"]]
        self._records.close(record, tries)
        self.written += lines
        self.outcome.left |= left
        self.outcome.misplaced += joined.misplaced
        _tell(record, lines=len(lines), left=len(left), misplaced=joined.misplaced)

    def _refuse_if_all_rejected(self, record: BatchRecord, lines: Sequence[Line]) -> None:
        rejected = [line for line in lines if line["fault"] == "item" and not self._job.is_rejected_again(line)]
        is_all = len(rejected) == len(self._pending) and not self._job.was_ever_served()
        if len(rejected) == len(record.requests) and (is_all or len(rejected) >= _NONE_SERVED):
            self._records.close(record)
            reason = rejected[-1]["reason"]
            message = f"batch {record.batch}: the provider rejects every request, the last one so: {reason}."
            raise RemoteError(message)

    def _tried(self, record: BatchRecord, own_id: str, joined: Joined) -> Tried | None:
        """What came of a request; None if the provider did not work on it."""
        reply: Reply | Fault
        billed: Reply | Fault | None
        if own_id in joined.replies:
            reply = billed = joined.replies[own_id]
        elif own_id in joined.doubts:
            reply, billed = Fault(kind="again", reason=joined.doubts[own_id]), joined.doubtful.get(own_id)
        else:
            return None
        price = self._model(record.model).price
        cost = None if billed is None else cost_of(price, billed)
        reserve = record.requests[own_id].reserve_usd
        counted = None if price is None else (reserve if cost is None else cost)
        seconds = max(record.since - (record.created or record.since), 0.0)
        return Tried(model=record.model, reply=reply, cost=cost, counted=counted, seconds=round(seconds, 3))

    def _line(self, question: Question, tries: Sequence[Tried], record: BatchRecord) -> Line | None:
        """The line of the journal; None if the item is to be asked about again."""
        last = tries[-1].model
        verdict = _verdict(question, tries[-1].reply)
        if verdict.status == "broken" and sum(one.model == last for one in tries) <= self._job.settings.retries:
            return None
        if verdict.status == "refused" and last != self._clients[-1][0].model:
            return None
        trials = [
            Trial(
                teacher=self._model(one.model),
                reply=one.reply,
                cost=one.cost,
                counted=one.counted,
                seconds=one.seconds,
            )
            for one in tries
        ]
        earlier = self._job.journal.lines.get(question.item.name)
        return line_of(question, verdict, trials, earlier) | {"batch": record.batch}

    def _model(self, name: str) -> TeacherModel:
        return next(teacher for teacher, _ in self._clients if teacher.model == name)


@contextmanager
def _progress(total: int, note: Note) -> Generator[Advance]:
    """Show requests that are done; one that is sent again is done twice, but counts once."""
    with track("batches", total, "items", note=note) as add:
        left = total

        def advance(count: int) -> None:
            nonlocal left
            add(min(count, left))
            left -= min(count, left)

        yield advance


def _tell(record: BatchRecord, *, lines: int, left: int, misplaced: int) -> None:
    again = len(record.requests) - lines - left
    parts = [f"batch {record.batch}: {record.word}; {lines} of {len(record.requests)} items done"]
    parts += [f"{again} to be asked again"] if again else []
    parts += [f"{left} not worked on"] if left else []
    parts += [f"{misplaced} answers came under the keys of others"] if misplaced else []
    say(", ".join(parts))


def _verdict(question: Question, reply: Reply | Fault) -> Verdict:
    """As `judge`, but what the provider could not do is asked for again."""
    verdict = judge(question, reply)
    if isinstance(reply, Fault) and reply.kind in ("again", "busy"):
        return Verdict(status="broken", explanations={}, reason=verdict.reason)
    return verdict


def _echoed(text: str, aspects: Sequence[str]) -> str | None:
    """The id that an answer repeats; None if it cannot be read."""
    found = read_answer(text, aspects)
    return None if isinstance(found, str) else found.id
