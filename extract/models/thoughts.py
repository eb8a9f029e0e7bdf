"""Thoughts: what a thinking model writes before its answer. Chat templates are asked for none; others are cut off."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

MARKS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek, GLM, SmolLM3, MiniMax, Nemotron and most others
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
)
"""(beginning, end) of a thought in the words of the published families."""

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates turn thoughts off."""

_TAGS = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_TAIL = 16
"""Tokens at the end of a prompt that hold the beginning of a thought, if the template writes one."""


def switches_of(template: str) -> dict[str, bool]:
    """The SWITCHES that `template` reads, all off."""
    code = " ".join(_TAGS.findall(template))
    return {name: False for name in SWITCHES if re.search(rf"(?<![\w.'\"]){name}(?![\w'\"])", code)}


def mark_in(text: str) -> str | None:
    """A mark of thoughts that `text` contains; None where there is none."""
    return next((mark for pair in MARKS for mark in pair if mark in text), None)


def begins_in_thought(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether the token ids of a `prompt` end with the beginning of a thought, so that the answer goes on with it."""
    text: str = tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False)
    return text.rstrip().endswith(tuple(begin for begin, _ in MARKS))


def split_thoughts(tokenizer: Any, ids: Sequence[int], *, begun: bool) -> tuple[str, str | None]:
    """(what the model says, without special tokens and thoughts; all that it generated, None if that is the same).

    A thought ends with the last mark of an end. One that does not end is all of `ids`. `begun` says that the prompt
    began the thought. Marks are looked for in the text, as they may be one token, special or not, or several.
    """
    whole: str = tokenizer.decode(list(ids), skip_special_tokens=False)
    for begin, end in MARKS:
        if end in whole:
            said = _after_last(tokenizer, ids, end, whole.count(end))
            return said.strip(), whole
        if whole.lstrip().startswith(begin):
            return "", whole
    if begun:
        return "", whole
    said = tokenizer.decode(list(ids), skip_special_tokens=True)
    return said.strip(), None


def _after_last(tokenizer: Any, ids: Sequence[int], end: str, count: int) -> str:
    """The text after the last of the `count` marks `end`; its last token may hold letters of what follows."""

    def ends_within(length: int) -> int:
        text: str = tokenizer.decode(list(ids[:length]), skip_special_tokens=False)
        return text.count(end)

    length = bisect_left(range(len(ids) + 1), count, key=ends_within)
    before: str = tokenizer.decode(list(ids[:length]), skip_special_tokens=False)
    rest: str = tokenizer.decode(list(ids[length:]), skip_special_tokens=True)
    return before.rpartition(end)[2] + rest
