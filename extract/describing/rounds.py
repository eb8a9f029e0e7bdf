"""The two rounds about an image: their settings, the questions, and the model's answers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from agiqa.errors import DataError, UnknownName
from agiqa.extract.data.items import Item, Message, OnBadItem, read_image
from agiqa.extract.data.seeds import derived_seed
from agiqa.extract.data.templates import VARIANTS, ended, fill, reads_description, template_of
from agiqa.extract.models import Answer, AnsweringModel, GenerationSettings, Prepared
from agiqa.extract.models.preparing import Preparation

PRESETS = ("greedy", "published")

RATING_TOKENS = 16
"""Most new tokens of a rating."""


@dataclass(frozen=True, kw_only=True)
class DescriptionSettings:
    """How to describe; the defaults are those of the command line."""

    aspect: str = "quality"
    describe: GenerationSettings = field(default_factory=GenerationSettings)
    rate: GenerationSettings | None = field(default_factory=lambda: GenerationSettings(max_new_tokens=RATING_TOKENS))
    """None for no rating word."""
    batch_size: int | None = None
    """Most items whose answers are generated at the same time, halved when memory runs out; None lets the device's
    memory decide."""
    on_bad_item: OnBadItem = "fail"

    def generation(self) -> dict[str, Any]:
        """The settings of both rounds, JSON-able."""
        return {"describe": asdict(self.describe), "rate": None if self.rate is None else asdict(self.rate)}


@dataclass(frozen=True, kw_only=True)
class Described:
    """The model's answers about one image."""

    item: Item
    conversation: tuple[Message, Message, Message]
    """Question, description, question for the rating."""
    answer: str = ""
    """The answer to the second question, without outer white space; empty if it was not asked."""
    tokens: Mapping[str, int | None]
    """Tokens of both prompts, images included, and of both answers; None if unknown, or if there was no question."""
    cut: bool | None
    """Whether a limit cut the description off; None if the model does not tell."""
    generated: Mapping[str, str | None]
    """By round, everything that the model generated if that includes thoughts; None if the answer is everything."""
    seconds: Mapping[str, float]
    """By round, the item's share of the model's time for all items in work."""
    decoder: str | None = None
    """How the answers were generated: `slots` or `batches`; None on a server."""

    @property
    def description(self) -> str:
        """The answer to the first question."""
        return self.conversation[1].content

    @property
    def thought(self) -> bool:
        """Whether thoughts came before the description."""
        return self.generated["describe"] is not None

    @property
    def rating_word(self) -> str:
        """The second answer in lower case."""
        return self.answer.lower()


def preset(name: str, *, max_new_tokens: int = 1024, seed: int = 0) -> tuple[GenerationSettings, GenerationSettings]:
    """The settings of both rounds for a name of PRESETS; a rating has RATING_TOKENS at most.

    `seed` is that of sampling, and greedy answers ignore it. Raises UnknownName.
    """
    if name not in PRESETS:
        raise UnknownName.of(kind="generation preset", name=name, known=PRESETS)
    limits = max_new_tokens, min(RATING_TOKENS, max_new_tokens)
    if name == "published":
        first, second = (GenerationSettings.published(max_new_tokens=limit, seed=seed) for limit in limits)
    else:
        first, second = (GenerationSettings(max_new_tokens=limit) for limit in limits)
    return first, second


@dataclass(frozen=True, kw_only=True)
class Question:
    """An item, and the conversation about it up to the question that the model answers next."""

    item: Item
    conversation: tuple[Message, ...]

    def __str__(self) -> str:
        """For messages."""
        return str(self.item)


def prepare_question(backbone: AnsweringModel, question: Question) -> Prepared | str:
    """The tokens and pixels of `question`, or the line that says why the model cannot answer. Needs no weights."""
    name = question.item.name
    try:
        prepared = backbone.prepare(question.conversation, read_image(question.item), answer=True)
    except DataError as error:
        return f"{name}: {error}"
    return full_prompt(name, len(prepared.token_ids), backbone.max_positions) or prepared


def seed_of(settings: GenerationSettings, name: Literal["describe", "rate"], item: Item) -> int:
    """The seed of the draws for the answer about `item` in the round `name`: one of its own."""
    return derived_seed(settings.seed, name, item.name)


def full_prompt(name: str, length: int, positions: int | None) -> str | None:
    """The line about an item `name` whose prompt of `length` tokens leaves the model no position for an answer."""
    if positions is None or length < positions:
        return None
    return f"{name}: {length} tokens, and the model has {positions} positions: none is left for an answer."


def is_safe(question: Question) -> bool:
    """See `Preparation.groups`."""
    return question.item.is_checked


def unprepared(question: Question, reason: str) -> str:
    """The line about a `question` that no worker process could prepare, for `Preparation`."""
    return f"{question.item.name}: {reason}"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The model's answer to one question about one item."""

    text: str
    prompt_tokens: int | None
    tokens: int | None
    """Tokens of the answer; None, as the next two and the tokens of the prompt, if the model does not tell."""
    cut: bool | None
    generated: str | None
    seconds: float
    """The item's share of the model's time for the batch."""


def reply_of(prompt_tokens: int, answer: str, seconds: float) -> Reply:
    """The `answer` to a question of `prompt_tokens`, 0 if only the server knows how many."""
    counted = answer.prompt_tokens if isinstance(answer, Answer) else None
    return Reply(
        text=str(answer),
        prompt_tokens=prompt_tokens or counted,
        tokens=answer.tokens if isinstance(answer, Answer) else None,
        cut=not answer.complete if isinstance(answer, Answer) else None,
        generated=answer.generated if isinstance(answer, Answer) else None,
        seconds=seconds,
    )


def rated(described: Described, reply: Reply) -> Described:
    """`described` with the answer to the second question."""
    return replace(
        described,
        answer=reply.text,
        tokens={**described.tokens, "second_prompt": reply.prompt_tokens, "answer": reply.tokens},
        generated={**described.generated, "rate": reply.generated},
        seconds={**described.seconds, "rate": reply.seconds},
    )


def _why_empty(reply: Reply) -> str:
    """What a thinking model did instead of answering, and what to do about it."""
    if reply.generated is None:
        return ""
    if reply.cut:
        return f": it was still thinking after {reply.tokens} tokens; allow more with --max-new-tokens"
    return ": it thought and then said nothing"


class Interview:
    """The questions of both rounds about any item, and what becomes of the answers."""

    def __init__(
        self,
        backbone: AnsweringModel,
        settings: DescriptionSettings,
        *,
        preparation: Preparation[AnsweringModel] | None = None,
    ) -> None:
        """The workers of `preparation` prepare the items. Raises UnknownName for the aspect."""
        self.backbone = backbone
        self.settings = settings
        self.wording = template_of(settings.aspect)
        self.preparation = preparation or Preparation(backbone)

    def first(self, item: Item) -> Question:
        """The first question about `item`."""
        message = Message(role="user", content=fill(self.wording.describe, item.prompt))
        return Question(item=item, conversation=(message,))

    @property
    def second(self) -> Message:
        """The second question."""
        return Message(role="user", content=self.wording.rate)

    def undescribed(self, item: Item, variant: str = "no_id") -> Item:
        """The item as heads of the variant `no_id` or `question` read it, without any answer of the model."""
        asked = self.wording.describe if variant == "question" else self.wording.one_round
        return replace(item, conversation=(Message(role="user", content=fill(asked, item.prompt)),))

    def item(self, described: Described, variant: str) -> Item:
        """The item with the conversation of `variant`, worded as by `agiqa extract`.

        Raises UnknownName for the variant, and DataError for `full` without a rating.
        """
        if variant not in VARIANTS:
            raise UnknownName.of(kind="conversation variant", name=variant, known=VARIANTS)
        item, turns = described.item, ended(described.conversation, variant)
        if not reads_description(variant):
            return self.undescribed(item, variant)
        if variant == "full" and not described.answer:
            message = f"{item.name}: the model answered no rating word, which the variant full needs; use id."
            raise DataError(message)
        ending = [Message(role="assistant", content=described.answer)] if variant == "full" else []
        return replace(item, conversation=(*turns, *ending), description=described.description)

    def prepare(self, questions: Sequence[Question]) -> list[Prepared | str]:
        """The tokens and pixels of each of `questions`, or the line that says why the model cannot answer."""
        return list(self.preparation.each(prepare_question, questions, lost=unprepared, is_safe=is_safe))

    def described(self, item: Item, reply: Reply | str, *, decoder: str | None = None) -> Described | str:
        """The item with its description and without a rating, or why it has no description."""
        if isinstance(reply, str):
            return reply
        if not reply.text:
            return f"{item.name}: the model's description is empty{_why_empty(reply)}"
        (question,) = self.first(item).conversation
        description = Message(role="assistant", content=reply.text)
        return Described(
            item=item,
            conversation=(question, description, self.second),
            tokens={"prompt": reply.prompt_tokens, "description": reply.tokens, "second_prompt": None, "answer": None},
            cut=reply.cut,
            generated={"describe": reply.generated, "rate": None},
            seconds={"describe": reply.seconds, "rate": 0.0},
            decoder=decoder,
        )

    def rate_settings(self, *, thinking: bool) -> GenerationSettings:
        """The settings of the second round, which must be asked for.

        A model that thought before it described may think as long before it rates.
        """
        rate = self.settings.rate
        assert rate is not None  # or there is no second round
        longer = max(rate.max_new_tokens, self.settings.describe.max_new_tokens)
        return replace(rate, max_new_tokens=longer) if thinking else rate
