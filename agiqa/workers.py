"""Worker processes that answer one question at a time; one that crashes or hangs costs no other question its answer.

Each has a pipe of its own, so it is known what a process was at when it died. A thread kills those that take too long.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from agiqa.errors import AgiqaError, WorkerError
from agiqa.progress import say

SECONDS_TO_ANSWER = 300.0
"""A process that takes longer for one question is killed. Images take a second or two."""
_LOOKS = 60
"""Looks at a process within its seconds. The clock would also count the time for which Ctrl-Z stopped this process."""
_TIMES_TO_BEGIN = 4
"""So many times its seconds a process may take to begin: a dozen that import and open a model at once are slow."""
_SECONDS_TO_END = 5.0
"""What a process that has been killed, or has closed its pipe, may take to be gone."""
_ATTEMPTS = 2
"""Processes that try a question: the first may have been stopped or killed for no fault of the question."""
_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux."""
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""Signals that say nothing of the question: people send them, and the system does where memory runs out."""

Work = Callable[[Callable[..., Any], Any], Any]
"""What a process does with a function and its argument."""


class LostAnswer(Exception):
    """No process lived to answer a question. Its text says of the last one "was ended by SIGSEGV", for a message."""

    def __init__(self, how: str, *, blameless: bool) -> None:
        """`blameless`: nothing speaks against the question itself."""
        super().__init__(how)
        self.blameless = blameless


class Workers:
    """Processes that are started as they are needed, one for each thread that asks at the same time."""

    def __init__(self, context: BaseContext, begin: Callable[[], Work], *, limited: bool = True) -> None:
        """Each process calls `begin` first, which must be picklable unless `context` forks this process.

        With `limited` a process may take SECONDS_TO_ANSWER, and longer to begin, and it starts no processes itself.
        """
        self._context = context
        self._begin = begin
        self._limited = limited
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if limited:
            threading.Thread(target=self._watch, args=(SECONDS_TO_ANSWER,), daemon=True).start()

    def ask(self, function: Callable[..., Any], argument: Any) -> Any:
        """The answer of a process to `function` and `argument`; what it raises is raised here.

        A fresh process tries where the first one died or took longer than it may. Raises LostAnswer when
        that one does not answer either, and WorkerError where it cannot even start.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            worker = self._take(fresh=attempt > 1)
            try:
                sound, answer = worker.ask(function, argument)
            except (EOFError, OSError) as error:  # it is gone, perhaps within a message
                lost = self._lost(worker)
                if attempt == _ATTEMPTS or self._closed.is_set():
                    raise lost from error
                if self._limited and isinstance(lost, LostAnswer):
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
        """Kill the processes, stopped ones too; whoever waits for an answer gets LostAnswer."""
        _wake_fork_server()  # a thread that waits for it holds the lock
        with self._lock:
            self._closed.set()
            there = [*self._idle, *self._busy]
            for worker in there:
                worker.kill()
            for worker in there:
                worker.process.join(_SECONDS_TO_END)
            self._idle.clear()

    def _take(self, *, fresh: bool) -> "_Worker":
        """A process that has nothing to do; a `fresh` one cannot have been stopped or killed before."""
        with self._lock:
            if self._closed.is_set():
                message = "was not needed any more"
                raise LostAnswer(message, blameless=True)
            if fresh or not self._idle:
                worker = _Worker(self._context, self._begin, daemon=self._limited)
            else:
                worker = self._idle.pop()
            worker.looks = 0
            self._busy.append(worker)
            return worker

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

    def __init__(self, context: BaseContext, begin: Callable[[], Work], *, daemon: bool) -> None:
        self.pipe, theirs = context.Pipe()
        start: Any = context  # typed without the class of its processes
        self.process: BaseProcess = start.Process(target=_serve, args=(theirs, begin), daemon=daemon)
        with ctrl_c_kept_away():
            self.process.start()
        theirs.close()  # so that this end tells when the process is gone
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
        """End it at once."""
        if self.process.is_alive():
            self.process.kill()

    def obituary(self) -> LostAnswer | WorkerError:
        """How it ended; it is gone afterwards."""
        self.process.join(_SECONDS_TO_END)
        self.kill()
        self.process.join(_SECONDS_TO_END)
        code = self.process.exitcode
        how = self.late or _ending(code)
        if not self.ready:
            return WorkerError(f"A worker process {how} before it had begun. Run the same command again.")
        return LostAnswer(how, blameless=self.late is None and code is not None and -code in _FROM_OUTSIDE)


@contextmanager
def ctrl_c_kept_away() -> Generator[None]:
    """Start processes inside that Ctrl-C does not reach, from their first instruction on.

    One that comes meanwhile is raised in this process afterwards.
    """
    resource_tracker.ensure_running()  # which would let it through again if it were started inside
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, however it did; Ctrl-C is the parent's to take.

    On Linux the children of a fork server end even while they are stopped.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if os.getppid() != parent.pid:  # a fork server has forked it
        killed_with_forker()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def killed_with_forker() -> None:
    """Have Linux kill this process, stopped or not, when the fork server ends, and let that end with the whole run.

    The fork server lives until nobody holds the pipe that it watches, and hands that pipe to every process that it
    forks: one that was stopped would keep it alive for ever.
    """
    server: Any = getattr(forkserver, "_forkserver", None)
    if (watched := getattr(server, "_forkserver_alive_fd", None)) is not None:
        os.close(watched)
        server._forkserver_alive_fd = None
    with suppress(OSError, AttributeError):  # other systems have no such call
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _wake_fork_server() -> None:
    """Let the fork server go on if somebody stopped it: nobody can start a process, or see one end, without it."""
    server: int | None = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    if server is not None:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGCONT)


def picklable(error: Exception) -> Exception:
    """`error`, or what can be told of it to another process; of one that nobody raised on purpose, with its place."""
    if not isinstance(error, AgiqaError):
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever an error's own pickling raises
        return WorkerError(f"{type(error).__name__}: {error}")
    return error


def _ending(code: int | None) -> str:
    """How a process with this exit code ended."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by {next((known.name for known in signal.Signals if known == -code), f'signal {-code}')}"


def _serve(pipe: "Connection[Any, Any]", begin: Callable[[], Work]) -> None:
    """The life of a process: answer what is asked until the pipe closes."""
    end_with_parent()
    try:
        work = begin()
    except Exception as error:  # noqa: BLE001  # it is raised by whoever asks
        pipe.send((False, picklable(error)))
        return
    pipe.send((True, None))
    with suppress(EOFError, ConnectionError):  # nobody asks any more
        while True:
            question = pipe.recv_bytes()
            try:
                pipe.send((True, work(*pickle.loads(question))))
            except Exception as error:  # noqa: BLE001  # it is raised by whoever asks
                pipe.send((False, picklable(error)))
