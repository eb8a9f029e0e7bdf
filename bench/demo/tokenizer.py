"""The demo model's tokenizer: byte-level BPE whose merges are learned from the project's own questions and prompts."""

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agiqa.bench.demo.prompts import KINDS, all_scenes
from agiqa.extract.data.templates import templates

VOCABULARY = 768
"""Entries of the tokenizer and rows of the language-model head."""
PAD, START, END, IMAGE = "<|pad|>", "<|im_start|>", "<|im_end|>", "<image>"
LEVELS = ("bad", "poor", "fair", "good", "excellent")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Jinja, as Hugging Face processors read it; a message holds text, or parts of type `image` and `text`."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, the same at every call: any text can be written with it, the demo's own in few tokens."""
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
    """Every question, rating word and role that the demo can ask with, and a part of its prompts."""
    for template in templates().values():
        yield from [template.describe, template.rate, template.one_round] * 20
    for word in ("user", "assistant", *LEVELS):
        yield from [word, f" {word}"] * 20
    for kind in KINDS:
        for scene in all_scenes(kind):
            yield scene.prompt()
