"""Asks a model about images, in batches: a description each, then a rating in one word."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from agiqa.errors import DataError, ModelError, UnknownName
from agiqa.extract.data.items import Item, Message, OnBadItem, read_image
from agiqa.extract.data.templates import VARIANTS, fill, template_of
from agiqa.extract.models import Answer, Backbone, GenerationSettings, Prepared
from agiqa.extract.models.batches import is_out_of_memory
from agiqa.extract.models.preparing import Preparation
from agiqa.progress import say

PRESETS = ("greedy", "published")

RATING_TOKENS = 16
"""New tokens of a rating at most."""


@dataclass(frozen=True, kw_only=True)
class DescriptionSettings:
    """How to describe; the defaults are those of the command line."""

    aspect: str = "quality"
    describe: GenerationSettings = field(default_factory=GenerationSettings)
    rate: GenerationSettings | None = field(default_factory=lambda: GenerationSettings(max_new_tokens=RATING_TOKENS))
    """None asks for no rating word."""
    batch_size: int = 8
    """Items whose answers are generated at a time; halved where memory runs out."""
    on_bad_item: OnBadItem = "fail"

    def generation(self) -> dict[str, Any]:
        """The settings of both rounds, JSON-able."""
        return {"describe": asdict(self.describe), "rate": None if self.rate is None else asdict(self.rate)}


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a model said of one image."""

    item: Item
    conversation: tuple[Message, Message, Message]
    """Question, description, question for the rating."""
    answer: str
    """To the second question, without white space around it; empty where it was not asked."""
    tokens: Mapping[str, int | None]
    """Of both prompts, images included, and both answers; None where the backbone does not count or was not asked."""
    cut: bool | None
    """Whether the description was cut off by a limit; None where the backbone cannot tell."""
    generated: Mapping[str, str | None]
    """Of both rounds: all that the model generated, where that includes thoughts; None where the answer is all."""
    seconds: Mapping[str, float]
    """Of both rounds: the item's share of what the model took for its batch."""

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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An item, and the conversation about it that the model answers next."""

    item: Item
    conversation: tuple[Message, ...]

    def __str__(self) -> str:
        """For messages."""
        return str(self.item)


def prepare_asked(backbone: Backbone, asked: Asked) -> Prepared | str:
    """`asked` as the model reads it, or the line that says why it cannot be answered. Needs no weights."""
    name = asked.item.name
    try:
        prepared = backbone.prepare(asked.conversation, read_image(asked.item), answer=True)
    except DataError as error:
        return f"{name}: {error}"
    length, positions = len(prepared.token_ids), backbone.max_positions
    if positions is not None and length >= positions:
        return f"{name}: {length} tokens, and the model has {positions} positions: none is left for an answer."
    return prepared


def unprepared(asked: Asked, reason: str) -> str:
    """The line that says why `asked` cannot be answered: what `Preparation` tells where no worker could prepare it."""
    return f"{asked.item.name}: {reason}"


class Describer:
    """Asks one model about images, in batches.

    The second round reads the whole conversation anew. It does not go on from the keys and values of the first: what
    the heads will read is the text of the description, and its tokens need not be those that were generated (white
    space around it is dropped, a cut one may end within a letter, templates trim and close the turn); rows of a batch
    end at different places; and recurrent or windowed models cannot return to an earlier one. It would save
    milliseconds of the seconds that a description takes.
    """

    def __init__(
        self, backbone: Backbone, settings: DescriptionSettings, *, preparation: Preparation | None = None
    ) -> None:
        """Items are prepared in the workers of `preparation`. Raises UnknownName for the aspect."""
        self.backbone = backbone
        self.settings = settings
        self.questions = template_of(settings.aspect)
        self.batch_size = settings.batch_size
        self.preparation = preparation or Preparation(backbone)

    def first(self, item: Item) -> Asked:
        """The first question about `item`."""
        question = Message(role="user", content=fill(self.questions.describe, item.prompt))
        return Asked(item=item, conversation=(question,))

    def undescribed(self, item: Item) -> Item:
        """The item as heads of the variant no_id read it, which needs no answer of the model."""
        asked = Message(role="user", content=fill(self.questions.one_round, item.prompt))
        return replace(item, conversation=(asked,))

    def item(self, described: Described, variant: str) -> Item:
        """The item as the heads read it: with the conversation of `variant`, as `agiqa extract` words it.

        Raises UnknownName for the variant, and DataError where `full` has no rating to end with.
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
        """`describe` of each batch in turn; the images of those that follow are prepared meanwhile."""
        asked = ((batch, [self.first(item) for item in batch]) for batch in batches)
        for batch, prepared in self.preparation.groups(prepare_asked, asked, lost=unprepared):
            yield self.describe(batch, prepared)

    def describe(
        self, items: Sequence[Item], prepared: Sequence[Prepared | str] | None = None
    ) -> list[Described | str]:
        """What the model says of each item, or the line that says why it says nothing.

        `prepared` are the first questions about the items, if that is done. Raises ModelError when not even a batch
        of one fits into the memory.
        """
        if prepared is None:
            prepared = list(self.preparation.each(prepare_asked, map(self.first, items), lost=unprepared))
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

    def _shrink(self, size: int) -> None:
        self.batch_size = size // 2
        torch.cuda.empty_cache()
        say(f"warning: out of memory with {size} items at a time; going on with {self.batch_size}")

    def _both_rounds(self, items: Sequence[Item], prepared: Sequence[Prepared | str]) -> list[Described | str]:
        first = self._ask(items, prepared, self.settings.describe, "describe")
        rate = Message(role="user", content=self.questions.rate)
        talks: dict[str, tuple[Message, Message, Message]] = {}
        for item in items:
            description = str(first.answers.get(item.name, ""))
            if description:
                (question,) = self.first(item).conversation
                talks[item.name] = (question, Message(role="assistant", content=description), rate)
            elif item.name in first.answers:
                first.failures[item.name] = f"{item.name}: the model's description is empty{_why(first, item.name)}"
        second = self._rate([item for item in items if item.name in talks], talks, first)
        failures = first.failures | ({} if second is None else second.failures)
        return [
            failures[item.name] if item.name in failures else _described(item, talks[item.name], first, second)
            for item in items
        ]

    def _rate(self, told: Sequence[Item], talks: Mapping[str, tuple[Message, ...]], first: "_Round") -> "_Round | None":
        """The second question, where it is asked. Who thought before describing may think as long before rating."""
        settings, rounds = self.settings.rate, list[_Round]()
        if settings is None:
            return None
        longer = max(settings.max_new_tokens, self.settings.describe.max_new_tokens)
        for thinking in (False, True):
            items = [item for item in told if (_generated(first.answers[item.name]) is not None) == thinking]
            asked = [Asked(item=item, conversation=talks[item.name]) for item in items]
            chosen = replace(settings, max_new_tokens=longer) if thinking else settings
            prepared = list(self.preparation.each(prepare_asked, asked, lost=unprepared))
            rounds.append(self._ask(items, prepared, chosen, "rate"))
        return rounds[0] | rounds[1]

    def _ask(
        self, items: Sequence[Item], prepared: Sequence[Prepared | str], settings: GenerationSettings, label: str
    ) -> "_Round":
        """One question to every item of a batch."""
        ready = {item.name: one for item, one in zip(items, prepared, strict=True) if not isinstance(one, str)}
        failures = {item.name: one for item, one in zip(items, prepared, strict=True) if isinstance(one, str)}
        if not ready:
            return _Round(answers={}, failures=failures, lengths={}, seconds={})
        started = time.perf_counter()
        answers = self.backbone.generate(list(ready.values()), replace(settings, seed=_seed(settings, label, [*ready])))
        return _Round(
            answers=dict(zip(ready, answers, strict=True)),
            failures=failures,
            lengths={name: len(one.token_ids) for name, one in ready.items()},
            seconds=dict.fromkeys(ready, (time.perf_counter() - started) / len(ready)),
        )


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What became of one question to every item of a batch; all by the items' names."""

    answers: Mapping[str, str]
    failures: dict[str, str]
    lengths: Mapping[str, int]
    """Tokens of the prompt of every item that was answered."""
    seconds: Mapping[str, float]
    """Each item's share of what the model took for the batch."""

    def __or__(self, other: "_Round") -> "_Round":
        """Both, of unlike items."""
        return _Round(
            answers={**self.answers, **other.answers},
            failures=self.failures | other.failures,
            lengths={**self.lengths, **other.lengths},
            seconds={**self.seconds, **other.seconds},
        )


def _described(item: Item, talk: tuple[Message, Message, Message], first: _Round, second: _Round | None) -> Described:
    name = item.name
    return Described(
        item=item,
        conversation=talk,
        answer="" if second is None else str(second.answers[name]),
        tokens={
            "prompt": first.lengths[name],
            "description": _tokens(first.answers[name]),
            "second_prompt": None if second is None else second.lengths[name],
            "answer": None if second is None else _tokens(second.answers[name]),
        },
        cut=_cut(first.answers[name]),
        generated={
            "describe": _generated(first.answers[name]),
            "rate": None if second is None else _generated(second.answers[name]),
        },
        seconds={"describe": first.seconds[name], "rate": 0.0 if second is None else second.seconds[name]},
    )


def _seed(settings: GenerationSettings, label: str, names: Sequence[str]) -> int:
    """A seed of its own for every batch, the same whenever the batch is asked."""
    text = "\0".join([str(settings.seed), label, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _cut(answer: str) -> bool | None:
    return not answer.complete if isinstance(answer, Answer) else None


def _generated(answer: str) -> str | None:
    return answer.generated if isinstance(answer, Answer) else None


def _why(asked: _Round, name: str) -> str:
    """What to do about an empty answer of a thinking model."""
    answer = asked.answers[name]
    if _generated(answer) is None:
        return ""
    if _cut(answer):
        return f": it was still thinking after {_tokens(answer)} tokens; allow more with --max-new-tokens"
    return ": it thought and then said nothing"


def _tokens(answer: str) -> int | None:
    return answer.tokens if isinstance(answer, Answer) else None
