"""The description of a family of image-text-to-text models, and settings that many families share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to write a tiny checkpoint of one family."""

    image: str = "<image>"
    """What its chat template writes for an image."""
    tokens: tuple[str, ...] = ("<image>",)
    """Special tokens of its tokenizer."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The tokens that have names in the tokenizer, by name."""
    filled: str = "<image>"
    """The image token."""
    id_key: str = "image_token_id"
    """The configuration's setting that holds its id."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the configuration; a token stands for its id."""
    images: str = ""
    """The image processor: module.class below transformers.models, without the ending Pil."""
    image_settings: Mapping[str, Any] = field(default_factory=dict)
    processor: str = ""
    """The processor class, as processor_config.json states it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the processor."""
    torchvision: bool = False
    """Whether all image processors of the family need torchvision."""


SQUARE = {"height": 32, "width": 32}
CLIP = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
LLAMA = {"model_type": "llama"}
QWEN = {"model_type": "qwen2"}
CLIP_TOWER = {"model_type": "clip_vision_model"}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_IDS = {
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_IMAGE = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "tokens": QWEN_TOKENS,
    "filled": "<|image_pad|>",
    "images": "qwen2_vl.Qwen2VLImageProcessor",
}
QWEN3_VISION = {
    "out_hidden_size": 32,
    "patch_size": 16,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 16,
}
GLM_TOKENS = (
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
GLM_IDS = {
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
GLM_VISION = {"patch_size": 14, "out_hidden_size": 32, "intermediate_size": 64, "image_size": 56}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}
