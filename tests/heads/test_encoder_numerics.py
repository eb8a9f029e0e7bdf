"""Encoders against their libraries' own modules with the same weights."""

import torch
from torch import nn
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
)
from xlstm.blocks.mlstm.layer import mLSTMLayer
from xlstm.blocks.slstm.layer import sLSTMLayer

from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders import GRUEncoder, XLSTMEncoder


def published_stack(length: int) -> xLSTMBlockStack:
    """The stack of the released settings at width 16, written out anew, for sequences of one length."""
    slstm = sLSTMLayerConfig(backend="vanilla", num_heads=4, conv1d_kernel_size=4, bias_init="powerlaw_blockdependent")
    return xLSTMBlockStack(
        xLSTMBlockStackConfig(
            mlstm_block=mLSTMBlockConfig(
                mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4)
            ),
            slstm_block=sLSTMBlockConfig(slstm=slstm, feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu")),
            context_length=length,
            num_blocks=4,
            embedding_dim=16,
            slstm_at=[1],
        )
    )


def test_xlstm_is_the_published_stack():
    theirs = published_stack(11).double()
    ours = XLSTMEncoder(HeadConfig(width=16)).double()
    ours.stack.load_state_dict(theirs.state_dict())
    tokens = torch.randn(3, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(tokens, torch.ones(3, 11, dtype=torch.bool)), theirs(tokens))
    kinds = [type(block.xlstm) for block in ours.stack.blocks]
    assert kinds == [mLSTMLayer, sLSTMLayer, mLSTMLayer, mLSTMLayer]
    assert ours.kernels == (
        "mlstm: torch's parallel form (the kernels need CUDA, not cpu); "
        "slstm: loops over the steps (the kernels need CUDA, not cpu)"
    )


def test_xlstm_reads_past_its_first_context_and_stays_causal():
    theirs = published_stack(600)
    ours = XLSTMEncoder(HeadConfig(width=16)).eval()
    ours.stack.load_state_dict(theirs.state_dict())
    tokens = torch.randn(1, 600, 16)
    with torch.no_grad():
        outputs = ours(tokens, torch.ones(1, 600, dtype=torch.bool))
        torch.testing.assert_close(outputs, theirs(tokens))
        short = ours(tokens[:, :520], torch.ones(1, 520, dtype=torch.bool))
    torch.testing.assert_close(outputs[:, :520], short, rtol=1e-4, atol=1e-5)


def test_gru_is_torchs_gru_on_each_item_alone():
    torch.manual_seed(0)
    lengths = (7, 3, 5)
    tokens = torch.randn(3, 7, 8, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    for bidirectional in (False, True):
        ours = GRUEncoder(HeadConfig(width=8, layers=2, bidirectional=bidirectional)).double()
        theirs = nn.GRU(8, 4 if bidirectional else 8, 2, batch_first=True, bidirectional=bidirectional).double()
        theirs.load_state_dict(ours.gru.state_dict())
        outputs = ours(tokens, mask)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(outputs[row, :length], theirs(tokens[row, :length])[0])
