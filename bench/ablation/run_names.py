"""Names of the runs of a grid: their settings, and the folders that are called so."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST_NAME = 120


def spell(settings: Mapping[str, Any]) -> str:
    """`key=value,key=value`."""
    words = {True: "true", False: "false", None: "none"}
    return ",".join(
        f"{name}={words[value] if value is None or isinstance(value, bool) else value}"
        for name, value in settings.items()
    )


def file_name(text: str) -> str:
    """`text` as the name of a folder; a hash replaces the end of a long one."""
    safe = re.sub(r"[^\w.,=+@-]+", "_", text)
    return safe if len(safe) <= _LONGEST_NAME else _with_hash(safe, text)


def _with_hash(name: str, text: str) -> str:
    """`name`, cut to the longest length, with a hash of `text` at its end."""
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def told_apart(names: Sequence[tuple[str, str]]) -> list[str]:
    """The names of runs, given (name, text that it was made of), with a hash where they are equal but for case and mean
    different things, such as `sd 1.5` and `sd_1.5`.
    """
    meant: dict[str, set[str]] = {}
    for name, spelled in names:
        meant.setdefault(name.casefold(), set()).add(spelled)
    return [_with_hash(name, spelled) if len(meant[name.casefold()]) > 1 else name for name, spelled in names]
