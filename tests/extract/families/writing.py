"""Writes tiny random checkpoints of families in their official layout."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from agiqa.extract.models.loading import quiet_transformers
from tests.extract.families.sizes import tiny_config
from tests.extract.families.specs import FAMILIES
from tests.extract.tiny_models import PARTS_TEMPLATE, TEXT_TEMPLATE, Parts, make_tokenizer, save


def write_vision_family(folder: Path, model_type: str) -> Path:
    """A checkpoint of an image-text-to-text family."""
    family = FAMILIES[model_type]
    tokenizer = make_tokenizer(*family.tokens)
    tokenizer._set_model_specific_special_tokens(special_tokens=dict(family.names))
    tokenizer.init_kwargs |= {"extra_special_tokens": dict(family.names)} if family.names else {}
    tokenizer.chat_template = PARTS_TEMPLATE.replace("IMAGE", family.image)
    own = {family.id_key: family.filled, **family.config}
    config_class: Any = CONFIG_MAPPING[model_type]
    config: Any = tiny_config(config_class, len(tokenizer), _with_ids(own, tokenizer.get_vocab()))
    images = image_processor(family.images)(**family.image_settings)
    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    with quiet_transformers():
        return save(
            folder, model_class, config, Parts(tokenizer, images, processor_class=family.processor, **family.settings)
        )


def write_text_family(folder: Path, model_type: str) -> Path:
    """A checkpoint of a causal language model."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    config_class: Any = CONFIG_MAPPING[model_type]
    config: Any = tiny_config(config_class, len(tokenizer), {})
    return save(folder, MODEL_FOR_CAUSAL_LM_MAPPING[config_class], config, tokenizer)


def image_processor(name: str) -> Any:
    """The image processor that runs on Pillow, by module.class; where there is none, the one that needs torchvision."""
    module, name = name.split(".")
    stem = f"transformers.models.{module}.image_processing_"
    try:
        return getattr(importlib.import_module(f"{stem}pil_{module}"), f"{name}Pil")
    except ModuleNotFoundError:
        return getattr(importlib.import_module(f"{stem}{module}"), name)


def _with_ids(settings: Any, vocabulary: Mapping[str, int]) -> Any:
    """`settings` with ids in place of special tokens."""
    if isinstance(settings, Mapping):
        return {name: _with_ids(value, vocabulary) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_with_ids(value, vocabulary) for value in settings]
    special = isinstance(settings, str) and settings in vocabulary and not settings.isalpha()
    return vocabulary[settings] if special else settings
