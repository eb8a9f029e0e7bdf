"""Asks a model about images, in batches: for a description of each, then for a rating in one word."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from agiqa.errors import DataError, ModelError, UnknownName
from agiqa.extract.data.items import Item, Message, OnBadItem, read_image
from agiqa.extract.data.seeds import derived_seed
from agiqa.extract.data.templates import VARIANTS, fill, template_of
from agiqa.extract.models import Answer, AnsweringModel, GenerationSettings, Prepared
from agiqa.extract.models.batches import is_out_of_memory
from agiqa.extract.models.preparing import Preparation
from agiqa.progress import say

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
    batch_size: int = 8
    """Items whose answers are generated at the same time; halved when memory runs out."""
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
    """By round, the item's share of the model's time for its batch."""

    @property
    def description(self) -> str:
        """The answer to the first question."""
        return self.conversation[1].content

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
    length, positions = len(prepared.token_ids), backbone.max_positions
    if positions is not None and length >= positions:
        return f"{name}: {length} tokens, and the model has {positions} positions: none is left for an answer."
    return prepared


def unprepared(question: Question, reason: str) -> str:
    """The line about a `question` that no worker process could prepare, for `Preparation`."""
    return f"{question.item.name}: {reason}"


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """The model's answer to one question about one item."""

    text: str
    prompt_tokens: int | None
    tokens: int | None
    """Tokens of the answer; None, as the next two and the tokens of the prompt, if the model does not tell."""
    cut: bool | None
    generated: str | None
    seconds: float
    """The item's share of the model's time for the batch."""


class Describer:
    """Asks one model about images, in batches.

    The second round reads the whole conversation again instead of continuing from the keys and values of the first:
    heads read the text of the description, whose tokens may differ from those generated (outer white space is
    dropped, a cut one may end within a letter, templates trim and close the turn); the rows of a batch end at
    different places; and recurrent or windowed models cannot return to an earlier state. It would save milliseconds
    of the seconds that a description takes.
    """

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
        self.batch_size = settings.batch_size
        self.preparation = preparation or Preparation(backbone)

    def first(self, item: Item) -> Question:
        """The first question about `item`."""
        message = Message(role="user", content=fill(self.wording.describe, item.prompt))
        return Question(item=item, conversation=(message,))

    def undescribed(self, item: Item) -> Item:
        """The item as heads of the variant no_id read it, without any answer of the model."""
        message = Message(role="user", content=fill(self.wording.one_round, item.prompt))
        return replace(item, conversation=(message,))

    def item(self, described: Described, variant: str) -> Item:
        """The item with the conversation of `variant`, worded as by `agiqa extract`.

        Raises UnknownName for the variant, and DataError for `full` without a rating.
        """
        if variant not in VARIANTS:
            raise UnknownName.of(kind="conversation variant", name=variant, known=VARIANTS)
        item, turns = described.item, described.conversation
        if variant == "no_id":
            return self.undescribed(item)
        if variant == "full" and not described.answer:
            message = f"{item.name}: the model answered no rating word, which the variant full needs; use id."
            raise DataError(message)
        ending = [Message(role="assistant", content=described.answer)] if variant == "full" else []
        return replace(item, conversation=(*turns, *ending), description=described.description)

    def batches(self, batches: Sequence[Sequence[Item]]) -> Iterator[list[Described | str]]:
        """`describe` each batch in turn, while workers prepare the images of the next ones."""
        groups = ((batch, [self.first(item) for item in batch]) for batch in batches)
        for batch, prepared in self.preparation.groups(prepare_question, groups, lost=unprepared):
            yield self.describe(batch, prepared)

    def describe(
        self, items: Sequence[Item], prepared: Sequence[Prepared | str] | None = None
    ) -> list[Described | str]:
        """The model's answers about each item, or the line that says why there are none.

        `prepared` are the first questions about the items, if prepared before. Raises ModelError when memory does not
        suffice for a batch of one.
        """
        if prepared is None:
            prepared = self._prepare([self.first(item) for item in items])
        outcomes: list[Described | str] = []
        while len(outcomes) < len(items):
            part = slice(len(outcomes), len(outcomes) + self.batch_size)
            try:
                outcomes.extend(self._both_rounds(items[part], prepared[part]))
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(items[part]) == 1:
                    message = f"{items[part][0].name}: the device is out of memory with this item alone ({error})."
                    raise ModelError(message) from error
            self._shrink(len(items[part]))  # outside of `except`, where the error would keep the batch in memory
        return outcomes

    def _prepare(self, questions: Sequence[Question]) -> list[Prepared | str]:
        return list(self.preparation.each(prepare_question, questions, lost=unprepared))

    def _shrink(self, size: int) -> None:
        self.batch_size = size // 2
        torch.cuda.empty_cache()
        say(f"warning: out of memory with {size} items at a time; going on with {self.batch_size}")

    def _both_rounds(self, items: Sequence[Item], prepared: Sequence[Prepared | str]) -> list[Described | str]:
        replies = self._ask(items, prepared, self.settings.describe, "describe")
        outcomes = [self._described(item, reply) for item, reply in zip(items, replies, strict=True)]
        if self.settings.rate is not None:
            # a model that thought before it described may think as long before it rates
            longer = max(self.settings.rate.max_new_tokens, self.settings.describe.max_new_tokens)
            self._rate(outcomes, self.settings.rate, thinking=False)
            self._rate(outcomes, replace(self.settings.rate, max_new_tokens=longer), thinking=True)
        return outcomes

    def _described(self, item: Item, reply: _Reply | str) -> Described | str:
        """The item with its description and without a rating, or why it has no description."""
        if isinstance(reply, str):
            return reply
        if not reply.text:
            return f"{item.name}: the model's description is empty{_why_empty(reply)}"
        (question,) = self.first(item).conversation
        description = Message(role="assistant", content=reply.text)
        return Described(
            item=item,
            conversation=(question, description, Message(role="user", content=self.wording.rate)),
            tokens={"prompt": reply.prompt_tokens, "description": reply.tokens, "second_prompt": None, "answer": None},
            cut=reply.cut,
            generated={"describe": reply.generated, "rate": None},
            seconds={"describe": reply.seconds, "rate": 0.0},
        )

    def _rate(self, outcomes: list[Described | str], settings: GenerationSettings, *, thinking: bool) -> None:
        """Add ratings to the `outcomes` whose description came after thoughts (`thinking`), or to those without."""
        chosen = {
            position: one
            for position, one in enumerate(outcomes)
            if isinstance(one, Described) and (one.generated["describe"] is not None) == thinking
        }
        prepared = self._prepare([Question(item=one.item, conversation=one.conversation) for one in chosen.values()])
        replies = self._ask([one.item for one in chosen.values()], prepared, settings, "rate")
        for (position, one), reply in zip(chosen.items(), replies, strict=True):
            outcomes[position] = reply if isinstance(reply, str) else _rated(one, reply)

    def _ask(
        self, items: Sequence[Item], prepared: Sequence[Prepared | str], settings: GenerationSettings, label: str
    ) -> list[_Reply | str]:
        """The reply to one question about each item, or the line that says why it could not be `prepared`."""
        ready = {item.name: one for item, one in zip(items, prepared, strict=True) if not isinstance(one, str)}
        if not ready:
            return [one for one in prepared if isinstance(one, str)]
        started = time.perf_counter()
        seed = derived_seed(settings.seed, label, *ready)  # another one for every batch and round
        answers = self.backbone.generate(list(ready.values()), replace(settings, seed=seed))
        share = (time.perf_counter() - started) / len(ready)
        replies = (_reply(one, answer, share) for one, answer in zip(ready.values(), answers, strict=True))
        return [one if isinstance(one, str) else next(replies) for one in prepared]


def _reply(prepared: Prepared, answer: str, seconds: float) -> _Reply:
    counted = answer.prompt_tokens if isinstance(answer, Answer) else None
    return _Reply(
        text=str(answer),
        prompt_tokens=len(prepared.token_ids) or counted,
        tokens=answer.tokens if isinstance(answer, Answer) else None,
        cut=not answer.complete if isinstance(answer, Answer) else None,
        generated=answer.generated if isinstance(answer, Answer) else None,
        seconds=seconds,
    )


def _rated(described: Described, reply: _Reply) -> Described:
    return replace(
        described,
        answer=reply.text,
        tokens={**described.tokens, "second_prompt": reply.prompt_tokens, "answer": reply.tokens},
        generated={**described.generated, "rate": reply.generated},
        seconds={**described.seconds, "rate": reply.seconds},
    )


def _why_empty(reply: _Reply) -> str:
    """What a thinking model did instead of answering, and what to do about it."""
    if reply.generated is None:
        return ""
    if reply.cut:
        return f": it was still thinking after {reply.tokens} tokens; allow more with --max-new-tokens"
    return ": it thought and then said nothing"
