"""The explicit sLSTM against the package's own cell and autograd, and against finite differences."""

import pytest
import torch
from xlstm import xLSTMBlockStack
from xlstm.blocks.slstm.cell import sLSTMCell_vanilla, sLSTMCellConfig

from agiqa.heads.model.encoders import XLSTMEncoder
from agiqa.heads.model.encoders.slstm import slstm
from agiqa.heads.model.encoders.xlstm import SLSTMCell, stack_config
from agiqa.heads.settings.config import HeadConfig

HEADS, DIM, BATCH = 2, 3, 4


def twin_cells(scale=1.0):
    """Our cell and the package's, with the same random recurrent weights and biases, in float64."""
    torch.manual_seed(3)
    config = {"hidden_size": HEADS * DIM, "num_heads": HEADS, "backend": "vanilla"}
    ours, theirs = SLSTMCell(sLSTMCellConfig(**config)).double(), sLSTMCell_vanilla(sLSTMCellConfig(**config)).double()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def values_and_gradients(module, tokens, call):
    """The output, and the gradients of a fixed random projection of it: of the input and of every parameter."""
    tokens = tokens.clone().requires_grad_()
    output = call(module, tokens)
    torch.manual_seed(5)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad((output * torch.randn(output.shape)).sum(), [tokens, *parameters])
    return dict(zip(("output", "input", *names), (output.detach(), *gradients), strict=True))


def assert_all_close(ours, theirs, rtol=1e-9):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        atol = rtol * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_the_stack_and_its_gradients_are_the_packages(length):
    torch.manual_seed(0)
    config = HeadConfig(width=16, num_heads=4, dropout=0.0)
    ours, theirs = XLSTMEncoder(config).double(), xLSTMBlockStack(stack_config(config)).double()
    for parameter in ours.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    theirs.load_state_dict(ours.stack.state_dict())
    tokens, mask = torch.randn(3, length, 16, dtype=torch.float64), torch.ones(3, length, dtype=torch.bool)
    mine = values_and_gradients(ours, tokens, lambda module, x: module(x, mask))
    mine = {name.removeprefix("stack."): value for name, value in mine.items()}
    assert_all_close(mine, values_and_gradients(theirs, tokens, lambda module, x: module(x)))


def test_the_stack_starts_from_the_packages_weights():
    config = HeadConfig(width=16)
    torch.manual_seed(0)
    ours = XLSTMEncoder(config).stack.state_dict()
    torch.manual_seed(0)
    theirs = xLSTMBlockStack(stack_config(config)).state_dict()
    assert list(ours) == list(theirs)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1.0, 50.0])
def test_the_cell_agrees_at_any_gate_size(size):
    ours, theirs = twin_cells()
    tokens = size * (2 * torch.rand(BATCH, 30, 4 * HEADS * DIM, dtype=torch.float64) - 1)
    mine, package = (values_and_gradients(cell, tokens, lambda cell, x: cell(x)[0]) for cell in (ours, theirs))
    assert all(value.isfinite().all() for value in mine.values())
    assert_all_close(mine, package)


@pytest.mark.parametrize("size", [-1e4, -50.0, 50.0, 1e4])
def test_one_sided_gates_stay_finite_in_float32(size):
    ours, _ = twin_cells()
    tokens = torch.full((BATCH, 30, 4 * HEADS * DIM), size)
    result = values_and_gradients(ours.float(), tokens, lambda cell, x: cell(x)[0])
    assert all(value.isfinite().all() for value in result.values())


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    shapes = (3, 2, 4, HEADS, DIM), (HEADS, 4, DIM, DIM), (4, HEADS, DIM)
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *given: slstm(*given)[0], arguments)


def test_only_what_asks_for_a_gradient_gets_one():
    ours, _ = twin_cells()
    ours._recurrent_kernel_.requires_grad_(requires_grad=False)
    tokens = torch.randn(BATCH, 5, 4 * HEADS * DIM, dtype=torch.float64)
    ours(tokens)[0].sum().backward()
    assert ours._recurrent_kernel_.grad is None
    assert ours._bias_.grad.abs().max() > 0


def test_the_last_state_carries_on_where_the_sequence_was_cut():
    ours, theirs = twin_cells()
    tokens = torch.randn(BATCH, 12, 4 * HEADS * DIM, dtype=torch.float64)
    whole = theirs(tokens)[0]
    start, state = ours(tokens[:, :7])
    rest, _ = ours(tokens[:, 7:], state)
    torch.testing.assert_close(torch.cat([start, rest], dim=2), whole)


def test_autocast_leaves_the_recurrence_in_float32():
    ours, _ = twin_cells()
    ours = ours.float()
    tokens = torch.randn(BATCH, 20, 4 * HEADS * DIM, dtype=torch.bfloat16)
    expected = values_and_gradients(ours, tokens.float(), lambda cell, x: cell(x)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = values_and_gradients(ours, tokens, lambda cell, x: cell(x)[0])
    assert mixed["output"].dtype == torch.float32
    assert mixed["input"].dtype == torch.bfloat16
    expected["input"] = expected["input"].bfloat16()
    assert_all_close(mixed, expected, rtol=1e-6)
