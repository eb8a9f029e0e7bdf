"""Sequence encoders by name: `xlstm`, `gru`, `none`, and whatever else joins `ENCODERS`.

base.py      the base class, its laws, and the registry
xlstm.py     the published xLSTM stack
gru.py       torch's GRU
identity.py  `none`
"""

from agiqa.heads.encoders.base import ENCODERS, Encoder
from agiqa.heads.encoders.gru import GRUEncoder
from agiqa.heads.encoders.identity import IdentityEncoder
from agiqa.heads.encoders.xlstm import XLSTMEncoder

__all__ = ["ENCODERS", "Encoder", "GRUEncoder", "IdentityEncoder", "XLSTMEncoder"]
