"""Images decoded in other processes while a data set is read: one that crashes its decoder is a bad image too."""

import multiprocessing
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agiqa.errors import DataError, WorkerError
from agiqa.extract.data.images import checked_image
from agiqa.workers import LostAnswer, Work, Workers

CHECKERS = os.cpu_count() or 1
"""Threads that may check images at the same time, each with a process."""


@contextmanager
def image_checks() -> Generator[Callable[[Path], str]]:
    """`checked_image`, run in another process, for as many threads as CHECKERS.

    It raises DataError also for an image that crashes or hangs its decoder, and WorkerError when the processes are
    killed from outside. They are forks of this one, which start at once; all that they do is to read and decode files.
    """
    workers = Workers(multiprocessing.get_context("fork"), _begin)

    def check(path: Path) -> str:
        try:
            found: str = workers.ask(checked_image, path)
        except LostAnswer as error:
            if error.blameless:
                message = f"{path}: the process that decoded it {error}, twice, from outside or for want of memory."
                raise WorkerError(message) from error
            message = f"{path}: the process that decoded it {error}, twice; replace the file or leave it out."
            raise DataError(message) from error
        return found

    try:
        yield check
    finally:
        workers.close()


def _begin() -> Work:
    return _call


def _call(function: Callable[[Any], Any], argument: Any) -> Any:
    return function(argument)
