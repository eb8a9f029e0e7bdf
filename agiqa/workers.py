"""Worker processes that answer one question at a time. One that crashes or hangs loses only its own answer.

Each process has its own pipe, so that the question at which it died is known. A thread kills processes that take too
long.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from agiqa.errors import AgiqaError, WorkerError
from agiqa.parts import modules_to_import, with_parts
from agiqa.progress import say

SECONDS_TO_ANSWER = 300.0
"""A process that takes longer for one question is killed. An image takes a second or two."""
_LOOKS = 60
"""Checks within that time. Checks are counted, not seconds: a pause of this process by Ctrl-Z must not count."""
_TIMES_TO_BEGIN = 4
"""Factor on that time for the start of a process: a dozen that import and open a model at once are slow."""
_SECONDS_TO_END = 5.0
"""The longest wait for the end of a process that was killed or closed its pipe."""
_ATTEMPTS = 2
"""Processes that try a question: the first may have been stopped or killed for another reason."""
_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux."""
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""Signals that people send, or the system when memory runs out: the question is not to blame."""

MODULES_TO_PREPARE_ITEMS = (
    "agiqa.extract.models.opening",
    "transformers.models.llama.configuration_llama",  # any configuration imports half of transformers
    "transformers.processing_utils",
    "transformers.models.auto.image_processing_auto",
)

ABANDONED = "agiqa-abandoned"
"""The name of threads whose results nobody wants any more; the end of a command does not wait for them."""

Work = Callable[[Callable[..., Any], Any], Any]
"""Called in the process with a function and its argument; returns the answer."""


class LostAnswer(Exception):
    """No process survived a question. The text continues a sentence about the last one: "was ended by SIGSEGV"."""

    def __init__(self, how: str, *, blameless: bool) -> None:
        """`blameless`: the question is not to blame."""
        super().__init__(how)
        self.blameless = blameless


class Workers:
    """Processes that start on demand, one for each thread that asks at the same time."""

    def __init__(self, context: BaseContext, begin: Callable[[], Work]) -> None:
        """Each process first calls `begin`, which must be picklable unless `context` forks this process.

        A process may take SECONDS_TO_ANSWER, and longer to begin, and cannot start processes itself.
        """
        self._context = context
        self._begin = begin
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._lock = threading.Lock()
        self._begins = threading.Lock()
        """Held while a process starts: of two forks at once, one would inherit the other's pipe."""
        self._closed = threading.Event()
        threading.Thread(target=self._watch, args=(SECONDS_TO_ANSWER,), daemon=True).start()

    def ask(self, function: Callable[..., Any], argument: Any) -> Any:
        """The answer of a process to `function` and `argument`; raises what they raise.

        If the first process dies or takes too long, a new one tries. Raises LostAnswer if that one fails too, and
        WorkerError if it cannot even start.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            worker = self._take(fresh=attempt > 1)
            try:
                sound, answer = worker.ask(function, argument)
            except (EOFError, OSError) as error:  # it died, perhaps within a message
                lost = self._lost(worker)
                if attempt == _ATTEMPTS or self._closed.is_set():
                    raise lost from error
                if isinstance(lost, LostAnswer):
                    say(f"warning: the process at {argument} {lost}; another one tries")
                continue
            except BaseException:
                self._let_go(worker)
                raise
            self._let_go(worker, keep=worker.ready)
            if sound:
                return answer
            raise answer
        raise AssertionError  # the last attempt returns or raises

    def close(self) -> None:
        """Kill the processes, stopped ones too. Threads that wait for an answer get LostAnswer.

        A process that is about to start is killed by its thread once it has: a fork server may be importing still.
        """
        _wake_fork_server()
        with self._lock:
            self._closed.set()
            workers = [*self._idle, *self._busy]
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.process.join(_SECONDS_TO_END)
            self._idle.clear()

    def _take(self, *, fresh: bool) -> "_Worker":
        """An idle process; a `fresh` one cannot have been stopped or killed before."""
        with self._lock:
            self._refuse_if_closed()
            worker = self._idle.pop() if self._idle and not fresh else None
            if worker is not None:
                worker.looks = 0
                self._busy.append(worker)
                return worker
        with self._begins:
            self._refuse_if_closed()
            worker = _Worker(self._context, self._begin)
        with self._lock:
            self._busy.append(worker)
            if self._closed.is_set():
                worker.kill()  # which the thread notices when it asks
        return worker

    def _refuse_if_closed(self) -> None:
        if self._closed.is_set():
            message = "was not needed any more"
            raise LostAnswer(message, blameless=True)

    def _let_go(self, worker: "_Worker", *, keep: bool = False) -> None:
        with self._lock:
            self._busy.remove(worker)
            if keep:
                self._idle.append(worker)
            else:
                worker.kill()

    def _lost(self, worker: "_Worker") -> LostAnswer | WorkerError:
        with self._lock:
            self._busy.remove(worker)
            return worker.obituary()

    def _watch(self, seconds: float) -> None:
        while not self._closed.wait(seconds / _LOOKS):
            _wake_fork_server()
            with self._lock:
                for worker in self._busy:
                    worker.looks += 1
                    times = 1 if worker.ready else _TIMES_TO_BEGIN
                    if worker.looks > times * _LOOKS:
                        worker.late = f"took longer than {times * seconds:g} s"
                        worker.kill()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, context: BaseContext, begin: Callable[[], Work]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = new_process(context, _serve, (theirs, begin), daemon=True)
        with ctrl_c_kept_away():
            self.process.start()
        theirs.close()  # so that reading fails once the process is gone
        self.ready = False
        self.looks = 0
        self.late: str | None = None

    def ask(self, function: Callable[..., Any], argument: Any) -> tuple[bool, Any]:
        """True and the answer, or False and an error. Raises EOFError or OSError when the process is gone."""
        if not self.ready:
            self.ready, error = self.pipe.recv()
            if not self.ready:
                return False, error
            self.looks = 0
        self.pipe.send((function, argument))
        answer: tuple[bool, Any] = self.pipe.recv()
        return answer

    def kill(self) -> None:
        """Kill the process."""
        if self.process.is_alive():
            self.process.kill()

    def obituary(self) -> LostAnswer | WorkerError:
        """How the process ended; afterwards it is gone."""
        self.process.join(_SECONDS_TO_END)
        self.kill()
        self.process.join(_SECONDS_TO_END)
        code = self.process.exitcode
        how = self.late or _ending(code)
        if not self.ready:
            return WorkerError(f"A worker process {how} before it had begun. Run the same command again.")
        return LostAnswer(how, blameless=self.late is None and code is not None and -code in _FROM_OUTSIDE)


def start_fork_server(modules: Sequence[str]) -> BaseContext | None:
    """Start the fork server of this process, unless it runs already; it imports `modules` while this process goes on.

    Its forks need not import them; it passes over those that are missing. Returns the context of such forks; None on
    systems that have none.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    with ctrl_c_kept_away():
        forkserver.ensure_running()
    return context


def context_of_processes(modules: Sequence[str], *, on_gpu: bool = False) -> BaseContext:
    """The context of processes that need `modules`: forks of the server that has imported them, where there is one.

    Processes that use a GPU are spawned: a library may begin to use it while it is imported, and no fork can go on with
    that.
    """
    forks = None if on_gpu else start_fork_server(modules)
    return forks or multiprocessing.get_context("spawn")


def new_process(
    context: BaseContext, function: Callable[..., Any], arguments: Sequence[Any], **settings: Any
) -> BaseProcess:
    """A process that calls `function` once it is started, with the parts of one's own that this process imports.

    `settings` are `name` and `daemon`.
    """
    make: Any = context  # typed without the class of its processes
    process: BaseProcess = make.Process(target=with_parts, args=(modules_to_import(), function, arguments), **settings)
    return process


@contextmanager
def ctrl_c_kept_away() -> Generator[None]:
    """Processes started within the block never receive Ctrl-C, from their first instruction on.

    A Ctrl-C within the block is raised in this process afterwards.
    """
    resource_tracker.ensure_running()  # if it started inside, it would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """End this process as soon as the one that started it ends, in any way. Only the parent handles Ctrl-C.

    On Linux the children of a fork server end even if they are stopped.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if os.getppid() != parent.pid:  # a fork server forked it
        killed_with_forker()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def killed_with_forker() -> None:
    """Have Linux kill this process, stopped or not, when the fork server ends, and let the server end with the run.

    The fork server lives as long as any process holds the pipe that it watches, and every process that it forks
    inherits that pipe: a stopped one would keep the server alive for ever.
    """
    server: Any = getattr(forkserver, "_forkserver", None)
    if (watched := getattr(server, "_forkserver_alive_fd", None)) is not None:
        os.close(watched)
        server._forkserver_alive_fd = None
    with suppress(OSError, AttributeError):  # other systems have no such call
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _wake_fork_server() -> None:
    """Continue a stopped fork server: without it no process starts, and the end of none is seen."""
    server: int | None = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    if server is not None:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGCONT)


def picklable(error: Exception) -> Exception:
    """`error`, or a WorkerError with its text if it cannot be pickled; with the traceback if it is no AgiqaError."""
    if not isinstance(error, AgiqaError):
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever an error's own pickling raises
        return WorkerError(f"{type(error).__name__}: {error}")
    return error


def _ending(code: int | None) -> str:
    """The end of a process with this exit code, in words."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by {next((known.name for known in signal.Signals if known == -code), f'signal {-code}')}"


def _serve(pipe: "Connection[Any, Any]", begin: Callable[[], Work]) -> None:
    """The main function of a process: answer questions until the pipe closes."""
    end_with_parent()
    try:
        work = begin()
    except Exception as error:  # noqa: BLE001  # the asking thread raises it
        pipe.send((False, picklable(error)))
        return
    pipe.send((True, None))
    with suppress(EOFError, ConnectionError):  # the parent closed the pipe
        while True:
            question = pipe.recv_bytes()
            try:
                pipe.send((True, work(*pickle.loads(question))))
            except Exception as error:  # noqa: BLE001  # the asking thread raises it
                pipe.send((False, picklable(error)))
