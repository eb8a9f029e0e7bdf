"""The encoder `gru`: torch's GRU over packed sequences, so that padding is never computed."""

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from agiqa.errors import ConfigError
from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders.base import ENCODERS, Encoder


@ENCODERS.register("gru")
class GRUEncoder(Encoder):
    """`layers` GRU layers, causal, or bidirectional with half of the width in each direction.

    A GRU has no norm at its input: the scale that it needs comes from the projection's calibration.
    """

    def __init__(self, config: HeadConfig) -> None:
        """Raises ConfigError when a bidirectional GRU cannot halve the width."""
        super().__init__()
        directions = 2 if config.bidirectional else 1
        if config.width % directions:
            message = f"A bidirectional GRU needs an even width, not {config.width}."
            raise ConfigError(message)
        self.gru = nn.GRU(
            config.width,
            config.width // directions,
            num_layers=config.layers,
            bidirectional=config.bidirectional,
            dropout=config.dropout if config.layers > 1 else 0.0,
            batch_first=True,
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token width"]:
        """The states of the last layer, with zeros in the padding."""
        packed = pack_padded_sequence(tokens, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = self.gru(packed)
        padded, _ = pad_packed_sequence(states, batch_first=True, total_length=tokens.shape[1])
        outputs: Tensor = self.dropout(padded)
        return outputs
