"""Encoders against torch's own modules, explicit attention and torch.compile, and xlstm against its package."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
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

from agiqa.heads.model.encoders import ENCODERS, BidirectionalEncoder, TransformerEncoder, XLSTMEncoder
from agiqa.heads.model.encoders.recurrent import run_layers
from agiqa.heads.settings.config import HeadConfig

LENGTHS = (7, 3, 5, 1)
WIDTH = 8


def ragged():
    torch.manual_seed(0)
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, dtype=torch.float64)
    return tokens, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


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
    kinds = [mLSTMLayer, sLSTMLayer, mLSTMLayer, mLSTMLayer]
    assert all(isinstance(block.xlstm, kind) for block, kind in zip(ours.stack.blocks, kinds, strict=True))
    assert ours.kernels == (
        "mlstm: torch, in chunks (the kernels need CUDA, not cpu); "
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


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_plain_recurrent_encoders_are_torchs_on_each_item_alone(name, kind, bidirectional):
    tokens, mask = ragged()
    config = HeadConfig(width=WIDTH, layers=2, bidirectional=bidirectional, residual=False)
    ours = ENCODERS.get(name)(config).double()
    theirs = kind(WIDTH, WIDTH, 2, batch_first=True, bidirectional=bidirectional).double()
    theirs.load_state_dict(ours.rnn.state_dict())
    outputs = ours(tokens, mask)
    assert outputs.shape[-1] == ours.out_width == (2 * WIDTH if bidirectional else WIDTH)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(outputs[row, :length], theirs(tokens[row, :length])[0])


@pytest.mark.parametrize("name", ["xlstm", "mamba2"])
def test_a_bidirectional_stack_is_two_stacks_one_on_the_items_reversed(name):
    tokens, mask = ragged()
    both = ENCODERS.get(name)(HeadConfig(width=WIDTH, num_heads=2, blocks=2, bidirectional=True)).double()
    assert isinstance(both, BidirectionalEncoder)
    outputs = both(tokens, mask)
    for row, length in enumerate(LENGTHS):
        item, whole = tokens[row : row + 1, :length], mask[row : row + 1, :length]
        ahead = both.forwards(item, whole)[0]
        back = both.backwards(item.flip(1), whole)[0].flip(0)
        torch.testing.assert_close(outputs[row, :length], torch.cat([ahead, back], dim=1))


def normed(rows, weights, name):
    """Layer norm of each row by its definition."""
    centred = rows - rows.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def positions(length):
    """Sinusoids as the paper writes them, one number at a time."""
    table = torch.empty(length, WIDTH, dtype=torch.float64)
    for step in range(length):
        for pair in range(WIDTH // 2):
            angle = step / 10_000 ** (2 * pair / WIDTH)
            table[step, 2 * pair], table[step, 2 * pair + 1] = math.sin(angle), math.cos(angle)
    return table


def explicit_transformer(rows, weights, *, layers, heads, bidirectional):
    """The encoder on the rows (token, width) of one item: softmax(Q K^T / sqrt d) V, row by row and head by head."""
    rows = rows + positions(len(rows))
    dim = WIDTH // heads
    for layer in range(layers):
        own = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items()}
        query, key, value = (normed(rows, own, "attention_norm") @ own["query_key_value.weight"].T).split(WIDTH, dim=1)
        attended = torch.empty_like(rows)
        for token in range(len(rows)):
            seen = len(rows) if bidirectional else token + 1
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                scores = (key[:seen, part] @ query[token, part] / math.sqrt(dim)).exp()
                attended[token, part] = (scores / scores.sum()) @ value[:seen, part]
        rows = rows + attended @ own["merge.weight"].T + own["merge.bias"]
        inner = normed(rows, own, "feed_forward_norm") @ own["expand.weight"].T + own["expand.bias"]
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        rows = rows + inner @ own["contract.weight"].T + own["contract.bias"]
    return normed(rows, weights, "norm")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_transformer_is_explicit_attention_on_each_item_alone(bidirectional):
    tokens, mask = ragged()
    encoder = TransformerEncoder(HeadConfig(width=WIDTH, layers=2, num_heads=2, bidirectional=bidirectional)).double()
    for parameter in encoder.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    weights = {name: weight.detach() for name, weight in encoder.state_dict().items()}
    outputs = encoder(tokens, mask)
    for row, length in enumerate(LENGTHS):
        item = tokens[row, :length]
        expected = explicit_transformer(item, weights, layers=2, heads=2, bidirectional=bidirectional)
        torch.testing.assert_close(outputs[row, :length], expected)


def test_a_transformer_knows_the_order_and_takes_an_odd_width():
    torch.manual_seed(0)
    encoder = TransformerEncoder(HeadConfig(width=9, num_heads=3, bidirectional=True)).double()
    tokens = torch.randn(1, 6, 9, dtype=torch.float64)
    mask = torch.ones(1, 6, dtype=torch.bool)
    forwards, backwards = encoder(tokens, mask).mean(1), encoder(tokens.flip(1), mask).mean(1)
    assert (forwards - backwards).abs().max() > 1e-3


def test_dropout_acts_in_training_only():
    tokens, mask = ragged()
    for name in ENCODERS:
        config = HeadConfig(width=WIDTH, num_heads=2, blocks=2, layers=2, dropout=0.5)
        encoder = ENCODERS.get(name)(config).double()
        same = torch.equal(encoder(tokens, mask), encoder(tokens, mask))
        assert same == (name == "none"), name
        encoder.eval()
        assert torch.equal(encoder(tokens, mask), encoder(tokens, mask)), name


@pytest.mark.parametrize("name", list(ENCODERS))
def test_dropout_leaves_the_scale_of_what_is_pooled(name):
    """How far evaluation spreads the items where the mean over draws of dropout spreads them by 1.

    A norm takes out what dropout before it adds to the mean square: a transformer that drops its inputs too has 1.48.
    """
    torch.manual_seed(0)
    encoder = ENCODERS.get(name)(HeadConfig(width=32, num_heads=2, blocks=2, dropout=0.5))
    mask = torch.arange(24) < torch.randint(10, 25, (32, 1))
    tokens = (torch.randn(32, 1, 32) + torch.randn(32, 24, 32)) * mask[..., None]
    with torch.no_grad():
        drawn = torch.stack([encoder(tokens, mask).sum(1) / mask.sum(1, keepdim=True) for _ in range(40)]).mean(0)
        encoder.eval()
        evaluated = encoder(tokens, mask).sum(1) / mask.sum(1, keepdim=True)
    apart, reached = drawn - drawn.mean(0), evaluated - evaluated.mean(0)
    assert 0.9 < float((apart * reached).sum() / (apart * apart).sum()) < 1.25


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_layer_by_layer_is_what_torch_does_with_packed_sequences(kind, bidirectional):
    tokens, mask = ragged()
    rnn = kind(WIDTH, WIDTH, 3, batch_first=True, bidirectional=bidirectional).double()
    packed = pack_padded_sequence(tokens, mask.sum(1), batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=tokens.shape[1])
    dirty = tokens.masked_fill(~mask[..., None], math.nan)
    torch.testing.assert_close(run_layers(rnn, dirty, mask), expected)
    weights = torch.randn_like(expected)
    found, wanted = (
        torch.autograd.grad((states * weights).sum(), list(rnn.parameters()))
        for states in (run_layers(rnn, dirty, mask), expected)
    )
    torch.testing.assert_close(found, wanted)


_COMPILE = """
import torch
from agiqa.heads.settings.config import HeadConfig
from agiqa.heads.model.encoders import ENCODERS

for name in ("mamba2", "transformer"):
    encoder = ENCODERS.get(name)(HeadConfig(width=12, layers=2))
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for length in (20, 70):
        tokens = torch.randn(2, length, 12)
        mask = torch.arange(length) < torch.tensor([[length], [9]])
        torch.testing.assert_close(compiled(tokens, mask), encoder(tokens, mask))
    print(name)
"""


def test_mamba2_and_the_transformer_compile_as_one_graph():
    """In a process of its own: the shape checks of the tests cannot be traced."""
    command = [sys.executable, "-W", "error", "-c", _COMPILE]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mamba2", "transformer"]
