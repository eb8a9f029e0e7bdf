"""Conversations as token ids with a role per token, through the model's own chat template.

A template is rendered twice: once with marks in place of the contents, which leaves its own words (system
prompt, headers, turn ends), and once with the contents. Between the template's words the contents lie at
known characters, and the tokenizer's offsets say which token covers them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError, ModelError
from agiqa.extract.data.items import Message
from agiqa.extract.models.thoughts import mark_in, switches_of
from agiqa.store import TOKEN_ROLES

Style = Literal["text", "parts"]
"""Whether the template wants message contents as one string or as a list of typed parts."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'User: ' if message.role == 'user' else 'Assistant: ' }}{{ message.content }}{{ '\n' }}"
    "{% endfor %}"
)
"""Stands in for the chat template of a model that has none."""

TEMPLATE_DATE = datetime(2024, 7, 26)
"""Today, for templates that print the date: the same item gives the same tokens on any day."""

_ROLE_OF = {"user": TOKEN_ROLES["question"], "assistant": TOKEN_ROLES["answer"]}


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The text of a conversation, and which characters are contents."""

    text: str
    spans: tuple[tuple[int, int, int], ...]
    """(first character, one past the last, role) of each message's contents."""


class Renderer:
    """Renders and tokenises conversations for one model."""

    def __init__(self, *, name: str, tokenizer: Any, template: str | None, image_token: str | None = None) -> None:
        """`template` is the model's chat template or None; `image_token` marks the image for models that see.

        Raises ModelError when the template leaves no place for contents or for the image.
        """
        self.name = name
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.plain = template is None
        self.template = PLAIN_TEMPLATE if template is None else template
        self.switches = switches_of(self.template)
        """What the template is told to leave out: the thoughts of models that can do without."""
        self._source = _fixed_date(self.template)
        self.style: Style = self._find_style()

    def render(self, conversation: Sequence[Message], *, image: bool = False, answer: bool = False) -> Rendered:
        """The conversation's text; `answer` adds what the template writes for the model to answer after.

        Raises ModelError when contents are lost, DataError for contents that the template takes for a thought.
        """
        rendered = self._render(conversation, image=image, ask=False)
        if not answer:
            return rendered
        asked = self._render(conversation, image=image, ask=True)
        if asked.text != rendered.text:
            return asked
        # Some templates have no switch for it: there an answer begins after what they write in front of one.
        words = self._own_words([*conversation, Message(role="assistant", content="")], image=image, style=self.style)
        if words is None:
            message = f"{self.name}: its chat template leaves no place for an answer of the model."
            raise ModelError(message)
        last = rendered.spans[-1][1]
        return Rendered(text=rendered.text[:last] + words[len(conversation)].rstrip(" "), spans=rendered.spans)

    @cached_property
    def turn_end(self) -> int | None:
        """The special token that the template closes an answer with; None where it closes it with none."""
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
            thought = next(filter(None, map(mark_in, contents)), None)
            if thought is not None:
                reason = f"a message contains {thought!r}, and the chat template leaves out thoughts; remove that text."
                raise DataError(reason)
            message = f"{self.name}: its chat template rewrites the contents of the messages, so roles cannot be told."
            raise ModelError(message)
        return Rendered(text=text, spans=spans)

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer must still add its own special tokens (such as BOS) to the rendered `text`.

        A text model's chat template brings all of them. Templates of processors often leave BOS to the
        tokenizer, so there, and for the plain template, they are added unless the text begins with BOS.
        """
        if not self.plain and self.image_token is None:
            return False
        beginning = self.tokenizer.bos_token
        return beginning is None or not text.startswith(beginning)

    def tokenize(self, rendered: Rendered) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids (n,) and roles (n,); a token that covers any character of a content belongs to it."""
        encoded = self.tokenizer(
            rendered.text,
            add_special_tokens=self.adds_special_tokens(rendered.text),
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )
        characters = np.full(len(rendered.text) + 1, TOKEN_ROLES["special"], dtype=np.uint8)
        for start, stop, role in rendered.spans:
            characters[start:stop] = role
        roles = [
            int(characters[start:stop].max()) if stop > start else TOKEN_ROLES["special"]
            for start, stop in encoded["offset_mapping"]
        ]
        return np.asarray(encoded["input_ids"], dtype=np.int32), np.asarray(roles, dtype=np.uint8)

    def _find_style(self) -> Style:
        """The contents' style that the template renders: it shows the marks, and the image exactly once."""
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
        """What the template itself writes before, between and after the contents; None if it drops one."""
        marks = [f"\ue000{index}\ue001" for index in range(len(conversation))]
        text = self._apply(conversation, marks, image=image, style=style, ask=ask)
        if [text.count(mark) for mark in marks] != [1] * len(marks):
            return None
        words: list[str] = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                return None
            words.append(before)
        return [*words, text]

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


def refuse_marks(conversation: Sequence[Message], marks: Iterable[str | None]) -> None:
    """Raise DataError for a message that contains one of the `marks` of an image: the model would take it for one."""
    for message in conversation:
        for mark in marks:
            if mark is not None and mark in message.content:
                reason = f"a message contains {mark!r}, the word that stands for the image; take it out of the text."
                raise DataError(reason)


def _locate(text: str, words: list[str], conversation: Sequence[Message]) -> tuple[tuple[int, int, int], ...] | None:
    """Where the contents lie between the template's own `words`; None if the two do not make up `text`."""
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
    """`template` with its `strftime_now` answering TEMPLATE_DATE.

    transformers hands templates data only, so the function is redefined as a macro, directive by directive.
    """
    if "strftime_now" not in template:
        return template
    day = str(TEMPLATE_DATE.day)
    answers = {"%-d": day, "%e": day, "%-m": str(TEMPLATE_DATE.month)}
    answers |= {f"%{letter}": TEMPLATE_DATE.strftime(f"%{letter}") for letter in "aAbBdFHIjmMpSwyY"}
    steps = "".join(f" | replace({directive!r}, {answer!r})" for directive, answer in answers.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}{template}"


def _trims(content: str) -> tuple[str, str, str, str]:
    """A content as templates may write it: as it is, or without white space around it."""
    return content, content.strip(), content.rstrip(), content.lstrip()
