"""Hidden states of chosen layers of a transformers model, kept by forward hooks while one forward pass runs.

Only the chosen layers are kept, and a pass ends at the highest of them. What the hooks keep is compared once with
transformers' own `output_hidden_states`, on a few tokens: families differ in where their blocks are, and in what a
block returns.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from agiqa.errors import ModelError
from agiqa.extract.models.checks import LOGIT_TOLERANCE, final_states, relative_error
from agiqa.store.format.layers import LAST


class _HighestReached(Exception):
    """Ends a forward pass once the highest chosen layer is there."""


def states_of_layers(
    model: Any, inputs: Mapping[str, torch.Tensor], blocks: Sequence[nn.Module], layers: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The hidden states (batch, n, D) of `layers`, by name. `blocks` may be empty if only `last` is wanted.

    Raises ModelError if a block of them does not run for these inputs.
    """
    found = _states_that_ran(model, inputs, blocks, layers)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        message = (
            f"{type(model).__name__} does not run block {missing[0]} for some items; Llama 3.2 Vision leaves out the "
            f"blocks that read the image where there is none. Leave layer {missing[0]} out of --layers."
        )
        raise ModelError(message)
    return found


def _states_that_ran(
    model: Any, inputs: Mapping[str, torch.Tensor], blocks: Sequence[nn.Module], layers: Sequence[str]
) -> dict[str, torch.Tensor]:
    """As `states_of_layers`, without those of blocks that do not run."""
    if tuple(layers) == (LAST,):
        return {LAST: final_states(model, inputs)}
    found: dict[str, torch.Tensor] = {}
    with kept_states(blocks, [layer for layer in layers if layer != LAST], found, stops=LAST not in layers):
        last = final_states(model, inputs)
        if LAST in layers:
            found[LAST] = last
    return found


@contextmanager
def kept_states(
    blocks: Sequence[nn.Module], layers: Sequence[str], found: dict[str, torch.Tensor], *, stops: bool
) -> Generator[None]:
    """Keep the states of `layers` in `found` while the block runs the model; with `stops` end it at the highest.

    Layer k is what `blocks[k - 1]` returns, and "0" what the first of them reads.
    """

    def keep(layer: str, states: Any) -> None:
        found[layer] = states[0] if isinstance(states, tuple | list) else states
        if stops and len(found) == len(layers):
            raise _HighestReached

    def keep_input(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep("0", args[0] if args else kwargs["hidden_states"])

    handles = [blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)] if "0" in layers else []
    for layer in layers:
        if layer != "0":

            def keep_output(_block: Any, _args: Any, output: Any, layer: str = layer) -> None:
                keep(layer, output)

            handles.append(blocks[int(layer) - 1].register_forward_hook(keep_output))
    try:
        with suppress(_HighestReached):
            yield
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(name: str, model: Any, count: int, token_ids: torch.Tensor) -> Sequence[nn.Module]:
    """The `count` decoder blocks of `model`, whose states of `token_ids` (1, n) are those that transformers reports.

    Raises ModelError if there are no such blocks, or their states are others.
    """
    decoder = model.get_decoder()
    lists = [list(module) for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise _unknown(name, model, f"no list of {count} decoder blocks was found")
    with torch.inference_mode():
        reports = model.base_model(input_ids=token_ids, use_cache=False, output_hidden_states=True)
        names = [str(layer) for layer in range(count)]
        by_name = _states_that_ran(model, {"input_ids": token_ids}, lists[0], names)
    found, expected = list(by_name.values()), getattr(reports, "hidden_states", None) or ()
    in_order = list(by_name) == sorted(by_name, key=int) and len(expected) == len(found) + 1
    # Mamba and RWKV report no embeddings: their list begins with the output of block 1
    if not in_order or not any(_agree(found[first:], expected) for first in (0, 1)):
        raise _unknown(name, model, "the states of its blocks are not those that transformers reports")
    return lists[0]


def _agree(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether the states `found` are the first of those `expected`."""
    return all(
        one.shape == other.shape and relative_error(one, other) <= LOGIT_TOLERANCE[other.dtype]
        for one, other in zip(found, expected, strict=False)
    )


def _unknown(name: str, model: Any, why: str) -> ModelError:
    return ModelError(
        f"{name}: agiqa cannot read single layers of {type(model).__name__}: {why}. Leave --layers out: the last layer "
        "can be stored."
    )
