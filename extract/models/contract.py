"""The contract of backbones: prepare items without weights; compute hidden states, logits and answers with them."""

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
    """One item as input of the model: a batch of one, on the CPU."""

    token_ids: NDArray[np.int32]
    """(n,)"""
    roles: NDArray[np.uint8]
    """(n,) values of `agiqa.store.TOKEN_ROLES`."""
    inputs: "Mapping[str, torch.Tensor]" = field(default_factory=dict)
    """Further model inputs, such as pixel_values; axis 0 is joined in a batch."""
    layout: "NDArray[np.int64] | None" = None
    """(slices, [rows, columns of patches]) if the backbone cuts images itself. It stays on the host, which needs it to
    queue the work of the device."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How the model chooses the tokens of an answer, by default greedily. Raises ConfigError for a bad value."""

    max_new_tokens: int = 1024
    sample: bool = False
    """Draw each token; otherwise take the likeliest and ignore `temperature`, `top_p` and `top_k`."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 means all."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that are already in the answer."""
    seed: int = 0
    """Seed of the draws."""

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
        """The sampling settings of the published MiniCPM-Llama3-V-2.5 `chat`, which M3-AGIQA used for its answers."""
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
    """The text of an answer, and how the generation ended."""

    __slots__ = ("complete", "generated", "prompt_tokens", "tokens")

    tokens: int | None
    """Number of generated tokens, without the one that ends the answer; None if a server did not count them."""
    prompt_tokens: int | None
    """Tokens of the question as a server counted them; None if the model runs here."""
    complete: bool
    """Whether the model ended the answer; False if the limit of new tokens or of positions cut it off."""
    generated: str | None
    """The whole generated text if it includes thoughts, which the answer leaves out; else None."""

    def __new__(
        cls,
        text: str,
        *,
        tokens: int | None,
        complete: bool,
        generated: str | None = None,
        prompt_tokens: int | None = None,
    ) -> "Answer":
        """`text`, with the attributes above."""
        answer = super().__new__(cls, text)
        answer.prompt_tokens = prompt_tokens
        answer.tokens = tokens
        answer.complete = complete
        answer.generated = generated
        return answer


class AnsweringModel(Protocol):
    """A model that answers questions about images: what describing needs, and all that a server has."""

    max_positions: int | None
    """The longest supported item, in tokens; None if the model states no limit."""
    reads_images: bool

    def provenance(self) -> dict[str, Any]:
        """Everything about model, tokenizer and processor that changes a result, JSON-able. Hashes the files."""
        ...

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """Tokenise one conversation, its image before the first question. Needs no weights.

        `answer` appends the chat template's prompt for the next answer of the assistant.
        Without an image there are no `inputs`. Raises DataError for an unreadable image or text, ModelError if the
        roles of tokens cannot be determined.
        """
        ...

    def outline(
        self,
        conversation: Sequence[Message],
        image: ImageSource | None,
        *,
        size: tuple[int, int] | None = None,
        answer: bool = False,
    ) -> Prepared:
        """The token ids and roles of `prepare`, without inputs, and raises what it raises.

        With the `size` (width, height) of the image as `open_image` returns it, the pixels are not decoded: the image
        must have been checked before. Filling a store compares all tokens with those of `prepare`.
        """
        ...

    def generate(
        self, batch: Sequence[Prepared], settings: GenerationSettings, *, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """The answers to items prepared with `answer=True`, without special tokens, thoughts and outer white space.

        `seeds` are those of each item's draws, by default `settings.seed` for all. But for rounding, an answer does not
        depend on the item's batch. Answers are `Answer`s if the backbone knows how they ended. Raises DataError for an
        item that leaves no position for an answer.
        """
        ...


class Backbone(AnsweringModel, Protocol):
    """A frozen multimodal or text model; the logits of most are `H W_lm^T`."""

    hidden_size: int
    """D"""
    vocab_size: int
    """V, the number of rows of `W_lm`."""
    logical_dtype: str
    """The dtype of hidden states: bfloat16, float16 or float32."""
    device: "torch.device"
    """The device to which `load` brings the weights."""
    layer_count: int
    """N decoder blocks. The layers are "0", the embeddings, "1" to "N-1", and "last", after the final norm."""
    first_layer: int
    """0; or 1 for an image encoder whose embeddings are no layer."""
    tap: str | None
    """Where the states come from, as stores record it: None for a language model; `timm`, `timm:blocks`, `vision:12`,
    `projector`.

    With a tap there is no `W_lm`: `lm_head`, `logits` and `project` raise ViewRefused, and `vocab_size` is 0."""
    reads_conversations: bool
    """False for an image encoder, whose states are the same whatever is asked."""

    def check_tensors(self) -> None:
        """Raise the ModelErrors of `load` that the headers of the weight files are enough for. Reads no tensor.

        These are an adapter that does not fit, embeddings or an lm_head of another shape and, in a native backbone, any
        tensor that does not fit. Weights of a hub repository are downloaded first.
        """
        ...

    def load(self) -> None:
        """Bring the weights onto the device, merged with the adapter if there is one. Idempotent.

        Raises ModelError if weights or adapter are missing, incomplete, damaged, or too large for the device.
        """
        ...

    @property
    def saved_by_compiling(self) -> float:
        """Seconds per token that compiled layers save on a GPU, at the speed of one H100."""
        ...

    def compile_layers(self) -> None:
        """Compile the layers that `hidden_states` runs, at its next calls. Loads the model. Idempotent.

        A call of `hidden_states` that compiles raises CompilerError if torch's compiler does not work.
        """
        ...

    def layer_width(self, layer: str) -> int:
        """Values per token of `layer`; `hidden_size` for every layer of a language model."""
        ...

    def fixed_roles(self, layer: str) -> NDArray[np.uint8] | None:
        """The roles of the rows of `layer` (n,), the same for every item; None where the rows are an item's tokens."""
        ...

    def hidden_states(self, batch: Sequence[Prepared]) -> "list[torch.Tensor]":
        """Each item's (n, D) final hidden states, the input of the output embedding, in `logical_dtype`.

        They are the layer "last" of `layer_states`, bit for bit.
        """
        ...

    def layer_states(self, batch: Sequence[Prepared], layers: Sequence[str]) -> "list[dict[str, torch.Tensor]]":
        """Each item's hidden states of `layers` by name, (n, D) each, in `logical_dtype`, from one forward pass.

        `layers` are names of `agiqa.extract.models.layers`, one or more. No other layer is kept, and blocks after the
        highest of them do not run. The states are those of transformers' `output_hidden_states`. Raises ModelError for
        a model whose single layers cannot be read.
        """
        ...

    def logits(self, item: Prepared) -> "torch.Tensor":
        """(n, V), computed by the model's own output embedding."""
        ...

    def lm_head(self, *, bent: bool = False) -> "torch.Tensor":
        """`W_lm` (V, D) with logits `H W_lm^T`, in the dtype that the model computes with.

        Raises ModelError for a model that does more to its logits (soft caps, biases, scales that `W_lm` cannot take
        up exactly). With `bent`, returns the weight of its output embedding even then, to identify the model.
        """
        ...

    def project(self, states: "torch.Tensor") -> "torch.Tensor":
        """The model's own logits (n, V) of final hidden states (n, D), with its soft caps, biases and scales.

        Raises ModelError for a model that makes its logits in a way that agiqa does not know.
        """
        ...
