"""MiniCPM-Llama3-V-2.5 in its real shape, or a tiny one, with random weights that are never written to disk."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agiqa.bench.demo.model import END, START, build_tokenizer
from agiqa.extract import Backbone
from agiqa.extract.models.checkpoints import Checkpoint
from agiqa.extract.models.devices import DTYPES
from agiqa.extract.models.loading import quiet_transformers
from agiqa.extract.models.minicpm.backbone import MiniCPMBackbone
from agiqa.extract.models.minicpm.model import MiniCPMV, read_config

_MARKS = {
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "unk": "<unk>",
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
_LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
_TINY_LANGUAGE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_TINY_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_SPREAD = 0.02
"""Standard deviation of the random weights, as at the start of training a language model."""

Shape = Callable[..., Backbone]
"""`shape(folder, device="cuda")`: a backbone with its settings in `folder`; the first call writes them."""


class RandomMiniCPM(MiniCPMBackbone):
    """Draws its weights on the device instead of reading them."""

    file_hashes: Any = {"weights": "random"}  # noqa: RUF012 - in place of hashes of files

    def check_tensors(self) -> None:
        """Check nothing: there are no files."""

    def load(self) -> None:
        """Draw the weights. Idempotent."""
        if self._model is not None:
            return
        usual = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[self.logical_dtype])
        try:
            with torch.device("meta"):
                model = MiniCPMV(self.config)
        finally:
            torch.set_default_dtype(usual)
        model = model.to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        for weight in model.parameters():
            weight.data.normal_(0.0, _SPREAD, generator=generator)
        model.restore_frequencies(self.device)
        self._model = model.eval().requires_grad_(requires_grad=False)


def minicpm(
    folder: Path, *, language: Mapping[str, Any], vision: Mapping[str, Any], resolution: int, device: str = "auto"
) -> Backbone:
    """The model, in bfloat16 on a GPU; images of more than `resolution` squared pixels are cut into slices."""
    if not (folder / "config.json").exists():
        _write_settings(folder, language, vision, resolution)
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    checkpoint = Checkpoint(name=folder.name, folder=folder)
    return RandomMiniCPM(checkpoint, read_config(checkpoint), dtype="bfloat16" if on_gpu else "float32", device=device)


def _write_settings(folder: Path, language: Mapping[str, Any], vision: Mapping[str, Any], resolution: int) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(_MARKS.values()), special_tokens=True)
    tokenizer.chat_template = _CHAT_TEMPLATE
    ids = tokenizer.get_vocab()
    images: dict[str, Any] = {"max_slice_nums": 9, "scale_resolution": resolution, "patch_size": 14}
    images |= {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3, **_MARKS}
    settings = {
        **language,
        "model_type": "minicpmv",
        "version": "2.5",
        "query_num": 96,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
        "bos_token_id": ids[START],
        "eos_token_id": ids[END],
        "vision_config": {**vision, "image_size": 980, "patch_size": 14},
    }
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")


def shape_of_config(config: Path, folder: Path, *, device: str = "auto") -> Backbone:
    """The model in the shape of a published config.json, with the tokenizer of the other random models."""
    raw = json.loads(config.read_text(encoding="utf-8"))
    language, vision = (
        {key: values[key] for key in keys} for keys, values in ((_LLAMA3_8B, raw), (_SO400M, raw["vision_config"]))
    )
    return minicpm(folder, language=language, vision=vision, resolution=448, device=device)


SHAPES: Mapping[str, Shape] = {
    "minicpm-8b": partial(minicpm, language=_LLAMA3_8B, vision=_SO400M, resolution=448),
    "tiny": partial(minicpm, language=_TINY_LANGUAGE, vision=_TINY_VISION, resolution=56),
}
"""Models by name."""
