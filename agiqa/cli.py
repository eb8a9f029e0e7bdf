"""The command line: `agiqa COMMAND ...`. Commands are imported when they are used, so `--help` is quick."""

import _thread
import logging
import os
import signal
import sys
import threading
import traceback
from importlib import import_module
from typing import NoReturn

import click

from agiqa.commands.help import write_commands
from agiqa.errors import AgiqaError
from agiqa.version import agiqa_version

_AGAIN_SECONDS = 0.02

SECTIONS = {
    "Prepare": {
        "data": "Import published data sets; check a data set before a model runs.",
        "teach": "Let an online model explain the MOS of every image.",
        "tune": "Fine-tune the model on a teacher's conversations, into an adapter.",
        "merge": "Write a model and its adapter as one checkpoint, for other servers.",
        "describe": "Let the model describe every image and rate it in one word.",
    },
    "Features": {
        "extract": "Run the model once over a data set and store what heads need.",
        "store": "Inspect, verify, repair, convert and share stores.",
    },
    "Heads": {
        "train": "Train a head from a store.",
        "stack": "Add up trained heads, with weights from validation items.",
        "evaluate": "SRCC, PLCC, KRCC and RMSE of a head on a store, with intervals.",
        "predict": "Scores of a head for every item of a store, as a csv.",
        "score": "Description, rating word and MOS of single images, without a store.",
    },
    "Questions": {
        "tune-head": "Which settings make the best head? A search on validation items, then a test.",
        "ablate": "Which head is best? A grid of heads, with baselines and paired differences.",
        "baseline": "How good are image networks, fine-tuned on the same splits? Table II.",
        "transfer": "How good is a head on another data set: unchanged, retrained, or trained on few items?",
        "runs": "List trained runs: settings that differ, scores, date; paired differences between them.",
        "words": "How well do the model's rating words agree with the MOS?",
        "reproduce": "The tables of the M3-AGIQA paper, from published data and checkpoints.",
        "report": "Tables, pictures and one page from the results of ablate, transfer and train.",
    },
    "Start": {
        "demo": "All steps in miniature on a CPU: images, features, heads, a comparison.",
        "parts": "List the encoders, poolings, losses and other parts, your own included.",
        "completion": "Print the script that completes commands, options and names in a shell.",
    },
}
"""The commands with their summaries, by section of `agiqa --help`."""
COMMANDS = tuple(name for commands in SECTIONS.values() for name in commands)


class LazyGroup(click.Group):
    """A group whose commands are the `command` objects of the modules in `agiqa.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the help."""
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by section, without importing any."""
        write_commands(formatter, SECTIONS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called `cmd_name`, or None."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"agiqa.commands.{cmd_name.replace('-', '_')}").command
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest known command in the message for an unknown one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from agiqa.errors import UnknownName

            raise click.UsageError(str(UnknownName.of(kind="command", name=args[0], known=COMMANDS)), ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(agiqa_version(), prog_name="agiqa")
def cli() -> None:
    """Quality assessment of AI-generated images from cached features of a multimodal LLM.

    Describe and extract run the model once. After that, train needs minutes and no model.
    """


def keep_interrupts(unraisable: "sys.UnraisableHookArgs") -> None:
    """Raise KeyboardInterrupt again if Ctrl-C came in a callback of the garbage collector: Python drops it there.

    Without this, most Ctrl-C would be lost while h5py writes.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


class Interruption:
    """Ctrl-C, and SIGTERM, which ends the command in the same way: clusters and supervisors stop jobs with it."""

    def __init__(self) -> None:
        """Install the handlers for this process. SIGTERM ends a fork of it at once."""
        self.came: int | None = None
        """The signal, as soon as it came."""
        self._process = os.getpid()
        signal.signal(signal.SIGTERM, self._stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
            signal.signal(signal.SIGINT, self._stop)

    def _stop(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process and number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.came = number
        raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed with one message, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    interruption = Interruption()
    sys.unraisablehook = keep_interrupts
    if not {"-v", "--verbose"} & set(arguments):
        # zarr writes concurrently: when one write fails, the error is printed below, and asyncio would log the others
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        _run(arguments, interruption)
    except (click.Abort, KeyboardInterrupt):
        _end_interrupted(interruption.came)
    except Exception:
        if interruption.came is None:
            raise
        _end_interrupted(interruption.came)  # compiled code of a library made another error of it


def _end_interrupted(number: int | None) -> NoReturn:
    print("interrupted; finished work is kept: run the same command again to resume", file=sys.stderr)
    _leave(128 + (number or signal.SIGINT))


def _leave(code: int) -> NoReturn:
    """Exit at once if a thread is still at work whose result nobody wants, as one that loads a model."""
    from agiqa.workers import ABANDONED

    if any(thread.name == ABANDONED for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(arguments: list[str], interruption: Interruption) -> None:
    """Run the command; exit with one message where it fails."""
    try:
        cli.main(args=arguments, prog_name="agiqa", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (AgiqaError, OSError) as error:
        if "-v" in arguments or "--verbose" in arguments:
            traceback.print_exc()
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"error: {error}{notes}", file=sys.stderr)
        if interruption.came is not None:
            _end_interrupted(interruption.came)
        _leave(1)
