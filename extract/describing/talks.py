"""Conversations about items in slots: what they are asked, how long they may become, and what their answers say."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import DataError, ModelError
from agiqa.extract.data.items import Item, Message
from agiqa.extract.describing.rounds import (
    Described,
    Interview,
    Question,
    Reply,
    full_prompt,
    rated,
    reply_of,
    seed_of,
)
from agiqa.extract.describing.spool import Spool
from agiqa.extract.models import GenerationSettings, Prepared
from agiqa.extract.models.decoding.cache import LayerShape
from agiqa.extract.models.decoding.choosing import Policy
from agiqa.extract.models.decoding.continuing import NextPrompt, next_prompt
from agiqa.extract.models.decoding.decoder import Ask, Decoder
from agiqa.extract.models.decoding.slot_model import REACH_STEP, LoadedModel, Suffix
from agiqa.extract.models.expansions import common_beginning
from agiqa.extract.models.generation import new_tokens, read_answer, stop_tokens
from agiqa.extract.models.rendering import THOUGHT_MARKS, begins_in_thought
from agiqa.progress import say

CPU_SLOTS, MOST_SLOTS = 8, 256
"""Most slots by default on a CPU and on a GPU. Up to there a step of an 8B model, which reads all weights anyway, takes
less and less time per token; slots of 1,700 tokens then take 57 GB."""
_RESERVED = 10 << 30
"""Bytes of a GPU's memory that are left to reading prompts and images."""
_SLACK = 32
"""Tokens by which a description may be longer when its text is tokenised again."""
_UNKNOWN = 256
"""Tokens of a second question that cannot be counted without the image."""


@dataclass
class Talk:
    """One conversation on its way."""

    item: Item
    prepared: Prepared
    """The first question."""
    place: tuple[int, int]
    """Number of its group, and its place in the group."""
    prompt: list[int] = field(default_factory=list)
    """Tokens of the question that is being answered."""
    held: list[int] = field(default_factory=list)
    """Tokens whose keys and values its slot holds after an answer."""
    described: Described | None = None
    """After the first round."""
    seconds: float = 0.0
    """Its share of the time of this round."""


class Talks:
    """What conversations in slots need: an interview, a model that `slot_shapes` finds fit, and its decoder."""

    def __init__(
        self, interview: Interview, loaded: LoadedModel, shapes: Sequence[LayerShape], *, spool: Spool | None = None
    ) -> None:
        """Makes no decoder yet. A `spool` gets the hidden states of whole conversations."""
        self.interview = interview
        self.decoder: Decoder | None = None
        self._loaded, self._shapes, self._spool = loaded, shapes, spool
        self._stops = stop_tokens(loaded.model, loaded.renderer)
        self._slots = interview.settings.batch_size
        """Slots that were asked for, or that are left after memory ran out."""
        self._added: int | None = None
        """Tokens that the second question adds, the description aside."""
        self._derives: bool | None = None
        """Whether `next_prompt` gives what the model's own processor does; None before it was compared."""

    def fitting(self, talks: Sequence[Talk], count: int, *, renew: bool) -> Decoder | None:
        """The decoder; with `renew` made anew if its slots are too short for `talks`, else None if they are.

        `count` is the number of all items.
        """
        needed = max(map(self._needed, talks))
        if self.decoder is not None and self.decoder.length >= needed:
            if not renew:
                return self.decoder
            if self._loaded.device.type == "cuda" or self.decoder.slots >= self._slots_for(needed, count):
                self.decoder.clear()
                return self.decoder
        if renew:
            self.decoder = None  # before the next is made, so that its memory is free
            self.decoder = self._made(-(-needed // REACH_STEP) * REACH_STEP, count)
            return self.decoder
        return None

    def halve(self, failure: str, name: str) -> None:
        """Go on with half the slots. Raises ModelError, naming the item `name`, if there is one slot only."""
        now = self.decoder.slots if self.decoder is not None else (self._slots or MOST_SLOTS)
        self.decoder = None
        if now == 1:
            message = f"{name}: the device is out of memory with this item alone ({failure})."
            raise ModelError(message)
        self._slots = now // 2
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        say(f"warning: out of memory with {now} items at a time; going on with {self._slots}")

    def ask(self, talk: Talk, prompt: NDArray[np.int32]) -> Ask:
        """The request for an answer to `prompt` (n,), which becomes that of `talk`."""
        talk.prompt = prompt.tolist()
        settings, seed = self._settings(talk)
        limit = new_tokens(len(prompt), settings, self._loaded.positions)
        return Ask(limit=limit, policy=Policy.of(settings), seed=seed)

    def reply(self, talk: Talk, ids: Sequence[int]) -> Reply:
        """The answer that consists of the generated `ids`; begins a new round of its time."""
        tokenizer = self._loaded.renderer.tokenizer
        answer = read_answer(tokenizer, ids, self._stops, begun=begins_in_thought(tokenizer, talk.prompt))
        talk.held = [*talk.prompt, *ids[:-1]]
        seconds, talk.seconds = talk.seconds, 0.0
        return reply_of(len(talk.prompt), answer, seconds)

    def suffix(self, row: int, talk: Talk) -> tuple[Suffix, Ask] | Described | str | None:
        """What the second question adds to what the slot `row` holds; None if the image must be read again.

        Or the outcome, if the conversation is too long for the model or for the slot.
        """
        found = self._next_prompt(talk)
        if found is None or isinstance(found, str):
            return found
        outcome = self.too_long(talk, found.ids)
        if outcome is not None:
            return outcome
        kept = min(common_beginning(np.array(talk.held, np.int32), found.ids), len(found.ids) - 1)
        if kept < found.seen:
            return None
        return Suffix(row=row, start=kept, ids=found.ids[kept:].tolist()), self.ask(talk, found.ids)

    def keep(self, ended: Mapping[int, tuple[Talk, Described]]) -> None:
        """Give the spool, if there is one, the states of conversations that ended in these slots.

        They are those of the tokens that an extraction reads. What their slots do not hold of them, such as the token
        that ends an answer, is computed behind what they hold. Left out are conversations whose tokens are not known
        here, or do not fit into a slot.
        """
        if self._spool is None or self.decoder is None:
            return
        whole = {
            row: ids for row, one in ended.items() if (ids := self._extracted(*one, self._spool.variant)) is not None
        }
        rest: list[Suffix] = []
        for row, ids in whole.items():
            held = common_beginning(np.array(ended[row][0].held, np.int32), ids)
            if held < len(ids):
                rest.append(Suffix(row=row, start=held, ids=ids[held:].tolist()))
        self.decoder.put_behind(rest)
        for row, ids in whole.items():
            self._spool.keep(ended[row][0].item, ids, self.decoder.states(row, len(ids)))

    def _extracted(self, talk: Talk, described: Described, variant: str) -> NDArray[np.int32] | None:
        """The token ids (n,) of the conversation as extracted; None if they are not known, or do not fit a slot."""
        if self._derives is False or (variant == "full" and not described.answer):
            return None
        before = self.interview.first(talk.item).conversation
        turns = self.interview.item(described, variant).conversation
        try:
            found = next_prompt(self._loaded.renderer, talk.prepared, before, turns, answer=False)
        except DataError:  # extraction refuses the text, too, and says so
            return None
        assert self.decoder is not None  # the conversation was in one of its slots
        if found is None or len(found.ids) > self.decoder.length:
            return None
        held = common_beginning(np.array(talk.held, np.int32), found.ids)
        return None if held < found.seen else found.ids

    def too_long(self, talk: Talk, prompt: NDArray[np.int32]) -> Described | str | None:
        """The outcome if the second `prompt` (n,) leaves the model no position, or exceeds a slot with its answer.

        The model then answers it outside of the slots.
        """
        refusal = full_prompt(talk.item.name, len(prompt), self._loaded.positions)
        if refusal is not None:
            return refusal
        settings, seed = self._settings(talk)
        assert self.decoder is not None  # it answered the first question
        if len(prompt) + new_tokens(len(prompt), settings, self._loaded.positions) <= self.decoder.length:
            return None
        (prepared,) = self.interview.prepare([question_of(talk)])
        if isinstance(prepared, str):
            return prepared
        started = time.perf_counter()
        (answer,) = self.interview.backbone.generate([prepared], settings, seeds=[seed])
        return rated(described_of(talk), reply_of(len(prompt), answer, time.perf_counter() - started))

    def _settings(self, talk: Talk) -> tuple[GenerationSettings, int]:
        """Those of the round that `talk` is in, and the seed of its draws."""
        if talk.described is None:
            settings = self.interview.settings.describe
            return settings, seed_of(settings, "describe", talk.item)
        settings = self.interview.rate_settings(thinking=talk.described.thought)
        return settings, seed_of(settings, "rate", talk.item)

    def _next_prompt(self, talk: Talk) -> NextPrompt | str | None:
        """The prompt for the rating; None if it must be prepared with its image, or a line that says why it cannot be.

        The first one with an image is compared with that of the model's own processor.
        """
        if self._derives is False:
            return None
        question = question_of(talk)
        before = self.interview.first(talk.item).conversation
        found = next_prompt(self._loaded.renderer, talk.prepared, before, question.conversation)
        if found is None or not found.seen or self._derives:
            return found
        (prepared,) = self.interview.prepare([question])
        if isinstance(prepared, str):
            return prepared
        self._derives = np.array_equal(prepared.token_ids, found.ids)
        return found if self._derives else None

    def _needed(self, talk: Talk) -> int:
        """The most tokens of a conversation and its answers."""
        settings, most = self.interview.settings, len(talk.prepared.token_ids)
        most += settings.describe.max_new_tokens
        if settings.rate is not None:
            most += self._second_question(talk) + self.interview.rate_settings(thinking=self._thinks).max_new_tokens
        positions = self._loaded.positions
        return most if positions is None else min(most, positions)

    def _second_question(self, talk: Talk) -> int:
        """Tokens that the second question adds, the description aside."""
        if self._added is None:
            before = self.interview.first(talk.item).conversation
            after = (*before, Message(role="assistant", content="x"), self.interview.second)
            found = next_prompt(self._loaded.renderer, talk.prepared, before, after)
            self._added = _SLACK + (_UNKNOWN if found is None else len(found.ids) - len(talk.prepared.token_ids))
        return self._added

    @cached_property
    def _thinks(self) -> bool:
        """Whether the model has a token that ends a thought."""
        vocabulary = self._loaded.renderer.tokenizer.get_vocab()
        return any(end in vocabulary for _, end in THOUGHT_MARKS)

    def _made(self, length: int, count: int) -> Decoder:
        settings = self.interview.settings
        limits, policies = [settings.describe.max_new_tokens], [Policy.of(settings.describe)]
        if settings.rate is not None:
            limits.append(self.interview.rate_settings(thinking=True).max_new_tokens)
            policies.append(Policy.of(settings.rate))
        return Decoder(
            self._loaded,
            self._shapes,
            slots=self._slots_for(length, count),
            length=length,
            policies=policies,
            limit=max(limits),
            stops=self._stops,
            keeps=self._spool is not None,
        )

    def _slots_for(self, length: int, count: int) -> int:
        """Slots of `length` tokens for `count` items.

        On a GPU as many as were asked for or fit, even for fewer items: a step takes little less time with fewer, and
        results do not depend on `count`.
        """
        device = self._loaded.device
        if device.type != "cuda":
            return max(1, min(self._slots or CPU_SLOTS, count))
        if self._slots is not None:
            return self._slots
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        token = sum(shape.token_bytes for shape in self._shapes)
        if self._spool is not None:
            token += self._loaded.model.get_output_embeddings().weight.shape[1] * self._shapes[0].dtype.itemsize
        slot = length * token
        return max(1, min(MOST_SLOTS, (free - _RESERVED) // slot))


def question_of(talk: Talk) -> Question:
    """The second question."""
    return Question(item=talk.item, conversation=described_of(talk).conversation)


def described_of(talk: Talk) -> Described:
    """What is known after the first round."""
    assert talk.described is not None  # the first round is over
    return talk.described
