"""Tiny random models in the official layout (config.json, model.safetensors, tokenizer.json, templates)."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from agiqa.extract.models.loading import quiet_transformers

TEXT_TEMPLATE = (
    "{{ bos_token }}<|system|>\nYou rate images.</s>\n{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim + '</s>\n' }}{% endfor %}"
)
"""Writes BOS itself, a system prompt, and trimmed contents."""

DEEP_BLOCKS = 5

PARTS_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
)
"""For processors: typed parts, IMAGE standing for the model's own marks; BOS is left to the tokenizer."""


def make_tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS in front, with `extra` special tokens."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "please rate the image quality describe what you see a blurry dog is good fair poor <|user|> <|assistant|>"
    bpe.train_from_iterator([words] * 4, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def widths(vocab_size: int) -> dict[str, Any]:
    """The sizes of a tiny text model."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


def save(
    folder: Path, model_class: Any, config: Any, saver: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a random model of `config`, and what `saver` saves."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with quiet_transformers():
            model = model_class(config)
            for weight in model.parameters():  # the usual tiny scale would hide mistakes in near-zero logits
                weight.data.mul_(4 if weight.ndim > 1 else 1)
                if weight.ndim > 1 and not weight.any():  # as some projectors of images begin
                    torch.nn.init.normal_(weight, std=0.1)
            for name, weight in model.named_parameters():  # gates start closed, and an image behind one is unseen
                if name.endswith("_gate"):
                    weight.data.fill_(0.5)
            model.to(dtype).save_pretrained(folder)
            saver.save_pretrained(folder)
    finally:
        torch.random.set_rng_state(state)
    return folder


def write_text_checkpoint(
    folder: Path, *, template: str | None = TEXT_TEMPLATE, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """A Llama with a chat template; `template=None` leaves it without one."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return save(folder, LlamaForCausalLM, LlamaConfig(**widths(len(tokenizer))), tokenizer, seed=seed, dtype=dtype)


def write_deep_checkpoint(folder: Path) -> Path:
    """A Llama of DEEP_BLOCKS blocks, so that it has layers to choose from."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    config = LlamaConfig(**{**widths(len(tokenizer)), "num_hidden_layers": DEEP_BLOCKS})
    return save(folder, LlamaForCausalLM, config, tokenizer)


def roomy(folder: Path) -> Path:
    """The checkpoint with enough positions for whole conversations in tokens of one or two letters."""
    config = json.loads((folder / "config.json").read_text())
    (config.get("text_config") or config)["max_position_embeddings"] = 2048
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_softcapped_checkpoint(folder: Path) -> Path:
    """A Gemma 2, which caps its logits at +-30."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    config = Gemma2Config(**widths(len(tokenizer)), head_dim=16, final_logit_softcapping=30.0)
    return save(folder, Gemma2ForCausalLM, config, tokenizer)


def tower() -> dict[str, int]:
    """The sizes of a tiny vision model: 32 x 32 pixels are 4 x 4 patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }


def write_vision_checkpoint(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A Llava: a 32 x 32 image is 16 image tokens."""
    tokenizer = make_tokenizer("<image>")
    template = PARTS_TEMPLATE.replace("IMAGE", "<image>\n")
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower()),
        text_config=LlamaConfig(**widths(len(tokenizer))),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return save(folder, LlavaForConditionalGeneration, config, processor, dtype=dtype)


def write_tiled_checkpoint(folder: Path) -> Path:
    """An Idefics 3: images over 32 x 32 are cut into tiles with row and column marks; 4 image tokens each."""
    marks = [f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)]
    tokenizer = make_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *marks)
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=PARTS_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = Idefics3Config(
        vision_config=tower(),
        text_config=LlamaConfig(**widths(len(tokenizer))),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=3,
    )
    return save(folder, Idefics3ForConditionalGeneration, config, processor)


class Parts:
    """Saves tokenizer and image processor side by side, as checkpoints with a video processor are published.

    `settings` are those of the processor itself, for processor_config.json.
    """

    def __init__(self, *parts: Any, **settings: Any) -> None:
        self.parts = parts
        self.settings = settings

    def save_pretrained(self, folder: Path) -> None:
        for part in self.parts:
            part.save_pretrained(folder)
        if self.settings:
            (folder / "processor_config.json").write_text(json.dumps(self.settings))


def write_grid_checkpoint(folder: Path) -> Path:
    """A Qwen2-VL: patches of all images in one row, image_grid_thw beside them, and a processor that wants video."""
    tokenizer = make_tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer.chat_template = PARTS_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in [("image", "<|image_pad|>"), ("video", "<|video_pad|>")]
    }
    ids |= {
        f"vision_{edge}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{edge}|>") for edge in ("start", "end")
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**widths(len(tokenizer)), "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        **ids,
    )
    return save(folder, Qwen2VLForConditionalGeneration, config, Parts(tokenizer, images))
