"""The model for inference: the tokens of a batch, and the patches of its slices, are packed without padding.

It computes what `MiniCPMV` computes, from the same weights, and reads less memory: linear maps of one input are one
product, and nothing is padded to the longest item. It has no gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, pad, rms_norm

from agiqa.extract.models.attention import Bounds, attention, runs
from agiqa.extract.models.batches import uploaded
from agiqa.extract.models.compiling import compile_each
from agiqa.extract.models.minicpm.model import MiniCPMV, Resampler, line_positions, position_table
from agiqa.extract.models.minicpm.passes import added, gated, linear_gelu, rotated, signed
from agiqa.store.format.layers import LAST

_PATCHES_AT_ONCE = 1 << 16
"""Bounds the memory of one pass of the vision tower: about 64 slices."""


@dataclass(frozen=True, kw_only=True)
class PackedForm:
    """How weights are laid out. Every form computes the same, with other roundings."""

    head_width: int | None = None
    """Width to which the vision tower's heads are padded with zeros; None for their own."""
    mlp_multiple: int = 128
    """The inner width of the vision tower's MLP is padded with zeros to a multiple of this."""
    fused_gelu: bool = True
    """Whether the vision tower's GELU is computed in the matrix product before it."""


class PackedMiniCPM:
    """The parts of a loaded `MiniCPMV` that make hidden states."""

    def __init__(self, model: MiniCPMV, form: PackedForm | None = None) -> None:
        """Joins weights of `model` in place: they become views of the joined ones, with the same values."""
        form = form or PackedForm()
        with torch.inference_mode(mode=False), torch.no_grad():
            self.decoder_layers = [DecoderLayer(layer) for layer in model.llm.model.layers]
            self.tower_layers = [TowerLayer(layer, form) for layer in model.vpm.encoder.layers]
        self._model = model

    def compile(self) -> None:
        """See `compile_each`: those of the Llama. Compiled layers of the vision tower are slower than these."""
        compile_each(self.decoder_layers)

    def states(
        self, embedded: Tensor, lengths: NDArray[np.int64], layers: Sequence[str] = (LAST,)
    ) -> dict[str, Tensor]:
        """Hidden states (tokens, D) of `layers` of sequences of `lengths`, from the embeddings (tokens, D) of all."""
        decoder = self._model.llm.model
        bounds = Bounds.of(lengths, embedded.device)
        places = uploaded(np.concatenate([np.arange(length) for length in lengths.tolist()]), embedded.device)
        cos, sin = decoder.rotary_emb(embedded, position_ids=places[None])
        cos, sin = cos[0, :, None], signed(sin[0, :, None])
        found = {"0": embedded} if "0" in layers else {}
        states = embedded.clone()  # layers may overwrite their input
        for number, layer in enumerate(self.decoder_layers, start=1):
            if len(found) == len(layers):
                return found
            states = layer(states, cos, sin, bounds.host, bounds.device)
            if str(number) in layers:
                found[str(number)] = states.clone()
        if LAST in layers:
            found[LAST] = _rms_norm(states, decoder.norm)
        return found

    def image_tokens(self, patches: Tensor, sizes: NDArray[np.int64], attended: NDArray[np.int64]) -> Tensor:
        """See `MiniCPMV.image_tokens`."""
        resampler: Resampler = self._model.resampler
        width = resampler.proj.shape[0]
        found = torch.empty(len(sizes), len(resampler.query), width, dtype=resampler.proj.dtype, device=patches.device)
        for chunk in _chunks(sizes, attended):
            states = self._tower(patches, chunk, (LAST,))[LAST]
            found[uploaded(chunk.slices, patches.device)] = _resampled(resampler, states, sizes[chunk.slices])
        return found

    def tower_states(
        self, patches: Tensor, sizes: NDArray[np.int64], attended: NDArray[np.int64], layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """The states (patches, C) of the vision tower's `layers`; the arguments are those of `image_tokens`."""
        chunks = _chunks(sizes, attended)
        found = [self._tower(patches, chunk, layers) for chunk in chunks]
        order = uploaded(np.argsort(np.concatenate([chunk.source for chunk in chunks])), patches.device)
        return {layer: torch.cat([states[layer] for states in found])[order] for layer in layers}

    def _tower(self, patches: Tensor, chunk: "_Chunk", layers: Sequence[str]) -> dict[str, Tensor]:
        """The states (rows, C) of `layers`, of the patches `chunk.source`; `last` comes after the final norm."""
        vision, device = self._model.vpm, patches.device
        rows = int(chunk.attended.sum())
        own = uploaded(chunk.own, device) if len(chunk.own) < rows else None
        values = self._model.normalised(patches[uploaded(chunk.source, device)])
        if own is not None:
            values = values.new_zeros(rows, values.shape[1]).index_copy_(0, own, values)
        places = np.concatenate([line_positions(count, self._model.per_side) for count in chunk.attended.tolist()])
        kernel = vision.embeddings.patch_embedding
        states = linear(values, kernel.weight.flatten(1), kernel.bias)
        states = states + vision.embeddings.position_embedding(uploaded(places, device))
        bounds, found = Bounds.of(chunk.attended, device), dict[str, Tensor]()
        for number, layer in enumerate(self.tower_layers, start=1):
            if len(found) == len(layers):
                return found
            states = layer(states, bounds.host, bounds.device)
            if str(number) in layers:
                found[str(number)] = states if own is None else states[own]
        if LAST in layers:
            normed = vision.post_layernorm(states)
            found[LAST] = normed if own is None else normed[own]
        return found


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Slices that pass through the vision tower together."""

    slices: NDArray[np.int64]
    """Their numbers."""
    attended: NDArray[np.int64]
    """The rows that each attends to, its own patches and blank ones."""
    source: NDArray[np.int64]
    """Their patches, among those of all slices."""
    own: NDArray[np.int64]
    """The rows of these patches."""


def _chunks(sizes: NDArray[np.int64], attended: NDArray[np.int64]) -> list[_Chunk]:
    """All slices, those of one size beside each other, in even groups of about _PATCHES_AT_ONCE patches."""
    counts = sizes.prod(axis=1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    order = np.lexsort((sizes[:, 1], sizes[:, 0], attended))
    found: list[_Chunk] = []
    for slices in np.array_split(order, max(1, -(-int(attended.sum()) // _PATCHES_AT_ONCE))):
        firsts = np.concatenate([[0], np.cumsum(attended[slices])])
        spans = list(zip(counts[slices].tolist(), firsts.tolist(), starts[slices].tolist(), strict=False))
        source = np.concatenate([np.arange(start, start + count) for count, _, start in spans])
        own = np.concatenate([np.arange(first, first + count) for count, first, _ in spans])
        found.append(_Chunk(slices=slices, attended=attended[slices], source=source, own=own))
    return found


class DecoderLayer(nn.Module):
    """A layer of the Llama."""

    def __init__(self, layer: Any) -> None:
        """Joins the weights of `layer` in place."""
        super().__init__()
        attended, mlp = layer.self_attn, layer.mlp
        self.width: int = attended.head_dim
        self.heads = attended.q_proj.out_features // self.width
        self.key_heads = attended.k_proj.out_features // self.width
        self.scale: float = attended.scaling
        self.read = joined_linear(attended.q_proj, attended.k_proj, attended.v_proj)
        self.out = attended.o_proj
        self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.activation = None if mlp.config.hidden_act == "silu" else mlp.act_fn
        self.first_norm, self.second_norm = layer.input_layernorm, layer.post_attention_layernorm

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, host: Tensor, device: Tensor) -> Tensor:
        """(tokens, D) of (tokens, D), which may be overwritten; `cos` and `sin` see `rotated`, others `Bounds`."""
        bounds = Bounds(host=host, device=device)
        read = self.read(_rms_norm(states, self.first_norm)).unflatten(1, (-1, self.width))
        turned = rotated(read, cos, sin, self.heads + self.key_heads)
        queries, keys = turned[:, : self.heads], turned[:, self.heads :]
        values = read[:, self.heads + self.key_heads :]
        seen = attention(queries, keys, values, bounds, bounds, causal=True, scale=self.scale)
        states = added(states, seen.flatten(1), self.out)
        inner = _rms_norm(states, self.second_norm)
        gate, up = self.gate(inner), self.up(inner)
        inner = gated(gate, up) if self.activation is None else self.activation(gate) * up
        return added(states, inner, self.down)


class TowerLayer(nn.Module):
    """A layer of the vision tower."""

    def __init__(self, layer: Any, form: PackedForm) -> None:
        """Joins and pads the weights of `layer` in place, or copies them where `form` pads heads."""
        super().__init__()
        attended, mlp = layer.self_attn, layer.mlp
        self.scale: float = attended.scale
        self.heads: int = attended.num_heads
        self.width: int = form.head_width or attended.head_dim
        self.read = joined_linear(attended.q_proj, attended.k_proj, attended.v_proj)
        self.out, self.inner, self.outer = attended.out_proj, mlp.fc1, mlp.fc2
        if self.width != attended.head_dim:
            self.read = _padded_linear(self.read, rows=(3 * self.heads, attended.head_dim, self.width))
            self.out = _padded_linear(self.out, columns=(self.heads, attended.head_dim, self.width))
        wide = -(-self.inner.out_features // form.mlp_multiple) * form.mlp_multiple
        if wide != self.inner.out_features:
            sizes = (1, self.inner.out_features, wide)
            self.inner, self.outer = _padded_linear(self.inner, rows=sizes), _padded_linear(self.outer, columns=sizes)
            own = mlp.fc1.out_features  # the layer's weights become views: memory holds them once
            mlp.fc1.weight = nn.Parameter(self.inner.weight[:own], requires_grad=False)
            mlp.fc2.weight = nn.Parameter(self.outer.weight[:, :own], requires_grad=False)
        self.activation = mlp.activation_fn
        self.fused_gelu = form.fused_gelu
        self.first_norm, self.second_norm = layer.layer_norm1, layer.layer_norm2

    def forward(self, states: Tensor, host: Tensor, device: Tensor) -> Tensor:
        """(patches, C) of (patches, C); `host` and `device` as in `Bounds`."""
        bounds = Bounds(host=host, device=device)
        read = self.read(_layer_norm(states, self.first_norm)).unflatten(1, (3, self.heads, self.width))
        queries, keys, values = read.unbind(1)
        seen = attention(queries, keys, values, bounds, bounds, causal=False, scale=self.scale)
        states = states + self.out(seen.flatten(1))
        inner = _layer_norm(states, self.second_norm)
        if self.fused_gelu:
            inner = linear_gelu(inner, self.inner.weight, self.inner.bias)
        else:
            inner = self.activation(self.inner(inner))
        summed: Tensor = states + self.outer(inner)
        return summed


def _resampled(resampler: Resampler, patches: Tensor, sizes: NDArray[np.int64]) -> Tensor:
    """`Resampler.forward` of `patches` (patches of all slices, C), without rows behind those of a slice."""
    keys = resampler.ln_kv(resampler.kv_proj(patches))
    counts, width = sizes.prod(axis=1), keys.shape[1]
    placed, first = torch.empty_like(keys), 0
    for many, (rows, columns) in runs([(rows, columns) for rows, columns in sizes.tolist()]):
        stop = first + many * rows * columns
        table = position_table(width, rows, columns, keys.device, keys.dtype)
        parts = (tensor[first:stop].unflatten(0, (many, rows * columns)) for tensor in (keys, placed))
        torch.add(next(parts), table, out=next(parts))
        first = stop
    mixer: Any = resampler.attn
    heads, (query_map, key_map, value_map) = mixer.num_heads, mixer.in_proj_weight.chunk(3)
    query_bias, key_bias, value_bias = mixer.in_proj_bias.chunk(3)
    asked = linear(resampler.ln_q(resampler.query), query_map, query_bias).repeat(len(sizes), 1)
    read = attention(
        asked.unflatten(1, (heads, -1)),
        linear(placed, key_map, key_bias).unflatten(1, (heads, -1)),
        linear(keys, value_map, value_bias).unflatten(1, (heads, -1)),
        Bounds.of(np.full(len(sizes), len(resampler.query)), keys.device),
        Bounds.of(counts, keys.device),
        causal=False,
        scale=(width // heads) ** -0.5,
    )
    tokens = resampler.ln_post(mixer.out_proj(read.flatten(1))) @ resampler.proj
    apart: Tensor = tokens.unflatten(0, (len(sizes), -1))
    return apart


def joined_linear(*maps: Any) -> nn.Linear:
    """One map with the outputs of all `maps` (nn.Linear), whose weights become views of it: memory holds them once."""
    weight = torch.cat([one.weight for one in maps])
    biases = [one.bias for one in maps if one.bias is not None]
    joined = _linear(weight, torch.cat(biases) if biases else None)
    rows = [one.out_features for one in maps]
    for one, part in zip(maps, joined.weight.detach().split(rows), strict=True):
        one.weight = nn.Parameter(part, requires_grad=False)
    return joined


def _padded_linear(
    one: Any, *, rows: tuple[int, int, int] | None = None, columns: tuple[int, int, int] | None = None
) -> nn.Linear:
    """The nn.Linear `one`, its outputs (`rows`) or inputs (`columns`), (groups, width, new width), padded by zeros."""
    weight, bias = one.weight.detach(), None if one.bias is None else one.bias.detach()
    if rows is not None:
        groups, width, wide = rows
        weight = pad(weight.unflatten(0, (groups, width)), (0, 0, 0, wide - width)).flatten(0, 1)
        bias = None if bias is None else pad(bias.unflatten(0, (groups, width)), (0, wide - width)).flatten()
    if columns is not None:
        groups, width, wide = columns
        weight = pad(weight.unflatten(1, (groups, width)), (0, wide - width)).flatten(1)
    return _linear(weight, bias)


class _EmptyLinear(nn.Linear):
    """For weights that come from others; random ones would cost milliseconds each."""

    def reset_parameters(self) -> None:
        """Nothing."""


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = _EmptyLinear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def _rms_norm(states: Tensor, norm: Any) -> Tensor:
    return rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _layer_norm(states: Tensor, norm: nn.LayerNorm) -> Tensor:
    return layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
