"""What every backbone offers: items prepared without weights, hidden states and `W_lm` with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError
from agiqa.extract.data.images import ImageSource
from agiqa.extract.data.items import Message

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
    layout: "NDArray[np.int64] | None" = None
    """(slices, [rows, columns of patches]) where the backbone cuts images itself. It stays on the host, where it is
    needed before the device has done anything."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How the model chooses the tokens of an answer; the default is greedy. Raises ConfigError out of range."""

    max_new_tokens: int = 1024
    sample: bool = False
    """Draw each token; otherwise the likeliest is taken, and `temperature`, `top_p` and `top_k` do not count."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Draw from the fewest tokens that have this share of the probability."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 is from all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative, of tokens that the answer has already."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature > 0, "more than 0"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
        ):
            if not fits:
                message = f"The generation setting {name} is {getattr(self, name)}; it must be {wanted}."
                raise ConfigError(message)

    @classmethod
    def published(cls, *, max_new_tokens: int = 1024, seed: int = 0) -> "GenerationSettings":
        """The sampling of the published MiniCPM-Llama3-V-2.5 `chat`, with which M3-AGIQA generated its answers."""
        return cls(
            max_new_tokens=max_new_tokens,
            sample=True,
            temperature=0.7,
            top_p=0.8,
            top_k=100,
            repetition_penalty=1.05,
            seed=seed,
        )


class Answer(str):
    """The text of an answer, and how it came to its end."""

    __slots__ = ("complete", "generated", "tokens")

    tokens: int
    """How many the model generated, the one that ended it not counted."""
    complete: bool
    """Whether the model ended it; False where the limit of new tokens or of the model's positions did."""
    generated: str | None
    """All that the model generated, where that includes thoughts, which the text does not; else None."""

    def __new__(cls, text: str, *, tokens: int, complete: bool, generated: str | None = None) -> "Answer":
        """The text, and what is told of it."""
        answer = super().__new__(cls, text)
        answer.tokens = tokens
        answer.complete = complete
        answer.generated = generated
        return answer


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
    device: "torch.device"
    """Where `load` brings the weights."""

    def provenance(self) -> dict[str, Any]:
        """Everything about model, tokenizer and processor that changes a number, JSON-able. Hashes the files."""
        ...

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """Tokenise one conversation, its image before the first question. Needs no weights.

        `answer` appends the chat template's prompt for the next answer of the assistant.
        Raises DataError for an image or text that cannot be read, ModelError when roles cannot be told.
        """
        ...

    def check_tensors(self) -> None:
        """Raise ModelError, as `load` would, for what the heads of files tell of it; no tensor is read.

        That is an adapter that does not fit the model, embeddings or an lm_head of another shape, and of a native
        backbone any tensor. Weights of a hub repository are downloaded first.
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

    def generate(self, batch: Sequence[Prepared], settings: GenerationSettings) -> list[str]:
        """The answer to each item, which was prepared with `answer`: no special tokens, thoughts or outer white space.

        An item's greedy answer does not depend on its batch but for rounding. Each is an `Answer` where the backbone
        can tell how it ended. Raises DataError for an item that leaves no position for an answer.
        """
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
