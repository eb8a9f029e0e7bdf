"""A reproduction: runs the steps of its plan one after another, each in a process of its own, and remembers them.

A step is a command line of agiqa, run as a user would run it, in a fork of this process: so the GPU memory of a model
is free before the next step begins, a step that is killed for memory stops no other one, and any step can be repeated
by hand. This process imports no model code and touches no GPU. Steps resume, because their commands do.
"""

import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

from agiqa.bench.reproducing.plan import Plan
from agiqa.bench.reproducing.sets import missing_set, prepare_set
from agiqa.bench.reproducing.steps import Step, described, digests, missing_weights, record_path
from agiqa.errors import AgiqaError
from agiqa.progress import say
from agiqa.store.disk.files import working_in_folder, write_text_atomically
from agiqa.workers import killed_with_forker

RESULTS = ("heads", "networks", "transfers")
"""Folders in OUT with a result folder per step."""
_KEPT = "finished steps are kept"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where extraction runs."""

    devices: int | None = None
    ray: str | None = None
    part: str | None = None
    """K/N: only this share of every store is filled, and no other step runs."""

    def arguments(self) -> list[str]:
        """Options of `agiqa extract`."""
        given = {"--devices": self.devices, "--ray": self.ray, "--part": self.part}
        return [word for name, value in given.items() if value is not None for word in (name, str(value))]

    def own(self, path: Path) -> Path:
        """`path`, with the part in its name: jobs of an array work at the same time."""
        return path if self.part is None else path.with_stem(f"{path.stem},{self.part.replace('/', '-of-')}")


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What became of the steps."""

    done: list[str] = field(default_factory=list[str])
    """Finished by this call or before."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Errors by step."""
    blocked: dict[str, str] = field(default_factory=dict[str, str])
    """Steps that were not begun, with the step that they wait for."""


def is_done(step: Step, digest: str, out: Path) -> bool:
    """Whether the step was finished with these arguments, after steps with theirs, and what it made is there."""
    record = _record(out, step)
    return record.get("digest") == digest and (step.out is None or step.out.exists())


def run_steps(
    plan: Plan, steps: Sequence[Step], wanted: Sequence[Step], root: Path, out: Path, machine: Machine
) -> Reproduction:
    """Run the `wanted` ones of all `steps` that are not done, each after those that it needs.

    A step that fails stops those that need it; the others go on. Raises BusyStore where another reproduction is at work
    in `out`, except for a part, which only fills stores.
    """
    found, digest = Reproduction(), digests(steps)
    names = {step.name for step in wanted}
    locked = nullcontext() if machine.part else working_in_folder(out, "reproduction", kept=_KEPT)
    with locked:
        for step in steps:  # also of steps that people run by hand
            for made in (record_path(out, step.name), step.out):
                if made is not None:
                    made.parent.mkdir(parents=True, exist_ok=True)
        for step in steps:
            if is_done(step, digest[step.name], out):
                found.done.append(step.name)
                continue
            if step.name not in names or (machine.part and step.kind != "extract"):
                continue
            waits = [name for name in step.needs if name not in found.done]
            if waits:
                found.blocked[step.name] = waits[0]
                say(f"{step.name}: not begun, since {waits[0]} is not done")
                continue
            _run_one(plan, step, digest[step.name], root, out, machine, found)
    return found


def _run_one(plan: Plan, step: Step, digest: str, root: Path, out: Path, machine: Machine, found: Reproduction) -> None:
    """Run a step and write its record, or its error into `found`."""
    arguments = [*step.arguments, *(machine.arguments() if step.kind == "extract" else [])]
    say(f"{step.name}: {shlex.join(['agiqa', *arguments]) if arguments else 'begins'}")
    started = time.monotonic()
    path = record_path(out, step.name)
    printed, log = (machine.own(path.with_suffix(suffix)) for suffix in (".out", ".log"))
    code = _forked(lambda: _work(plan, step, arguments, root, out), printed, log)
    seconds = time.monotonic() - started
    if code != 0:
        found.failed[step.name] = _error(code, log)
        say(f"{step.name}: failed after {seconds:.0f} s, see {log}")
        return
    say(f"{step.name}: done in {seconds:.0f} s")
    text = printed.read_text(encoding="utf-8").strip()
    printed.unlink()
    if machine.part:
        return
    content = {"step": step.name, "arguments": arguments, "seconds": seconds, "digest": digest}
    write_text_atomically(path, json.dumps({**content, "result": json.loads(text) if text else None}, indent=1))
    found.done.append(step.name)


def _work(plan: Plan, step: Step, arguments: Sequence[str], root: Path, out: Path) -> None:
    """In the process of a step: what no command does, then the command, which ends the process."""
    if step.kind == "fetch":
        _fetch(plan, step.entry)
    elif step.kind == "data":
        prepare_set(plan, step.entry, root, out / "data" / step.entry)
    elif step.kind == "ablate":
        from agiqa.bench.reproducing.grids import write_grid

        write_grid(plan, step.entry, out / "grids" / f"{step.entry}.yaml")
    elif step.kind == "words":
        _select_test(described(out, step.entry), out / "words" / f"{step.entry}.jsonl")
    if arguments:
        from agiqa.cli import main

        main([*arguments, "--json"])


def _fetch(plan: Plan, name: str) -> None:
    """Download the model or an adapter into the hub's cache, if it is no folder here."""
    if name == plan.model:
        from agiqa.extract.models.checkpoints import resolve_checkpoint

        resolve_checkpoint(name).weight_files()
        return
    from agiqa.extract.models.adapters import resolve_adapter

    resolve_adapter(name)


def _select_test(file: Path, out: Path) -> None:
    """Write the lines of `file` about images of the split test."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, "".join(f"{line}\n" for line in lines if json.loads(line).get("split") == "test"))


class _Both:
    """An error stream whose text also goes into a file; no terminal, so that progress comes in lines."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self._streams = (first, second)

    def write(self, text: str) -> int:
        """Write to both."""
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush both."""
        for stream in self._streams:
            stream.flush()

    def isatty(self) -> bool:
        """Never."""
        return False

    def fileno(self) -> int:
        """That of the first, for C code."""
        return self._streams[0].fileno()


def _forked(work: Callable[[], None], printed: Path, log: Path) -> int:
    """Call `work` in a fork whose output goes to `printed`, and its messages also to `log`; the exit code.

    The fork ends with this process, in whatever way that ends. A signal that ends this process ends the fork first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _in_fork(work, printed, log)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
        raise


def _in_fork(work: Callable[[], None], printed: Path, log: Path) -> NoReturn:
    """Call `work`, and end this process as `agiqa.cli.main` ends."""
    code = 1
    try:
        killed_with_forker()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = printed.open("w", encoding="utf-8")
        os.dup2(sys.stdout.fileno(), 1)
        both: Any = _Both(sys.stderr, log.open("w", encoding="utf-8", buffering=1))
        sys.stderr = both
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except (AgiqaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except BaseException:  # noqa: BLE001  # this process ends here, and nothing else would show it
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _error(code: int, log: Path) -> str:
    """The message of a step that failed."""
    text = log.read_text(encoding="utf-8", errors="replace")
    place = text.rfind("error: ")
    if place >= 0:
        return text[place + len("error: ") :].strip()
    lines = text.strip().splitlines()
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{lines[-1]} ({ended})" if lines else ended


def _record(out: Path, step: Step) -> Mapping[str, Any]:
    """The record of a step; empty if it was not finished."""
    try:
        found = json.loads(record_path(out, step.name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def missing_inputs(plan: Plan, steps: Sequence[Step], root: Path) -> dict[str, str]:
    """By step, why its data set cannot be used, or its network lacks pretrained weights."""
    found = {step.name: missing_set(plan, step.entry, root) for step in steps if step.kind == "data"}
    found |= {step.name: missing_weights(step, root) for step in steps if step.kind == "baseline"}
    return {name: message for name, message in found.items() if message is not None}


def result_folders(out: Path) -> list[Path]:
    """The result folders that a report can show."""
    return sorted(path.parent for kind in RESULTS for path in (out / kind).glob("*/rows.jsonl"))
