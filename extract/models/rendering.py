"""Conversations as token ids with a role per token, through the model's own chat template.

The template is rendered twice: once with marks in place of the contents, which leaves its own words (system prompt,
headers, turn ends), and once with the contents. So the characters of the contents between those words are known, and
the tokenizer's offsets say which tokens cover them. A processor then replaces the image's mark by the image's tokens;
`expansions.expand_roles` carries the roles over.

Thinking models write thoughts before an answer. The switches of the chat template leave them out; agiqa cuts off those
that come anyway.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError, ModelError, listed
from agiqa.extract.data.items import Message
from agiqa.store import TOKEN_ROLES

Style = Literal["text", "parts"]
"""How the template takes a message's contents: one string, or a list of typed parts."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'User: ' if message.role == 'user' else 'Assistant: ' }}{{ message.content }}{{ '\n' }}"
    "{% endfor %}"
)
"""Stands in for the chat template of a model that has none."""

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that templates print as today, so that an item gives the same tokens on any day."""

THOUGHT_MARKS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek, GLM, SmolLM3, MiniMax, Nemotron and most others
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
)
"""(beginning, end) of a thought in the published families."""

THOUGHT_SWITCHES = ("enable_thinking", "thinking")
"""Template variables that turn thoughts off."""

_TAGS = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_TAIL = 16
"""Tokens at the end of a prompt that contain the beginning of a thought, if the template writes one."""

_ROLE_OF = {"user": TOKEN_ROLES["question"], "assistant": TOKEN_ROLES["answer"]}


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The text of a conversation, and where the contents are in it."""

    text: str
    spans: tuple[tuple[int, int, int], ...]
    """(first character, one past the last, role) of each message's contents."""


class Renderer:
    """Renders and tokenises conversations for one model."""

    def __init__(self, *, name: str, tokenizer: Any, template: str | None, image_token: str | None = None) -> None:
        """`template` is the model's chat template or None; `image_token` marks the image, if the model reads images.

        Raises ModelError if the template leaves out the contents or the image.
        """
        self.name = name
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.plain = template is None
        self.template = PLAIN_TEMPLATE if template is None else template
        self.switches = switches_of(self.template)
        """Template variables, set so that the template leaves out thoughts."""
        self._source = _fixed_date(self.template)
        self._words: dict[tuple[Any, ...], list[str] | None] = {}
        self.style: Style = self._find_style()

    def render(self, conversation: Sequence[Message], *, image: bool = False, answer: bool = False) -> Rendered:
        """The conversation's text; `answer` appends the template's prompt for the next answer.

        Raises ModelError if contents are lost, DataError for contents that the template takes for a thought.
        """
        rendered = self._render(conversation, image=image, ask=False)
        if not answer:
            return rendered
        asked = self._render(conversation, image=image, ask=True)
        if asked.text != rendered.text:
            return asked
        # Templates without a generation prompt: append what they write in front of an answer.
        words = self._own_words([*conversation, Message(role="assistant", content="")], image=image, style=self.style)
        if words is None:
            message = f"{self.name}: its chat template leaves no place for an answer of the model."
            raise ModelError(message)
        last = rendered.spans[-1][1]
        return Rendered(text=rendered.text[:last] + words[len(conversation)].rstrip(" "), spans=rendered.spans)

    @cached_property
    def turn_end(self) -> int | None:
        """The special token with which the template closes an answer; None if it writes none."""
        probe = [Message(role="user", content="?"), Message(role="assistant", content="!")]
        words = self._own_words(probe, image=self.image_token is not None, style=self.style)
        closing = "" if words is None else words[-1].lstrip()
        ids = self.tokenizer(closing, add_special_tokens=False)["input_ids"]
        added = self.tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
        return int(ids[0]) if added is not None and added.special else None

    def _render(self, conversation: Sequence[Message], *, image: bool, ask: bool) -> Rendered:
        words = self._own_words(conversation, image=image, style=self.style, ask=ask)
        contents = [message.content for message in conversation]
        text = self._apply(conversation, contents, image=image, style=self.style, ask=ask)
        spans = None if words is None else _locate(text, words, conversation)
        if spans is None:
            thought = next(filter(None, map(_thought_mark_in, contents)), None)
            if thought is not None:
                reason = f"a message contains {thought!r}, and the chat template leaves out thoughts; remove that text."
                raise DataError(reason)
            message = f"{self.name}: its chat template rewrites the contents of the messages, so roles are unknown."
            raise ModelError(message)
        return Rendered(text=text, spans=spans)

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer must add its own special tokens (such as BOS) to the rendered `text`.

        A text model's chat template writes all of them. Processors' templates often leave BOS to the tokenizer: there,
        and for the plain template, they are added unless the text begins with BOS.
        """
        if not self.plain and self.image_token is None:
            return False
        beginning = self.tokenizer.bos_token
        return beginning is None or not text.startswith(beginning)

    def tokenize(self, rendered: Rendered) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids (n,) and roles (n,); a token that covers any character of a content gets the content's role."""
        encoded = self.tokenizer(
            rendered.text,
            add_special_tokens=self.adds_special_tokens(rendered.text),
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        roles = roles_of(offsets, rendered.spans, length=len(rendered.text))
        return np.asarray(encoded["input_ids"], dtype=np.int32), roles

    def _find_style(self) -> Style:
        """The style in which the template shows the contents, and the image exactly once."""
        probe = [Message(role="user", content="?")]
        styles: tuple[Style, ...] = ("text", "parts") if self.plain or self.image_token is None else ("parts", "text")
        reason = ""
        for style in styles:
            try:
                words = self._own_words(probe, image=self.image_token is not None, style=style)
            except ModelError as error:
                reason = f" ({error})"
                continue
            if words is not None and (self.image_token is None or "".join(words).count(self.image_token) == 1):
                return style
        shown = "the messages" if self.image_token is None else f"the messages and one image ({self.image_token!r})"
        message = f"{self.name}: its chat template does not show {shown}{reason}."
        raise ModelError(message)

    def _own_words(
        self, conversation: Sequence[Message], *, image: bool, style: Style, ask: bool = False
    ) -> list[str] | None:
        """What the template itself writes before, between and after the contents; None if it leaves one out."""
        kind = (tuple(message.role for message in conversation), image, style, ask)
        if kind not in self._words:
            self._words[kind] = self._find_words(conversation, image=image, style=style, ask=ask)
        return self._words[kind]

    def _find_words(self, conversation: Sequence[Message], *, image: bool, style: Style, ask: bool) -> list[str] | None:
        count = range(len(conversation))
        marks = [f"\ue000{index}\ue001" for index in count]
        text = self._apply(conversation, marks, image=image, style=style, ask=ask)
        parts = re.split("\ue000(\\d+)\ue001", text)
        return parts[::2] if parts[1::2] == [str(index) for index in count] else None

    def _apply(
        self, conversation: Sequence[Message], contents: list[str], *, image: bool, style: Style, ask: bool
    ) -> str:
        import jinja2

        turns = [
            {"role": message.role, "content": self._content(content, image=image and index == 0, style=style)}
            for index, (message, content) in enumerate(zip(conversation, contents, strict=True))
        ]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=ask,
                **self.switches,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            message = f"{self.name}: its chat template cannot render the conversation ({error})."
            raise ModelError(message) from error
        return text

    def _content(self, content: str, *, image: bool, style: Style) -> Any:
        if style == "parts":
            part = {"type": "text", "text": content}
            return [{"type": "image"}, part] if image else [part]
        return f"{self.image_token}\n{content}" if image else content


def roles_of(offsets: NDArray[np.int64], spans: Sequence[tuple[int, int, int]], *, length: int) -> NDArray[np.uint8]:
    """Roles (n,) of tokens with the character `offsets` (n, [first, one past the last]) in a text of `length`.

    A token gets the highest role of its characters: those in one of `spans` have its role, the others none.
    """
    characters = np.full(length, TOKEN_ROLES["special"], dtype=np.uint8)
    for start, stop, role in spans:
        characters[start:stop] = role
    roles = np.full(len(offsets), TOKEN_ROLES["special"], dtype=np.uint8)
    first, last = np.clip(offsets, 0, length).T
    for role in sorted({role for _, _, role in spans}):
        before = np.concatenate([[0], np.cumsum(characters == role)])
        roles[before[last] > before[first]] = role
    return roles


def refuse_marks(conversation: Sequence[Message], marks: Iterable[str | None]) -> None:
    """Raise DataError for a message that contains one of `marks`, which the model would take for an image."""
    for message in conversation:
        for mark in marks:
            if mark is not None and mark in message.content:
                reason = f"a message contains {mark!r}, the word that stands for the image; take it out of the text."
                raise DataError(reason)


def _locate(text: str, words: list[str], conversation: Sequence[Message]) -> tuple[tuple[int, int, int], ...] | None:
    """The spans of the contents between the template's own `words`; None if the two do not make up `text`."""
    if not text.startswith(words[0]):
        return None
    cursor = len(words[0])
    spans: list[tuple[int, int, int]] = []
    for message, following in zip(conversation, words[1:], strict=True):
        shown = next((c for c in _trims(message.content) if text.startswith(c + following, cursor)), None)
        if shown is None:
            return None
        spans.append((cursor, cursor + len(shown), _ROLE_OF[message.role]))
        cursor += len(shown) + len(following)
    return tuple(spans) if cursor == len(text) else None


def _fixed_date(template: str) -> str:
    """`template`, in which `strftime_now` returns TEMPLATE_DATE.

    transformers passes only data to templates, so a macro redefines the function, directive by directive.
    """
    if "strftime_now" not in template:
        return template
    day = str(TEMPLATE_DATE.day)
    answers = {"%-d": day, "%e": day, "%-m": str(TEMPLATE_DATE.month)}
    answers |= {f"%{letter}": TEMPLATE_DATE.strftime(f"%{letter}") for letter in "aAbBdFHIjmMpSwyY"}
    steps = "".join(f" | replace({directive!r}, {answer!r})" for directive, answer in answers.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}{template}"


def _trims(content: str) -> tuple[str, str, str, str]:
    """A content as templates may write it: unchanged, or without white space around it."""
    return content, content.strip(), content.rstrip(), content.lstrip()


def main_template(name: str, found: str | Mapping[str, str] | None) -> str | None:
    """The chat template of the checkpoint `name`; of templates by name, as transformers, the one called default.

    Raises ModelError if none is called so.
    """
    if found is None or isinstance(found, str):
        return found
    if "default" not in found:
        message = f"{name}: its chat templates are called {listed(sorted(found))}; call the one to use 'default'."
        raise ModelError(message)
    return found["default"]


def switches_of(template: str) -> dict[str, bool]:
    """The THOUGHT_SWITCHES that `template` reads, all off."""
    code = " ".join(_TAGS.findall(template))
    return {name: False for name in THOUGHT_SWITCHES if re.search(rf"(?<![\w.'\"]){name}(?![\w'\"])", code)}


def _thought_mark_in(text: str) -> str | None:
    return next((mark for pair in THOUGHT_MARKS for mark in pair if mark in text), None)


def begins_in_thought(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether the token ids of a `prompt` end with the beginning of a thought, which the answer then continues."""
    text: str = tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False)
    return text.rstrip().endswith(tuple(begin for begin, _ in THOUGHT_MARKS))


def split_thoughts(tokenizer: Any, ids: Sequence[int], *, begun: bool) -> tuple[str, str | None]:
    """(the answer without special tokens and thoughts; the whole generated text, None if it has no thoughts).

    A thought ends at the last end mark; without one, all of `ids` are thought. `begun` says that the prompt began the
    thought. Marks are looked for in the text, because a mark may be one token, special or not, or several.
    """
    whole: str = tokenizer.decode(list(ids), skip_special_tokens=False)
    for begin, end in THOUGHT_MARKS:
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
    """The text after the last of the `count` marks `end`; their last token may contain letters of that text."""

    def ends_within(length: int) -> int:
        text: str = tokenizer.decode(list(ids[:length]), skip_special_tokens=False)
        return text.count(end)

    length = bisect_left(range(len(ids) + 1), count, key=ends_within)
    before: str = tokenizer.decode(list(ids[:length]), skip_special_tokens=False)
    rest: str = tokenizer.decode(list(ids[length:]), skip_special_tokens=True)
    return before.rpartition(end)[2] + rest
