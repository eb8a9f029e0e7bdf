"""What the teacher is asked about each item: words, the MOS, the image, and the schema of the answer."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.extract.data.items import Item, read_image
from agiqa.extract.teaching.answers import ASPECTS, ID, KEYS, answer_schema
from agiqa.extract.teaching.apis import Api
from agiqa.extract.teaching.chats import ChatRequest, Turn
from agiqa.extract.teaching.pictures import picture_of
from agiqa.extract.teaching.wording_and_prices import PLACEHOLDER, Wording, shipped_wording
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.labels import DEFAULT_RANGE, MosRange

USUAL_ANSWER_TOKENS = 750
"""Tokens of an answer, until answers are there to tell (method: about 750 per image)."""

_ID_LENGTH = 16
_CHARACTERS_PER_TOKEN = 4
_SCORE_TALK = re.compile(r"\bmean opinion score|\bMOS\b")
_NUMBER = re.compile(r"(?<![\d.])\d+(?:\.\d+)?(?!\d)")


@dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """What changes the text of the answers; all of it goes into the provenance."""

    aspects: tuple[str, ...] = ASPECTS
    blind: bool = False
    """Whether the teacher does not see the MOS."""
    mos_range: MosRange = DEFAULT_RANGE
    wording: Wording = field(default_factory=shipped_wording)
    max_tokens: int = 8192
    """Most tokens of an answer, thoughts included."""
    temperature: float | None = None
    """None for the model's own."""
    schema: bool = True
    """Whether the server enforces the JSON schema, besides the words of the request."""

    def __post_init__(self) -> None:
        """Raise UnknownName for an aspect, ConfigError for none or a repeated one."""
        for aspect in self.aspects:
            if aspect not in KEYS:
                raise UnknownName.of(kind="aspect", name=aspect, known=KEYS)
        if not self.aspects or len(set(self.aspects)) < len(self.aspects):
            message = f"The aspects to explain are {', '.join(self.aspects) or 'none'}; name each one once."
            raise ConfigError(message)

    def record(self) -> dict[str, Any]:
        """JSON-able form."""
        used = {"text": self.wording.blind if self.blind else self.wording.known}
        parts = {"tasks": self.wording.tasks, "example": self.wording.example}
        return {
            "aspects": list(self.aspects),
            "blind": self.blind,
            "mos_range": list(self.mos_range),
            "question": used | {name: {aspect: of[aspect] for aspect in self.aspects} for name, of in parts.items()},
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "schema": self.schema,
        }


@dataclass(frozen=True, kw_only=True)
class Question:
    """The question about one item, without its image file, which `request` reads."""

    item: Item
    id: str
    """What the answer repeats, and batches join by: 16 hex digits, unique in the data set, without the item's name."""
    key: str
    """SHA-256 of the item's text and image, in hex: what the answer depends on."""
    text: str
    settings: QuestionSettings

    def __str__(self) -> str:
        """For messages."""
        return str(self.item)

    def request(self) -> ChatRequest:
        """The request with the image. Raises DataError if its file cannot be read, or has changed since."""
        file = read_image(self.item)
        picture = None if file is None else picture_of(file)
        settings = self.settings
        return ChatRequest(
            turns=(Turn(role="user", text=self.text, picture=picture),),
            schema=answer_schema(settings.aspects) if settings.schema else None,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
        )

    def fault_of(self, explanations: Mapping[str, str]) -> str | None:
        """Why valid explanations are not this item's: they are the example's, or name the score. None if they are."""
        for aspect, text in explanations.items():
            if text == self.settings.wording.example[aspect].strip():
                return f"{KEYS[aspect]} is that of the example"
            if not self.settings.blind and self._names_score(aspect, text):
                return f"{KEYS[aspect]} gives away that there is a score"
        return None

    def _names_score(self, aspect: str, text: str) -> bool:
        """Whether a text speaks of the score that the teacher knew, as shown or rounded once more.

        Numbers of the prompt are no scores, and neither are whole numbers on short scales, which count things.
        """
        score, (low, high) = _score(self.item.labels[aspect], self.settings.mos_range), self.settings.mos_range
        exact = float(score)
        digits = len(score.partition(".")[2])
        shown = {score, f"{exact:.{digits - 1}f}", *([f"{exact:.0f}"] if high - low > 10 else [])}
        found = set(_NUMBER.findall(text)) - set(_NUMBER.findall(self.item.prompt))
        return bool(_SCORE_TALK.search(text) or shown & found)


def input_tokens(request: ChatRequest, api: Api, model: str) -> int:
    """An estimate of the tokens of `request` to `model`."""
    characters = sum(len(turn.text) for turn in request.turns)
    pictures = sum(api.picture_tokens(model, turn.picture) for turn in request.turns if turn.picture is not None)
    return characters // _CHARACTERS_PER_TOKEN + pictures


def questions(items: tuple[Item, ...], settings: QuestionSettings) -> list[Question]:
    """The question about each item. Raises DataError that lists the items without a MOS, unless they are not needed."""
    if not settings.blind:
        lacking = {item.name: [aspect for aspect in settings.aspects if aspect not in item.labels] for item in items}
        problems = [f"{name}: no MOS of {' and '.join(aspects)}" for name, aspects in lacking.items() if aspects]
        if problems:
            error = DataError.from_problems("The teacher explains the MOS of each aspect", problems)
            error.add_note("Name the aspects that all items have by --aspect, or leave the MOS out by --blind.")
            raise error
    return [_question(item, settings) for item in items]


def _question(item: Item, settings: QuestionSettings) -> Question:
    wording, (low, high) = settings.wording, settings.mos_range
    keys = {KEYS[aspect]: aspect for aspect in settings.aspects}
    known = {
        "prompt": item.prompt,
        "low": f"{low:g}",
        "high": f"{high:g}",
        "tasks": "\n".join(f"- {key}: {wording.tasks[aspect]}" for key, aspect in keys.items()),
    }
    if not settings.blind:
        known["scores"] = "\n".join(
            f"- {_title(aspect)}: {_score(item.labels[aspect], settings.mos_range)}" for aspect in settings.aspects
        )
    template = wording.blind if settings.blind else wording.known
    filled = _fill(template, known.get)
    image = item.image_sha256 or ""
    key = hashlib.sha256(canonical_json([filled, wording.example, image]).encode()).hexdigest()
    own_id = hashlib.sha256(canonical_json([item.name, key]).encode()).hexdigest()[:_ID_LENGTH]
    example = {ID: own_id} | {key: wording.example[aspect] for key, aspect in keys.items()}
    last = {"id": own_id, "example": json.dumps(example, indent=2, ensure_ascii=False)}
    text = _fill(template, (known | last).get)
    return Question(item=item, id=own_id, key=key, text=text, settings=settings)


def _fill(template: str, value_of: Callable[[str], str | None]) -> str:
    """The template with its placeholders filled in one pass, so that braces in a prompt have no meaning."""
    return PLACEHOLDER.sub(lambda match: filled if (filled := value_of(match[1])) is not None else match[0], template)


def _title(aspect: str) -> str:
    return "correspondence with the prompt" if aspect == "correspondence" else aspect


def _score(mos: float, mos_range: MosRange) -> str:
    """The MOS with a precision of about a five-hundredth of the scale."""
    return f"{mos:.{2 if mos_range[1] - mos_range[0] >= 2 else 3}f}"
