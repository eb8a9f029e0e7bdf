"""Tiny random image-text-to-text models of many families, each in its official layout."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.extract.tiny_models import PARTS_TEMPLATE, Parts, make_tokenizer, save, tower, widths


def _with_names(tokenizer: Any, **names: str) -> Any:
    """`tokenizer` with further names of special tokens, as tokenizer_config.json states them."""
    tokenizer._set_model_specific_special_tokens(special_tokens=names)
    tokenizer.init_kwargs |= {"extra_special_tokens": names}
    return tokenizer


def write_qwen25(folder: Path) -> Path:
    """A Qwen2.5-VL: windowed attention over the patches of all images in one row."""
    tokenizer = make_tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer.chat_template = PARTS_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    id_of = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **widths(len(tokenizer)),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 28,
            "fullatt_block_indexes": [1],
        },
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
    )
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=84 * 84)
    return save(folder, Qwen2_5_VLForConditionalGeneration, config, Parts(tokenizer, images))


def write_smolvlm(folder: Path) -> Path:
    """A SmolVLM: tiles with row and column marks; its processor wants video, and the package num2words."""
    marks = [f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)]
    tokenizer = make_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *marks)
    tokenizer.chat_template = PARTS_TEMPLATE.replace("IMAGE", "<image>")
    config = SmolVLMConfig(
        vision_config=tower(),
        text_config={**widths(len(tokenizer)), "model_type": "llama"},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=3,
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    parts = Parts(tokenizer, images, processor_class="SmolVLMProcessor", image_seq_len=4)
    return save(folder, SmolVLMForConditionalGeneration, config, parts)


def write_internvl(folder: Path) -> Path:
    """An InternVL: the image is cut into up to 3 tiles and a thumbnail, 4 image tokens each."""
    tokenizer = _with_names(
        make_tokenizer("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    tokenizer.chat_template = PARTS_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n")
    config = InternVLConfig(
        vision_config={**tower(), "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={**widths(len(tokenizer)), "model_type": "qwen2"},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=3)
    parts = Parts(tokenizer, images, processor_class="InternVLProcessor", image_seq_length=4)
    return save(folder, InternVLForConditionalGeneration, config, parts)


def write_mllama(folder: Path) -> Path:
    """A Llama 3.2 Vision: one image token, and cross-attention from every token to up to 4 tiles."""
    tokenizer = make_tokenizer("<|python_tag|>", "<|image|>")  # the embedding is 8 rows longer than the vocabulary
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
        text_config={
            **widths(len(tokenizer)),
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    images = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    template = "{{ bos_token }}" + PARTS_TEMPLATE.replace("IMAGE", "<|image|>")
    processor = MllamaProcessor(images, tokenizer, chat_template=template)
    return save(folder, MllamaForConditionalGeneration, config, processor)


def write_minicpm46(folder: Path) -> Path:
    """A MiniCPM-V 4.6: slices of one packed row of patches, merged 16 to 1; a text model with linear attention."""
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    tokenizer = _with_names(make_tokenizer(*names.values()), **names)
    tokenizer.chat_template = PARTS_TEMPLATE.replace("IMAGE", "<|image_pad|>")
    config = MiniCPMV4_6Config(
        vision_config={**tower(), "num_hidden_layers": 3, "image_size": 224, "patch_size": 14},
        text_config={
            **widths(len(tokenizer)),
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        insert_layer_id=1,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    images = MiniCPMV4_6ImageProcessorPil(scale_resolution=56, patch_size=14, max_slice_nums=4)
    parts = Parts(tokenizer, images, processor_class="MiniCPMV4_6Processor")
    return save(folder, MiniCPMV4_6ForConditionalGeneration, config, parts, dtype=torch.float32)
