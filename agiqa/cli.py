"""The command line: `agiqa COMMAND ...`. Commands are loaded when they are asked for, so `--help` is quick."""

import _thread
import logging
import os
import signal
import sys
import threading
import traceback
from importlib import import_module

import click

from agiqa.errors import AgiqaError
from agiqa.version import agiqa_version

_AGAIN_SECONDS = 0.02

COMMANDS = (
    "demo",
    "describe",
    "extract",
    "store",
    "train",
    "ablate",
    "transfer",
    "report",
    "evaluate",
    "words",
    "predict",
    "score",
)


class LazyGroup(click.Group):
    """A group whose commands are the `command` objects of the modules in `agiqa.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the data's way."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called `cmd_name`, or None."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"agiqa.commands.{cmd_name}").command
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
    """Quality assessment of AI-generated images from cached features of a multimodal language model.

    Phase 1 runs the model once (describe, extract); phase 2 trains heads from the store in minutes (train).
    """


def keep_interrupts(unraisable: "sys.UnraisableHookArgs") -> None:
    """Interrupt again when Ctrl-C met a callback of the garbage collector, where Python drops every exception.

    While h5py writes, most of them would be lost so.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


class Termination:
    """Ends the command at SIGTERM, by which clusters and supervisors stop jobs, as Ctrl-C does."""

    def __init__(self) -> None:
        """Listen from now on, in this process alone: a fork of it dies of SIGTERM as others do."""
        self.came = False
        self._process = os.getpid()
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.came = True
        raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed with one message, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    termination = Termination()
    sys.unraisablehook = keep_interrupts
    if not {"-v", "--verbose"} & set(arguments):
        # zarr writes side by side: when one write fails, which is told below, asyncio would log how the others end
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        cli.main(args=arguments, prog_name="agiqa", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        how = signal.SIGTERM if termination.came else signal.SIGINT
        print("interrupted; what is finished is kept: run the same command again", file=sys.stderr)
        sys.exit(128 + how)
    except (AgiqaError, OSError) as error:
        if "-v" in arguments or "--verbose" in arguments:
            traceback.print_exc()
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"error: {error}{notes}", file=sys.stderr)
        sys.exit(1)
