"""What rows, protocols and metrics are called on the page."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agiqa.bench.report.reading import Results, Row

METRIC_NAMES = {"srcc": "SRCC", "plcc": "PLCC", "rmse": "RMSE"}
GENERATORS = "leave-one-generator-out"
PROTOCOLS = {
    "published": "published split",
    "grouped": "grouped by prompt",
    "one group held out": "one group of prompts held out",
    GENERATORS: "leave one generator out",
}
PROTOCOL_NOTES = {
    GENERATORS: "Each image is scored by a head that saw no image of its generator; the images of all generators are "
    "then ranked together, so that differences between generators count. Intervals draw prompts, not generators: they "
    "do not say what a further generator would change."
}
"""What a reader of its tables must know of a protocol."""
_BETWEEN = "\N{NO-BREAK SPACE}· "
_TELLING = ("encoder", "pooling", "projection", "loss")
"""Settings whose values need no name beside them, though `none` does."""


def protocol_name(protocol: str) -> str:
    """A protocol in words; one that is not known as it is."""
    return PROTOCOLS.get(protocol, protocol)


def row_titles(rows: Iterable[Row]) -> dict[str, str]:
    """A short title for each row by its name: `gru · mean` for `encoder=gru,pooling=mean`.

    Titles that would be the same are the names themselves.
    """
    titles = {row.row: _title(row) for row in rows}
    seen = Counter(titles.values())
    return {name: title if seen[title] == 1 else name for name, title in titles.items()}


def kin_titles(rows: Iterable[Row]) -> dict[str, str]:
    """A title for each `Row.kin`: that of its rows, or of a baseline of several names its key, `features`."""
    kept = list(rows)
    titles, names = row_titles(kept), dict[str, set[str]]()
    for row in kept:
        names.setdefault(row.kin, set()).add(row.row)
    return {row.kin: titles[row.row] if len(names[row.kin]) == 1 else _key(row.settings) for row in kept}


def _key(settings: Mapping[str, Any]) -> str:
    """The name of a baseline in its settings, with the others."""
    others = (f"{name}={value}" for name, value in settings.items() if name != "baseline")
    return ", ".join((str(settings["baseline"]), *others))


def on_store(title: str, store: str) -> str:
    """`title @ store`; the title alone where the store has no name, or the title tells it."""
    told = f"store {store}" in title.split(_BETWEEN)
    return title if told or not store else f"{title} @ {store}"


def group_title(results: Results, label: str, protocol: str) -> str:
    """What a table of rows of one label and protocol is called."""
    return results.titled(f"{label}, {protocol_name(protocol)}")


def slug(*parts: str) -> str:
    """A name for files and anchors."""
    words = [re.sub(r"[^a-z0-9]+", "-", part.casefold()).strip("-") for part in parts]
    return "-".join(word for word in words if word) or "table"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def _title(row: Row) -> str:
    if row.kind == "baseline" or "=" not in row.row or not row.settings:
        return row.row
    return _BETWEEN.join(_setting(name, value) for name, value in row.settings.items())


def _setting(name: str, value: Any) -> str:
    if name in _TELLING and isinstance(value, str):
        return f"no {name}" if value == "none" else value
    words = {True: "on", False: "off", None: "none"}
    told = words[value] if value is None or isinstance(value, bool) else value
    return f"{name.replace('_', ' ')} {told}"
