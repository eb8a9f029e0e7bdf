"""Work of this process that runs in a thread while the main thread does something else: loading, hashing, writing."""

import contextvars
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from agiqa.workers import ABANDONED

_Result_co = TypeVar("_Result_co", covariant=True)
_SECONDS_TO_NOTICE = 1.0
"""After which Ctrl-C is noticed at the latest: one that arrives just before a wait begins does not end that wait."""
_SECONDS_TO_END = 0.5
"""Time that a thread has to end once nobody wants its result; loading a large model takes longer."""


class Ahead(Generic[_Result_co]):
    """A call in a thread of its own; a context manager whose block may fail before the result is there.

    No thread can be interrupted safely. If the block fails, its error is raised soon, and the thread may still run: it
    is then called ABANDONED, and a command that ends does not wait for it.
    """

    def __init__(self, function: Callable[[], _Result_co], *, finishes: bool = False) -> None:
        """Begin to call `function`, with the context variables of this thread.

        With `finishes`, a block that fails waits for it too.
        """
        self._function = function
        self._finishes = finishes
        self._found: list[_Result_co] = []
        self._error: BaseException | None = None
        context = contextvars.copy_context()
        self._ended = threading.Event()  # Thread.join of Python 3.11 marks a thread as ended when Ctrl-C interrupts it
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="agiqa-ahead")
        self._thread.start()

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the thread, but not for long if the block failed."""
        if error is None or self._finishes:
            self._wait()
        elif not self._ended.wait(_SECONDS_TO_END):
            self._thread.name = ABANDONED

    def result(self) -> _Result_co:
        """What the function returned, as soon as it has. Raises what it raised."""
        self._wait()
        self.check()
        return self._found[0]

    def check(self) -> None:
        """Raise what the function raised, if it already has."""
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        while not self._ended.wait(_SECONDS_TO_NOTICE):
            pass

    def _run(self) -> None:
        try:
            self._found.append(self._function())
        except BaseException as error:  # noqa: BLE001  # `result` raises it
            self._error = error
        finally:
            self._ended.set()
