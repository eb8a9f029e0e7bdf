"""Training steps of an encoder as CUDA graphs.

A step of an encoder is hundreds of kernels of some microseconds each, and the CPU takes longer to queue them than the
GPU to compute them. A graph queues a whole pass at once. It has one shape, so batches are padded to one of few lengths,
which does not change results: padding is invisible to every encoder.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from agiqa.cuda import garbage_waits
from agiqa.heads.model.encoders.base import Encoded, Encoder, Mask, Tokens
from agiqa.heads.model.encoders.kernels.dispatch import exclude_from_compiling, product_dtype
from agiqa.heads.settings.config import TrainConfig

_LENGTHS_PER_OCTAVE = 8
_SHORTEST = 16
_WARM_UPS = 1
"""Passes before a capture, in which kernels are loaded and libraries take their memory."""


def training_pass(encoder: Encoder, config: TrainConfig, device: torch.device) -> "GraphedEncoder | None":
    """What to call instead of `encoder` in training steps; None is the encoder itself.

    On a GPU the setting `compile` compiles the encoder's blocks in place; a deep copy of the encoder has plain blocks.
    """
    if device.type != "cuda":
        return None
    if config.compile:
        exclude_from_compiling()
        torch.compiler.reset()  # it compiles eight variants of a function at most, and earlier heads count
        for block in encoder.compiled_blocks:
            block.compile(dynamic=True)
    return GraphedEncoder(encoder, config.batch_size) if config.cuda_graphs and encoder.graphable else None


def training_kernels(encoder: Encoder, config: TrainConfig, device: torch.device) -> str:
    """The kernels that compute the training steps of `encoder`, in words."""
    parts = [encoder.kernels]
    if device.type == "cuda":
        parts += ["torch.compile"] * (config.compile and any(True for _ in encoder.compiled_blocks))
        parts += ["CUDA graphs"] * (config.cuda_graphs and encoder.graphable)
    return "; ".join(parts)


class GraphedEncoder:
    """Calls `encoder`, and replays passes with gradients from a graph for each length and precision.

    Smaller batches are filled up with items of one zero token. Whether a pass is replayed depends on its shape alone,
    not on earlier passes, so that a training resumed after a kill computes the same. Each pass must be followed by its
    backward pass before the next.
    """

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        """`encoder` must be on a CUDA device, in training mode and `graphable`; larger batches run as usual."""
        self._encoder = encoder
        self._batch_size = batch_size
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, torch.dtype, torch.dtype], nn.Module] = {}

    def __call__(self, tokens: Tokens, mask: Mask) -> Encoded:
        """As the encoder's."""
        batch, length = mask.shape
        if batch > self._batch_size or not (torch.is_grad_enabled() and tokens.requires_grad):
            outputs: Tensor = self._encoder(tokens, mask)
            return outputs
        longer = graph_length(length)
        more = (0, longer - length, 0, self._batch_size - batch)
        tokens, mask = pad(tokens, (0, 0, *more)), pad(mask, more)
        mask[batch:, 0] = True
        key = (longer, tokens.dtype, product_dtype(tokens))
        if key not in self._graphs:
            self._graphs[key] = self.capture(tokens, mask)
        replayed: Tensor = self._graphs[key](tokens, mask)
        return replayed[:batch, :length]

    def capture(self, tokens: Tensor, mask: Tensor) -> nn.Module:
        """Graphs of this shape, in memory that all shapes share. The random state stays as it was."""
        examples = tokens.detach().clone().requires_grad_(), mask.clone()
        dtype, mixed = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        random = torch.cuda.get_rng_state(tokens.device)
        _expect_streams_to_differ()
        with torch.autocast("cuda", dtype=dtype, enabled=mixed, cache_enabled=False), garbage_waits():
            graphed = torch.cuda.make_graphed_callables(
                _Pass(self._encoder), examples, num_warmup_iters=_WARM_UPS, pool=self._pool
            )
        torch.cuda.set_rng_state(random, tokens.device)
        return cast("nn.Module", graphed)


def _expect_streams_to_differ() -> None:
    """Silence a warning of newer torch: parameters remember the stream of the capture in later backward passes.

    The gradients are right, as autograd makes one stream wait for the other.
    """
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn is not None:
        warn(enabled=False)


class _Pass(nn.Module):
    """Wraps the encoder, since torch replaces the `forward` of the module that it captures."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        outputs: Tensor = self.encoder(tokens, mask)
        return outputs


def graph_length(length: int) -> int:
    """`length` rounded up to one of eight lengths between a power of two and the next."""
    if length <= _SHORTEST:
        return _SHORTEST
    step = (1 << math.ceil(math.log2(length))) // (2 * _LENGTHS_PER_OCTAVE)
    return -(-length // step) * step
