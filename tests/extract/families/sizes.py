"""Tiny sizes for any configuration of transformers: each setting that it has under a known name is made small."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from agiqa.extract.models.loading import quiet_transformers
from tests.extract.tiny_models import widths

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


def tiny(config_class: type[PreTrainedConfig], vocab_size: int, *, vision: bool = False, **own: Any) -> dict[str, Any]:
    """The settings of a tiny `config_class`, without its inner configurations; `own` come on top."""
    with quiet_transformers():
        usual = config_class()
    known = VISION if vision else {**widths(vocab_size), **TEXT}
    return {name: value for name, value in known.items() if _has(usual, name) and _settable(config_class, name)} | own


def _has(usual: PreTrainedConfig, name: str) -> bool:
    """Whether a usual configuration has the setting, as a number."""
    try:
        return isinstance(getattr(usual, name, None), int)
    except RuntimeError:  # it differs from layer to layer
        return True


def _settable(config_class: type[PreTrainedConfig], name: str) -> bool:
    """Whether the setting is one, and not computed from others."""
    computed = getattr(config_class, name, None)
    return not isinstance(computed, property) or computed.fset is not None


def tiny_config(config_class: type[PreTrainedConfig], vocab_size: int, own: Mapping[str, Any]) -> PreTrainedConfig:
    """A tiny configuration with its inner ones; in `own`, a mapping under an inner one's name is for that one."""
    own = dict(own)
    inner: dict[str, Any] = {}
    for name, part in config_class.sub_configs.items():
        given = own.pop(name, {})
        if given is None:
            inner[name] = None
            continue
        vision = "text" not in name and "llm" not in name
        kind = given.get("model_type")
        part = _class_of(kind) if kind else _usual(config_class, name, part)
        inner[name] = {**tiny(part, vocab_size, vision=vision), **given}
    outer = {} if inner else tiny(config_class, vocab_size)
    with quiet_transformers():
        return config_class(**outer, **inner, **own)


def _class_of(kind: str) -> type[PreTrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: type[PreTrainedConfig] = CONFIG_MAPPING[kind]
    return found


def _usual(config_class: type[PreTrainedConfig], name: str, part: Any) -> type[PreTrainedConfig]:
    """The class of an inner configuration; where any fits, the one that comes by default."""
    if hasattr(part, "from_pretrained") and "Auto" not in part.__name__:
        found: type[PreTrainedConfig] = part
        return found
    with quiet_transformers():
        usual = getattr(config_class(), name)
    return type(usual)
