"""What every backbone offers: items prepared without weights, hidden states and `W_lm` with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agiqa.extract.items import Message

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One item as the model reads it: a batch of one, on the CPU."""

    token_ids: NDArray[np.int32]
    """(n,)"""
    roles: NDArray[np.uint8]
    """(n,) values of `agiqa.store.TOKEN_ROLES`."""
    inputs: "Mapping[str, torch.Tensor]" = field(default_factory=dict)
    """Further model inputs, such as pixel_values; axis 0 counts what the item adds to a batch."""


class Backbone(Protocol):
    """A frozen multimodal or text model; of most, the logits are `H W_lm^T`."""

    hidden_size: int
    """D"""
    vocab_size: int
    """V, the rows of `W_lm`."""
    max_positions: int | None
    """The longest item that the model was made for, in tokens; None when it states no limit."""
    logical_dtype: str
    """Of the hidden states: bfloat16, float16 or float32."""
    reads_images: bool

    def provenance(self) -> dict[str, Any]:
        """Everything about model, tokenizer and processor that changes a number, JSON-able. Hashes the files."""
        ...

    def prepare(self, conversation: Sequence[Message], image: Path | None) -> Prepared:
        """Tokenise one conversation, its image before the first question. Needs no weights.

        Raises DataError for an image or text that cannot be read, ModelError when roles cannot be told.
        """
        ...

    def load(self) -> None:
        """Bring the weights onto the device, merged with the adapter if there is one. Idempotent.

        Raises ModelError when weights or the adapter are missing, incomplete, broken, or too many.
        """
        ...

    def hidden_states(self, batch: Sequence[Prepared]) -> "list[torch.Tensor]":
        """Each item's (n, D) final hidden states, the input of the output embedding, in `logical_dtype`."""
        ...

    def logits(self, item: Prepared) -> "torch.Tensor":
        """(n, V), computed by the model's own output embedding."""
        ...

    def lm_head(self, *, bent: bool = False) -> "torch.Tensor":
        """`W_lm` (V, D) with logits `H W_lm^T`, in the dtype that the model computes with.

        Raises ModelError for a model that does more to its logits (soft caps, biases, scales that `W_lm` cannot take
        up exactly); with `bent` the weight of its output embedding is given all the same, to identify it.
        """
        ...

    def project(self, states: "torch.Tensor") -> "torch.Tensor":
        """The model's own logits (n, V) of final hidden states (n, D), with whatever it does after `W_lm`.

        Raises ModelError for a model whose logits are made in a way that agiqa does not know.
        """
        ...
