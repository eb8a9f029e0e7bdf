"""The summary of a data set for people: on a terminal with bars and colours, elsewhere as plain lines."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from agiqa.commands.output import print_result, table

_BAR = 40
"""Characters of the longest bar of a histogram."""
_UNITS = ("B", "kB", "MB", "GB", "TB")
_GENERATORS, _PROBLEMS = 8, 20
"""Most of them that are shown."""


def print_summary(summary: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the summary of `agiqa.data_summary`, as JSON or for people."""
    if as_json or not sys.stdout.isatty():
        print_result(summary, "\n".join(_lines(summary)), as_json=as_json)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for line in _lines(summary):
        text = Text(line)
        text.highlight_regex("█+", "cyan")
        text.highlight_regex(r"^[a-z][a-zA-Z ]+?(?=  )", "bold")
        text.highlight_regex(r"\(leak\)|^left out:", "bold red")
        console.print(text, soft_wrap=True)


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    yield from table(_counts(summary)).split("\n")
    for aspect, mos in summary["mos"].items():
        yield ""
        yield from _histogram(aspect, mos)
    yield ""
    cost, tokens = summary["cost"], summary["tokens"]
    yield from _token_lines(tokens, cost)
    yield ""
    yield from _cost_lines(cost, exact=tokens["exact"])
    problems = problems_of(summary)
    yield from (f"left out: {line}" for line in problems[:_PROBLEMS])
    if len(problems) > _PROBLEMS:
        yield f"left out: and {len(problems) - _PROBLEMS} more; --json lists all"


def problems_of(summary: Mapping[str, Any]) -> list[str]:
    """What `agiqa extract` would refuse: unusable rows, and items that are too long."""
    return [*summary["problems"], *summary["tokens"]["skipped"]]


def _counts(summary: Mapping[str, Any]) -> dict[str, str]:
    images, repeated = summary["images"], summary["duplicates"]
    shown = {
        "data set": f"{summary['name']} ({summary['table']})",
        "items": f"{summary['items']:,}, with {summary['prompts']:,} different prompts",
        "splits": _named(summary["splits"]),
        "generators": _named(summary["generators"], most=_GENERATORS),
        "descriptions": f"{summary['described']:,} of {summary['items']:,} items",
        "without any MOS": f"{summary['unlabelled']:,}",
    }
    for pair, leak in summary["leaks"].items():
        part, _, other = pair.partition(" in ")
        mark = " (leak)" if leak["prompts"] or leak["images"] else ""
        shown[f"{part} and {other}"] = (
            f"{leak['prompts']:,} of {leak['of']:,} {part} items have a prompt of {other}, {leak['images']:,} an image "
            f"of {other}{mark}"
        )
    same = "; ".join(" = ".join(group[:3]) for group in repeated["examples"][:2])
    shown["same images"] = f"{repeated['images']:,}, such as {same}" if repeated["images"] else "none"
    if images["count"]:
        other = {"other sizes": images["other_sizes"]} if images["other_sizes"] else {}
        shown["image sizes"] = _named({**images["sizes"], **other})
    return shown


def _named(counts: Mapping[str, int], most: int | None = None) -> str:
    names = list(counts)[:most]
    more = f" and {len(counts) - len(names)} more" if len(names) < len(counts) else ""
    return ", ".join(f"{name} ({counts[name]:,})" for name in names) + more


def _histogram(aspect: str, mos: Mapping[str, Any]) -> Iterator[str]:
    missing = f", {mos['missing']:,} items without" if mos["missing"] else ""
    yield (
        f"MOS of {aspect}: {mos['count']:,}{missing}, mean {mos['mean']:.3g}, std {mos['std']:.3g}, "
        f"{mos['lowest']:.3g} to {mos['highest']:.3g}"
    )
    most = max(1, *mos["histogram"])
    edges = [f"{edge:g}" for edge in mos["edges"]]
    width = max(len(edge) for edge in edges)
    for low, high, count in zip(edges, edges[1:], mos["histogram"], strict=False):
        bar = "█" * max(count > 0, round(_BAR * count / most))
        yield f"  {low:>{width}} to {high:<{width}}  {bar} {count:,}"


def _token_lines(tokens: Mapping[str, Any], cost: Mapping[str, Any]) -> Iterator[str]:
    how = "counted by its tokenizer" if tokens["exact"] else "estimated; --model counts them"
    if cost["vocabulary"]:
        yield f"Tokens of {cost['model']}, {how}"
    else:
        yield f"Positions of images in {cost['model']}"
    rows = {
        "in all": f"{tokens['total']:,}",
        "per item": _spread(tokens["per_item"]),
        "of the image": _spread(tokens["image_per_item"]),
    }
    if tokens["slices_per_item"] is not None:
        rows["slices"] = f"{_spread(tokens['slices_per_item'])}, the overview included"
    if tokens["truncated"]:
        rows["cut"] = f"{tokens['truncated']:,} items"
    yield from (f"  {line}" for line in table(rows).split("\n"))


def _spread(spread: Mapping[str, float]) -> str:
    return f"mean {spread['mean']:,.0f}, median {spread['median']:,.0f}, most {spread['most']:,.0f}"


def _cost_lines(cost: Mapping[str, Any], *, exact: bool) -> Iterator[str]:
    layers, pooled = ", ".join(cost["layers"]), ", ".join(cost["pooled"])
    rows = f", {pooled} of every item" if pooled else ""
    several = "" if layers == "last" else f" of layer{'s' if ',' in layers else ''} {layers}"
    yield f"A store of each encoding{several}{rows}" + ("" if exact else ", by the estimated tokens")
    unit = "row" if pooled else "token"
    for encoding in (name for name in ("hidden", "sketch", "int8", "logits") if name in cost):
        one = cost[encoding]
        hours = one["gpu_hours"]
        time = "GPU time not measured for this model" if hours is None else _hours(hours)
        yield (
            f"  {encoding:<7} {one['bytes_per_token']:>7,} bytes per {unit}, {_size(one['raw_bytes'])} raw, "
            f"about {_size(one['disk_bytes'])} on disk, {time}"
        )
    if cost["rate"] is not None:
        yield f"  GPU rates: {cost['rate']}; start and planning come on top"


def _hours(hours: float) -> str:
    if hours * 60 < 1:
        return "under 1 min of GPU"
    return f"about {hours:.2g} h of GPU" if hours >= 1 else f"about {hours * 60:.0f} min of GPU"


def _size(count: float) -> str:
    """Bytes with a unit, three digits."""
    unit = 0
    while count >= 1000 and unit + 1 < len(_UNITS):
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {_UNITS[unit]}"
