"""Asks a model about images, in batches: for a description of each, then for a rating in one word."""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import torch

from agiqa.errors import ModelError
from agiqa.extract.data.items import Item
from agiqa.extract.describing.continuous import GROUP, Conversations
from agiqa.extract.describing.rounds import (
    Described,
    DescriptionSettings,
    Interview,
    Question,
    Reply,
    is_safe,
    prepare_question,
    rated,
    reply_of,
    seed_of,
    unprepared,
)
from agiqa.extract.describing.spool import Spool
from agiqa.extract.describing.talks import Talks
from agiqa.extract.models import AnsweringModel, GenerationSettings, Prepared
from agiqa.extract.models.batches import is_out_of_memory
from agiqa.extract.models.decoding.eligibility import Unfit, slot_shapes
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.preparing import Preparation
from agiqa.progress import say

BATCH, LARGEST_BATCH = 8, 32
"""Items of a batch on a CPU and on a GPU, for models that cannot answer in slots."""


class Describer(Interview):
    """Asks one model about images: in the slots of a decoder, or in batches if the model does not fit slots.

    In batches, the second round reads the whole conversation again: the rows of a batch end at different places, and
    recurrent or windowed models cannot return to an earlier state.
    """

    decoder: str | None = "batches"
    """The name, in the lines, of how models that do not fit slots generate answers."""

    def __init__(
        self,
        backbone: AnsweringModel,
        settings: DescriptionSettings,
        *,
        preparation: Preparation[AnsweringModel] | None = None,
        spool: Spool | None = None,
    ) -> None:
        """As Interview. With a `spool`, the hidden states of conversations are kept there."""
        super().__init__(backbone, settings, preparation=preparation)
        self.spool = spool
        on_gpu = getattr(getattr(backbone, "device", None), "type", "cpu") == "cuda"
        self.batch_size = settings.batch_size or (LARGEST_BATCH if on_gpu else BATCH)

    @cached_property
    def conversations(self) -> Conversations | None:
        """The decoder in slots, for a model that it fits. The first use loads the model.

        Raises ModelError for another model whose states a spool shall get.
        """
        if not isinstance(self.backbone, HuggingFaceBackbone):
            if self.spool is not None:
                raise _no_states(type(self.backbone).__name__, "agiqa does not decode its answers")
            return None
        loaded = self.backbone.answering_parts()
        try:
            shapes = slot_shapes(loaded, keeps=self.spool is not None)
        except Unfit as reason:
            if self.spool is not None:
                raise _no_states(loaded.name, f"it cannot answer in slots: {reason}") from reason
            say(f"note: {loaded.name} cannot answer in slots, so it answers in batches: {reason}")
            return None
        return Conversations(Talks(self, loaded, shapes, spool=self.spool))

    def check_spooling(self) -> None:
        """Load the model, and raise the ModelError of `conversations` before anything is asked."""
        assert self.conversations is not None or self.spool is None  # the property raises

    def release(self) -> None:
        """Give the memory of the decoder back."""
        if "conversations" in self.__dict__ and self.conversations is not None:
            self.conversations.talks.decoder = None
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    @property
    def group_size(self) -> int:
        """Items that `batches` should get together."""
        return self.batch_size if self.conversations is None else GROUP

    def batches(self, batches: Sequence[Sequence[Item]]) -> Iterator[list[Described | str]]:
        """The outcomes of each batch in turn, while workers prepare the images of the next ones."""
        asked = ((batch, [self.first(item) for item in batch]) for batch in batches)
        groups = self.preparation.groups(prepare_question, asked, lost=unprepared, is_safe=is_safe)
        if self.conversations is not None:
            yield from self.conversations.run(groups, count=sum(map(len, batches)))
            return
        for batch, prepared in groups:
            yield self._in_batches(batch, prepared)

    def describe(self, items: Sequence[Item]) -> list[Described | str]:
        """The model's answers about each item, or the line that says why there are none.

        Raises ModelError when memory does not suffice for one item alone.
        """
        return [outcome for outcomes in self.batches([items]) for outcome in outcomes] if items else []

    def _in_batches(self, items: Sequence[Item], prepared: Sequence[Prepared | str]) -> list[Described | str]:
        """`prepared` are the first questions about the items."""
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
        replies = self._ask(items, prepared, self.settings.describe, "describe")
        outcomes = [
            self.described(item, reply, decoder=self.decoder) for item, reply in zip(items, replies, strict=True)
        ]
        if self.settings.rate is not None:
            self._rate(outcomes, thinking=False)
            self._rate(outcomes, thinking=True)
        return outcomes

    def _rate(self, outcomes: list[Described | str], *, thinking: bool) -> None:
        """Add ratings to the `outcomes` whose description came after thoughts (`thinking`), or to those without."""
        chosen = {
            position: one
            for position, one in enumerate(outcomes)
            if isinstance(one, Described) and one.thought == thinking
        }
        prepared = self.prepare([Question(item=one.item, conversation=one.conversation) for one in chosen.values()])
        settings = self.rate_settings(thinking=thinking)
        replies = self._ask([one.item for one in chosen.values()], prepared, settings, "rate")
        for (position, one), reply in zip(chosen.items(), replies, strict=True):
            outcomes[position] = reply if isinstance(reply, str) else rated(one, reply)

    def _ask(
        self,
        items: Sequence[Item],
        prepared: Sequence[Prepared | str],
        settings: GenerationSettings,
        name: Literal["describe", "rate"],
    ) -> list[Reply | str]:
        """The reply to the question of the round `name` about each item, or why it could not be `prepared`."""
        ready = [(item, one) for item, one in zip(items, prepared, strict=True) if not isinstance(one, str)]
        if not ready:
            return [one for one in prepared if isinstance(one, str)]
        started = time.perf_counter()
        seeds = [seed_of(settings, name, item) for item, _ in ready]
        answers = self.backbone.generate([one for _, one in ready], settings, seeds=seeds)
        share = (time.perf_counter() - started) / len(ready)
        replies = (reply_of(len(one.token_ids), answer, share) for (_, one), answer in zip(ready, answers, strict=True))
        return [one if isinstance(one, str) else next(replies) for one in prepared]


def _no_states(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} cannot hand out its hidden states while it describes: {why}. Describe without --store, then run "
        "`agiqa extract DATA STORE --conversations OUT.jsonl`."
    )
