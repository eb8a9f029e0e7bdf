"""What the backbones share, a transformers model run up to its final norm; and the backbone `text`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from agiqa.errors import DataError, ModelError, listed
from agiqa.extract.data.images import ImageSource
from agiqa.extract.data.items import Message
from agiqa.extract.models.adapters import Adapter, apply_adapter, check_adapter
from agiqa.extract.models.batches import alike, collate, room_for_weights
from agiqa.extract.models.checkpoints import Checkpoint
from agiqa.extract.models.checks import TOKENS_NEEDED, LogitMap, find_logit_map, refuse_batch_dependence
from agiqa.extract.models.compiling import compile_layers, compiler_errors
from agiqa.extract.models.contract import GenerationSettings, Prepared
from agiqa.extract.models.decoding.slot_model import LoadedModel
from agiqa.extract.models.devices import DTYPES, checked_dtype, device_named
from agiqa.extract.models.generation import generate
from agiqa.extract.models.loading import check_vocabulary_rows, failures_of, load_model, load_tokenizer
from agiqa.extract.models.provenance import versions_of
from agiqa.extract.models.rendering import TEMPLATE_DATE, Renderer, main_template
from agiqa.extract.models.tapping import find_blocks, states_of_layers
from agiqa.parts import OwnPart
from agiqa.store.format.layers import LAST

_SAVED_BY_COMPILING = 4.8e-11
"""Seconds per token, layer and channel on one H100: 14.75 - 11.76 ms for 479 tokens, 32 layers and 4,096 channels."""
PROBE_TOKENS = 8
"""Length of the input on which logits are checked."""


class HuggingFaceBackbone(ABC):
    """A `Backbone` over a transformers model."""

    kind: str
    reads_images: bool
    auto_class: Any
    """The transformers auto class that loads the model."""
    classes: Any
    """transformers' mapping from configuration to model class."""
    first_layer: int = 0
    tap: str | None = None
    reads_conversations: bool = True
    packages: tuple[str, ...] = ("torch", "transformers", "tokenizers")
    """Libraries whose version may change a result."""

    def __init__(
        self, checkpoint: Checkpoint, config: Any, *, adapter: Adapter | None = None, dtype: str, device: str
    ) -> None:
        """`dtype` is auto or one of DTYPES, `device` auto or a torch device."""
        if getattr(config, "is_encoder_decoder", False):
            message = (
                f"{checkpoint.name}: {config.model_type!r} is an encoder-decoder model, whose image or question has no "
                "hidden states of its own before the logits; use a decoder-only model."
            )
            raise ModelError(message)
        text_config = config.get_text_config()
        self.checkpoint = checkpoint
        self.adapter = adapter
        self.config = config
        self.device = device_named(device)
        self.logical_dtype = _dtype_name(checkpoint, config, dtype)
        self.hidden_size: int = text_config.hidden_size
        self.vocab_size: int = text_config.vocab_size
        self.layer_count: int = text_config.num_hidden_layers
        self.max_positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self.model_class: Any = self.classes[type(config)]
        self._torch_dtype = DTYPES[self.logical_dtype]
        self.attention = "sdpa" if getattr(self.model_class, "_supports_sdpa", False) else "eager"
        self.renderer = self._make_renderer()
        self._check_tokenizer()
        self._model: Any = None
        self._tensors_fit = False
        self._compiled = False

    @abstractmethod
    def _make_renderer(self) -> Renderer:
        """Load the tokenizer or processor, and make its renderer."""

    @abstractmethod
    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`."""

    def outline(
        self,
        conversation: Sequence[Message],
        image: ImageSource | None,
        *,
        size: tuple[int, int] | None = None,
        answer: bool = False,
    ) -> Prepared:
        """See `Backbone.outline`; a backbone that knows how an image's size becomes tokens overrides this."""
        del size
        prepared = self.prepare(conversation, image, answer=answer)
        return Prepared(token_ids=prepared.token_ids, roles=prepared.roles)

    @property
    def _image_token_id(self) -> int | None:
        return None

    def provenance(self) -> dict[str, Any]:
        """See `Backbone.provenance`. The first call reads every file of the checkpoint to hash it."""
        adapter, own = self._adapter_provenance, OwnPart.of("backbone", self.kind, type(self))
        return {
            "name": self.checkpoint.label if self.adapter is None else f"{self.checkpoint.label}+{self.adapter.label}",
            "kind": self.kind,
            "model_type": self.config.model_type,
            "architecture": self.model_class.__name__,
            "revision": self.checkpoint.revision,
            "gguf": self.checkpoint.gguf,
            "files": dict(self.file_hashes),
            "chat_template": {
                "source": "plain" if self.renderer.plain else "checkpoint",
                "sha256": hashlib.sha256(self.renderer.template.encode()).hexdigest(),
                "style": self.renderer.style,
                "date": TEMPLATE_DATE.date().isoformat(),
                **self.renderer.switches,
            },
            "dtype": self.logical_dtype,
            "attention": self.attention,
            "versions": versions_of(self.packages),
            **({} if adapter is None else {"adapter": adapter}),
            **({} if own is None else {"own_part": own.as_dict()}),
        }

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of the checkpoint's files, by name."""
        return self.checkpoint.hashes()

    @cached_property
    def _adapter_provenance(self) -> dict[str, Any] | None:
        return None if self.adapter is None else self.adapter.provenance()

    def check_tensors(self) -> None:
        """See `Backbone.check_tensors`. Only the first call reads the headers."""
        if not self._tensors_fit:
            model = self.empty_model()
            # found now: building a second model while a thread loads the first would mix up their default dtypes
            self._embedding_rows = self._count_embeddings(model)
            if self.adapter is not None:
                check_adapter(model, self.adapter, name=self.checkpoint.name)
            self._compare_weights(model)
            self._tensors_fit = True

    def _compare_weights(self, model: Any) -> None:
        """Compare the headers of the files with `model`, which has no weights; loading compares the rest."""
        check_vocabulary_rows(self.checkpoint, model)

    def empty_model(self) -> torch.nn.Module:
        """The model without weights, on the device `meta`."""
        with failures_of(self.checkpoint, "build the model"), torch.device("meta"):
            about = {"dtype": self._torch_dtype, "attn_implementation": self.attention}
            model: torch.nn.Module = self.auto_class.from_config(self.config, **about)
        return model

    @cached_property
    def _embedding_rows(self) -> int:
        """The number of token ids with an embedding: the vocabulary and, in some models, marks of images."""
        return self._count_embeddings(self.empty_model())

    def _count_embeddings(self, model: Any) -> int:
        return max(self.vocab_size, len(self.language_model_of(model).get_input_embeddings().weight))

    def _check_tokenizer(self) -> None:
        """Raise ModelError if the tokenizer makes ordinary tokens without an embedding: it may be of another model.

        Special tokens may lack one until a text contains them: published text models keep image marks of siblings.
        """
        tokenizer = self.renderer.tokenizer
        beyond = {token: place for token, place in tokenizer.get_vocab().items() if place >= self.vocab_size}
        special = {*tokenizer.all_special_ids, self._image_token_id}
        special |= {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
        unknown = sorted(token for token, place in beyond.items() if place not in special)
        if unknown and max(beyond.values()) >= self._embedding_rows:
            message = (
                f"{self.checkpoint.name}: the tokenizer has ids up to {max(beyond.values())}, and the model's "
                f"vocabulary is {self._embedding_rows} ({listed(unknown)} have no embedding). Give the tokenizer that "
                "belongs to the weights, or resize the model's embeddings and save it."
            )
            raise ModelError(message)

    def _refuse_unknown_tokens(self, token_ids: NDArray[np.int32]) -> None:
        """Raise DataError if one of `token_ids` (n,) has no embedding; the image token needs none."""
        beyond = {int(place) for place in token_ids[token_ids >= self.vocab_size]} - {self._image_token_id}
        if beyond and max(beyond) >= self._embedding_rows:
            token = self.renderer.tokenizer.convert_ids_to_tokens(max(beyond))
            message = (
                f"its text holds the token {token!r} (id {max(beyond)}), and the vocabulary of {self.checkpoint.name} "
                f"is {self._embedding_rows}; take it out of the text, or use a model with an embedding for it."
            )
            raise DataError(message)

    def load(self) -> None:
        """See `Backbone.load`."""
        if self._model is not None:
            return
        with room_for_weights(self.checkpoint.name, self.device):
            model = self._load_model()
            if self.adapter is not None:
                apply_adapter(model, self.adapter, name=self.checkpoint.name)
        language_model = self.language_model_of(model)
        found = tuple(language_model.get_output_embeddings().weight.shape)
        expected = (self.vocab_size, self.hidden_size)
        if found != expected:
            message = f"{self.checkpoint.name}: lm_head has shape {found}, expected {expected} by the configuration."
            raise ModelError(message)
        tokens, pad = self._ordinary_tokens(TOKENS_NEEDED), self._pad_id()
        refuse_batch_dependence(self.checkpoint.name, language_model, tokens, pad_id=pad, dtype=self._torch_dtype)
        self._model = model

    def _load_model(self) -> Any:
        """The model with its weights, without the adapter, on the device."""
        merges = self.adapter is not None
        found = load_model(self.checkpoint, self.auto_class, self._torch_dtype, self.attention, to_merge=merges)
        return found.to(self.device)

    @property
    def saved_by_compiling(self) -> float:
        """See `Backbone.saved_by_compiling`; by the decoder's layers and their width."""
        return _SAVED_BY_COMPILING * self.layer_count * self.hidden_size

    def compile_layers(self) -> None:
        """See `Backbone.compile_layers`."""
        if not self._compiled:
            self._compile()
            self._compiled = True

    def _compile(self) -> None:
        compile_layers(self._loaded())

    def _compiling(self) -> AbstractContextManager[None]:
        """Around a forward pass: its compiler's errors become CompilerError."""
        return compiler_errors(self.checkpoint.name) if self._compiled else nullcontext()

    def layer_width(self, layer: str) -> int:
        """See `Backbone.layer_width`."""
        del layer
        return self.hidden_size

    def fixed_roles(self, layer: str) -> NDArray[np.uint8] | None:
        """See `Backbone.fixed_roles`."""
        del layer
        return None

    def hidden_states(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        """See `Backbone.hidden_states`."""
        return [states[LAST] for states in self.layer_states(batch, (LAST,))]

    def layer_states(self, batch: Sequence[Prepared], layers: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """See `Backbone.layer_states`."""
        with torch.inference_mode(), self._compiling():
            return self._states_of(batch, layers)

    def states(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        """As `hidden_states`, with gradients."""
        return [states[LAST] for states in self._states_of(batch, (LAST,))]

    def _states_of(self, batch: Sequence[Prepared], layers: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """As `layer_states`, with gradients. Items that are not `alike` run in separate forward passes."""
        model, blocks = self._loaded(), () if tuple(layers) == (LAST,) else self._blocks
        rows: dict[int, dict[str, torch.Tensor]] = {}
        for group in alike(batch):
            found = states_of_layers(model, self._collate([batch[position] for position in group]), blocks, layers)
            for row, position in enumerate(group):
                own = slice(len(batch[position].token_ids))
                rows[position] = {name: kept[row, own].to(self._torch_dtype) for name, kept in found.items()}
        return [rows[position] for position in range(len(batch))]

    @cached_property
    def _blocks(self) -> Sequence[torch.nn.Module]:
        """The decoder blocks, once they are known to give the states that transformers reports."""
        probe = torch.tensor([self._ordinary_tokens(PROBE_TOKENS)], device=self.device)
        return find_blocks(self.checkpoint.name, self._language_model(), self.layer_count, probe)

    def logits(self, item: Prepared) -> torch.Tensor:
        """See `Backbone.logits`."""
        model = self._language_model()
        with torch.inference_mode():
            logits: torch.Tensor = model(**self._collate([item]), use_cache=False).logits[0]
        return logits

    def generate(
        self, batch: Sequence[Prepared], settings: GenerationSettings, *, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """See `Backbone.generate`."""
        model, collate, most = self._language_model(), self._collate, self.max_positions
        return generate(model, self.renderer, batch, settings, seeds, collate=collate, positions=most)

    def answering_parts(self) -> LoadedModel:
        """The loaded model, as decoding in slots uses it."""
        return LoadedModel(
            name=self.checkpoint.name,
            model=self._language_model(),
            renderer=self.renderer,
            collate=self._collate,
            positions=self.max_positions,
            device=self.device,
            ordinary=self._ordinary_tokens,
        )

    def lm_head(self, *, bent: bool = False) -> torch.Tensor:
        """See `Backbone.lm_head`."""
        weight: torch.Tensor = self._language_model().get_output_embeddings().weight.detach()
        return weight if bent else self._logit_map.fold(self.checkpoint.name, weight)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """See `Backbone.project`."""
        with torch.inference_mode():
            return self.logits_of(states)

    def logits_of(self, states: torch.Tensor) -> torch.Tensor:
        """As `project`, with gradients."""
        head = self._language_model().get_output_embeddings()
        return self._logit_map(head(states.to(device=head.weight.device, dtype=head.weight.dtype)))

    def loaded(self) -> Any:
        """The model itself, with its weights, for training."""
        return self._loaded()

    @cached_property
    def _logit_map(self) -> LogitMap:
        """What the model does after its output embedding."""
        probe = torch.tensor([self._ordinary_tokens(PROBE_TOKENS)], device=self.device)
        return find_logit_map(self.checkpoint.name, self._language_model(), probe)

    def _language_model(self) -> Any:
        return self.language_model_of(self._loaded())

    def language_model_of(self, model: Any) -> Any:
        """The part of `model`, loaded or empty, that makes logits."""
        return model

    def _loaded(self) -> Any:
        self.load()
        return self._model

    def _collate(self, items: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        return collate(items, pad_id=self._pad_id(), dtype=self._torch_dtype, device=self.device)

    def _pad_id(self) -> int:
        pad: int | None = self.renderer.tokenizer.pad_token_id
        return next(p for p in (pad, 0, 1) if p is not None and p != self._image_token_id)

    def _ordinary_tokens(self, count: int) -> list[int]:
        """Token ids, spread over the vocabulary, none of them special or an image token."""
        special = {*self.renderer.tokenizer.all_special_ids, self._image_token_id}
        ordinary = [token for token in range(min(self.vocab_size, 4096)) if token not in special]
        return [ordinary[position] for position in np.linspace(0, len(ordinary) - 1, count).astype(int)]


class TextBackbone(HuggingFaceBackbone):
    """The backbone `text`: a causal language model that reads no image, in the official layout or as GGUF."""

    kind = "text"
    reads_images = False
    auto_class = transformers.AutoModelForCausalLM
    classes = MODEL_FOR_CAUSAL_LM_MAPPING

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`; `image` is ignored."""
        del image
        token_ids, roles = self.renderer.tokenize(self.renderer.render(conversation, answer=answer))
        self._refuse_unknown_tokens(token_ids)
        return Prepared(token_ids=token_ids, roles=roles)

    def _make_renderer(self) -> Renderer:
        tokenizer = load_tokenizer(self.checkpoint)
        name = self.checkpoint.name
        return Renderer(name=name, tokenizer=tokenizer, template=main_template(name, tokenizer.chat_template))


def _dtype_name(checkpoint: Checkpoint, config: Any, dtype: str) -> str:
    if dtype != "auto":
        return checked_dtype(dtype)
    if checkpoint.gguf is not None:
        return "bfloat16"
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    name = str(stated).removeprefix("torch.") if stated is not None else checkpoint.stored_dtype()
    if name not in DTYPES:
        message = f"{checkpoint.name}: the dtype {name!r} is none of {', '.join(DTYPES)}; choose one with --dtype."
        raise ModelError(message)
    return str(name)
