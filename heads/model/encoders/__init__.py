"""Sequence encoders by name, in `ENCODERS`: `xlstm`, `lstm`, `gru`, `mamba2`, `transformer`, `none`, and your own."""

from agiqa.heads.model.encoders.base import ENCODERS, BidirectionalEncoder, EitherWay, Encoder, IdentityEncoder
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
]
