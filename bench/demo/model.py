"""The demo's image-text-to-text model: a small LLaVA in the official layout with seeded RANDOM weights.

Nothing in it was ever trained, so it understands neither language nor quality. A head can still learn from it, because
the first vision layer is laid out to respond to sharpness, noise and block edges. A plain random patch embedding
responds almost only to brightness and large shapes. Here each random filter is local, has zero mean and sees one scale,
and its gain compensates for the low energy that images have at that scale. The units behind the filters apply relu6 at
several gains, in pairs of opposite sign (the concatenated ReLU of Shang et al., 2016). Together they form a soft
histogram of the response strength of each kind of filter.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from agiqa.bench.demo.scenes import SCENES, SIDE
from agiqa.extract.data.templates import templates
from agiqa.extract.models.loading import quiet_transformers

PATCH = 24
"""Side of a patch in pixels, three JPEG blocks; an image becomes (192 / 24)^2 = 64 tokens."""
WIDTH = 192
"""Hidden size of the vision tower and of the language model."""
VOCABULARY = 768
"""Entries of the tokenizer and rows of the language-model head."""
PAD, START, END, IMAGE = "<|pad|>", "<|im_start|>", "<|im_end|>", "<image>"

FILTER_KINDS = tuple((cell, coloured) for cell in (1, 2, 4) for coloured in (False, True))
"""Scale in pixels, and whether filters see colour differences only or brightness only; filter k has kind k modulo 6."""
_GAINS = (2.0, 4.4, 9.6, 20.9, 45.7, 100.0)
_VOTES = 16.0
"""Standard deviation, over channels, of the largest shift that the votes of all kinds together give a channel."""
_OWN_VIEW = 0.4
"""Standard deviation of a unit's own contribution, beside the vote of its kind."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_demo_model(out: Path, *, seed: int = 0) -> None:
    """Write the checkpoint folder `out`: config, safetensors, tokenizer with chat template, image processor.

    AutoModelForImageTextToText and AutoProcessor load it offline, with torchvision or without. Weights are float32,
    drawn from `seed`; the same seed gives the same bytes.
    """
    tokenizer = build_tokenizer()
    model = LlavaForConditionalGeneration(_config(tokenizer.get_vocab()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, generator))
        first = model.get_submodule("model.vision_tower.encoder.layers.0.mlp")
        values = (_unit_weights(), torch.zeros(len(_unit_weights())), *_vote_weights(generator))
        for name, value in zip(("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"), values, strict=True):
            first.get_parameter(name).copy_(value)
    with quiet_transformers():
        model.save_pretrained(out)
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(out)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the project's questions and the demo's prompts; every call gives the same."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="right",
        model_max_length=2048,
    )


def _corpus() -> Iterator[str]:
    """Every question, rating word, role and prompt of the demo."""
    for template in templates().values():
        yield from [template.describe, template.rate, template.one_round] * 20
    for word in ("user", "assistant", "bad", "poor", "fair", "good", "excellent"):
        yield from [word, f" {word}"] * 20
    yield from (scene.prompt() for scene in SCENES)


def _config(vocabulary: dict[str, int]) -> LlavaConfig:
    """Two vision layers and three language layers of width 192."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=len(_unit_weights()),
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="relu6",
        layer_norm_eps=1.0,  # large, so that the norms keep the strength of weak responses
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


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """The value of a parameter outside the voting layer.

    Norms have weight 1 and bias 0; matrices keep the scale of their input.
    """
    if name.endswith("patch_embedding.weight"):
        return draw_filters(len(parameter), generator)
    if "norm" in name or name.endswith("bias"):
        return torch.full_like(parameter, float("norm" in name and name.endswith("weight")))
    scale = 0.05 if "embedding" in name else 0.5 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
    return scale * torch.randn(parameter.shape, generator=generator)


def draw_filters(count: int, generator: torch.Generator) -> Tensor:
    """Random patch filters (count, 3, PATCH, PATCH), float32: high-passed noise under a bell-shaped window."""
    filters = torch.empty(count, 3, PATCH, PATCH)
    for index in range(count):
        cell, coloured = FILTER_KINDS[index % len(FILTER_KINDS)]
        cells = PATCH // cell
        noise = torch.randn(1, 3 if coloured else 1, cells, cells, generator=generator).expand(1, 3, -1, -1)
        if coloured:
            noise = noise - noise.mean(1, keepdim=True)
        noise = noise - nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
        noise = nn.functional.interpolate(noise, size=(PATCH, PATCH), mode="bilinear")[0]
        centre = 2 * cell + (PATCH - 4 * cell) * torch.rand(2, 1, generator=generator)
        bells = torch.exp(-((torch.arange(PATCH) + 0.5 - centre) ** 2) / (2 * (1.5 * cell) ** 2))
        window = bells[0][:, None] * bells[1][None, :]
        windowed = window * (noise - (noise * window).sum((1, 2), keepdim=True) / window.sum())
        filters[index] = windowed * ((3.0 if coloured else 1.5) / cell / windowed.norm())
    return filters


def _unit_weights() -> Tensor:
    """Weights (units, WIDTH) from the filters to the units: every filter with both signs at every gain."""
    return torch.cat([sign * gain * torch.eye(WIDTH) for gain in _GAINS for sign in (1.0, -1.0)])


def _vote_weights(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights (WIDTH, units) and bias (WIDTH,) from the units back to the stream.

    Units of one kind of filter and one gain share a random direction, so that the randomness of single filters
    averages out. With the bias, a typical image, whose units reach 0.4 of their limit, gives about zero.
    """
    kinds = len(FILTER_KINDS)
    groups = kinds * len(_GAINS)
    kind = torch.arange(WIDTH) % kinds
    group = torch.cat([kinds * gain + kind for gain in range(len(_GAINS)) for _ in range(2)])
    directions = torch.randn(WIDTH, groups, generator=generator) * _VOTES / math.sqrt(groups)
    own = torch.randn(WIDTH, len(group), generator=generator) * _OWN_VIEW / math.sqrt(WIDTH)
    return (directions[:, group] * kinds / WIDTH + own) / 6.0, -0.4 * directions.sum(1)
