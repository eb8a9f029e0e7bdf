"""A language model over a cache in slots: reads prompts, reads on where a slot ends, and one token for all slots."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from agiqa.extract.models.batches import indices, uploaded
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.decoding.attention import configs_of, slot_attention, visible_bias
from agiqa.extract.models.decoding.cache import LayerShape, SlotCache, SlotStates
from agiqa.extract.models.rendering import Renderer

REACH_STEP = 128
"""Attention reads the cache up to a multiple of this many places."""

Inputs = dict[str, torch.Tensor]
Keep = Callable[[torch.Tensor], None]
"""Gets final hidden states (n, q, D)."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """The parts of a loaded backbone that answers are made with."""

    name: str
    model: Any
    """The transformers model that makes logits."""
    renderer: Renderer
    collate: Callable[[Sequence[Prepared]], Inputs]
    """Makes model inputs, padded on the right, of items that are `alike`."""
    positions: int | None
    """The longest sequence that the model supports, in tokens."""
    device: torch.device
    ordinary: Callable[[int], list[int]]
    """That many ordinary token ids."""


@dataclass(frozen=True, kw_only=True)
class Suffix:
    """Tokens that follow what a slot holds."""

    row: int
    start: int
    """Tokens of the slot that are kept."""
    ids: Sequence[int]
    """One or more."""


def reach_of(length: int, most: int) -> int:
    """Places that attention reads for rows of up to `length` tokens, in slots of `most`."""
    return min(-(-length // REACH_STEP) * REACH_STEP, most)


class SlotModel:
    """Computes logits (rows, V) in float32. All calls must be in inference mode."""

    def __init__(
        self, loaded: LoadedModel, shapes: Sequence[LayerShape], *, slots: int, length: int, keeps: bool = False
    ) -> None:
        """Allocates `slots` of `length` tokens, and one more that padding is written to.

        With `keeps`, the final hidden states of all tokens are kept too.
        """
        self.loaded, self.slots, self.length = loaded, slots, length
        self.device = loaded.device
        self.cache = SlotCache(shapes, slots + 1, length, self.device)
        self._dtype = shapes[0].dtype
        self.states: SlotStates | None = None
        """Of the tokens that the slots hold, if they are kept."""
        if keeps:
            width = loaded.model.get_output_embeddings().weight.shape[1]
            self.states = SlotStates(width, self._dtype, self.cache, self.device)
        self._counting: Any = next((part for part in loaded.model.modules() if hasattr(part, "rope_deltas")), None)
        """The part of the model that knows the positions after an image, where they are not the places."""
        self._configs = configs_of(loaded.model)
        self._every = torch.arange(slots, device=self.device)[:, None]

    def read(self, rows: Sequence[int], items: Sequence[Prepared]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read `items`, which are `alike`, into the slots `rows`. Returns logits (n, V) after their last tokens.

        The second tensor (n,) holds the position of each row's next token less its place. It is 0 unless the model
        counts an image's tokens in rows and columns (Qwen-VL, GLM-V). Such a model reads prompts of one length at a
        time: it keeps the difference, but families disagree about whether padding counts.
        """
        lengths = [len(item.token_ids) for item in items]
        if self._counting is None:
            logits = self._read(rows, items)
            return logits, torch.zeros(len(items), dtype=torch.int64, device=self.device)
        places = [[place for place, found in enumerate(lengths) if found == length] for length in sorted(set(lengths))]
        found = [self._read_counted(rows, items, chosen) for chosen in places]
        order = indices([place for chosen in places for place in chosen], self.device).argsort()
        return torch.cat([logits for logits, _ in found])[order], torch.cat([offsets for _, offsets in found])[order]

    def _read_counted(
        self, rows: Sequence[int], items: Sequence[Prepared], places: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._read([rows[place] for place in places], [items[place] for place in places])
        if not items[0].inputs:
            return logits, torch.zeros(len(places), dtype=torch.int64, device=self.device)
        return logits, self._counting.rope_deltas.reshape(-1)

    def _read(self, rows: Sequence[int], items: Sequence[Prepared]) -> torch.Tensor:
        last, into = indices([len(item.token_ids) - 1 for item in items], self.device), indices(rows, self.device)
        keep = None if self.states is None else partial(self.states.fill, into)
        found, logits = read_prompts(self.loaded.model, self.loaded.collate(items), last, keep=keep)
        self.cache.fill(into, [(layer.keys, layer.values) for layer in found.layers])
        return logits

    def read_on(self, suffixes: Sequence[Suffix], offsets: torch.Tensor, *, rows: int, width: int) -> torch.Tensor:
        """Logits (n, V) after the last token of each of `suffixes`, which have up to `width` tokens.

        `offsets` (slots + 1,) are as of `read`. The pass has the shape (rows, width): logits then do not depend on
        which suffixes are computed together.
        """
        shape = (rows, width)
        ids, places = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        into = torch.full(shape, self.slots)
        for row, suffix in enumerate(suffixes):
            count = len(suffix.ids)
            ids[row, :count], into[row, :count] = torch.tensor(suffix.ids), suffix.row
            places[row, :count] = torch.arange(suffix.start, suffix.start + count)
        last = torch.tensor([len(suffix.ids) - 1 for suffix in suffixes] + [0] * (rows - len(suffixes)))
        read = torch.tensor([suffix.row for suffix in suffixes] + [self.slots] * (rows - len(suffixes)))
        reach = reach_of(int(places.max()) + 1, self.length)
        ids, places, into, last, read = (uploaded(value, self.device) for value in (ids, places, into, last, read))
        self.cache.look(rows=into, places=places, read=read, count=rows, reach=reach)
        bias = visible_bias(places + 1, reach, self._dtype)
        return self._forward(ids, places + offsets[read][:, None], bias, last=last)[: len(suffixes)]

    def next_logits(
        self, tokens: torch.Tensor, lengths: torch.Tensor, offsets: torch.Tensor, reach: int
    ) -> torch.Tensor:
        """Logits (slots, V) after one more token (slots,) in every slot, each of which holds `lengths` (slots,).

        `offsets` (slots + 1,) are as of `read`; attention reads `reach` places. Nothing here waits for the device.
        """
        places = lengths[:, None]
        self.cache.look(rows=self._every, places=places, read=None, count=self.slots, reach=reach)
        positions = (lengths + offsets[: self.slots])[:, None]
        return self._forward(tokens[:, None], positions, visible_bias(places + 1, reach, self._dtype))

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor, *, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (n, V) of the last token of each row, or of those at the places `last` (n,)."""
        keep = None if self.states is None else self.states.put
        with slot_attention(self._configs), before_the_head(self.loaded.model, last=last, keep=keep):
            found = self.loaded.model(
                input_ids=ids, position_ids=positions, attention_mask=bias, past_key_values=self.cache, use_cache=True
            )
        logits: torch.Tensor = found.logits[:, -1].float()
        return logits


def read_prompts(
    model: Any, inputs: Mapping[str, torch.Tensor], last: torch.Tensor, *, keep: Keep | None = None
) -> tuple[Any, torch.Tensor]:
    """The cache of transformers after `inputs`, padded on the right, and the logits (n, V) at the places `last`."""
    cache = DynamicCache(config=model.config)
    with before_the_head(model, last=last, keep=keep):
        found = model(**inputs, past_key_values=cache, use_cache=True)
    return found.past_key_values, found.logits[:, -1].float()


@contextmanager
def before_the_head(model: Any, *, last: torch.Tensor | None, keep: Keep | None) -> Generator[None]:
    """Give `keep` the states that `model` makes logits of; with `last` (n,), let it make those of these places alone.

    The logits of a whole prompt would be 128,256 per token.
    """

    def choose(_module: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states = given[0]
        if keep is not None:
            keep(states)
        if last is None:
            return given
        rows = torch.arange(len(last), device=last.device)
        return (states[rows, last][:, None], *given[1:])

    if last is None and keep is None:
        yield
        return
    with model.get_output_embeddings().register_forward_pre_hook(choose):
        yield
