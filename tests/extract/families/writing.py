"""Writes tiny random checkpoints of families in their official layout, with every known size made small."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from agiqa.extract.models.loading import quiet_transformers
from tests.extract.families.family import Family
from tests.extract.families.grids import GRIDS
from tests.extract.families.squares import SQUARES
from tests.extract.tiny_models import PARTS_TEMPLATE, TEXT_TEMPLATE, Parts, make_tokenizer, save, widths

FAMILIES: dict[str, Family] = {**SQUARES, **GRIDS}
"""The image-text-to-text families that are tried."""

TEXT: dict[str, Any] = {
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 2,
}


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
    """The image processor module.class: the one that runs on Pillow or, without one, the one that needs torchvision."""
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


def tiny(config_class: type[PreTrainedConfig], vocab_size: int, *, vision: bool = False, **own: Any) -> dict[str, Any]:
    """The settings of a tiny `config_class`, without its inner configurations; `own` override them."""
    with quiet_transformers():
        usual = config_class()
    known = VISION if vision else {**widths(vocab_size), **TEXT}
    return {name: value for name, value in known.items() if _has(usual, name) and _settable(config_class, name)} | own


def _has(usual: PreTrainedConfig, name: str) -> bool:
    """Whether a default configuration has the setting, as a number."""
    try:
        return isinstance(getattr(usual, name, None), int)
    except RuntimeError:  # it differs from layer to layer
        return True


def _settable(config_class: type[PreTrainedConfig], name: str) -> bool:
    """Whether the setting can be set, and is not computed from others."""
    computed = getattr(config_class, name, None)
    return not isinstance(computed, property) or computed.fset is not None


def tiny_config(config_class: type[PreTrainedConfig], vocab_size: int, own: Mapping[str, Any]) -> PreTrainedConfig:
    """A tiny configuration with its inner ones; `own` overrides settings, those of inner ones by their names."""
    own = dict(own)
    inner: dict[str, Any] = {}
    for name, part in config_class.sub_configs.items():
        given = own.pop(name, {})
        if given is None:
            inner[name] = None
            continue
        vision = "text" not in name and "llm" not in name
        kind = given.get("model_type")
        part = CONFIG_MAPPING[kind] if kind else _usual(config_class, name, part)
        inner[name] = {**tiny(part, vocab_size, vision=vision), **given}
    outer = {} if inner else tiny(config_class, vocab_size)
    with quiet_transformers():
        return config_class(**outer, **inner, **own)


def _usual(config_class: type[PreTrainedConfig], name: str, part: Any) -> type[PreTrainedConfig]:
    """The class of an inner configuration, by default if any class fits."""
    if hasattr(part, "from_pretrained") and "Auto" not in part.__name__:
        found: type[PreTrainedConfig] = part
        return found
    with quiet_transformers():
        usual = getattr(config_class(), name)
    return type(usual)
