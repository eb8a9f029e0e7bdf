"""The published configuration files of a MiniCPM-Llama3-V-2.5 checkpoint, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import transformers
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig

from agiqa.errors import ModelError
from agiqa.extract.models.checkpoints import Checkpoint

MODEL_TYPE = "minicpmv"
VERSION = "2.5"
_PREPROCESSOR = "preprocessor_config.json"
_LANGUAGE = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)
"""Entries of config.json that describe the Llama."""
_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}
_VISION = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")


@dataclass(frozen=True, kw_only=True)
class MiniCPMConfig:
    """What the model is made of and how it sees images."""

    language: Mapping[str, Any]
    """Arguments of transformers' LlamaConfig."""
    vision: Mapping[str, Any]
    """Arguments of transformers' Idefics2VisionConfig."""
    queries: int
    """Tokens that stand for one slice."""
    slices: int
    """Most slices of one image, the overview aside; 1 cuts nothing."""
    resolution: int
    """A slice has about this number of pixels, squared."""
    patch: int
    """Side of a patch, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    marks: Mapping[str, str]
    """The tokens im_start, im_end, slice_start, slice_end and unk."""
    dtype: str | None
    """Of the published weights."""
    model_type: ClassVar[str] = MODEL_TYPE

    def get_text_config(self) -> Any:
        """transformers' configuration of the Llama, under the name that its own composite ones have for it."""
        return transformers.LlamaConfig(**self.language, **_ATTENTION)

    def get_vision_config(self) -> Any:
        """transformers' configuration of the vision tower."""
        return Idefics2VisionConfig(**self.vision, **_ATTENTION)


def read_config(checkpoint: Checkpoint) -> MiniCPMConfig:
    """The configuration of `checkpoint`. Raises ModelError for another version and for entries that are missing."""
    raw = checkpoint.raw_config
    version = str(raw.get("version", "unknown"))
    if version != VERSION:
        message = (
            f"{checkpoint.name}: MiniCPM-V of version {version}; of those that need remote code, agiqa implements "
            f"{VERSION} only (MiniCPM-Llama3-V-2.5, the base of the published M3-AGIQA adapters)."
        )
        raise ModelError(message)
    images = checkpoint.read_settings(_PREPROCESSOR, "what says how images are cut")
    try:
        vision = {name: raw["vision_config"][name] for name in _VISION}
        vision["num_hidden_layers"] -= bool(raw.get("drop_vision_last_layer", False))
        return MiniCPMConfig(
            language={name: raw[name] for name in _LANGUAGE if name in raw},
            vision=vision,
            queries=int(raw["query_num"]),
            slices=int(images["max_slice_nums"]) if raw.get("slice_mode", True) else 1,
            resolution=int(images["scale_resolution"]),
            patch=int(images["patch_size"]),
            mean=tuple(images["norm_mean"]),
            std=tuple(images["norm_std"]),
            marks={name: images[name] for name in ("im_start", "im_end", "slice_start", "slice_end", "unk")},
            dtype=raw.get("torch_dtype"),
        )
    except (KeyError, TypeError, ValueError) as error:
        message = f"{checkpoint.name}: config.json or {_PREPROCESSOR} in {checkpoint.folder} lacks {error}."
        raise ModelError(message) from error
