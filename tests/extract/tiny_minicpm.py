"""A tiny random MiniCPM-Llama3-V-2.5 in its published layout: sharded safetensors, its own tokenizer class and template."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

MARKS = ["<image>", "</image>", "<slice>", "</slice>"]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<unk>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
"""As published: it always ends with the prompt for an answer."""
QUERIES, RESOLUTION, SLICES = 6, 56, 9
WIDTH, VISION_WIDTH, INNER, VOCABULARY = 128, 48, 64, 340 + len(MARKS) + len(SPECIAL)


def shapes(*, layers: int = 2, vision_layers: int = 2) -> dict[str, tuple[int, ...]]:
    """The tensors of the published layout at the tiny widths: names and shapes, spelled out."""
    norm = {"weight": (WIDTH,)}
    found: dict[str, tuple[int, ...]] = {
        "llm.model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "llm.lm_head.weight": (VOCABULARY, WIDTH),
        "llm.model.norm.weight": (WIDTH,),
        "vpm.embeddings.patch_embedding.weight": (VISION_WIDTH, 3, 14, 14),
        "vpm.embeddings.patch_embedding.bias": (VISION_WIDTH,),
        "vpm.embeddings.position_embedding.weight": (4900, VISION_WIDTH),
        "resampler.query": (QUERIES, WIDTH),
        "resampler.proj": (WIDTH, WIDTH),
        "resampler.kv_proj.weight": (WIDTH, VISION_WIDTH),
        "resampler.attn.in_proj_weight": (3 * WIDTH, WIDTH),
        "resampler.attn.in_proj_bias": (3 * WIDTH,),
        "resampler.attn.out_proj.weight": (WIDTH, WIDTH),
        "resampler.attn.out_proj.bias": (WIDTH,),
    }
    for layer in range(layers):
        at = f"llm.model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found |= {f"{at}.{name}.{part}": shape for part, shape in norm.items()}
        wide = {"q_proj": WIDTH, "k_proj": WIDTH // 2, "v_proj": WIDTH // 2, "o_proj": WIDTH}
        found |= {f"{at}.self_attn.{name}.weight": (rows, WIDTH) for name, rows in wide.items()}
        found |= {f"{at}.mlp.{name}.weight": (INNER, WIDTH) for name in ("gate_proj", "up_proj")}
        found[f"{at}.mlp.down_proj.weight"] = (WIDTH, INNER)
    norms = [f"resampler.{name}" for name in ("ln_q", "ln_kv", "ln_post")]
    found |= {f"{name}.{part}": (WIDTH,) for name in norms for part in ("weight", "bias")}
    blocks = [f"vpm.encoder.layers.{layer}" for layer in range(vision_layers)]
    norms = ["vpm.post_layernorm", *(f"{block}.layer_norm{number}" for block in blocks for number in (1, 2))]
    found |= {f"{name}.{part}": (VISION_WIDTH,) for name in norms for part in ("weight", "bias")}
    for block in blocks:
        sizes = {
            f"self_attn.{name}": (VISION_WIDTH, VISION_WIDTH) for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        }
        sizes |= {"mlp.fc1": (INNER, VISION_WIDTH), "mlp.fc2": (VISION_WIDTH, INNER)}
        found |= {f"{block}.{name}.weight": shape for name, shape in sizes.items()}
        found |= {f"{block}.{name}.bias": shape[:1] for name, shape in sizes.items()}
    return found


def write_minicpm_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """The whole checkpoint, in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _draw(name, shape, generator) for name, shape in sorted(shapes().items())}
    names = list(tensors)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    _write(folder / "model.safetensors.index.json", index)
    _write(folder / "config.json", _config())
    _write(folder / "preprocessor_config.json", _preprocessor())
    _write_tokenizer(folder)
    return folder


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values * (2.0 if "embed_tokens" in name or "position" in name else 1.5 / shape[1] ** 0.5)
    return values * 0.1 + (1.0 if name.endswith("weight") else 0.0)


def _config() -> dict[str, Any]:
    return {
        "architectures": ["MiniCPMV"],
        "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
        "model_type": "minicpmv",
        "version": "2.5",
        "batch_vision_input": True,
        "bos_token_id": 340,
        "eos_token_id": 341,
        "drop_vision_last_layer": False,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "max_position_embeddings": 2048,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "query_num": QUERIES,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "slice_mode": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vision_config": {
            "hidden_size": VISION_WIDTH,
            "image_size": 980,
            "intermediate_size": INNER,
            "model_type": "idefics2",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "patch_size": 14,
        },
        "vocab_size": VOCABULARY,
    }


def _preprocessor() -> dict[str, Any]:
    marks = dict(zip(("im_start", "im_end", "slice_start", "slice_end"), MARKS, strict=True))
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "max_slice_nums": SLICES,
        "scale_resolution": RESOLUTION,
        "patch_size": 14,
        "image_feature_size": QUERIES,
        "unk": "<unk>",
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": 2.5,
        **marks,
    }


def _write_tokenizer(folder: Path) -> None:
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    words = "please rate the image quality describe what you see a blurry dog is good fair poor bad excellent colours"
    longer = " ".join(f"{word}ing {word}est un{word}" for word in words.split())
    bpe.train_from_iterator([f"{words} {longer}"] * 4, trainer)
    assert bpe.get_vocab_size() == 340
    bpe.add_special_tokens([*SPECIAL, *MARKS])
    bpe.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 340)])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
        "tokenizer_class": "MiniCPMVTokenizerFast",
        "chat_template": TEMPLATE,
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "unk_token": "<unk>",
        "pad_token": "!",
    }
    _write(folder / "tokenizer_config.json", settings)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))
