"""Attention over packed sequences, against softmax written out for each sequence."""

import numpy as np
import pytest
import torch

from agiqa.extract.models.attention import Bounds, attention

CPU = torch.device("cpu")


def softmax_of(query, key, value, *, causal, scale):
    """(tokens, heads, width) of one sequence, in float64, head by head."""
    heads = []
    for head in range(query.shape[1]):
        read = head * key.shape[1] // query.shape[1]
        scores = query[:, head].double() @ key[:, read].double().T * scale
        if causal:
            scores.masked_fill_(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ value[:, read].double())
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize(
    ("lengths", "key_lengths", "causal", "key_heads"),
    [
        ([5], [5], True, 2),
        ([3, 3, 3], [3, 3, 3], True, 4),
        ([3, 7, 7, 1, 4, 9, 2], [3, 7, 7, 1, 4, 9, 2], True, 2),
        ([4, 4, 4], [6, 6, 9], False, 4),
        ([1, 1], [1, 8], False, 4),
    ],
)
def test_every_sequence_reads_its_own_keys(lengths, key_lengths, causal, key_heads):
    random = torch.Generator().manual_seed(0)
    joint = torch.randn(sum(lengths), 3, 4, 16, generator=random)
    query = joint[:, 0]  # not contiguous, as slices of a joined product are
    keys = torch.randn(sum(key_lengths), 2, key_heads, 16, generator=random)
    bounds = [Bounds.of(np.array(counts), CPU) for counts in (lengths, key_lengths)]
    found = attention(query, keys[:, 0], keys[:, 1], *bounds, causal=causal, scale=0.3)
    parts = zip(query.split(lengths), keys.split(key_lengths), strict=True)
    expected = torch.cat([softmax_of(q, k[:, 0], k[:, 1], causal=causal, scale=0.3) for q, k in parts])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_compiler_knows_the_shape_of_the_answer():
    query, key = torch.randn(7, 4, 16), torch.randn(9, 2, 16)
    ends = [Bounds.of(np.array(counts), CPU) for counts in ([3, 4], [4, 5])]
    arguments = (query, key, key, ends[0].host, ends[1].host, ends[0].device, ends[1].device, False, 0.25)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.agiqa.attend.default, arguments, test_utils=tests)
