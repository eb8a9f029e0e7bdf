"""Real processes that start fast: one process imports the store, and forks a child for each job.

A job is a function of `tests.store.jobs`. It runs in a process with an id to kill and limits of its own; what it returns,
or the error that it raised, comes back as JSON.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_SERVER = "from tests.store import jobs, workers; workers.serve(jobs)"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    code: int
    """Exit code; minus the signal that killed it."""
    result: Any = None
    error: str = ""
    """Class of the error that was raised."""
    message: str = ""
    """The error and its notes, as the command line prints them."""
    expected: bool = False
    """Whether agiqa raises such an error on purpose."""
    peak: int = 0
    """Bytes of memory that the process had at most."""


class Progress:
    """The current phase of a job, so that a test can kill it in the middle of one."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def at(self, phase: str) -> None:
        self._file.write_text(phase)


class Job:
    """A job at work."""

    def __init__(self, process: int, folder: Path, workers: "Workers") -> None:
        self.process = process
        self._folder = folder
        self._workers = workers

    @property
    def phase(self) -> str:
        """What the job last said that it is at."""
        file = self._folder / "phase"
        return file.read_text() if file.exists() else ""

    def wait_for(self, phase: str) -> None:
        """Wait until the job says that it is at `phase`, or has ended."""
        while self.phase != phase and not (self._folder / "outcome").exists():
            time.sleep(0.001)

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def ended(self) -> Outcome:
        """Wait for its end."""
        code = self._workers.reap(self.process)
        outcome = self._folder / "outcome"
        return Outcome(code=code, **(json.loads(outcome.read_text()) if outcome.exists() else {}))


class Workers:
    """Starts jobs, as many as wanted at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _SERVER],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = 0
        Path(self._folder.name).chmod(0o755)

    def start(self, job: str, *arguments: Any, **limits: int) -> Job:
        """Start the job called `job`; `limits` are those of `_limit`."""
        self._jobs += 1
        folder = Path(self._folder.name) / str(self._jobs)
        folder.mkdir()
        folder.chmod(0o777)
        plain = [str(argument) if isinstance(argument, Path) else argument for argument in arguments]
        request = {"job": job, "arguments": plain, "folder": str(folder), "limits": limits}
        return Job(int(self._ask(request)), folder, self)

    def run(self, job: str, *arguments: Any, **limits: int) -> Outcome:
        """Start a job and wait for its end."""
        return self.start(job, *arguments, **limits).ended()

    def reap(self, process: int) -> int:
        """The exit code of a job, once it has ended."""
        return int(self._ask({"reap": process}))

    def close(self) -> None:
        """End the process that the jobs are forked from."""
        self._server.communicate()
        self._folder.cleanup()

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline()


def serve(jobs: Any) -> None:
    """Fork a child for every request; `jobs` is the module with the functions."""
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            os._exit(_run(getattr(jobs, request["job"]), request))
        print(child, flush=True)


def _run(job: Any, request: dict[str, Any]) -> int:
    folder = Path(request["folder"])
    try:
        _limit(**request["limits"])
        answer = {"result": job(Progress(folder / "phase"), *request["arguments"])}
    except BaseException as error:  # noqa: BLE001 - the test judges it
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        answer = {"error": type(error).__name__, "message": f"{error}{notes}"}
        answer["expected"] = type(error).__module__ == "agiqa.errors"
        if not answer["expected"]:
            traceback.print_exc()
    answer["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    temporary = folder / "outcome.new"
    temporary.write_text(json.dumps(answer))
    temporary.rename(folder / "outcome")
    return 1 if "error" in answer else 0


def _limit(*, memory: int = 0, seconds: int = 60, file_size: int = 0, user: int = 0) -> None:
    """Bytes of memory more than this process has now, seconds of life, bytes of a file, and who it is."""
    signal.alarm(seconds)
    if memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
