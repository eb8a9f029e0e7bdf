"""Decodes in slots: conversations begin, go on and end in their slots while the others are in the middle of theirs.

All slots take a step together, whether they are in use or not: a step reads all weights anyway, and its results do not
depend on how many are in use. On a GPU the step is replayed from a CUDA graph for each length that attention reads,
since the CPU takes longer to queue its thousand kernels than the GPU to compute them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from agiqa.cuda import garbage_waits
from agiqa.errors import first_line
from agiqa.extract.models.batches import indices, is_out_of_memory, uploaded
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.decoding.cache import LayerShape
from agiqa.extract.models.decoding.choosing import Policy, choose
from agiqa.extract.models.decoding.slot_model import LoadedModel, SlotModel, Suffix, reach_of
from agiqa.progress import say

SUFFIX_ROWS, SUFFIX_WIDTH = 16, 64
"""On a GPU, tokens that follow what a slot holds are computed in passes of this shape."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a slot answers next."""

    limit: int
    """Most tokens of the answer, 1 or more."""
    policy: Policy
    seed: int = 0
    """Of the draws, below 2^63."""


class Decoder:
    """Answers in slots. Rows are numbers of slots; the caller knows which are free."""

    def __init__(
        self,
        loaded: LoadedModel,
        shapes: Sequence[LayerShape],
        *,
        slots: int,
        length: int,
        policies: Iterable[Policy],
        limit: int,
        stops: Sequence[int],
        graphs: bool = True,
        keeps: bool = False,
    ) -> None:
        """`length` is the most tokens that a slot holds, answers included, and `limit` the longest answer.

        Answers end with one of `stops`. With `graphs`, steps on a GPU are replayed. With `keeps`, `states` are kept.
        """
        self.slots, self.length, self.limit = slots, length, limit
        self._device = loaded.device
        self._policies = list(dict.fromkeys(policies))
        self._graphed = graphs and self._device.type == "cuda"
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._at: dict[int, int] = {}
        """By row in use, at least the tokens that it holds."""
        with torch.inference_mode():
            self._model = SlotModel(loaded, shapes, slots=slots, length=length, keeps=keeps)
            vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
            self._tokens, self._lengths, self._made, self._limits, self._seeds, self._which = (
                torch.zeros(slots, dtype=torch.int64, device=self._device) for _ in range(6)
            )
            self._offsets = torch.zeros(slots + 1, dtype=torch.int64, device=self._device)
            self._done = torch.ones(slots, dtype=torch.bool, device=self._device)
            self._out = torch.zeros(slots, limit + 1, dtype=torch.int64, device=self._device)
            self._stops = torch.tensor(list(stops), dtype=torch.int64, device=self._device)
            penalised = any(policy.repetition_penalty != 1.0 for policy in self._policies)
            self._said = torch.zeros(slots, vocabulary, dtype=torch.bool, device=self._device) if penalised else None
        self._pool = torch.cuda.graph_pool_handle() if self._graphed else None

    @torch.inference_mode()
    def begin(self, rows: Sequence[int], items: Sequence[Prepared], asks: Sequence[Ask]) -> None:
        """Read `items`, which are `alike`, into the slots `rows`, and choose the first token of each answer."""
        logits, offsets = self._model.read(rows, items)
        self._offsets[indices(rows, self._device)] = offsets
        self._choose_first(rows, logits, [len(item.token_ids) for item in items], asks)

    @torch.inference_mode()
    def go_on(self, suffixes: Sequence[Suffix], asks: Sequence[Ask]) -> None:
        """Put `suffixes` behind what their slots hold, and choose the first token of each answer."""
        asked = {suffix.row: ask for suffix, ask in zip(suffixes, asks, strict=True)}
        for ending, logits in self._read_on(suffixes):
            lengths = [one.start + len(one.ids) for one in ending]
            self._choose_first([one.row for one in ending], logits, lengths, [asked[one.row] for one in ending])

    @torch.inference_mode()
    def put_behind(self, suffixes: Sequence[Suffix]) -> None:
        """Compute `suffixes` behind what their slots hold, for their `states`; the next step may overwrite them."""
        for _ in self._read_on(suffixes):
            pass

    @torch.inference_mode()
    def states(self, row: int, count: int) -> torch.Tensor:
        """(count, D): the final hidden states of the first tokens that the slot `row` holds, as queued until now."""
        assert self._model.states is not None  # they are kept
        return self._model.states.of(row, count)

    def _read_on(self, suffixes: Sequence[Suffix]) -> Iterator[tuple[list[Suffix], torch.Tensor]]:
        """Pass by pass: those of `suffixes` that it ends, with their last part of ids, and logits (n, V) after them."""
        most = min(SUFFIX_ROWS, self.slots)
        for start in range(0, len(suffixes), most):
            left = list(suffixes[start : start + most])
            while left:
                now = [Suffix(row=one.row, start=one.start, ids=one.ids[:SUFFIX_WIDTH]) for one in left]
                rows, width = len(now), max(len(one.ids) for one in now)
                if self._device.type == "cuda":
                    rows, width = most, SUFFIX_WIDTH
                logits = self._model.read_on(now, self._offsets, rows=rows, width=width)
                ends = [place for place, one in enumerate(left) if len(one.ids) <= SUFFIX_WIDTH]
                if ends:
                    yield [left[place] for place in ends], logits[indices(ends, self._device)]
                left = [
                    Suffix(row=one.row, start=one.start + SUFFIX_WIDTH, ids=one.ids[SUFFIX_WIDTH:])
                    for one in left
                    if len(one.ids) > SUFFIX_WIDTH
                ]

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget what the slots are in the middle of."""
        self._at.clear()
        self._done.fill_(value=True)

    @torch.inference_mode()
    def step(self, count: int) -> None:
        """Queue `count` steps: one more token in each slot in use whose answer has not ended."""
        for _ in range(count):
            reach = reach_of(max(self._at.values(), default=0) + 1, self.length)
            self._at = {row: min(length + 1, self.length - 1) for row, length in self._at.items()}
            self._one_step(reach)

    @torch.inference_mode()
    def ended(self) -> dict[int, list[int]]:
        """Row -> the ids of each answer that has ended, with the one that ends it. Waits for the queued steps."""
        done, made, lengths = torch.stack([self._done.long(), self._made, self._lengths]).tolist()
        self._at = {row: lengths[row] for row in self._at}
        rows = [row for row in self._at if done[row]]
        if not rows:
            return {}
        ids = self._out[indices(rows, self._device), : max(made[row] for row in rows)].tolist()
        for row in rows:
            del self._at[row]
        return {row: answer[: made[row]] for row, answer in zip(rows, ids, strict=True)}

    def _choose_first(
        self, rows: Sequence[int], logits: torch.Tensor, lengths: Sequence[int], asks: Sequence[Ask]
    ) -> None:
        places = indices(rows, self._device)
        policies = [self._policies.index(ask.policy) for ask in asks]
        values = torch.tensor([lengths, [ask.limit for ask in asks], [ask.seed for ask in asks], policies])
        lengths_, limits, seeds, which = uploaded(values, self._device)
        said = None
        if self._said is not None:
            self._said[places] = False
            said = self._said[places]
        numbers = torch.zeros_like(seeds)
        chosen = self._choose(logits, which, said, seeds, numbers)
        for state, new in (
            (self._tokens, chosen),
            (self._lengths, lengths_),
            (self._made, numbers + 1),
            (self._limits, limits),
            (self._seeds, seeds),
            (self._which, which),
            (self._done, self._is_end(chosen) | (limits <= 1)),
        ):
            state[places] = new
        self._out[places, 0] = chosen
        if self._said is not None:
            self._said[places, chosen] = True
        self._at |= dict(zip(rows, lengths, strict=True))

    def _choose(
        self,
        logits: torch.Tensor,
        which: torch.Tensor,
        said: torch.Tensor | None,
        seeds: torch.Tensor,
        numbers: torch.Tensor,
    ) -> torch.Tensor:
        """(n,) tokens by the policy `which` (n,) of each row."""
        chosen = choose(logits, self._policies[0], said=said, seeds=seeds, numbers=numbers)
        for number, policy in enumerate(self._policies[1:], start=1):
            other = choose(logits, policy, said=said, seeds=seeds, numbers=numbers)
            chosen = torch.where(which == number, other, chosen)
        return chosen

    def _is_end(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, None] == self._stops).any(-1)

    def _step(self, reach: int) -> None:
        """One step. Only in-place changes leave it, and nothing waits for the device, so that it can be captured."""
        logits = self._model.next_logits(self._tokens, self._lengths, self._offsets, reach)
        active = ~self._done
        chosen = self._choose(logits, self._which, self._said, self._seeds, self._made)
        column = torch.where(active, self._made, self.limit)  # the last column is for slots that are not in use
        self._out.scatter_(1, column[:, None], chosen[:, None])
        if self._said is not None:
            self._said.scatter_(1, chosen[:, None], True)  # noqa: FBT003 - torch's own signature
        self._lengths.add_(active)
        self._made.add_(active)
        ends = self._is_end(chosen) | (self._made >= self._limits)
        self._tokens.copy_(torch.where(active, chosen, self._tokens))
        self._done.logical_or_(ends)

    def _one_step(self, reach: int) -> None:
        if not self._graphed:
            self._step(reach)
        elif reach in self._graphs:
            self._graphs[reach].replay()
        else:
            self._first_step(reach)

    def _first_step(self, reach: int) -> None:
        """A step of a new length, which warms up, and the capture of the graph of later ones."""
        stream = _stream_of(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._step(reach)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": what other threads do, such as receiving prepared images, breaks no capture
            capture = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
            with garbage_waits(), capture:
                self._step(reach)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._graphed = False
            say(f"note: this model's steps cannot be replayed from a CUDA graph, and are slower: {first_line(error)}")
        else:
            self._graphs[reach] = graph


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps 32 MiB for each stream that it was used on, until the process ends."""
    return torch.cuda.Stream(device)
