"""A tiny model with scripted answers, and templates of thinking models."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from tests.extract.tiny_models import make_tokenizer, save

HYBRID_TEMPLATE = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- else %}{%- set said, thought = m.content, '' %}"
    "{%- if '</think>' in said %}{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- said + '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
"""As of models that can think or not: thoughts of earlier rounds are left out, the last answer has one, maybe empty."""

FORCED_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1].strip() + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
"""As of models that always think: the prompt begins the thought."""


def write_reciter(folder: Path, template: str, sayings: Mapping[int, str], *, special: bool = False) -> Path:
    """A GPT-2 that generates `sayings`: at a prompt's length in tokens, what it says to that prompt.

    Its layers add nothing, so the next token is read off the position. `special` makes the marks of thoughts special
    tokens, which decoding drops unless told not to; otherwise they are ordinary added ones.
    """
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2, n_positions=2048)
    save(folder, GPT2LMHeadModel, config, tokenizer)
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.zero_()
        words = torch.nn.functional.normalize(
            torch.randn(len(tokenizer), 64, generator=torch.Generator().manual_seed(1))
        )
        model.transformer.wte.weight.copy_(words)
        model.transformer.wpe.weight.zero_()
        for length, saying in sayings.items():
            ids = tokenizer(saying, add_special_tokens=False)["input_ids"]
            model.transformer.wpe.weight[length - 1 : length - 1 + len(ids)] = 10 * words[ids]
    model.save_pretrained(folder)
    return folder


def write_reciter_for_slots(folder: Path, template: str, sayings: Mapping[int, str]) -> Path:
    """As `write_reciter`, by an OPT, which can answer in slots. Its marks of thoughts are special tokens."""
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 64, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=2048, **sizes)
    save(folder, OPTForCausalLM, config, tokenizer)
    model = OPTForCausalLM.from_pretrained(folder)
    before = 2  # rows that OPT keeps in front of the first position
    with torch.no_grad():
        for parameter in model.model.decoder.layers.parameters():
            parameter.zero_()
        words = torch.nn.functional.normalize(
            torch.randn(len(tokenizer), 64, generator=torch.Generator().manual_seed(1))
        )
        model.get_input_embeddings().weight.copy_(words)
        places = model.model.decoder.embed_positions.weight
        places.zero_()
        for length, saying in sayings.items():
            ids = tokenizer(saying, add_special_tokens=False)["input_ids"]
            places[before + length - 1 : before + length - 1 + len(ids)] = 10 * words[ids]
    model.save_pretrained(folder)
    return folder
