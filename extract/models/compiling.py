"""torch.compile for the layers of a model. The command line reads the choices, so torch is imported in functions."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agiqa.errors import CompilerError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

COMPILING = ("auto", "always", "never")
"""Whether torch.compile compiles the layers of a model; `auto` does where it saves more time than it takes."""


def layers_of(model: "nn.Module") -> "Iterator[tuple[str, nn.Module]]":
    """The layers of a transformers model, decoder and towers, with their names."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield name, module


def compile_each(layers: "Sequence[nn.Module]") -> None:
    """Compile each of `layers` in place, at its first use; layers of one kind share a compilation.

    The method `forward` is compiled, not the call, so that hooks of a layer run as they do without compiling.
    """
    import torch

    torch.compiler.reset()  # it compiles eight variants of a function at most, and earlier models count
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def compile_layers(model: "nn.Module") -> None:
    """`compile_each` of the layers of `model`."""
    compile_each([layer for _, layer in layers_of(model)])


@contextmanager
def compiler_errors(name: str) -> Generator[None]:
    """Turn the errors of torch's compiler, while the model `name` runs inside, into CompilerError."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        message = f"torch cannot compile the layers of {name} ({first_line(error)})"
        raise CompilerError(message) from error


def check_compiler(device: "torch.device") -> None:
    """Compile a small function for `device`. Raises CompilerError if torch's compiler does not work."""
    import torch

    with compiler_errors("any model"):
        torch.compile(_norm)(torch.ones(2, 8, device=device))


def _norm(values: "torch.Tensor") -> "torch.Tensor":
    return values * values.square().mean(dim=-1, keepdim=True).rsqrt()
