"""The model: its configuration, a vision tower over patches, the resampler, and a Llama that reads both.

transformers' modelling code is imported where a model is built: worker processes need the configuration alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig

from agiqa.errors import ModelError
from agiqa.extract.models.batches import uploaded
from agiqa.extract.models.checkpoints import Checkpoint

MODEL_TYPE = "minicpmv"
VERSION = "2.5"
PREPROCESSOR = "preprocessor_config.json"
_LANGUAGE = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)
"""Entries of config.json that describe the Llama."""
_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}
_VISION = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")
_PATCHES_AT_ONCE = 1 << 16
"""Bounds the memory of one pass of the vision tower: about 64 slices."""
_HEAD_WIDTH = 128
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class MiniCPMConfig:
    """The sizes of the model, and how it cuts images."""

    language: Mapping[str, Any]
    """Arguments of transformers' LlamaConfig."""
    vision: Mapping[str, Any]
    """Arguments of transformers' Idefics2VisionConfig."""
    queries: int
    """Tokens that stand for one slice."""
    slices: int
    """Most slices of one image, without the overview; 1 leaves images whole."""
    resolution: int
    """A slice has about this many pixels, squared."""
    patch: int
    """Side of a patch, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    marks: Mapping[str, str]
    """The tokens im_start, im_end, slice_start, slice_end and unk."""
    dtype: str | None
    """Of the published weights."""
    model_type: ClassVar[str] = MODEL_TYPE

    def get_text_config(self) -> Any:
        """transformers' configuration of the Llama; its own composite configurations call it so too."""
        return transformers.LlamaConfig(**self.language, **_ATTENTION)

    def get_vision_config(self) -> Any:
        """transformers' configuration of the vision tower."""
        return Idefics2VisionConfig(**self.vision, **_ATTENTION)


def read_config(checkpoint: Checkpoint) -> MiniCPMConfig:
    """The configuration of `checkpoint`. Raises ModelError for another version or a missing entry."""
    raw = checkpoint.raw_config
    version = str(raw.get("version", "unknown"))
    if version != VERSION:
        message = (
            f"{checkpoint.name}: MiniCPM-V of version {version}; of those that need remote code, agiqa implements "
            f"{VERSION} only (MiniCPM-Llama3-V-2.5, the base of the published M3-AGIQA adapters)."
        )
        raise ModelError(message)
    images = checkpoint.read_settings(PREPROCESSOR, "what says how images are cut")
    try:
        vision = {name: raw["vision_config"][name] for name in _VISION}
        vision["num_hidden_layers"] -= bool(raw.get("drop_vision_last_layer", False))
        return MiniCPMConfig(
            language={name: raw[name] for name in _LANGUAGE if name in raw},
            vision=vision,
            queries=int(raw["query_num"]),
            slices=int(images["max_slice_nums"]) if raw.get("slice_mode", True) else 1,
            resolution=int(images["scale_resolution"]),
            patch=int(images["patch_size"]),
            mean=tuple(images["norm_mean"]),
            std=tuple(images["norm_std"]),
            marks={name: images[name] for name in ("im_start", "im_end", "slice_start", "slice_end", "unk")},
            dtype=raw.get("torch_dtype"),
        )
    except (KeyError, TypeError, ValueError) as error:
        message = f"{checkpoint.name}: config.json or {PREPROCESSOR} in {checkpoint.folder} lacks {error}."
        raise ModelError(message) from error


class MiniCPMV(nn.Module):
    """`llm`, `vpm` and `resampler`, with the parameter names of the published checkpoint."""

    _supports_sdpa = True

    def __init__(self, config: MiniCPMConfig) -> None:
        """Random weights; on the meta device none."""
        from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

        super().__init__()
        language, vision = config.get_text_config(), config.get_vision_config()
        self.llm = transformers.LlamaForCausalLM(language)
        self.vpm: Any = Idefics2VisionTransformer(vision)
        self.resampler = Resampler(queries=config.queries, width=language.hidden_size, vision_width=vision.hidden_size)
        self._mean, self._std = config.mean, config.std
        self.per_side: int = vision.image_size // vision.patch_size

    def image_tokens(self, patches: Tensor, sizes: NDArray[np.int64], attended: NDArray[np.int64]) -> Tensor:
        """The embeddings of slices for the language model, (slices, queries, hidden size).

        `patches` (patches of all slices, 3 * patch * patch) are uint8, `sizes` (slices, [rows, columns]) count them.
        The published code pads the slices of one image to the longest and does not mask the padding: a slice attends to
        its own patches and to blank ones, `attended` (slices,) in all.
        """
        starts = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))])
        width = self.resampler.proj.shape[0]
        found = torch.empty(len(sizes), len(self.resampler.query), width, dtype=self._dtype, device=patches.device)
        for chosen in _in_chunks(attended):
            pieces = [patches[starts[place] : starts[place + 1]] for place in chosen]
            found[uploaded(chosen, patches.device)] = self.chunk_tokens(pieces, sizes[chosen], attended[chosen])
        return found

    def chunk_tokens(self, pieces: list[Tensor], sizes: NDArray[np.int64], attended: NDArray[np.int64]) -> Tensor:
        values = self.normalised(torch.cat(pieces)).split([len(piece) for piece in pieces])
        padded = nn.utils.rnn.pad_sequence(list(values), batch_first=True)
        longest = int(attended.max())
        padded = nn.functional.pad(padded, (0, 0, 0, longest - padded.shape[1]))
        kernel = self.vpm.embeddings.patch_embedding
        positions = np.zeros((len(sizes), longest), np.int64)
        for row, count in enumerate(attended.tolist()):
            positions[row, :count] = line_positions(count, self.per_side)
        embedded = linear(padded, kernel.weight.flatten(1), kernel.bias)
        embedded = embedded + self.vpm.embeddings.position_embedding(uploaded(positions, padded.device))
        states = self.vpm.encoder(inputs_embeds=embedded, attention_mask=_mask(attended, longest, padded))
        tokens: Tensor = self.resampler(self.vpm.post_layernorm(states.last_hidden_state), sizes)
        return tokens

    def embed(self, token_ids: NDArray[np.int64], seen: NDArray[np.bool_], images: Tensor | None) -> Tensor:
        """Embeddings (batch, tokens, D) of `token_ids`; `images`, in order, at the places of `seen` (batch, tokens)."""
        table: Any = self.llm.get_input_embeddings()
        embedded: Tensor = table(uploaded(token_ids, table.weight.device))
        if images is not None:
            places = uploaded(np.flatnonzero(seen), embedded.device)
            embedded.view(-1, embedded.shape[-1]).index_copy_(0, places, images.flatten(0, 1).to(embedded.dtype))
        return embedded

    def restore_frequencies(self, device: torch.device) -> None:
        """Compute the rotary frequencies of the Llama, which no file holds, after the model was built on `meta`."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.llm.model.rotary_emb = LlamaRotaryEmbedding(self.llm.config).to(device)

    @property
    def _dtype(self) -> torch.dtype:
        """What the model computes with: training changes other weights only, and keeps those in float32."""
        dtype: torch.dtype = self.llm.lm_head.weight.dtype
        return dtype

    def normalised(self, patches: Tensor) -> Tensor:
        """uint8 (n, 3 * patch * patch) as the tower expects it, computed in float32."""
        mean, std = (uploaded(torch.tensor(value), patches.device)[:, None] for value in (self._mean, self._std))
        values = patches.view(len(patches), 3, -1).float() / 255
        return ((values - mean) / std).flatten(1).to(self._dtype)


class Resampler(nn.Module):
    """Learned queries that read the patches of a slice: cross-attention with positions in two dimensions."""

    def __init__(self, *, queries: int, width: int, vision_width: int) -> None:
        """`width` is the language model's hidden size."""
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False) if vision_width != width else nn.Identity()
        self.attn = nn.MultiheadAttention(width, width // _HEAD_WIDTH)
        self.ln_q = nn.LayerNorm(width, eps=_EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=_EPSILON)
        self.ln_post = nn.LayerNorm(width, eps=_EPSILON)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, patches: Tensor, sizes: NDArray[np.int64]) -> Tensor:
        """(slices, queries, width) of `patches` (slices, longest, vision width); `sizes` is (slices, [rows, columns]).

        Patches behind the rows x columns of a slice are masked.
        """
        counts = uploaded(sizes.prod(axis=1), patches.device)
        longest = int(sizes.prod(axis=1).max())
        keys = self.ln_kv(self.kv_proj(patches[:, :longest]))
        positions = self._positions(sizes, longest, keys)
        hidden = torch.arange(longest, device=patches.device) >= counts[:, None]
        queries = self.ln_q(self.query)[:, None].expand(-1, len(patches), -1)
        values = keys.transpose(0, 1)
        read, _ = self.attn(
            queries, values + positions.transpose(0, 1), values, key_padding_mask=hidden, need_weights=False
        )
        tokens: Tensor = self.ln_post(read.transpose(0, 1)) @ self.proj
        return tokens

    def _positions(self, sizes: NDArray[np.int64], longest: int, like: Tensor) -> Tensor:
        """(slices, longest, width) in the dtype and on the device of `like`; zeros behind the patches of a slice."""
        found, width = like.new_zeros(len(sizes), longest, like.shape[-1]), like.shape[-1]
        for rows, columns in {tuple(size) for size in sizes.tolist()}:
            table = position_table(width, rows, columns, like.device, like.dtype)
            places = uploaded(np.flatnonzero((sizes == (rows, columns)).all(axis=1)), like.device)
            found[places, : len(table)] = table
        return found


@lru_cache(maxsize=64)
def position_table(width: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`sine_positions` on a device; at most about 9 MB each."""
    return sine_positions(width, rows, columns).to(device, dtype)


def sine_positions(width: int, rows: int, columns: int) -> Tensor:
    """(rows * columns, width): sines and cosines of the column in the first half, of the row in the second."""
    column, row = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32))
    halves = [_sines(width // 2, place.reshape(-1)) for place in (column, row)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


def _sines(width: int, places: NDArray[np.float32]) -> NDArray[np.float32]:
    rates = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float32) / (width / 2.0))
    angles = np.outer(places, rates)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


@lru_cache(maxsize=256)
def line_positions(count: int, per_side: int) -> NDArray[np.int64]:
    """Positions (count,) of patches in the tower's grid of `per_side` x `per_side`: all in its first row, in order.

    The published code passes each slice to the tower as one row of patches, spread over the columns of the first row;
    only the resampler's positions know rows and columns. The rounding of float32 decides about the column of a patch,
    so these are the published calls of torch, on the CPU, whatever torch's defaults are.
    """
    cpu: Any = {"dtype": torch.float32, "device": "cpu"}
    step = 1 / torch.tensor(count, **cpu)
    places = torch.arange(0, 1 - 1e-6, step.item(), **cpu)
    bounds = torch.arange(1 / per_side, 1.0, 1 / per_side, **cpu)
    found: NDArray[np.int64] = torch.bucketize(places, bounds, right=True).numpy()
    return found


def _in_chunks(attended: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Positions of slices, longest first, in groups of at most about _PATCHES_AT_ONCE patches."""
    order = np.argsort(attended, kind="stable")[::-1]
    while len(order):
        count = max(1, _PATCHES_AT_ONCE // int(attended[order[0]]))
        yield order[:count].copy()
        order = order[count:]


def _mask(attended: NDArray[np.int64], longest: int, like: Tensor) -> Tensor | None:
    """(slices, 1, 1, longest), additive; None, which is faster, if all attend to all."""
    if (attended == longest).all():
        return None
    counts = uploaded(attended, like.device)
    hidden = torch.arange(longest, device=like.device) >= counts[:, None]
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, lowest)[:, None, None]
