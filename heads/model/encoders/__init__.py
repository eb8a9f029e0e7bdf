"""Sequence encoders by name: `xlstm`, `lstm`, `gru`, `mamba2`, `transformer`, `none`, and what else joins `ENCODERS`.

base.py                 the base class, its laws, and the registry
bidirectional.py        both directions from an encoder that only reads forwards
xlstm.py                the published xLSTM stack
xlstm_parts.py          its blocks' parts, as they are computed here
slstm.py                its sLSTM recurrence
slstm_triton.py         the same on a GPU
mlstm.py                its mLSTM, by kernels on a GPU
causal_conv.py          the short convolution of xLSTM and Mamba2
causal_conv_triton.py   the same on a GPU
recurrent.py            torch's LSTM and GRU
mamba2.py               Mamba2
ssd.py                  its scan in chunks
transformer.py          self-attention
identity.py             `none`
gpu_kernels.py           what kernels for GPUs have in common
graphed.py              training steps as CUDA graphs
"""

from agiqa.heads.model.encoders.base import ENCODERS, Encoder, settings_read
from agiqa.heads.model.encoders.bidirectional import BidirectionalEncoder, EitherWay
from agiqa.heads.model.encoders.identity import IdentityEncoder
from agiqa.heads.model.encoders.mamba2 import Mamba2Encoder
from agiqa.heads.model.encoders.recurrent import GRUEncoder, LSTMEncoder
from agiqa.heads.model.encoders.transformer import TransformerEncoder
from agiqa.heads.model.encoders.xlstm import XLSTMEncoder

__all__ = [
    "ENCODERS",
    "BidirectionalEncoder",
    "EitherWay",
    "Encoder",
    "GRUEncoder",
    "IdentityEncoder",
    "LSTMEncoder",
    "Mamba2Encoder",
    "TransformerEncoder",
    "XLSTMEncoder",
    "settings_read",
]
