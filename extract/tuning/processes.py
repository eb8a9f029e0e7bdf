"""One process per device of this host for one training. The first error of any ends all."""

import os
import uuid
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import torch

from agiqa.errors import AgiqaError, WorkerError
from agiqa.extract.tuning.group import Group, joined
from agiqa.extract.tuning.learner import OutOfMemory
from agiqa.workers import (
    MODULES_TO_PREPARE_ITEMS,
    context_of_processes,
    ctrl_c_kept_away,
    end_with_parent,
    new_process,
    picklable,
)

_SECONDS_TO_END = 5.0


class OnDevice(Protocol):
    """What each process does."""

    def open_and_run(self, device: str, group: Group) -> None:
        """Do the work on `device`, as one of `group`."""
        ...


def run_on_devices(work: OnDevice, devices: Sequence[str], folder: Path) -> None:
    """Call `work.open_and_run` in a process per device. They meet in a file in `folder`.

    Raises the first error of a process, and WorkerError for one that was killed.
    """
    on_cpu = all(torch.device(device).type == "cpu" for device in devices)
    context = context_of_processes(MODULES_TO_PREPARE_ITEMS, on_gpu=not on_cpu)
    meeting = folder / f".meeting.{uuid.uuid4().hex}"
    processes: dict[Connection, BaseProcess] = {}
    try:
        for rank in range(len(devices)):
            mine, theirs = context.Pipe()
            process = new_process(context, _main, (theirs, work, rank, list(devices), meeting))
            with ctrl_c_kept_away():
                process.start()
            theirs.close()
            processes[mine] = process
        _attend(processes, devices)
    finally:
        for process in processes.values():
            process.kill()  # those that have ended well are gone already
            process.join(_SECONDS_TO_END)
        meeting.unlink(missing_ok=True)


def _attend(processes: dict[Connection, BaseProcess], devices: Sequence[str]) -> None:
    """Wait for the end of all. Raise the cause of the first failure: the others then lose their connection to it."""
    names = dict(zip(processes, devices, strict=True))
    listening, consequence = set(processes), None
    while listening:
        ready = wait(list(listening), None if consequence is None else _SECONDS_TO_END)
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)  # nothing else is waited for
            listening.discard(connection)
            error = _outcome(connection, processes[connection], names[connection])
            if isinstance(error, AgiqaError | OutOfMemory):
                raise error
            consequence = consequence or error
    if consequence is not None:
        raise consequence


def _outcome(connection: Connection, process: BaseProcess, name: str) -> Exception | None:
    """The error of a process, which has ended or is about to; None if it did its work."""
    try:
        error: Exception | None = connection.recv()
    except (EOFError, OSError):
        process.join()
        message = (
            f"The process on {name} ended with exit code {process.exitcode}. The last checkpoint is kept: run the same "
            "command again."
        )
        return WorkerError(message)
    if error is not None:
        error.add_note(f"on {name}")
    return error


def _main(connection: Connection, work: OnDevice, rank: int, devices: list[str], meeting: Path) -> None:
    """The main function of a process; sends its error or None."""
    end_with_parent()
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // len(devices)))
    with joined(rank, devices, meeting) as group:
        try:
            work.open_and_run(str(device), group)
        except Exception as error:  # noqa: BLE001  # the parent raises it
            connection.send(picklable(error))  # before the group ends, which the others notice
        else:
            connection.send(None)
    connection.close()
