"""The questions to the model, by aspect and conversation variant (`templates.yaml` beside this module)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import yaml

from agiqa.errors import ConfigError, UnknownName

Turn = TypeVar("Turn")

VARIANTS = ("no_id", "question", "described", "id", "full")
"""What the forward pass reads.

`no_id` is the one-round question. The others are one conversation that ends sooner or later: after the describing
question, after the description, after the rating question, after the rating word. For variants with descriptions of
several aspects see `aspects_of`.
"""

DESCRIBING = tuple(variant for variant in VARIANTS if variant != "no_id")
"""What a model reads and says while it describes an image and rates it, up to one of the parts."""

PROMPT = "{prompt}"
"""Placeholder in a wording for the text that the image was generated from."""

_OF_SEVERAL = ("described", "id", "full")
"""Variants that may list aspects."""

_OLDER = {"agiqa3k_quality_v0": "quality"}
"""The label of templates that are not called by it."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The wording of one aspect, with PROMPT as a placeholder."""

    describe: str
    rate: str
    one_round: str


@cache
def templates() -> dict[str, Template]:
    """Every template by its name."""
    text = Path(__file__).with_name("templates.yaml").read_text(encoding="utf-8")
    return {name: Template(**wording) for name, wording in yaml.safe_load(text).items()}


def template_of(aspect: str) -> Template:
    """The wording of `aspect`. Raises UnknownName."""
    known = templates()
    if aspect not in known:
        unknown = UnknownName.of("aspect", aspect, known)
        raise unknown
    return known[aspect]


def label_of(aspect: str) -> str:
    """The label that the template called `aspect` asks about: quality, correspondence or authenticity."""
    return _OLDER.get(aspect, aspect)


def aspect_asked(question: str) -> str | None:
    """The label that the rating `question` of a conversation asks about; None if it is of no template."""
    words = question.split()
    return next((label_of(name) for name, one in templates().items() if one.rate.split() == words), None)


def aspects_of(variant: str, aspect: str) -> tuple[str, ...]:
    """The aspects whose descriptions a conversation of `variant` holds; the first, `aspect`, is rated.

    `variant` is one of VARIANTS, or `id:ASPECT+ASPECT[+ASPECT]`: questions and descriptions of these aspects, in
    this order, then the rating question of the first; `full:ASPECT+ASPECT[+ASPECT]` adds its rating word, and
    `described:ASPECT+ASPECT[+ASPECT]` ends before that question. Raises UnknownName for a variant or aspect,
    ConfigError for a list that repeats an aspect, has only one, or does not begin with `aspect`.
    """
    template_of(aspect)
    if variant in VARIANTS:
        return (aspect,)
    kind, _, listed = variant.partition(":")
    if kind not in _OF_SEVERAL or not listed:
        several = [f"{kind}:ASPECT+ASPECT" for kind in _OF_SEVERAL]
        unknown = UnknownName.of("conversation variant", variant, [*VARIANTS, *several])
        raise unknown
    aspects = tuple(listed.split("+"))
    for name in aspects:
        template_of(name)
    if len(aspects) == 1 or len(set(aspects)) < len(aspects):
        fault = "repeats an aspect" if len(aspects) > 1 else f"lists one aspect; that is the variant {kind}"
        message = f"The variant {variant} {fault}. Write two or three, such as {kind}:quality+correspondence."
        raise ConfigError(message)
    if aspects[0] != aspect:
        message = (
            f"The variant {variant} rates its first aspect, {aspects[0]}, and --aspect is {aspect}; give one of both."
        )
        raise ConfigError(message)
    return aspects


def reads_rating_word(variant: str) -> bool:
    """Whether a conversation of `variant` ends with the rating word: `full`, also with several aspects."""
    return variant.partition(":")[0] == "full"


def reads_description(variant: str) -> bool:
    """Whether a conversation of `variant` holds descriptions: all but `no_id` and `question` do."""
    return variant not in ("no_id", "question")


def prefixes_of(variant: str, aspect: str) -> dict[str, int]:
    """The shorter variants with which every conversation of `variant` begins, and how many messages each has.

    The shortest comes first. `no_id` has other words and is no such beginning. Nor is `id` of a conversation with
    several aspects, in which the description of the second follows that of the first. Raises as `aspects_of`.
    """
    aspects = aspects_of(variant, aspect)
    if not reads_description(variant):
        return {}
    found = {"question": 1, "described": 2}
    for count in range(2, len(aspects) + 1):
        found[f"described:{'+'.join(aspects[:count])}"] = 2 * count
    found["id" if len(aspects) == 1 else f"id:{'+'.join(aspects)}"] = 2 * len(aspects) + 1
    return {name: count for name, count in found.items() if count < found.get(variant, len(aspects) * 2 + 2)}


def ended(turns: Sequence[Turn], variant: str) -> Sequence[Turn]:
    """`turns` up to the rating question, or the rating word, as far as `variant` goes."""
    if variant == "question":
        return turns[:1]
    without_question = variant.partition(":")[0] == "described"
    return turns[:-1] if without_question else turns


def fill(question: str, prompt: str) -> str:
    """`question` with PROMPT replaced by `prompt`, in which braces have no meaning."""
    return question.replace(PROMPT, prompt)
