"""The oracle: tokens, hidden states and logits of one item by the classes of transformers themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from agiqa.extract.data.items import Item
from agiqa.extract.models.loading import quiet_transformers


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One item, by the official route."""

    token_ids: np.ndarray  # (n,)
    hidden: np.ndarray  # (n, D) float32, after the final norm
    logits: np.ndarray  # (n, V) float32


@cache
def _text(checkpoint: Path):
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@cache
def _vision(checkpoint: Path):
    with quiet_transformers():
        processor = LlavaProcessor.from_pretrained(checkpoint, backend="pil")
        return processor, LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()


def _inputs(checkpoint: Path, item: Item):
    if item.image is None:
        tokenizer, model = _text(checkpoint)
        turns = [{"role": turn.role, "content": turn.content} for turn in item.conversation]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt"), model
    processor, model = _vision(checkpoint)
    turns = [{"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in item.conversation]
    turns[0]["content"].insert(0, {"type": "image"})
    text = processor.apply_chat_template(turns, tokenize=False)
    with Image.open(item.image) as image:
        return processor(images=image.convert("RGB"), text=text, return_tensors="pt"), model


def expected(checkpoint: Path, item: Item, *, limit: int | None = None) -> Expected:
    """The official model on `item` alone; `limit` cuts the tokens."""
    inputs, model = _inputs(checkpoint, item)
    inputs = {name: value[:, :limit] if value.ndim == 2 else value for name, value in inputs.items()}
    with torch.inference_mode():
        answer = model(**inputs, output_hidden_states=True)
    return Expected(
        token_ids=inputs["input_ids"][0].numpy(),
        hidden=answer.hidden_states[-1][0].float().numpy(),
        logits=answer.logits[0].float().numpy(),
    )


def all_hidden(checkpoint: Path, items: Sequence[Item], *, limit: int | None = None) -> np.ndarray:
    """Hidden states of all items, one after the other, (tokens, D)."""
    return np.concatenate([expected(checkpoint, item, limit=limit).hidden for item in items])
