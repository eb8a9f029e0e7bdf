"""Layers of a model by name: "0" are its embeddings, "8" is the output of block 8, "last" comes after the final norm.

A user writes a list: numbers (from 0, or from -1 backwards as in transformers' `hidden_states`), `last`, `every N`, and
`all`, with commas between.
"""

import re
from collections.abc import Iterable

from agiqa.errors import ConfigError
from agiqa.store.format.layers import LAST

_NUMBER = re.compile(r"[+-]?\d+")
_EVERY = re.compile(r"every\s+(\d+)")
_RANGE = re.compile(r"-?\d+\s*(-|:|\.\.\.?|to)\s*-?\d+")


def parse_layers(
    written: str | int | Iterable[str | int], count: int, *, model: str, first: int = 0
) -> tuple[str, ...]:
    """The names of the layers `written` for a `model` of `count` blocks: ascending, each once, `last` at the end.

    Block `count` and -1 are `last`. `first` is 1 for a model without the layer 0. Raises ConfigError for what names no
    layer of the model.
    """
    given = [written] if isinstance(written, str | int) else list(written)
    parts = [part.strip() for one in given for part in str(one).split(",")]
    if not any(parts):
        message = f"--layers names no layer of {model}. {_known(first, count)}"
        raise ConfigError(message)
    found = {number for part in parts for number in _numbers(part, first, count, model)}
    return tuple(LAST if number == count else str(number) for number in sorted(found))


def _numbers(part: str, first: int, count: int, model: str) -> list[int]:
    """The layers of one part of a list, as indices of transformers' `hidden_states`."""
    if part == LAST:
        return [count]
    if part == "all":
        return list(range(first, count + 1))
    every = _EVERY.fullmatch(part)
    if every is not None and int(every[1]) > 0:
        return [*range(int(every[1]), count, int(every[1])), count]
    if _NUMBER.fullmatch(part):
        number = int(part)
        if first - count - 1 <= number < 0 or first <= number <= count:
            return [number % (count + 1)]
    if _RANGE.fullmatch(part):
        message = f"--layers takes no ranges, such as {part!r}: list the layers, or write `every N`."
        raise ConfigError(message)
    message = f"--layers names {part!r}, which is no layer of {model}. {_known(first, count)}"
    raise ConfigError(message)


def _known(first: int, count: int) -> str:
    lowest = "from 0 (the embeddings)" if first == 0 else f"from {first}"
    return (
        f"It has {count}: write numbers {lowest} to {count}, or from -1 (the last) back to {first - count - 1}, "
        "`last`, `every N`, or `all`, with commas between."
    )
