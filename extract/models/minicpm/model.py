"""The model: a vision tower over patches, the resampler, and a Llama that reads both."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from agiqa.extract.models.batches import uploaded
from agiqa.extract.models.minicpm.config import MiniCPMConfig
from agiqa.extract.models.minicpm.resampler import Resampler

_PATCHES_AT_ONCE = 1 << 16
"""Bounds the memory of one pass of the vision tower: about 64 slices."""


class MiniCPMV(nn.Module):
    """`llm`, `vpm` and `resampler`, with the parameter names of the published checkpoint."""

    _supports_sdpa = True

    def __init__(self, config: MiniCPMConfig) -> None:
        """Random weights; on the meta device none."""
        super().__init__()
        language, vision = config.get_text_config(), config.get_vision_config()
        self.llm = transformers.LlamaForCausalLM(language)
        self.vpm: Any = Idefics2VisionTransformer(vision)
        self.resampler = Resampler(queries=config.queries, width=language.hidden_size, vision_width=vision.hidden_size)
        self._mean, self._std = config.mean, config.std
        self._per_side: int = vision.image_size // vision.patch_size

    def image_tokens(self, patches: Tensor, sizes: NDArray[np.int64], attended: NDArray[np.int64]) -> Tensor:
        """What the language model reads of slices, (slices, queries, hidden size).

        `patches` (all patches of all slices, 3 * patch * patch) are uint8, `sizes` (slices, [rows, columns]) their
        numbers. A slice attends to its own patches and as many blank ones as make up `attended` (slices,): published
        code pads the slices of one image to the longest and does not hide the padding.
        """
        starts = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))])
        width = self.resampler.proj.shape[0]
        found = torch.empty(len(sizes), len(self.resampler.query), width, dtype=self._dtype, device=patches.device)
        for chosen in _in_chunks(attended):
            pieces = [patches[starts[place] : starts[place + 1]] for place in chosen]
            found[uploaded(chosen, patches.device)] = self._chunk_tokens(pieces, sizes[chosen], attended[chosen])
        return found

    def _chunk_tokens(self, pieces: list[Tensor], sizes: NDArray[np.int64], attended: NDArray[np.int64]) -> Tensor:
        values = self._normalised(torch.cat(pieces)).split([len(piece) for piece in pieces])
        padded = nn.utils.rnn.pad_sequence(list(values), batch_first=True)
        longest = int(attended.max())
        padded = nn.functional.pad(padded, (0, 0, 0, longest - padded.shape[1]))
        kernel = self.vpm.embeddings.patch_embedding
        positions = np.zeros((len(sizes), longest), np.int64)
        for row, count in enumerate(attended.tolist()):
            positions[row, :count] = line_positions(count, self._per_side)
        embedded = linear(padded, kernel.weight.flatten(1), kernel.bias)
        embedded = embedded + self.vpm.embeddings.position_embedding(uploaded(positions, padded.device))
        states = self.vpm.encoder(inputs_embeds=embedded, attention_mask=_mask(attended, longest, padded))
        tokens: Tensor = self.resampler(self.vpm.post_layernorm(states.last_hidden_state), sizes)
        return tokens

    def embed(self, token_ids: NDArray[np.int64], seen: NDArray[np.bool_], images: Tensor | None) -> Tensor:
        """Embeddings (batch, tokens, D) of `token_ids`, with `images` where `seen` (batch, tokens) is set, in order."""
        table: Any = self.llm.get_input_embeddings()
        embedded: Tensor = table(uploaded(token_ids, table.weight.device))
        if images is not None:
            places = uploaded(np.flatnonzero(seen), embedded.device)
            embedded.view(-1, embedded.shape[-1]).index_copy_(0, places, images.flatten(0, 1).to(embedded.dtype))
        return embedded

    def restore_frequencies(self, device: torch.device) -> None:
        """Compute the rotary frequencies of the Llama, which are no weights: a model built on `meta` has none."""
        self.llm.model.rotary_emb = LlamaRotaryEmbedding(self.llm.config).to(device)

    @property
    def _dtype(self) -> torch.dtype:
        return self.resampler.proj.dtype

    def _normalised(self, patches: Tensor) -> Tensor:
        """uint8 (n, 3 * patch * patch) as the tower expects it, computed in float32."""
        mean, std = (uploaded(torch.tensor(value), patches.device)[:, None] for value in (self._mean, self._std))
        values = patches.view(len(patches), 3, -1).float() / 255
        return ((values - mean) / std).flatten(1).to(self._dtype)


@lru_cache(maxsize=256)
def line_positions(count: int, per_side: int) -> NDArray[np.int64]:
    """Positions (count,) of patches in the tower's square of `per_side` squared: all in its first row, in order.

    Published code hands the tower each slice as one row of patches, which spreads them over the columns of the first
    row; rows and columns enter with the resampler's own positions. Which column a patch falls into depends on how
    float32 is rounded, so these are the published calls of torch, on the CPU, whatever torch's defaults are.
    """
    cpu: Any = {"dtype": torch.float32, "device": "cpu"}
    step = 1 / torch.tensor(count, **cpu)
    places = torch.arange(0, 1 - 1e-6, step.item(), **cpu)
    bounds = torch.arange(1 / per_side, 1.0, 1 / per_side, **cpu)
    found: NDArray[np.int64] = torch.bucketize(places, bounds, right=True).numpy()
    return found


def _in_chunks(attended: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Places of slices in groups of like length, each of few enough patches."""
    order = np.argsort(attended, kind="stable")[::-1]
    while len(order):
        count = max(1, _PATCHES_AT_ONCE // int(attended[order[0]]))
        yield order[:count].copy()
        order = order[count:]


def _mask(attended: NDArray[np.int64], longest: int, like: Tensor) -> Tensor | None:
    """(slices, 1, 1, longest), additive; None where all attend to all, which is faster."""
    if (attended == longest).all():
        return None
    counts = uploaded(attended, like.device)
    hidden = torch.arange(longest, device=like.device) >= counts[:, None]
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, lowest)[:, None, None]
