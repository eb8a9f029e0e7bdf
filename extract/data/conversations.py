"""M3-AGIQA conversation files: the published questions with the descriptions that the models gave.

A file holds one JSON list, or one JSON object per line, of
`{id, image, conversations: [{role, content} x 4], response_0?, response_1?, text_author?, rating_author?, prompt?,
split?}`. `response_0` and `response_1` are the fine-tuned local model's own description and rating word. Where they are
given, they replace those of `conversations`, which a teacher that knew the MOS wrote, unless `text_author` names
another writer, and `rating_author` another one of the rating word. LLaVA's form (`from`, `value`) and OpenAI's
(`messages`, whose contents may be lists of parts) are read too. `prompt` is the prompt that the conversation is
about, for questions that do not name it. An entry's own `split` beats that of the file.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.extract.data.items import Message
from agiqa.extract.data.templates import (
    aspect_asked,
    ended,
    label_of,
    reads_description,
    reads_rating_word,
    template_of,
)
from agiqa.store.disk.files import read_text
from agiqa.store.format.items import MODEL, TEACHER, TEXT_AUTHOR, TEXT_AUTHORS, author_of
from agiqa.store.format.labels import ASPECT_NAMES, SPLITS

IMAGE_MARK = re.compile(r"\A<image>\n?|\n?<image>\Z")
"""Where the published training files say that the image goes: always before the first question."""
_SPEAKERS = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
"""Roles by the names of LLaVA's form."""

_RATING_AUTHOR = "rating_author"
_TEXT_FIELDS = ("image", "response_0", "response_1", "prompt")
_ROLES = ("user", "assistant", "user", "assistant")
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
_PREFIX = re.compile(r"(?:(?P<aspect>\w{2,}):(?!//))?(?:(?P<split>[A-Za-z]+)=)?(?P<file>.+)")


@dataclass(frozen=True, kw_only=True)
class ConversationFile:
    """One file of conversations, with the split and aspect that the user or its name gives."""

    path: Path
    split: str | None = None
    """train, val, test, or None if neither gives one."""
    aspect: str | None = None
    """The aspect that the user wrote before the file."""

    def aspect_among(self, aspects: Sequence[str]) -> str:
        """Which of the `aspects` of a conversation the file describes.

        The aspect written before the file decides, else the only aspect, else the file's name. Raises ConfigError
        when the written one is not among them, or the name holds none or several of them.
        """
        if self.aspect is not None and self.aspect not in aspects:
            message = f"{self.path} has descriptions of {self.aspect}; the conversation holds {' and '.join(aspects)}."
            raise ConfigError(message)
        if self.aspect is not None or len(aspects) == 1:
            return self.aspect or aspects[0]
        known = aspects_in_name(self.path)
        named = [aspect for aspect in aspects if aspect in known]
        if len(named) != 1:
            choices = " or ".join(f"{aspect}:{self.path}" for aspect in aspects)
            message = f"{self.path}: which aspect do these describe? Write {choices}."
            raise ConfigError(message)
        return named[0]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One entry of a conversation file; only `image` and `where` count if `problems` is not empty."""

    file: Path
    where: str
    """The file's name and the entry's id, for messages."""
    image: str
    split: str | None
    prompt: str | None = None
    """The prompt that the entry states; None if only its question may name it."""
    describe: str = ""
    description: str = ""
    description_author: str | None = None
    """Who wrote `description`, one of TEXT_AUTHORS."""
    rate: str = ""
    rating: str | None = None
    rating_author: str | None = None
    """Who wrote `rating`."""
    problems: tuple[str, ...] = ()
    more: tuple["Conversation", ...] = ()
    """Conversations on further aspects of the same image, whose descriptions follow this one's."""

    def text_author(self, variant: str) -> str | None:
        """Who wrote the texts that the model reads under `variant`, see `author_of`; None if it reads none."""
        if not reads_description(variant):
            return None
        described = 1 + variant.partition(":")[2].count("+")
        writers = [one.description_author for one in (self, *self.more)[:described]]
        return author_of([*writers, self.rating_author] if reads_rating_word(variant) else writers)

    def messages(self, variant: str) -> tuple[Message, ...]:
        """What the model reads under `variant`, with the descriptions of all aspects that this conversation holds.

        `question` ends with the describing question, `described` with the description, `id` with the rating question,
        and `full` with the rating word.
        """
        turns: list[Message] = []
        for one in (self, *self.more):
            turns.append(Message(role="user", content=one.describe))
            turns.append(Message(role="assistant", content=one.description))
        turns.append(Message(role="user", content=self.rate))
        if reads_rating_word(variant) and self.rating is not None:
            turns.append(Message(role="assistant", content=self.rating))
        return tuple(ended(turns, variant))


def asked_otherwise(conversations: Iterable[Conversation], aspect: str) -> Counter[str]:
    """How many of the conversations rate another label than that of `aspect`, by that label."""
    asked = (aspect_asked(one.rate) for one in conversations)
    return Counter(label for label in asked if label not in (None, label_of(aspect)))


def parse_source(source: str) -> ConversationFile:
    """`[ASPECT:][SPLIT=]FILE`; without SPLIT, the split that the file's name holds.

    A file that exists under the whole of `source` has no prefixes. Raises UnknownName for another ASPECT or SPLIT.
    """
    match = _PREFIX.fullmatch(source)
    if match is None or Path(source).exists():
        return ConversationFile(path=Path(source), split=_split_in_name(Path(source)))
    aspect, split, path = match["aspect"], match["split"], Path(match["file"])
    if aspect is not None:
        aspect = ASPECT_NAMES.get(aspect, aspect)
        template_of(aspect)
    if split is not None and split not in SPLITS:
        unknown = UnknownName.of("split", split, SPLITS)
        raise unknown
    return ConversationFile(path=path, split=split or _split_in_name(path), aspect=aspect)


def aspects_in_name(path: Path) -> set[str]:
    """The aspects that words of the file's name stand for; `align` and `alignment` are correspondence."""
    words = re.split("[^a-z0-9]+", path.stem.lower())
    return {ASPECT_NAMES[word] for word in words if word in ASPECT_NAMES}


def _split_in_name(path: Path) -> str | None:
    words = set(_SPLIT_WORD.findall(path.stem.lower()))
    return words.pop() if len(words) == 1 else None


def read_conversations(path: Path, split: str | None) -> list[Conversation]:
    """Every conversation of `path`. Raises DataError when the file is not JSON, not a list, or empty."""
    records = _records(path, read_text(path))
    if not records:
        message = f"{path}: no conversations in the file."
        raise DataError(message)
    if isinstance(records[0], dict) and "explanations" in records[0] and "conversations" not in records[0]:
        message = f"{path} is the journal of `agiqa teach`. Give the file beside it, such as {path.stem}.quality.jsonl."
        raise DataError(message)
    return [_conversation(path, number, record, split) for number, record in enumerate(records, start=1)]


def _records(path: Path, text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        parsed: list[Any] = _parse(f"{path}", text)
        return parsed
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines[0][1].strip() == "{":
        return [_parse(f"{path}", text)]
    return [_parse(f"{path}, line {number}", line) for number, line in lines]


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        message = f"{where}: not JSON ({error}); expected an M3-AGIQA conversation list."
        raise DataError(message) from error


def _conversation(path: Path, number: int, record: Any, split: str | None) -> Conversation:
    entry = cast("dict[str, Any]", record) if isinstance(record, dict) else {}
    where = f"{path.name}, id {entry['id']!r}" if "id" in entry else f"{path.name}, entry {number}"
    turns = _turns(entry.get("conversations", entry.get("messages")))
    image = _image_name(entry, turns)
    entry = {**entry, "image": image}
    texts, faults = _texts(turns)
    problems = tuple(_problems(entry, texts, faults)) if isinstance(record, dict) else ("is not a JSON object",)
    if problems:
        name = image if isinstance(image, str) else ""
        return Conversation(file=path, where=where, image=name, split=split, problems=problems)
    writer, described, rated = entry.get(TEXT_AUTHOR) or TEACHER, entry.get("response_0"), entry.get("response_1")
    rater = entry.get(_RATING_AUTHOR) or writer
    return Conversation(
        file=path,
        where=where,
        image=cast("str", image),
        split=entry.get("split") or split,
        prompt=entry.get("prompt"),
        describe=IMAGE_MARK.sub("", texts[0]),
        description=described or texts[1],
        description_author=MODEL if described else writer,
        rate=texts[2],
        rating=rated or (texts[3] if len(texts) > 3 else None),
        rating_author=MODEL if rated else rater,
    )


def _turns(messages: Any) -> Any:
    """The messages as {role, content}, without those of the system; anything else as it is."""
    if not isinstance(messages, list):
        return messages
    turns: list[Any] = []
    for message in messages:
        if isinstance(message, dict) and "from" in message and "role" not in message:
            speaker = message["from"]
            role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
            message = {"role": role, "content": message.get("value")}
        if not (isinstance(message, dict) and message.get("role") == "system"):
            turns.append(message)
    return turns


def _image_name(entry: Mapping[str, Any], turns: Any) -> Any:
    """The image of the entry: a path, a dict with a path, a list of one of these, or a part of the first message."""
    image: Any = entry.get("image", entry.get("images"))
    if image is None and isinstance(turns, list) and turns and isinstance(turns[0], dict):
        content = turns[0].get("content")
        parts: list[Any] = content if isinstance(content, list) else []
        images = [part for part in parts if isinstance(part, dict) and "image" in str(part.get("type"))]
        image = [part.get("image_url", part.get("image", part.get("path"))) for part in images]
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, dict):
        image = next((image[key] for key in ("path", "file_name", "url") if image.get(key)), None)
    return image.removeprefix("file://") if isinstance(image, str) else image


def _content(content: Any) -> Any:
    """The text of a message: that of its text parts, if it is a list of parts."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "\n".join(text for text in texts if isinstance(text, str))


def _problems(entry: Mapping[str, Any], texts: Sequence[str], faults: Sequence[str]) -> Iterator[str]:
    """Why the entry cannot be used: the `faults` of its messages, whose contents are `texts`, and its own."""
    if not _is_text(entry.get("image")):
        yield "has no `image`"
    yield from faults
    for key in ("response_0", "response_1", "prompt"):
        if entry.get(key) is not None and not _is_text(entry[key]):
            yield f"`{key}` is empty or not text"
    for key, values in ((TEXT_AUTHOR, TEXT_AUTHORS), (_RATING_AUTHOR, TEXT_AUTHORS), ("split", SPLITS)):
        if entry.get(key) not in (None, *values):
            yield f"`{key}` is {entry[key]!r}, none of {', '.join(values)}"
    for part in filter(_is_halved, (*texts, *(entry.get(key) for key in _TEXT_FIELDS))):
        yield f"the text {str(part)[:40]!r} holds half a character (a lone surrogate)"


def _texts(messages: Any) -> tuple[list[str], list[str]]:
    """The contents of the messages, and what is wrong with them."""
    if not isinstance(messages, list):
        return [], ["has no list `conversations`"]
    turns = [cast(Mapping[str, Any], turn) if isinstance(turn, dict) else {} for turn in messages]
    roles = [turn.get("role") for turn in turns]
    if len(roles) not in (3, 4):
        return [], [f"has {len(roles)} messages, expected 4 (or 3, without the rating word)"]
    if roles != list(_ROLES[: len(roles)]):
        return [], [f"has the roles {roles}, expected user, assistant, user, assistant"]
    contents = [_content(turn.get("content")) for turn in turns]
    empty = [number for number, content in enumerate(contents, start=1) if not _is_text(content)]
    if _is_text(contents[0]) and not IMAGE_MARK.sub("", cast(str, contents[0])).strip():
        empty.append(1)
    return cast(list[str], contents), [f"message {number} is empty or not text" for number in empty]


def _is_halved(value: Any) -> bool:
    """Whether a text was cut within a character that JSON writes as two code units, such as an emoji."""
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
