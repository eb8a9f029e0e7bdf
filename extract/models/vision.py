"""The backbone `vision`: any image-text-to-text model of transformers; the image comes before the first question."""

import inspect
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from agiqa.errors import AgiqaError, DataError, ModelError, first_line
from agiqa.extract.data.images import ImageSource, open_image
from agiqa.extract.data.items import Message
from agiqa.extract.models.batches import JOINED, PER_TOKEN, check_inputs
from agiqa.extract.models.checkpoints import Checkpoint
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.expansions import Expansions, expand_roles
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.loading import load_processor, quiet_transformers
from agiqa.extract.models.rendering import Rendered, Renderer, main_template, refuse_marks

_NO_INPUTS = ("input_ids", "attention_mask", "labels")
"""Outputs of a processor that are no image inputs; PaliGemma's adds labels for training."""
_MARK_NAME = re.compile(r"(image|img|boi).*(token|placeholder)$|^boi")


class VisionBackbone(HuggingFaceBackbone):
    """An image-text-to-text model with its processor, in the official layout."""

    kind = "vision"
    reads_images = True
    auto_class = transformers.AutoModelForImageTextToText
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    packages = (*HuggingFaceBackbone.packages, "pillow", "torchvision")

    processor: Any
    _marks: tuple[str, ...]
    """Words that no message may contain: the template's mark of an image, and the image token."""
    _accepted: frozenset[str]
    """Image inputs that the model's forward pass takes."""
    image_token_id: int
    """The token that the image's embeddings replace."""

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`; without an image the model reads the text alone."""
        refuse_marks(conversation, self._marks)
        rendered = self.renderer.render(conversation, image=image is not None, answer=answer)
        if image is None:
            text_ids, text_roles = self.renderer.tokenize(rendered)
            prepared = Prepared(token_ids=text_ids, roles=text_roles)
        else:
            prepared = self._processed(self.renderer, rendered, open_image(image), name=str(image))
        self._refuse_unknown_tokens(prepared.token_ids)
        return prepared

    def outline(
        self,
        conversation: Sequence[Message],
        image: ImageSource | None,
        *,
        size: tuple[int, int] | None = None,
        answer: bool = False,
    ) -> Prepared:
        """See `Backbone.outline`: the processor reads a black image in place of one of known size, see `Expansions`."""
        if image is None:
            return self.prepare(conversation, image, answer=answer)
        if size is None:
            return super().outline(conversation, image, answer=answer)
        refuse_marks(conversation, self._marks)
        rendered = self.renderer.render(conversation, image=True, answer=answer)
        text = self.renderer.tokenize(rendered)
        found = self._expansions.expanded(size, text)
        if found is None:
            black = self._processed(self.renderer, rendered, Image.new("RGB", size), name=str(image))
            found = black.token_ids, black.roles
            self._expansions.learn(size, text, found)
        self._refuse_unknown_tokens(found[0])
        return Prepared(token_ids=found[0], roles=found[1])

    def _processed(self, renderer: Renderer, rendered: Rendered, picture: Image.Image, *, name: str) -> Prepared:
        """The processor's output for a conversation with its image. Raises DataError if it refuses the image."""
        text_ids, text_roles = renderer.tokenize(rendered)
        with _refusals_of(self.checkpoint, name):
            encoded = self.processor(
                text=[rendered.text],
                images=[picture],
                return_tensors="pt",
                add_special_tokens=renderer.adds_special_tokens(rendered.text),
            )
        inputs = {key: value for key, value in encoded.items() if key not in _NO_INPUTS}
        check_inputs(self.checkpoint.name, inputs, self._accepted)
        token_ids = encoded["input_ids"][0].numpy().astype(np.int32)
        decode = self.processor.tokenizer.decode
        roles = expand_roles(self.checkpoint.name, text_ids, text_roles, token_ids, self.image_token_id, decode=decode)
        return Prepared(token_ids=token_ids, roles=roles, inputs=inputs)

    def provenance(self) -> dict[str, Any]:
        """See `Backbone.provenance`; includes the image processor, which differs with and without torchvision."""
        return {**super().provenance(), "image_processor": type(self.processor.image_processor).__name__}

    @property
    def _image_token_id(self) -> int | None:
        return self.image_token_id

    def _make_renderer(self) -> Renderer:
        self.processor = load_processor(self.checkpoint, self.config)
        self._expansions = Expansions()
        self._accepted = frozenset(inspect.signature(self.model_class.forward).parameters) | JOINED | PER_TOKEN
        self.image_token_id = _image_token_id(self.checkpoint.name, self.config, self.processor)
        filled = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        reason: AgiqaError | None = None
        for mark in _image_marks(self.processor, filled):
            try:
                renderer = self._try_mark(mark)
            except (DataError, ModelError) as error:
                if reason is None or isinstance(
                    error, DataError
                ):  # the template shows this mark, so its error is more specific
                    reason = error
                continue
            self._marks = (mark, filled)
            return renderer
        raise ModelError(str(reason)) from reason

    def _try_mark(self, mark: str) -> Renderer:
        """The renderer with `mark`. Raises DataError or ModelError if template or processor do not know the mark."""
        tokenizer = self.processor.tokenizer
        name, found = self.checkpoint.name, getattr(self.processor, "chat_template", None) or tokenizer.chat_template
        renderer = Renderer(name=name, tokenizer=tokenizer, template=main_template(name, found), image_token=mark)
        rendered = renderer.render([Message(role="user", content="?")], image=True)
        self._processed(renderer, rendered, Image.new("RGB", (64, 64)), name="a black image of 64 x 64 pixels")
        return renderer


def _image_marks(processor: Any, filled: str) -> Iterator[str]:
    """Words that may mark an image in a text: those that `processor` states, its `image_token` first.

    The last is `filled`, the image token, which most families write; Gemma 3 writes another.
    """
    stated = (*vars(processor), *processor.tokenizer.special_tokens_map)
    names = [name for name in stated if _MARK_NAME.search(name)]
    seen: set[str] = set()
    for name in ("image_token", "image_placeholder", "boi_token", *names, ""):
        for holder in (processor, processor.tokenizer):
            found = getattr(holder, name, None) if name else filled
            mark = str(found) if isinstance(found, str | AddedToken) else ""
            if mark and mark not in seen:
                seen.add(mark)
                yield mark


@contextmanager
def _refusals_of(checkpoint: Checkpoint, image: str) -> Generator[None]:
    """Turn what a processor raises within the block into a DataError: some refuse images of extreme shapes."""
    try:
        with quiet_transformers():
            yield
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        message = f"{image}: the image processor of {checkpoint.name} cannot prepare it ({first_line(error)})."
        raise DataError(message) from error


def _image_token_id(name: str, config: Any, processor: Any) -> int:
    """The id of the image token, under the names that transformers' configurations and processors use."""
    for holder, key in ((config, "image_token_id"), (config, "image_token_index"), (processor, "image_token_id")):
        found = getattr(holder, key, None)
        if isinstance(found, int):
            return found
    message = f"{name}: neither its configuration nor its processor says which token stands for the image."
    raise ModelError(message)
