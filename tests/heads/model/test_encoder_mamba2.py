"""Mamba2 against transformers' torch path with the same weights, and against the recurrence one step at a time."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import Mamba2Config, Mamba2Model
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer

from agiqa.heads.model.encoders import Mamba2Encoder
from agiqa.heads.model.encoders.mamba2 import CHUNK, Mamba2Mixer, head_dim_for, ssd
from agiqa.heads.settings.config import HeadConfig

WIDTH, STATE, HEAD_DIM, LAYERS = 12, 5, 6, 2
LENGTHS = [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 37]


class KeepDouble(TorchFunctionMode):
    """Transformers computes parts of Mamba2 in float32 whatever comes in: here its casts leave float64 as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        casts = func is torch.Tensor.float or (
            func is torch.Tensor.to and torch.float32 in (*args[1:], *(kwargs or {}).values())
        )
        return args[0] if casts and args[0].dtype == torch.float64 else func(*args, **(kwargs or {}))


def their_config(head_dim):
    return Mamba2Config(
        hidden_size=WIDTH,
        num_heads=2 * WIDTH // head_dim,
        head_dim=head_dim,
        state_size=STATE,
        n_groups=1,
        num_hidden_layers=LAYERS,
        chunk_size=16,
        vocab_size=2,
    )


def randomised(module):
    torch.manual_seed(4)
    for parameter in module.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return module


def values_and_gradients(module, tokens, call):
    """The output, and the gradients of a fixed random projection of it: of the input and of every parameter."""
    tokens = tokens.clone().requires_grad_()
    outputs = call(module, tokens)
    torch.manual_seed(5)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad((outputs * torch.randn(outputs.shape)).sum(), [tokens, *parameters])
    return dict(zip(("outputs", "tokens", *names), (outputs.detach(), *gradients), strict=True))


@pytest.mark.parametrize("length", LENGTHS)
def test_the_mixer_and_its_gradients_are_transformers(length):
    theirs = randomised(TheirMixer(their_config(HEAD_DIM), layer_idx=0).double())
    ours = Mamba2Mixer(WIDTH, STATE, HEAD_DIM).double()
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(3, length, WIDTH, dtype=torch.float64)
    mine = values_and_gradients(ours, tokens, lambda module, x: module(x))
    with KeepDouble():
        expected = values_and_gradients(theirs, tokens, lambda module, x: module(x))
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
    theirs.load_state_dict(ours.state_dict())


def test_the_encoder_is_transformers_model_without_its_embedding():
    theirs = randomised(Mamba2Model(their_config(head_dim_for(2 * WIDTH))).double())
    ours = Mamba2Encoder(HeadConfig(width=WIDTH, layers=LAYERS, state_size=STATE)).double()
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith("embeddings.")}
    ours.load_state_dict(weights)
    tokens = torch.randn(2, 21, WIDTH, dtype=torch.float64)
    with KeepDouble():
        expected = theirs(inputs_embeds=tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours(tokens, torch.ones(2, 21, dtype=torch.bool)), expected, rtol=1e-9, atol=1e-9)


def arguments(length, *, scale=1.0):
    """x, dt, A, B and C of two items with three heads."""
    torch.manual_seed(6)
    random = [torch.randn(shape, dtype=torch.float64) for shape in ((2, length, 3, 4), (2, length, 3), (3,))]
    reads_and_writes = torch.randn(2, 2, length, STATE, dtype=torch.float64)
    given = [random[0], scale * random[1].abs(), -random[2].exp(), *reads_and_writes]
    return [part.requires_grad_() for part in given]


def recurrence(inputs, step_sizes, rates, writes, reads):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T and y_t = C_t^T h_t, one step at a time."""
    state = torch.zeros(len(inputs), len(rates), STATE, inputs.shape[-1], dtype=inputs.dtype)
    outputs = []
    for x, dt, write, read in zip(*(part.unbind(1) for part in (inputs, step_sizes, writes, reads)), strict=True):
        decay = torch.exp(dt * rates)[..., None, None]
        state = decay * state + dt[..., None, None] * write[:, None, :, None] * x[:, :, None, :]
        outputs.append(torch.einsum("bn,bhnp->bhp", read, state))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("chunk", [1, 7, 8, 64])
@pytest.mark.parametrize("length", [1, 8, 23, 40])
def test_the_scan_in_chunks_is_the_recurrence(length, chunk):
    given = arguments(length)
    ours, expected = ssd(*given, chunk=chunk), recurrence(*given)
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad((outputs * weights).sum(), given) for outputs in (ours, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_very_short_and_very_long_steps_stay_exact_and_finite(scale):
    given = arguments(40, scale=scale)
    ours, expected = ssd(*given, chunk=8), recurrence(*given)
    torch.testing.assert_close(ours, expected)
    gradients = torch.autograd.grad(ours.sum(), given)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_long_item_in_float32_keeps_what_a_strong_decay_left():
    """The state after long steps at the start must not lose its digits to their large sum."""
    given = arguments(700)
    with torch.no_grad():
        given[1] *= torch.where(torch.arange(700) < 350, 30.0, 1e-3)[:, None]
        expected = recurrence(*given)
        found = ssd(*(part.float() for part in given))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("inner", "size"), [(1024, 64), (256, 64), (32, 32), (96, 48), (10, 10), (2, 2), (1018, 509)])
def test_heads_are_as_near_to_64_channels_as_divides(inner, size):
    assert head_dim_for(inner) == size


def test_the_scan_that_runs_is_named():
    assert Mamba2Encoder(HeadConfig(width=WIDTH)).kernels == "torch, chunked scan"
