"""The backbone `vision`: any transformers image-text-to-text model; it reads the image before the first question."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from agiqa.errors import DataError, ModelError, first_line
from agiqa.extract.backbones.alignment import expand_roles
from agiqa.extract.backbones.batching import check_inputs
from agiqa.extract.backbones.contract import Prepared
from agiqa.extract.backbones.huggingface import HuggingFaceBackbone
from agiqa.extract.backbones.loading import load_processor, quiet_transformers
from agiqa.extract.backbones.rendering import Renderer, refuse_marks
from agiqa.extract.checkpoints import Checkpoint
from agiqa.extract.images import open_image
from agiqa.extract.items import Message


class VisionBackbone(HuggingFaceBackbone):
    """An image-text-to-text model with its processor, in the official layout."""

    kind = "vision"
    reads_images = True
    auto_class = transformers.AutoModelForImageTextToText
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    packages = (*HuggingFaceBackbone.packages, "pillow", "torchvision")

    processor: Any
    image_token_id: int
    """The token that an image's embeddings take the place of."""

    def prepare(self, conversation: Sequence[Message], image: Path | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`; without an image the model reads the text alone."""
        refuse_marks(conversation, [self.renderer.image_token])
        rendered = self.renderer.render(conversation, image=image is not None, answer=answer)
        text_ids, text_roles = self.renderer.tokenize(rendered)
        self.vocabulary.refuse_strangers(text_ids)
        if image is None:
            return Prepared(token_ids=text_ids, roles=text_roles)
        picture = open_image(image)
        with _refusals_of(self.checkpoint, image):
            encoded = self.processor(
                text=[rendered.text],
                images=[picture],
                return_tensors="pt",
                add_special_tokens=self.renderer.adds_special_tokens(rendered.text),
            )
        inputs = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask")}
        check_inputs(self.checkpoint.name, inputs)
        token_ids = encoded["input_ids"][0].numpy().astype(np.int32)
        roles = expand_roles(self.checkpoint.name, text_ids, text_roles, token_ids, self.image_token_id)
        return Prepared(token_ids=token_ids, roles=roles, inputs=inputs)

    def provenance(self) -> dict[str, Any]:
        """See `Backbone.provenance`; names the image processor too, which differs with and without torchvision."""
        return {**super().provenance(), "image_processor": type(self.processor.image_processor).__name__}

    @property
    def _image_token_id(self) -> int | None:
        return self.image_token_id

    def _make_renderer(self) -> Renderer:
        self.processor = load_processor(self.checkpoint, self.config)
        tokenizer = self.processor.tokenizer
        self.image_token_id = _image_token_id(self.checkpoint.name, self.config, self.processor)
        # Gemma 3 writes one token into the text and fills another one with the image.
        written = getattr(self.processor, "boi_token", None) or tokenizer.convert_ids_to_tokens(self.image_token_id)
        template = getattr(self.processor, "chat_template", None) or tokenizer.chat_template
        return Renderer(name=self.checkpoint.name, tokenizer=tokenizer, template=template, image_token=written)


@contextmanager
def _refusals_of(checkpoint: Checkpoint, image: Path) -> Generator[None]:
    """Quiet, and whatever a processor raises inside is a DataError: some refuse images of extreme shapes, in words."""
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
