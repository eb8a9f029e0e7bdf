"""Stage 1: an online model explains the MOS of each image, into a journal of one line per item.

A line is written as soon as its answer is there, so that a run that was killed resumes and pays for nothing twice.
The conversations for tuning are written anew from the journal at the end of every run.
"""

import threading
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from pathlib import Path

from agiqa.errors import RemoteError
from agiqa.extract.data.items import DataSet
from agiqa.extract.data.journals import Line
from agiqa.extract.teaching.batch_records import refuse_open_batches
from agiqa.extract.teaching.client import Client
from agiqa.extract.teaching.costs import Budget
from agiqa.extract.teaching.job import Splits, TeachingJob, TeachingResult, TeachingSettings, costs_note
from agiqa.extract.teaching.questions import Question
from agiqa.extract.teaching.teacher import Teacher, TeacherModel
from agiqa.progress import Advance, say, track
from agiqa.store.sharing.transfers import Halted

_NONE_SERVED = 10
"""When the server has failed to serve this many requests in a row, the fault is not in the items."""


def run_teaching(
    data_set: DataSet,
    out: Path,
    models: Sequence[TeacherModel],
    settings: TeachingSettings,
    *,
    splits: Splits,
) -> TeachingResult:
    """Let the first of `models` explain the items of `data_set` into the journal `out`, the second what it refuses.

    Lines of earlier runs are kept. `splits` go into the conversation files. On Ctrl-C the run waits for the answers
    that are on their way; a second one drops them. Raises RemoteError when no request can succeed, SettingsConflict
    while batches are open, and as TeachingJob and Journal.
    """
    since = time.perf_counter()
    job = TeachingJob(data_set, out, models, settings, splits)
    with job.journal.writing(), conversations_at_the_end(job) as conversations:
        refuse_open_batches(out)
        pending = job.pending()
        if job.journal.lines:
            say(f"resume: {len(job.questions) - len(pending)} of {len(job.questions)} items are done already")
        if pending and any(model.price is None for model in models):
            unknown = next(model for model in models if model.price is None)
            say(f"note: the price of {unknown.model} is not known, so costs are not counted")
        run = _Run(job, pending)
        run.work()
    return job.result(conversations, run.written, stopped=run.stopped, since=since)


@contextmanager
def conversations_at_the_end(job: TeachingJob) -> Generator[dict[str, Path]]:
    """Write the conversation files also after an error or Ctrl-C; yields the dict that will hold them."""
    files: dict[str, Path] = {}
    try:
        yield files
    finally:
        files.update(job.finish())


class _Run:
    """Threads that ask about the pending items and write the lines."""

    def __init__(self, job: TeachingJob, pending: Sequence[Question]) -> None:
        self.written: list[Line] = []
        self.stopped: str | None = None
        self._job = job
        self._left = len(pending)
        self._next = iter(pending)
        self._halt = threading.Event()
        self._lock = threading.Lock()
        """Held by a thread that takes the next question, or writes."""
        self._is_closed = False
        self._errors: list[BaseException] = []
        self._unserved: list[Line] = []
        """Lines that wait until the server serves a request."""
        self._budget = Budget(job.settings.budget, job.spent())
        self._each = job.expected_cost()
        self._advance: Advance = lambda _count: None

    def work(self) -> None:
        """Ask until nothing is pending. Raises what stopped a thread, and KeyboardInterrupt."""
        job, halt = self._job, self._halt
        with ExitStack() as stack, self._tracked() as self._advance:
            clients = [
                Client(one.api, one.model, key=one.key, settings=job.settings.client, halt=halt) for one in job.models
            ]
            pairs = [(one, stack.enter_context(client)) for one, client in zip(job.models, clients, strict=True)]
            teacher = Teacher(pairs, self._budget, retries=job.settings.retries)
            try:
                self._follow([self._thread(teacher) for _ in range(min(job.settings.jobs, self._left))])
            finally:
                with self._lock:
                    self._is_closed = True
        if self._errors:
            raise self._errors[0]
        if self._unserved:
            if not job.was_ever_served():
                raise self._none_served()
            job.journal.append(self._unserved)
            self.written += self._unserved

    def _tracked(self) -> AbstractContextManager[Advance]:
        """The progress of all items, of which earlier runs have done some."""
        total = len(self._job.questions)
        return track("teach", total, "items", done=total - self._left, note=self._costs)

    def _follow(self, threads: Sequence[threading.Thread]) -> None:
        """Run the threads to their end, also after a first Ctrl-C."""
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self._halt.set()
            say("stopping: waiting for the answers that are on their way; Ctrl-C again drops them")
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise

    def _costs(self) -> str:
        return costs_note(self._budget.spent, self._left, self._each)

    def _thread(self, teacher: Teacher) -> threading.Thread:
        """A thread in the context of this one. It ends with the process: a dropped answer holds nothing up."""
        return threading.Thread(target=copy_context().run, args=(self._serve, teacher), daemon=True)

    def _serve(self, teacher: Teacher) -> None:
        """Ask about the next item, and write its line, until none is left."""
        lines = self._job.journal.lines
        try:
            while not self._halt.is_set():
                with self._lock:
                    question = next(self._next, None)
                if question is None:
                    return
                line = teacher.explain(question, lines.get(question.item.name), keep=self._accept)
                if line is not None:
                    self._accept(line)
                if line is None or line["status"] == "open":
                    self.stopped = "budget"
                    return
        except Halted:
            return
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            self._errors.append(error)
            self._halt.set()

    def _accept(self, line: Line) -> None:
        """Write the line of an item. Lines about requests that the server did not serve wait until it serves one."""
        with self._lock:
            if self._is_closed:
                return
            again = self._job.is_rejected_again(line)
            self._unserved.append(line)
            if line["fault"] == "unserved" or (line["fault"] == "item" and not (self.written or again)):
                if len(self._unserved) < _NONE_SERVED:
                    return
                raise self._none_served()
            new, self._unserved = self._unserved, []
            self._job.journal.append(new)
            self.written += new
            self._left -= len(new)
            for one in new:
                if self._each is not None and one["counted_usd"] is not None:
                    self._each.add(one["counted_usd"])
            self._advance(len(new))

    def _none_served(self) -> RemoteError:
        last, count = self._unserved[-1], len(self._unserved)
        which = f"none of the last {count} requests" if count > 1 else "no request"
        return RemoteError(f"{last['base_url']} has served {which}: {last['reason']}.")
