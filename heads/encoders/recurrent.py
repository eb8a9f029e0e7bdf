"""The encoders `lstm` and `gru`: torch's own, which are cuDNN's on a GPU."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders.base import ENCODERS, Encoder
from agiqa.heads.encoders.bidirectional import reversal


class RecurrentEncoder(Encoder):
    """`layers` recurrent layers, causal, or bidirectional with the full width in each direction.

    They have no norm at their input: the scale that they need comes from the projection's calibration.
    """

    graphable = True
    reads = frozenset({"layers", "dropout"})

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
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token out_width"]:
        """The states of the last layer, with zeros in the padding."""
        outputs: Tensor = self.dropout(run_layers(self.rnn, tokens, mask))
        return outputs


@ENCODERS.register("lstm")
class LSTMEncoder(RecurrentEncoder):
    """Long short-term memory (Hochreiter & Schmidhuber 1997); published with 4 layers in both directions."""

    def __init__(self, config: HeadConfig) -> None:
        """`config` gives width, layers, directions and dropout."""
        super().__init__(config, nn.LSTM)


@ENCODERS.register("gru")
class GRUEncoder(RecurrentEncoder):
    """Gated recurrent units (Cho et al. 2014); published with 2 layers in both directions."""

    def __init__(self, config: HeadConfig) -> None:
        """`config` gives width, layers, directions and dropout."""
        super().__init__(config, nn.GRU)


def run_layers(
    rnn: nn.LSTM | nn.GRU, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token out_width"]:
    """The states of the last layer of `rnn`, with zeros in the padding: layer by layer, backwards on reversed items.

    Packing the items would be the usual way. That needs their lengths on the CPU, for which a GPU must finish all work
    before it, and torch's gradient of them on a CPU takes 20 times as long as that of padded ones.
    """
    padding = ~mask[..., None]
    order = reversal(mask) if rnn.bidirectional else None
    states = tokens.masked_fill(padding, 0.0)
    for layer in range(rnn.num_layers):
        if layer:
            states = nn.functional.dropout(states, rnn.dropout, rnn.training)
        ahead = _one_way(rnn, states, f"l{layer}")
        if order is not None:
            back = _one_way(rnn, _reordered(states, order), f"l{layer}_reverse")
            ahead = torch.cat([ahead, _reordered(back, order)], dim=-1)
        states = ahead.masked_fill(padding, 0.0)
    return states


def _reordered(states: Float[Tensor, "batch token width"], order: Tensor) -> Float[Tensor, "batch token width"]:
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
    sizes = torch.full((length,), batch)  # called packed, or cuDNN takes kernels with half the speed in float16
    rows = tokens.transpose(0, 1).flatten(0, 1)
    states, *_ = run(rows, sizes, state, _in_one_piece(weights), True, 1, 0.0, rnn.training, False)  # noqa: FBT003
    return torch.unflatten(states, 0, (length, batch)).transpose(0, 1)


def _in_one_piece(weights: list[Tensor]) -> list[Tensor]:
    """The same in one block of memory: cuDNN copies weights that are not, and torch warns of it at every call."""
    flat = torch.cat([weight.flatten() for weight in weights])
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
