"""Whether an extraction compiles the layers of its model: decided once for a store, which records it.

Compiled layers round otherwise, so all units of a store are filled with the same choice.
"""

from collections.abc import Callable
from pathlib import Path

from agiqa.errors import CompilerError, UnknownName
from agiqa.extract.models import Backbone
from agiqa.extract.models.compiling import COMPILING
from agiqa.progress import say
from agiqa.store import is_planned, open_store

KEY = "compiled"
"""Of the provenance: true with compiled layers, omitted without."""
SECONDS_TO_COMPILE = 20.0
"""In a process, on the machine of one H100 and with an empty cache: 16 for one shape of batch, then those of others."""


def check_choice(choice: str) -> None:
    """Raise UnknownName for a choice that is not one of COMPILING."""
    if choice not in COMPILING:
        raise UnknownName.of(kind="choice of compile", name=choice, known=COMPILING)


def compiles(choice: str, path: Path, *, worth: bool, try_out: Callable[[], None]) -> bool:
    """Whether layers are compiled for the store at `path`; `worth` is what `auto` means, see `pays`.

    An existing store goes on as it was begun. For a new one, `try_out` compiles, and raises CompilerError where that
    does not work: then `auto` leaves the layers as they are, and says so.
    """
    if is_planned(path):
        return _recorded(path, choice)
    if choice == "never" or (choice == "auto" and not worth):
        return False
    try:
        try_out()
    except CompilerError as error:
        if choice == "always":
            error.add_note("Give --compile never, or put this right.")
            raise
        say(f"{error}: going on without compiled layers")
        return False
    return True


def pays(backbone: Backbone, tokens: int) -> bool:
    """Whether compiling saves more time than it takes, in a process that computes `tokens` tokens: on a GPU only."""
    return backbone.device.type == "cuda" and tokens * backbone.saved_by_compiling > SECONDS_TO_COMPILE


def _recorded(path: Path, choice: str) -> bool:
    recorded = bool(open_store(path, allow_partial=True).provenance.get(KEY, False))
    if choice == ("never" if recorded else "always"):
        how = "with" if recorded else "without"
        say(f"{path} was begun {how} compiled layers, and is finished so; --compile {choice} is for new stores")
    return recorded
