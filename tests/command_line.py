"""Real `agiqa` processes at the price of a fork: one process imports the libraries, each command is a child of it.

A cold start of torch and transformers costs seconds, and these tests run a hundred commands. A child runs the
same `agiqa.cli.main`, with a process id to kill, file descriptors of its own and nothing shared but imports.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY_VARIABLE, KEY = "AGIQA_TEST_KEY", "test-key-71c1f0e5-never-in-a-file"
"""The key of the loopback servers in tests of `agiqa teach`: commands find it in this environment variable."""
_ATTEMPTS = 10
REPOSITORY = Path(__file__).resolve().parent.parent

_SERVER = """
import gc, json, os, signal, sys, traceback
import lightning.pytorch, pyarrow.parquet, sklearn.feature_extraction.text, torch, transformers, xlstm, zarr
import agiqa.bench.ablation.ablation, agiqa.bench.report.writing, agiqa.bench.transfer.transfer
import agiqa.bench.networks.networks, timm
import agiqa.extract.filling.job, agiqa.extract.teaching.batches
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor
from agiqa.cli import main
from tests.warm_forks import keep_one_ready
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(os.open(request["streams"][descriptor - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        torch.set_num_threads(request["threads"])
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        keep_one_ready()
        code = 0
        try:
            main(request["arguments"])
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that the output stream must be."""
        assert self.code == 0, self.err
        result = json.loads(self.out)
        assert isinstance(result, dict)
        return result


def in_time(break_off: Callable[[], Outcome], made: Path) -> Outcome:
    """The outcome of a command that was broken off.

    On a busy machine the command may end first: then what it `made` is removed, and it is called again.
    """
    for _ in range(_ATTEMPTS):
        outcome = break_off()
        if outcome.code != 0:
            return outcome
        if made.is_dir():
            shutil.rmtree(made)
        else:
            made.unlink()
    message = f"A command ended {_ATTEMPTS} times before it was broken off."
    raise AssertionError(message)


class CommandLine:
    """Calls `agiqa` with arguments, one command at a time."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        """Further environment variables of the commands."""
        self.folder = REPOSITORY
        """In which the commands run."""
        settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200", KEY_VARIABLE: KEY}
        environment = {**os.environ, **settings}
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    @property
    def server_id(self) -> int:
        """The process that the commands are forked from."""
        return self._server.pid

    def __call__(self, *arguments: object, threads: int = 1) -> Outcome:
        """Run `agiqa ARGUMENTS` to its end."""
        return self._run(arguments, None, threads)

    def killed(self, *arguments: object, when: Callable[[], bool], delay: float = 0.0) -> Outcome:
        """Run `agiqa ARGUMENTS` and kill it `delay` seconds after `when()` became true; code -9, or 0 if too late."""
        return self._run(arguments, lambda _error: when(), 1, delay)

    def interrupted(
        self,
        *arguments: object,
        after: str = "",
        when: Callable[[], bool] = lambda: True,
        number: signal.Signals = signal.SIGINT,
        then: Callable[[int, str], object] = lambda _process, _error: None,
    ) -> Outcome:
        """Run `agiqa ARGUMENTS` and press Ctrl-C, which reaches all its processes, or send it signal `number`.

        It is when `after` is on one of its streams and `when()` is true. `then` is called again and again until the
        command ends, with its process and what it has written to its error stream.
        """

        def told(error: Path) -> bool:
            return after in error.read_text() or after in error.with_name("out").read_text()

        return self._run(arguments, lambda error: told(error) and when(), 1, number=number, then=then)

    def close(self) -> None:
        """End the process that the commands are forked from."""
        self._server.communicate()

    def _run(
        self,
        arguments: tuple[object, ...],
        when: Callable[[Path], bool] | None,
        threads: int,
        delay: float = 0.0,
        number: signal.Signals = signal.SIGKILL,
        then: Callable[[int, str], object] = lambda _process, _error: None,
    ) -> Outcome:
        with tempfile.TemporaryDirectory() as temporary:
            streams = [Path(temporary) / "out", Path(temporary) / "err"]
            for stream in streams:
                stream.touch()
            request = {
                "arguments": [str(argument) for argument in arguments],
                "streams": [str(stream) for stream in streams],
                "threads": threads,
                "environment": self.environment,
                "folder": str(self.folder),
            }
            assert self._server.stdin is not None
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            child = int(self._read())
            if when is not None:
                self._disturb(child, streams[1], when, delay, number, then)
            code = int(self._read())
            return Outcome(code=code, out=streams[0].read_text(), err=streams[1].read_text())

    @staticmethod
    def _disturb(
        child: int,
        error: Path,
        when: Callable[[Path], bool],
        delay: float,
        number: signal.Signals,
        then: Callable[[int, str], object],
    ) -> None:
        """Send a signal when it is time, and call `then` until the command ends."""
        while _alive(child):
            if when(error):
                time.sleep(delay)
                if _alive(child):
                    _send(child, number)
                break
            time.sleep(0.001)
        while _alive(child):
            then(child, error.read_text())
            time.sleep(0.001)

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()


def _send(process: int, number: signal.Signals) -> None:
    if number == signal.SIGINT:
        os.killpg(process, number)
    else:
        os.kill(process, number)


def _alive(process: int) -> bool:
    """Whether the process is there; its id is not given to another while the server has not told its exit code."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
