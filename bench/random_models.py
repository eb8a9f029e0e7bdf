"""Backbones of a real shape with random weights, which are made on the device and never lie on a disk."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Idefics3Config, LlamaConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from agiqa.bench.demo_tokenizer import CHAT_TEMPLATE, END, IMAGE, PAD, build_tokenizer
from agiqa.extract import Backbone
from agiqa.extract.backbones.huggingface import DTYPES
from agiqa.extract.backbones.loading import load_config, quiet_transformers
from agiqa.extract.backbones.vision import VisionBackbone
from agiqa.extract.checkpoints import Checkpoint

_TILES_PER_SIDE = 2
_MARKS = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
_LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
}
_TINY_LANGUAGE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}
_TINY_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}

Shape = Callable[..., Backbone]
"""`shape(folder, device="cuda")`: a backbone whose settings lie in `folder`, where the first call writes them."""


class RandomWeights(VisionBackbone):
    """An image-text-to-text model that draws its weights on the device instead of reading them."""

    def provenance(self) -> dict[str, Any]:
        """As ever, with no hash of weights."""
        self._hashes = {"weights": "random"}
        return super().provenance()

    def load(self) -> None:
        """Draw the weights. Idempotent."""
        if self._model is not None:
            return
        torch.manual_seed(0)
        with quiet_transformers(), torch.device(self.device):
            model = self.auto_class.from_config(
                self.config, dtype=DTYPES[self.logical_dtype], attn_implementation=self.attention
            )
        self._model = model.to(self.device).eval().requires_grad_(requires_grad=False)


def idefics3(folder: Path, *, language: Mapping[str, Any], vision: Mapping[str, Any], device: str = "auto") -> Backbone:
    """Idefics 3, in bfloat16 on a GPU: a 512 x 512 image is four tiles and a fifth of the whole."""
    if not (folder / "config.json").exists():
        _write_settings(folder, language, vision)
    checkpoint = Checkpoint(name=folder.name, folder=folder)
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return RandomWeights(checkpoint, load_config(checkpoint), dtype="bfloat16" if on_gpu else "float32", device=device)


def _write_settings(folder: Path, language: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    side, per_side = vision["image_size"], vision["image_size"] // vision["patch_size"]
    scale = max(2, per_side // 8)
    rows = range(1, _TILES_PER_SIDE + 1)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([*_MARKS, *(f"<row_{row}_col_{col}>" for row in rows for col in rows)], special_tokens=True)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": _TILES_PER_SIDE * side}, max_image_size={"longest_edge": side}
    )
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=(per_side // scale) ** 2, chat_template=CHAT_TEMPLATE
    )
    ids = tokenizer.get_vocab()
    text = LlamaConfig(**language, bos_token_id=ids[END], eos_token_id=ids[END], pad_token_id=ids[PAD])
    marks: dict[str, Any] = {"image_token_id": ids[IMAGE], "pad_token_id": ids[PAD], "scale_factor": scale}
    config = Idefics3Config(vision_config=dict(vision), text_config=text, **marks)
    with quiet_transformers():
        config.save_pretrained(folder)
        processor.save_pretrained(folder)


SHAPES: Mapping[str, Shape] = {
    "idefics3-8b": partial(idefics3, language=_LLAMA3_8B, vision=_SO400M),
    "tiny": partial(idefics3, language=_TINY_LANGUAGE, vision=_TINY_VISION),
}
"""Models by name; a further one is a further entry."""
