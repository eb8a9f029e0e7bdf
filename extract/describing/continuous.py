"""Both rounds about many images in the slots of one decoder: a conversation that ends makes room for the next.

A slot goes on to the rating with the keys and values of the description where the tokens are the same. Outcomes come in
the order of the items; what an item answers does not depend on the others, but for rounding.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from agiqa.errors import first_line
from agiqa.extract.data.items import Item
from agiqa.extract.describing.rounds import Described, rated
from agiqa.extract.describing.talks import Talk, Talks, question_of
from agiqa.extract.models import Prepared
from agiqa.extract.models.batches import alike, is_out_of_memory
from agiqa.extract.models.decoding.decoder import Ask, Decoder
from agiqa.extract.models.decoding.slot_model import Suffix

GROUP = 16
"""Items whose prompts are read together, and ratings that are asked for together."""
STEPS = 8
"""Steps between two looks at which answers have ended."""

Group = tuple[Sequence[Item], Sequence[Prepared | str]]
"""Items with their first questions, or the lines that say why they cannot be asked about."""


class Conversations:
    """Describes groups of items in slots, one call after the other."""

    def __init__(self, talks: Talks) -> None:
        """The decoder of `talks` is made when the first conversation begins, and kept for later calls."""
        self.talks = talks

    def run(self, groups: Iterable[Group], *, count: int) -> Iterator[list[Described | str]]:
        """The outcomes of each of `groups`, which have `count` items in all.

        Raises ModelError when memory does not suffice for one conversation alone.
        """
        return _Run(self.talks, iter(groups), count).outcomes()


class _Run:
    """The conversations about the items of one call."""

    def __init__(self, talks: Talks, groups: Iterator[Group], count: int) -> None:
        self._talks, self._groups, self._count = talks, groups, count
        self._more = True
        self._number = 0
        """Groups that were fetched."""
        self._waiting: deque[Talk] = deque()
        self._active: dict[int, Talk] = {}
        self._ended: dict[int, list[int]] = {}
        """Answers that have ended, by slot, and were not seen to."""
        self._free: list[int] = []
        self._results: deque[list[Described | str | None]] = deque()
        """Of the groups that are not complete, the first one first."""
        self._mark = 0.0

    def outcomes(self) -> Iterator[list[Described | str]]:
        """The outcomes of each group, in order."""
        while True:
            self._fetch()
            yield from self._complete()
            if not self._waiting and not self._active:
                return
            self._mark = time.perf_counter()
            failure = self._turn_or_failure()
            if failure is not None:  # outside of `except`, where the error would keep its tensors in memory
                self._start_again(failure)

    def _turn_or_failure(self) -> str | None:
        """What the device said when its memory ran out."""
        try:
            self._turn()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return first_line(error)
        return None

    def _start_again(self, failure: str) -> None:
        """Halve the slots, and begin all unfinished conversations anew."""
        talks = sorted([*self._active.values(), *self._waiting], key=lambda talk: talk.place)
        self._talks.halve(failure, talks[0].item.name)
        self._active.clear()
        self._ended.clear()
        self._waiting = deque(Talk(item=one.item, prepared=one.prepared, place=one.place) for one in talks)

    def _turn(self) -> None:
        """Begin what fits, queue some steps, see to answers that ended before them, and wait for the steps."""
        self._begin()
        decoder = self._talks.decoder
        assert decoder is not None  # made for the first that began
        if len(self._active) > len(self._ended):
            decoder.step(STEPS)
        self._fetch()
        ended = list(self._ended.items())
        for start in range(0, len(ended), GROUP):
            self._go_on(decoder, dict(ended[start : start + GROUP]))
        self._ended = decoder.ended()
        self._share_time()

    def _fetch(self) -> None:
        """Take groups until one has an item that can be asked about."""
        while self._more and not self._waiting:
            group = next(self._groups, None)
            if group is None:
                self._more = False
                return
            items, prepared = group
            self._results.append([one if isinstance(one, str) else None for one in prepared])
            self._waiting.extend(
                Talk(item=item, prepared=one, place=(self._number, place))
                for place, (item, one) in enumerate(zip(items, prepared, strict=True))
                if not isinstance(one, str)
            )
            self._number += 1

    def _complete(self) -> Iterator[list[Described | str]]:
        while self._results and all(one is not None for one in self._results[0]):
            yield [one for one in self._results.popleft() if one is not None]

    def _finish(self, talk: Talk, outcome: Described | str) -> None:
        group, place = talk.place
        self._results[group - (self._number - len(self._results))][place] = outcome

    def _begin(self) -> None:
        """Let conversations begin where slots are free, a whole group of them at a time."""
        while self._waiting:
            talks = list(self._waiting)[:GROUP]
            decoder = self._talks.fitting(talks, self._count, renew=not self._active)
            if decoder is None:  # the slots are too short: longer ones are made when all are free
                return
            if not self._active:
                self._free = list(range(decoder.slots))
            if len(self._free) < min(len(talks), decoder.slots):
                return
            chosen = {self._free.pop(0): self._waiting.popleft() for _ in talks[: len(self._free)]}
            self._active |= chosen
            self._read(decoder, chosen, [talk.prepared for talk in chosen.values()])
            self._fetch()

    def _read(self, decoder: Decoder, talks: Mapping[int, Talk], prepared: Sequence[Prepared]) -> None:
        """Ask what `prepared` says in the slots of `talks`."""
        rows = list(talks)
        for group in alike(prepared):
            items = [prepared[place] for place in group]
            chosen = [rows[place] for place in group]
            asks = [self._talks.ask(talks[row], item.token_ids) for row, item in zip(chosen, items, strict=True)]
            decoder.begin(chosen, items, asks)

    def _share_time(self) -> None:
        now = time.perf_counter()
        for talk in self._active.values():
            talk.seconds += (now - self._mark) / len(self._active)
        self._mark = now

    def _go_on(self, decoder: Decoder, ended: Mapping[int, Sequence[int]]) -> None:
        """Finish conversations, or ask their second question. `ended` is from the decoder."""
        asked: list[tuple[Suffix, Ask]] = []
        unread: dict[int, Talk] = {}
        over: dict[int, Described | str] = {}
        for row, ids in ended.items():
            talk = self._active[row]
            outcome = self._outcome(talk, ids)
            if outcome is None:
                found = self._talks.suffix(row, talk)
                if isinstance(found, tuple):
                    asked.append(found)
                elif found is None:
                    unread[row] = talk
                else:
                    outcome = found
            if outcome is not None:
                over[row] = outcome
        self._talks.keep({row: (self._active[row], one) for row, one in over.items() if isinstance(one, Described)})
        for row, outcome in over.items():
            self._release(row, outcome)
        if asked:
            suffixes, asks = zip(*asked, strict=True)
            decoder.go_on(suffixes, asks)
        if unread:
            self._read_again(decoder, unread)

    def _outcome(self, talk: Talk, ids: Sequence[int]) -> Described | str | None:
        """What the answer `ids` ends the conversation with; None if there is another question."""
        reply = self._talks.reply(talk, ids)
        if talk.described is not None:
            return rated(talk.described, reply)
        outcome = self._talks.interview.described(talk.item, reply, decoder="slots")
        if isinstance(outcome, str) or self._talks.interview.settings.rate is None:
            return outcome
        talk.described = outcome
        return None

    def _read_again(self, decoder: Decoder, talks: Mapping[int, Talk]) -> None:
        """Ask the second question with the whole conversation and its image."""
        asked = [question_of(talk) for talk in talks.values()]
        able: dict[int, Prepared] = {}
        for row, prepared in zip(talks, self._talks.interview.prepare(asked), strict=True):
            outcome = prepared if isinstance(prepared, str) else self._talks.too_long(talks[row], prepared.token_ids)
            if outcome is not None:
                self._release(row, outcome)
            elif not isinstance(prepared, str):
                able[row] = prepared
        if able:
            self._read(decoder, {row: talks[row] for row in able}, list(able.values()))

    def _release(self, row: int, outcome: Described | str) -> None:
        self._finish(self._active.pop(row), outcome)
        self._free.append(row)
