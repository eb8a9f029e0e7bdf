"""The encoders `lstm` and `gru`: torch's own, which are cuDNN's on a GPU."""

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders.base import ENCODERS, Encoder


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

        Packing needs the lengths on the CPU, for which a GPU must finish all work before it. Forwards on a GPU the
        padding is therefore computed and dropped; a causal layer cannot feel it.
        """
        padded = tokens.is_cuda and not self.rnn.bidirectional
        states = run_padded(self.rnn, tokens, mask) if padded else run_packed(self.rnn, tokens, mask)
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
    """The same for a causal `rnn`, padding computed from zeros and dropped; the device is never waited for."""
    padding = ~mask[..., None]
    states, _ = rnn(tokens.masked_fill(padding, 0.0))
    kept: Tensor = states.masked_fill(padding, 0.0)
    return kept
