"""The questions put to the model, by aspect and conversation variant (`templates.yaml` beside this module)."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from agiqa.errors import UnknownName

VARIANTS = ("no_id", "id", "full")
"""What the forward pass reads: one question; question, description, question; the same and the rating word."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The wording of one aspect; `{prompt}` stands for the text that the image was generated from."""

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


def check_variant(variant: str) -> None:
    """Raise UnknownName unless `variant` is one of VARIANTS."""
    if variant not in VARIANTS:
        unknown = UnknownName.of("conversation variant", variant, VARIANTS)
        raise unknown


def fill(question: str, prompt: str) -> str:
    """`question` with `{prompt}` replaced to the letter: braces within the prompt stay what they are."""
    return question.replace("{prompt}", prompt)
