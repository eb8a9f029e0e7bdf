"""Every error that agiqa raises on purpose, each also the builtin that a caller would expect.

AgiqaError
├── DataError (ValueError)            images, prompts, labels or conversations that cannot be used
├── ModelError (ValueError)           a checkpoint that is missing, incomplete or unsuitable
├── CompilerError (RuntimeError)      torch's compiler does not work on this machine, or not for this model
├── ConfigError (ValueError)          a setting that contradicts another or is out of range
├── UnknownName (LookupError)         no such encoder, pooling, label ...; names the nearest known one
├── WorkerError (RuntimeError)        a process of this run died, or the device ran out of memory on one item
├── BrokenLaw (AssertionError)        a registered part that breaks a law of its kind
├── HeadError (ValueError)            features that a head cannot read, or no run folder
└── StoreError
    ├── SchemaError (ValueError)      a format or version that this agiqa does not read
    ├── SettingsConflict (ValueError) the store exists, made with other settings
    ├── BusyStore (RuntimeError)      another run is at work on the same store
    ├── IncompleteStore (RuntimeError) units are missing, or the store was never sealed
    ├── DamagedStore (OSError)        bytes on disk differ from what was recorded
    ├── ViewRefused (LookupError)     the encoding of the store does not have this view
    └── RemoteError (OSError)         a URL that cannot be reached, or refuses a request

The message of each says what is wrong, where, and what to do about it.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class AgiqaError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one message and exits 1."""


class DataError(AgiqaError, ValueError):
    """Input items that cannot be used: images, prompts, labels or conversations."""

    SHOWN = 20

    @classmethod
    def from_problems(cls, where: str, problems: Sequence[str]) -> "DataError":
        """One error that lists every problem found in `where` (a file name or a data set), up to 20 lines."""
        shown = "\n".join(f"  {problem}" for problem in problems[: cls.SHOWN])
        rest = len(problems) - cls.SHOWN
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        noun = "problem" if len(problems) == 1 else "problems"
        return cls(f"{where}: {len(problems)} {noun}\n{shown}{more}")


class ModelError(AgiqaError, ValueError):
    """A checkpoint that is missing, incomplete, or does not suit the task."""


class CompilerError(AgiqaError, RuntimeError):
    """Layers that torch's compiler cannot compile: a tool is missing, or the model has operations that it refuses."""


class ConfigError(AgiqaError, ValueError):
    """A setting that is unknown, out of range, or contradicts another one."""


class UnknownName(AgiqaError, LookupError):
    """A name that no registry or table holds."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> "UnknownName":
        """The error for `name`, with the nearest known name and the whole list."""
        names = sorted(known)
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return cls(f"No {kind} is called {name!r}.{hint} Known: {', '.join(names) or 'none'}.")


class WorkerError(AgiqaError, RuntimeError):
    """A process of this run died, or the device ran out of memory on one item."""


class BrokenLaw(AgiqaError, AssertionError):
    """A registered part that breaks a law of its kind, such as one that reads padding."""


class HeadError(AgiqaError, ValueError):
    """Features that a head cannot read, or a folder that is no run folder."""


class StoreError(AgiqaError):
    """Base of all errors of feature stores."""


class SchemaError(StoreError, ValueError):
    """A format or version that this agiqa does not read."""


class SettingsConflict(StoreError, ValueError):
    """The store exists already and was made with other settings."""


class BusyStore(StoreError, RuntimeError):
    """Another run is at work on the same store."""


class IncompleteStore(StoreError, RuntimeError):
    """Units are missing, or the store was never sealed."""


class DamagedStore(StoreError, OSError):
    """Bytes on disk differ from what was recorded."""


class ViewRefused(StoreError, LookupError):
    """The encoding of the store does not have this view."""


class RemoteError(StoreError, OSError):
    """A URL that cannot be reached, or that refuses what is asked of it."""

    refused: bool = False
    """Whether it would answer the same again: no right to do this, for example."""
    retry_after: float = 0.0
    """Seconds that the server asks to wait before the next try."""


def first_line(error: BaseException) -> str:
    """What an error of a library says first, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def listed(names: Sequence[str], most: int = 5) -> str:
    """`names` for a message: the first few, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
