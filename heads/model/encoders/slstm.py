"""The sLSTM recurrence (Beck et al. 2024, arXiv 2405.04517), with its gradient written out.

The paper's states c and n occur only as r = c/n, and the stabiliser m only as L = m + log n. So two states are enough,
and nothing can overflow. With the gate pre-activations i, f, z, o and a = L' + log sigmoid(f):

    w = sigmoid(i - a)              share of this step in the memory, 1 at the first step, where L' = -inf
    L = log(exp(a) + exp(i))        log of the unstabilised normaliser
    r = r' + w (tanh(z) - r')       the memory, a weighted mean of what was written
    h = sigmoid(o) r

Buffers are time-major and end in (dim, batch). The gates of a head are then contiguous: neighbouring slots share an
operation, the loops allocate nothing, and the recurrent weights are used as stored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from agiqa.cuda import kernels_missing
from agiqa.heads.model.encoders.kernels.dispatch import is_power_of_two, uncompiled

_SLOTS = (1, 3, 0, 2)
"""Which of the package's gates (i, f, z, o) each slot holds: f, o, i, z."""
_LEAST_DIM, _MOST_DIM = 16, 128
_LINEAR_FROM = 40.0
"""exp(-40) is below the last digit of float64 next to 40, so beyond it log sigmoid(-x) is -x."""


@uncompiled
def slstm(
    inputs: Float[Tensor, "time batch 4 heads dim"],
    recurrent: Float[Tensor, "heads 4 dim dim"],
    bias: Float[Tensor, "4 heads dim"],
) -> tuple[Float[Tensor, "time batch heads dim"], Float[Tensor, "4 batch heads dim"]]:
    """Hidden states of every step from the zero state, and the last state (h, c, n, m), which carries no gradient.

    The gates are in the order i, f, z, o; `recurrent[k, g]` maps the hidden state of head k to its gate g. Weights are
    float32 or float64. Everything is computed in their dtype, except that under autocast the kernels multiply in
    bfloat16; without autocast they multiply on tensor cores in three passes, which gives float32. Scaling c and n
    together gives an equal state; the last state has n = 1.
    """
    if slstm_loop_reason(recurrent) is None:
        from agiqa.heads.model.encoders.kernels.slstm_triton import KernelSLSTM  # triton is absent without a GPU

        precision = "bf16" if torch.is_autocast_enabled(inputs.device.type) else "tf32x3"
        hidden, last = KernelSLSTM.apply(inputs, recurrent, bias, precision)
    else:
        hidden, last = _SLSTM.apply(inputs.to(recurrent.dtype), recurrent, bias)
    return hidden, last


class _SLSTM(torch.autograd.Function):
    """`slstm`: one pass over the steps each way, with the sums over steps taken after the loop."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, recurrent: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weights = _ordered(recurrent, _SLOTS).flatten(1, 2)
        gates = _slotted(inputs, bias)
        with torch.autocast(inputs.device.type, enabled=False):
            hidden, memory, log_norm = run(gates, weights)
        ctx.save_for_backward(gates, weights, hidden, memory)
        last = torch.stack([hidden[-1], memory[-1], torch.ones_like(log_norm), log_norm])
        outputs = hidden[1:].permute(0, 3, 1, 2), last.permute(0, 3, 1, 2)
        ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gates, weights, hidden, memory = ctx.saved_tensors
        of_inputs, of_recurrent, of_bias = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            raw = raw_gradients(grad.permute(0, 2, 3, 1).contiguous(), gates, weights, hidden, memory)
            return (
                _unslotted(raw) if of_inputs else None,
                _recurrent_gradient(raw, hidden) if of_recurrent else None,
                _ordered(raw.sum((0, 4)), _gates_of_slots()).transpose(0, 1) if of_bias else None,
            )


def slstm_loop_reason(weights: Float[Tensor, "*sizes dim"]) -> str | None:
    """Why the loops of this module compute an sLSTM with such weights; None where the Triton kernels do."""
    unavailable = kernels_missing(weights.device, ("triton",))
    if unavailable is not None:
        return unavailable
    dim, dtype = weights.shape[-1], weights.dtype
    if dtype != torch.float32 or not (is_power_of_two(dim) and _LEAST_DIM <= dim <= _MOST_DIM):
        return f"the kernels need heads of 2^k float32 channels, {_LEAST_DIM} to {_MOST_DIM}, not {dim} in {dtype}"
    return None


def _ordered(values: Float[Tensor, "heads 4 *rest"], order: Sequence[int]) -> Float[Tensor, "heads 4 *rest"]:
    """The gates in another order. Indexing by `order` would copy it to the GPU, which a CUDA graph cannot do."""
    return torch.stack([values[:, gate] for gate in order], dim=1)


def _gates_of_slots() -> list[int]:
    """The slot of each of the gates i, f, z, o."""
    return [_SLOTS.index(gate) for gate in range(4)]


def _slotted(
    inputs: Float[Tensor, "time batch 4 heads dim"], bias: Float[Tensor, "4 heads dim"]
) -> Float[Tensor, "time heads 4 dim batch"]:
    """Inputs plus bias in the layout of the loops."""
    time, batch, _, heads, dim = inputs.shape
    gates = inputs.new_empty(time, heads, 4, dim, batch)
    for slot, gate in enumerate(_SLOTS):
        torch.add(inputs[:, :, gate].permute(0, 2, 3, 1), bias[gate, ..., None], out=gates[:, :, slot])
    return gates


def _unslotted(raw: Float[Tensor, "time heads 4 dim batch"]) -> Float[Tensor, "time batch 4 heads dim"]:
    time, heads, _, dim, batch = raw.shape
    inputs = raw.new_empty(time, batch, 4, heads, dim)
    for slot, gate in enumerate(_SLOTS):
        inputs[:, :, gate] = raw[:, :, slot].permute(0, 3, 1, 2)
    return inputs


def run(
    gates: Float[Tensor, "time heads 4 dim batch"], weights: Float[Tensor, "heads 4*dim dim"]
) -> tuple[
    Float[Tensor, "time+1 heads dim batch"], Float[Tensor, "time+1 heads dim batch"], Float[Tensor, "heads dim batch"]
]:
    """h and r of every step, the zero state in front, and the last L.

    Leaves in the slots of `gates`: the forget gate's pre-activation, sigmoid(o), w and tanh(z).
    """
    time, heads, _, dim, batch = gates.shape
    hidden, memory = gates.new_empty(2, time + 1, heads, dim, batch)
    hidden[0] = memory[0] = 0.0
    log_norm = gates.new_full((heads, dim, batch), -torch.inf)
    decayed = torch.empty_like(log_norm)
    states = zip(hidden, hidden[1:], memory, memory[1:], strict=False)
    slots = zip(gates.flatten(2, 3), *gates.unbind(2), gates[:, :, 1:3], strict=True)
    for (every, forget, output, share, candidate, sigmoids), (h_old, h, r_old, r) in zip(slots, states, strict=True):
        every.baddbmm_(weights, h_old)
        softplus(forget, -1.0, _LINEAR_FROM, out=decayed)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        decayed.add_(log_norm)
        torch.logaddexp(decayed, share, out=log_norm)
        share.sub_(decayed)
        sigmoids.sigmoid_()
        candidate.tanh_()
        torch.lerp(r_old, candidate, share, out=r)
        torch.mul(output, r, out=h)
    return hidden, memory, log_norm


def raw_gradients(
    grad: Float[Tensor, "time heads dim batch"],
    gates: Float[Tensor, "time heads 4 dim batch"],
    weights: Float[Tensor, "heads 4*dim dim"],
    hidden: Float[Tensor, "time+1 heads dim batch"],
    memory: Float[Tensor, "time+1 heads dim batch"],
) -> Float[Tensor, "time heads 4 dim batch"]:
    """Gradient of the pre-activations, in slots; `grad` is that of the hidden states.

    With Gx the gradient of x, per step:  Gr += Gh sigmoid(o);  Go = Gh h (1 - sigmoid(o));
    Gz = Gr w (1 - tanh(z)^2);  Gi = Gr (tanh(z) - r') w (1 - w) + GL w;  GL' = GL - Gi;  Gf = GL' sigmoid(-f);
    Gr' = Gr (1 - w);  Gh' = weights^T (Gf, Go, Gi, Gz).
    """
    raw = _factors(gates, hidden, memory)
    flat = raw[:, :, :4].flatten(2, 3)
    back = weights.transpose(1, 2)
    of_pair = torch.stack([torch.zeros_like(grad[-1]), grad[-1]], dim=1)
    of_log_norm, of_hidden = of_pair.unbind(1)
    of_memory = torch.empty_like(grad[-1])
    carried = torch.zeros_like(grad[-1])
    outputs, shares = gates[:, :, 1].unbind(), gates[:, :, 2].unbind()
    pairs, triples = raw[:, :, :2].unbind(), raw[:, :, 2:].unbind()
    of_inputs, carries = raw[:, :, 2].unbind(), raw[:, :, 4].unbind()
    for step in reversed(range(len(grad))):
        torch.addcmul(carried, of_hidden, outputs[step], out=of_memory)
        triples[step].mul_(of_memory[:, None])
        of_inputs[step].addcmul_(of_log_norm, shares[step])
        of_log_norm.sub_(of_inputs[step])
        pairs[step].mul_(of_pair)
        carried = carries[step]
        if step:
            torch.baddbmm(grad[step - 1], back, flat[step], out=of_hidden)
    return raw[:, :, :4]


def _factors(gates: Tensor, hidden: Tensor, memory: Tensor) -> Float[Tensor, "time heads 5 dim batch"]:
    """Factors that turn the gradients of L, h, r, r, r into those of f, o, i, z, r'."""
    forget, output, share, candidate = gates.unbind(2)
    time, heads, _, dim, batch = gates.shape
    factors = gates.new_empty(time, heads, 5, dim, batch)
    of_forget, of_output, of_input, of_candidate, of_memory = factors.unbind(2)
    torch.sigmoid(torch.neg(forget), out=of_forget)
    torch.addcmul(hidden[1:], hidden[1:], output, value=-1.0, out=of_output)
    torch.sub(1.0, share, out=of_memory)
    torch.sub(candidate, memory[:-1], out=of_input).mul_(share).mul_(of_memory)
    torch.mul(candidate, candidate, out=of_candidate).neg_().add_(1.0).mul_(share)
    return factors


def _recurrent_gradient(
    raw: Float[Tensor, "time heads 4 dim batch"], hidden: Float[Tensor, "time+1 heads dim batch"]
) -> Float[Tensor, "heads 4 dim dim"]:
    slots = torch.einsum("tkgob,tkib->kgoi", raw, hidden[:-1])
    return _ordered(slots, _gates_of_slots())
