"""The encoders `lstm` and `gru`: torch's own, which are cuDNN's on a GPU."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders.base import ENCODERS, Encoder
from agiqa.heads.encoders.bidirectional import reversal


class RecurrentEncoder(Encoder):
    """`layers` recurrent layers, causal, or bidirectional with the full width in each direction.

    They have no norm at their input: the scale that they need comes from the projection's calibration.
    """

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
        """The states of the last layer, with zeros in the padding.

        Packed sequences are for cuDNN in both directions only: they need the lengths on the CPU, for which a GPU must
        finish all work before it, and torch's gradient of them on a CPU takes 20 times as long as that of padded ones.
        """
        if not self.rnn.bidirectional:
            states = run_padded(self.rnn, tokens, mask)
        elif tokens.is_cuda:
            states = run_packed(self.rnn, tokens, mask)
        else:
            states = run_both_ways(self.rnn, tokens, mask)
        outputs: Tensor = self.dropout(states)
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


def run_packed(
    rnn: nn.LSTM | nn.GRU, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token out_width"]:
    """The states of the last layer, without computing padding, in either direction."""
    packed = pack_padded_sequence(tokens, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
    states, _ = rnn(packed)
    padded, _ = pad_packed_sequence(states, batch_first=True, total_length=tokens.shape[1])
    return padded


def run_padded(
    rnn: nn.LSTM | nn.GRU, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token out_width"]:
    """The same for a causal `rnn`, which cannot feel the padding: it is computed from zeros and dropped."""
    padding = ~mask[..., None]
    states, _ = rnn(tokens.masked_fill(padding, 0.0))
    kept: Tensor = states.masked_fill(padding, 0.0)
    return kept


def run_both_ways(
    rnn: nn.LSTM | nn.GRU, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token out_width"]:
    """The same for a bidirectional `rnn`, layer by layer, the second direction on the items reversed."""
    padding, order = ~mask[..., None], reversal(mask)
    states = tokens.masked_fill(padding, 0.0)
    for layer in range(rnn.num_layers):
        if layer:
            states = nn.functional.dropout(states, rnn.dropout, rnn.training)
        ahead = _one_way(rnn, states, f"l{layer}")
        back = _one_way(rnn, torch.take_along_dim(states, order, 1), f"l{layer}_reverse")
        states = torch.cat([ahead, torch.take_along_dim(back, order, 1)], dim=-1).masked_fill(padding, 0.0)
    return states


def _one_way(rnn: nn.LSTM | nn.GRU, tokens: Tensor, part: str) -> Tensor:
    """One layer in one direction, from the zero state, with the weights that torch calls `*_part`."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights: list[Tensor] = [rnn.get_parameter(f"{name}_{part}") for name in names]
    start = tokens.new_zeros(1, len(tokens), rnn.hidden_size)
    if isinstance(rnn, nn.LSTM):
        return torch.lstm(tokens, (start, start), weights, True, 1, 0.0, rnn.training, False, True)[0]  # noqa: FBT003
    return torch.gru(tokens, start, weights, True, 1, 0.0, rnn.training, False, True)[0]  # noqa: FBT003
