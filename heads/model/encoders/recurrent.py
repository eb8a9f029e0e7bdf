"""The encoders `lstm` and `gru`: torch's own, which are cuDNN's on a GPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from agiqa.heads.model.encoders.base import ENCODERS, Encoded, Encoder, Mask, Tokens, reversal
from agiqa.heads.settings.config import HeadConfig


class RecurrentEncoder(Encoder):
    """`layers` recurrent layers, causal, or bidirectional with the full width in each direction.

    With `residual` a layer is `x + dropout(rnn(norm(x)))`, with a LayerNorm, and another norm follows the last layer. A
    bidirectional first layer adds the output of each direction to the tokens. Sums are in the dtype of the weights,
    under autocast too.

    Without `residual` each layer reads the outputs of the layer before, as in the released code. An untrained layer
    shrinks its inputs and adds biases that are the same for every item, so that four layers of LSTM start with nearly
    the same vector for all items.
    """

    graphable = True
    settings = frozenset({"layers", "dropout", "residual"})

    def __init__(self, config: HeadConfig, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        """`kind` is the torch module to build."""
        super().__init__(config.width * (2 if config.bidirectional else 1))
        self.rnn = kind(
            config.width,
            config.width,
            num_layers=config.layers,
            bidirectional=config.bidirectional,
            dropout=config.dropout if config.layers > 1 else 0.0,
            batch_first=True,
        )
        self._dropout = config.dropout
        self.norms: nn.ModuleList | None = None
        if config.residual:
            widths = [config.width, *[self.out_width] * config.layers]
            self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, tokens: Tokens, mask: Mask) -> Encoded:
        """The states behind the last layer, with zeros in the padding."""
        if self.norms is None:
            return dropout(run_layers(self.rnn, tokens, mask), self._dropout, self.training)
        return self._add_layers(self.norms, tokens, mask)

    def _add_layers(self, norms: nn.ModuleList, tokens: Tokens, mask: Mask) -> Encoded:
        """`forward` with `residual`. Both directions read the padding last, so it reaches no real token."""
        padding = ~mask[..., None]
        order = reversal(mask) if self.rnn.bidirectional else None
        states = tokens.masked_fill(padding, 0.0).to(next(self.rnn.parameters()).dtype)
        for layer in range(self.rnn.num_layers):
            added = dropout(_one_layer(self.rnn, norms[layer](states), order, layer), self._dropout, self.training)
            if layer == 0 and order is not None:
                states = torch.cat([states, states], dim=-1)
            states = states + added
        outputs: Tensor = norms[-1](states)
        return outputs.masked_fill(padding, 0.0)


@ENCODERS.register("lstm")
class LSTMEncoder(RecurrentEncoder):
    """Long short-term memory (Hochreiter & Schmidhuber 1997); 4 bidirectional layers in the released code."""

    def __init__(self, config: HeadConfig) -> None:
        """`config` gives width, layers, directions and dropout."""
        super().__init__(config, nn.LSTM)


@ENCODERS.register("gru")
class GRUEncoder(RecurrentEncoder):
    """Gated recurrent units (Cho et al. 2014); 2 bidirectional layers in the released code."""

    def __init__(self, config: HeadConfig) -> None:
        """`config` gives width, layers, directions and dropout."""
        super().__init__(config, nn.GRU)


def run_layers(rnn: nn.LSTM | nn.GRU, tokens: Tokens, mask: Mask) -> Encoded:
    """The states of the last layer of `rnn`, with zeros in the padding: layer by layer, backwards on reversed items.

    Items are not packed, as is usual: packing needs their lengths on the CPU, for which a GPU has to finish all queued
    work, and on a CPU torch takes 20 times as long for gradients of packed items.
    """
    padding = ~mask[..., None]
    order = reversal(mask) if rnn.bidirectional else None
    states = tokens.masked_fill(padding, 0.0)
    for layer in range(rnn.num_layers):
        if layer:
            states = dropout(states, rnn.dropout, rnn.training)
        states = _one_layer(rnn, states, order, layer).masked_fill(padding, 0.0)
    return states


def _one_layer(rnn: nn.LSTM | nn.GRU, tokens: Tokens, order: Tensor | None, layer: int) -> Encoded:
    """The states of one layer; `order` reverses the items for a backward direction, None is forwards only."""
    ahead = _one_way(rnn, tokens, f"l{layer}")
    if order is None:
        return ahead
    back = _one_way(rnn, _reordered(tokens, order), f"l{layer}_reverse")
    return torch.cat([ahead, _reordered(back, order)], dim=-1)


def _reordered(states: Tokens, order: Tensor) -> Tokens:
    return states.gather(1, order.expand_as(states))


def _one_way(rnn: nn.LSTM | nn.GRU, tokens: Tensor, part: str) -> Tensor:
    """One layer in one direction, from the zero state, with the weights that torch calls `*_part`."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights: list[Tensor] = [rnn.get_parameter(f"{name}_{part}") for name in names]
    start = tokens.new_zeros(1, len(tokens), rnn.hidden_size)
    state = (start, start) if isinstance(rnn, nn.LSTM) else start
    run: Any = torch.lstm if isinstance(rnn, nn.LSTM) else torch.gru
    states: Tensor
    if not tokens.is_cuda:
        states, *_ = run(tokens, state, weights, True, 1, 0.0, rnn.training, False, True)  # noqa: FBT003
        return states
    batch, length, _width = tokens.shape
    sizes = torch.full((length,), batch)  # the packed call: for padded float16, cuDNN takes kernels of half the speed
    rows = tokens.transpose(0, 1).flatten(0, 1)
    states, *_ = run(rows, sizes, state, _in_one_piece(weights), True, 1, 0.0, rnn.training, False)  # noqa: FBT003
    return torch.unflatten(states, 0, (length, batch)).transpose(0, 1)


def _in_one_piece(weights: list[Tensor]) -> list[Tensor]:
    """The weights in one block of memory; otherwise cuDNN copies them, and torch warns, at every call."""
    flat = torch.cat([weight.flatten() for weight in weights])
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
