"""The demo's image-text-to-text model: a small LLaVA in the official layout with seeded RANDOM weights.

Nothing in it was ever trained, so nothing in it understands language or quality. The demo shows the
machinery: extraction, store, heads. It works because random features of an image still carry how sharp,
noisy and blocky the image is (`agiqa.bench.demo.filters`) to the last layer, where a trained head reads it.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from agiqa.bench.demo.canvas import SIDE
from agiqa.bench.demo.filters import UNITS_PER_FILTER, draw_filters, unit_weights, vote_weights
from agiqa.bench.demo.tokenizer import CHAT_TEMPLATE, END, IMAGE, PAD, START, VOCABULARY, build_tokenizer

PATCH = 24
"""Side of a patch in pixels, three JPEG blocks; an image becomes (192 / 24)^2 = 64 tokens."""
WIDTH = 192
"""Hidden size of the vision tower and of the language model."""
_VOTING = "vision_tower.encoder.layers.0.mlp."
_GAINS = {"fc1.weight": 1.5}
_OFFSETS = {"fc1.bias": 0.5, "linear_1.bias": 0.5}
_SCALES = {
    "class_embedding": 0.1,
    "position_embedding.weight": 0.05,
    "embed_tokens.weight": 0.5,
}
"""Standard deviations of embeddings; text is kept quieter than the image."""


def build_demo_model(out: Path, *, seed: int = 0) -> None:
    """Write the checkpoint folder `out`: config, safetensors, tokenizer with chat template, image processor.

    AutoModelForImageTextToText and AutoProcessor load it offline, with torchvision or without. Weights are
    float32, drawn from `seed`; the same seed gives the same bytes.
    """
    tokenizer = build_tokenizer()
    model = LlavaForConditionalGeneration(_config(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, generator))
        feed_forward = model.get_submodule("model." + _VOTING.rstrip("."))
        weight, bias = vote_weights(WIDTH, generator)
        feed_forward.get_parameter("fc1.weight").copy_(unit_weights(WIDTH))
        feed_forward.get_parameter("fc1.bias").zero_()
        feed_forward.get_parameter("fc2.weight").copy_(weight)
        feed_forward.get_parameter("fc2.bias").copy_(bias)
    model.save_pretrained(out)
    _processor(tokenizer).save_pretrained(out)


def _config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The shapes: two vision layers and three language layers of width 192."""
    vocabulary = tokenizer.get_vocab()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=UNITS_PER_FILTER * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="relu6",
        # Large, so that the norms leave the strength of weak responses as it is.
        layer_norm_eps=1.0,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=vocabulary[PAD],
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary[IMAGE],
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        dtype="float32",
    )


def _processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Tokenizer and image processor; pictures of the demo's own size reach the model pixel by pixel."""
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The value of one parameter: norms do nothing, matrices keep the scale of their input unless stated."""
    if "norm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith("patch_embedding.weight"):
        return draw_filters(shape[0], PATCH, generator)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return noise * _match(name, _OFFSETS, 0.0)
    scale = _match(name, _SCALES, 0.0)
    return noise * (scale or _match(name, _GAINS, 1.0) * shape[-1] ** -0.5)


def _match(name: str, table: dict[str, float], default: float) -> float:
    """The entry of `table` whose key `name` ends with."""
    return next((value for ending, value in table.items() if name.endswith(ending)), default)
