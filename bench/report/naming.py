"""The names of rows, protocols and metrics in a report, and counts in words."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agiqa.bench.recording.records import Row

METRIC_NAMES = {"srcc": "SRCC", "plcc": "PLCC", "krcc": "KRCC", "rmse": "RMSE"}
GENERATORS = "leave-one-generator-out"
PROTOCOLS = {
    "published": "published split",
    "grouped": "grouped by prompt",
    "one group held out": "one group of prompts held out",
    GENERATORS: "leave one generator out",
}
_BETWEEN = "\N{NO-BREAK SPACE}· "
_SELF_EXPLANATORY = ("encoder", "pooling", "projection", "loss")
"""Settings whose values are shown without the setting's name; only `none` needs it."""


def protocol_name(protocol: str) -> str:
    """A protocol in words; an unknown protocol unchanged."""
    return PROTOCOLS.get(protocol, protocol)


def row_titles(rows: Iterable[Row]) -> dict[str, str]:
    """A short title by row name: `gru · mean` for `encoder=gru,pooling=mean`. Rows of equal titles keep their names."""
    titles = {row.row: _title(row) for row in rows}
    seen = Counter(titles.values())
    return {name: title if seen[title] == 1 else name for name, title in titles.items()}


def identity_titles(rows: Iterable[Row]) -> dict[str, str]:
    """A title by `Row.identity`: the title of its rows, or the baseline's key where these have several names."""
    kept = list(rows)
    titles, names = row_titles(kept), dict[str, set[str]]()
    for row in kept:
        names.setdefault(row.identity, set()).add(row.row)
    return {
        row.identity: titles[row.row] if len(names[row.identity]) == 1 else _baseline_key(row.settings) for row in kept
    }


def on_store(title: str, store: str) -> str:
    """`title @ store`, or the title alone where the store has no name or the title contains it."""
    return title if not store or f"store {store}" in title.split(_BETWEEN) else f"{title} @ {store}"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def counts(numbers: Iterable[int], noun: str) -> str:
    """`1 seed`, `5 seeds`, or `3 to 5 seeds` for several distinct numbers."""
    found = sorted(set(numbers))
    return plural(found[0], noun) if len(found) == 1 else f"{found[0]:,} to {plural(found[-1], noun)}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def capitalized(text: str) -> str:
    """The text with a capital first letter; the rest stays unchanged."""
    return text[:1].upper() + text[1:]


def _title(row: Row) -> str:
    if row.kind == "baseline" or "=" not in row.row or not row.settings:
        return row.row
    return _BETWEEN.join(_setting(name, value) for name, value in row.settings.items())


def _setting(name: str, value: Any) -> str:
    if name in _SELF_EXPLANATORY and isinstance(value, str):
        return f"no {name}" if value == "none" else value
    words = {True: "on", False: "off", None: "none"}
    text = words[value] if value is None or isinstance(value, bool) else value
    return f"{name.replace('_', ' ')} {text}"


def _baseline_key(settings: Mapping[str, Any]) -> str:
    """`features, words=2` for the settings `baseline=features` and `words=2`."""
    others = (f"{name}={value}" for name, value in settings.items() if name != "baseline")
    return ", ".join((str(settings["baseline"]), *others))
