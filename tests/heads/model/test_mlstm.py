"""The mLSTM in chunks against the parallel form of the xlstm package."""

import pytest
import torch
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple

from agiqa.heads.model.encoders.mlstm import mlstm_in_torch


def both(tokens, dim, *, entry=1.0, forget=2.0, seed=0):
    """Hidden states and all gradients of a random projection of them: ours, and the package's."""
    torch.manual_seed(seed)
    rows = [torch.randn(2, 3, tokens, dim, dtype=torch.float64) for _ in range(3)]
    gates = [entry * torch.randn(2, 3, tokens, 1).double(), forget + torch.randn(2, 3, tokens, 1).double()]
    given = [part.requires_grad_() for part in (*rows, *gates)]
    weights = torch.randn(2, 3, tokens, dim, dtype=torch.float64)
    found = []
    for function in (mlstm_in_torch, parallel_stabilized_simple):
        hidden = function(*given)
        found.append((hidden, *torch.autograd.grad((hidden * weights).sum(), given)))
    return found


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 128, 129, 477])
def test_values_and_gradients_are_those_of_the_parallel_form(tokens):
    for one, other in zip(*both(tokens, 8), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("entry", "forget"), [(30.0, 2.0), (1.0, -20.0), (1.0, 30.0), (0.0, 0.0), (200.0, 0.0)])
def test_extreme_gates(entry, forget):
    """Entries that outweigh all earlier ones by e^100, a memory that forgets everything, and one that keeps it."""
    for one, other in zip(*both(200, 8, entry=entry, forget=forget), strict=True):
        assert one.isfinite().all()
        largest = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-7 * largest)  # sums of 200 gates of -20 round so


def test_later_tokens_do_not_reach_earlier_ones():
    torch.manual_seed(1)
    given = [torch.randn(1, 2, 200, size, requires_grad=True) for size in (8, 8, 8, 1, 1)]
    mlstm_in_torch(*given)[:, :, 130].sum().backward()
    assert all(part.grad[:, :, 131:].abs().max() == 0 for part in given)
    for part in given[1:]:  # keys, values and gates of the same chunk, and of those before
        assert part.grad[:, :, 128:130].abs().max() > 0
        assert part.grad[:, :, :64].abs().max() > 0
