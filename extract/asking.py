"""Asks a model about images, in batches: a description each, then a rating in one word."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from agiqa.errors import DataError, ModelError, UnknownName
from agiqa.extract.backbones import Answer, Backbone, GenerationSettings, Prepared
from agiqa.extract.items import Item, Message
from agiqa.extract.plan import OnBadItem
from agiqa.extract.templates import VARIANTS, fill, template_of
from agiqa.progress import say

PRESETS = ("greedy", "published")

RATING_TOKENS = 16
"""New tokens of a rating at most."""


@dataclass(frozen=True, kw_only=True)
class DescriptionSettings:
    """How to describe; the defaults are those of the command line."""

    aspect: str = "quality"
    describe: GenerationSettings = field(default_factory=GenerationSettings)
    rate: GenerationSettings = field(default_factory=lambda: GenerationSettings(max_new_tokens=RATING_TOKENS))
    batch_size: int = 8
    """Items whose answers are generated at a time; halved where memory runs out."""
    on_bad_item: OnBadItem = "fail"

    def generation(self) -> dict[str, Any]:
        """The settings of both rounds, JSON-able."""
        return {"describe": asdict(self.describe), "rate": asdict(self.rate)}


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a model said of one image."""

    item: Item
    conversation: tuple[Message, Message, Message]
    """Question, description, question for the rating."""
    answer: str
    """To the second question, without white space around it."""
    tokens: Mapping[str, int | None]
    """Of both prompts, images included, and both answers; None where the backbone does not count."""
    cut: bool | None
    """Whether the description was cut off by a limit; None where the backbone cannot tell."""
    seconds: Mapping[str, float]
    """Of both rounds: the item's share of its batch."""

    @property
    def description(self) -> str:
        """The answer to the first question."""
        return self.conversation[1].content

    @property
    def rating_word(self) -> str:
        """The second answer in lower case."""
        return self.answer.lower()


def preset(name: str, *, max_new_tokens: int = 1024, seed: int = 0) -> tuple[GenerationSettings, GenerationSettings]:
    """The settings of both rounds by the name of PRESETS; the rating has RATING_TOKENS at most.

    `seed` is that of draws; greedy answers have none. Raises UnknownName.
    """
    if name not in PRESETS:
        raise UnknownName.of(kind="generation preset", name=name, known=PRESETS)
    if name == "published":
        make = GenerationSettings.published
        return make(max_new_tokens=max_new_tokens, seed=seed), make(
            max_new_tokens=min(RATING_TOKENS, max_new_tokens), seed=seed
        )
    return (
        GenerationSettings(max_new_tokens=max_new_tokens),
        GenerationSettings(max_new_tokens=min(RATING_TOKENS, max_new_tokens)),
    )


class Describer:
    """Asks one model about images, in batches."""

    def __init__(self, backbone: Backbone, settings: DescriptionSettings) -> None:
        """Raises UnknownName for the aspect."""
        self.backbone = backbone
        self.settings = settings
        self.questions = template_of(settings.aspect)
        self.batch_size = settings.batch_size

    def question(self, item: Item) -> Message:
        """The first question about `item`."""
        return Message(role="user", content=fill(self.questions.describe, item.prompt))

    def prepare(self, item: Item, conversation: Sequence[Message]) -> Prepared:
        """`conversation` about `item`, for the next answer. Raises DataError where no position is left for one."""
        prepared = self.backbone.prepare(conversation, item.image, answer=True)
        length, positions = len(prepared.token_ids), self.backbone.max_positions
        if positions is not None and length >= positions:
            message = f"{length} tokens, and the model has {positions} positions: none is left for an answer."
            raise DataError(message)
        return prepared

    def item(self, described: Described, variant: str) -> Item:
        """The item as the heads read it: with the conversation of `variant`, as `agiqa extract` words it.

        Raises UnknownName for the variant, and DataError where `full` has no rating to end with.
        """
        if variant not in VARIANTS:
            raise UnknownName.of(kind="conversation variant", name=variant, known=VARIANTS)
        item, turns = described.item, described.conversation
        if variant == "no_id":
            asked = Message(role="user", content=fill(self.questions.one_round, item.prompt))
            return replace(item, conversation=(asked,))
        if variant == "full" and not described.answer:
            message = f"{item.name}: the model answered no rating word, which the variant full needs; use id."
            raise DataError(message)
        ending = [Message(role="assistant", content=described.answer)] if variant == "full" else []
        return replace(item, conversation=(*turns, *ending), description=described.description)

    def describe(self, items: Sequence[Item]) -> list[Described | str]:
        """What the model says of each item, or the line that says why it says nothing.

        Raises ModelError when not even a batch of one fits into the memory.
        """
        outcomes: list[Described | str] = []
        while len(outcomes) < len(items):
            part = items[len(outcomes) : len(outcomes) + self.batch_size]
            try:
                outcomes.extend(self._both_rounds(part))
                continue
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    message = f"{part[0].name}: the device is out of memory with this item alone ({error})."
                    raise ModelError(message) from error
            self._shrink(len(part))  # outside of `except`, where the error would keep the batch in memory
        return outcomes

    def _shrink(self, size: int) -> None:
        self.batch_size = size // 2
        torch.cuda.empty_cache()
        say(f"warning: out of memory with {size} items at a time; going on with {self.batch_size}")

    def _both_rounds(self, items: Sequence[Item]) -> list[Described | str]:
        first = _Round(self, {item.name: (self.question(item),) for item in items}, self.settings.describe, "describe")
        prompts = first.ask(items)
        talks: dict[str, tuple[Message, Message, Message]] = {}
        rate = Message(role="user", content=self.questions.rate)
        for item in items:
            description = str(first.answers.get(item.name, ""))
            if description:
                talks[item.name] = (self.question(item), Message(role="assistant", content=description), rate)
            elif item.name in prompts:
                first.failures[item.name] = f"{item.name}: the model's description is empty"
        second = _Round(self, talks, self.settings.rate, "rate")
        longer = second.ask([item for item in items if item.name in talks])
        failures = first.failures | second.failures
        return [
            failures[item.name]
            if item.name in failures
            else Described(
                item=item,
                conversation=talks[item.name],
                answer=str(second.answers[item.name]),
                tokens={
                    "prompt": prompts[item.name],
                    "description": _tokens(first.answers[item.name]),
                    "second_prompt": longer[item.name],
                    "answer": _tokens(second.answers[item.name]),
                },
                cut=_cut(first.answers[item.name]),
                seconds={"describe": first.seconds, "rate": second.seconds},
            )
            for item in items
        ]


class _Round:
    """One question to every item of a batch."""

    def __init__(
        self,
        describer: Describer,
        conversations: Mapping[str, tuple[Message, ...]],
        settings: GenerationSettings,
        label: str,
    ) -> None:
        self.describer = describer
        self.conversations = conversations
        self.settings = settings
        self.label = label
        self.answers: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.seconds = 0.0
        """Of each item: its share."""

    def ask(self, items: Sequence[Item]) -> dict[str, int]:
        """Fill `answers` and `failures`; the tokens of the prompt of every item that was answered."""
        started = time.perf_counter()
        prepared: dict[str, Prepared] = {}
        for item in items:
            try:
                prepared[item.name] = self.describer.prepare(item, self.conversations[item.name])
            except DataError as error:
                self.failures[item.name] = f"{item.name}: {error}"
        if prepared:
            settings = replace(self.settings, seed=self._seed(list(prepared)))
            answers = self.describer.backbone.generate(list(prepared.values()), settings)
            self.answers = dict(zip(prepared, answers, strict=True))
            self.seconds = (time.perf_counter() - started) / len(prepared)
        return {name: len(one.token_ids) for name, one in prepared.items()}

    def _seed(self, names: Sequence[str]) -> int:
        """A seed of its own for every batch, the same whenever the batch is asked."""
        text = "\0".join([str(self.settings.seed), self.label, *names])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _cut(answer: str) -> bool | None:
    return not answer.complete if isinstance(answer, Answer) else None


def _tokens(answer: str) -> int | None:
    return answer.tokens if isinstance(answer, Answer) else None
