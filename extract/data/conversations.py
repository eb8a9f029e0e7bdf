"""M3-AGIQA conversation files: the published questions with the descriptions that the models gave.

A file holds one JSON list, or one JSON object per line, of
`{id, image, conversations: [{role, content} x 4], response_0?, response_1?, text_author?, prompt?}`. `response_0`
and `response_1` are the fine-tuned local model's own description and rating word; where they are given they stand in
for those of `conversations`. Those are a teacher's that was told the MOS, unless `text_author` names another writer.
`prompt` is the prompt that the conversation is about, for questions that do not name it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.extract.data.items import Message
from agiqa.extract.data.templates import template_of
from agiqa.store.disk.files import read_text
from agiqa.store.format.items import MODEL, TEACHER, TEXT_AUTHOR, TEXT_AUTHORS, author_of
from agiqa.store.format.labels import ASPECT_NAMES, SPLITS

IMAGE_MARK = re.compile(r"\A<image>\n?")
"""Where the published training files say that the image goes: always before the first question."""

_TEXT_FIELDS = ("image", "response_0", "response_1", "prompt")
_ROLES = ("user", "assistant", "user", "assistant")
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
_PREFIX = re.compile(r"(?:(?P<aspect>\w{2,}):(?!//))?(?:(?P<split>[A-Za-z]+)=)?(?P<file>.+)")


@dataclass(frozen=True, kw_only=True)
class ConversationFile:
    """One file of conversations, and what the user or its name says of them."""

    path: Path
    split: str | None = None
    """train, val, test, or None where neither tells."""
    aspect: str | None = None
    """The aspect that the user wrote before it."""

    def aspect_among(self, aspects: Sequence[str]) -> str:
        """Which of the `aspects` of a conversation these descriptions are of: the one written, the only, the named.

        Raises ConfigError when another one is written before the file, or nothing tells between several.
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
class Talk:
    """One conversation of a file; where `problems` is not empty its texts mean nothing."""

    file: Path
    where: str
    """The file's name and the conversation's id, for messages."""
    image: str
    split: str | None
    prompt: str | None = None
    """The prompt that the entry states; None where only its question may name it."""
    describe: str = ""
    description: str = ""
    description_author: str | None = None
    """Who wrote `description`, one of TEXT_AUTHORS."""
    rate: str = ""
    rating: str | None = None
    rating_author: str | None = None
    """Who wrote `rating`."""
    problems: tuple[str, ...] = ()
    more: tuple["Talk", ...] = ()
    """Conversations on further aspects of the same image, whose descriptions follow this one's."""

    def text_author(self, variant: str) -> str | None:
        """Who wrote the texts that the model reads under `variant`, as `author_of` of them."""
        writers = [talk.description_author for talk in (self, *self.more)]
        return author_of([*writers, self.rating_author] if variant == "full" else writers)

    def messages(self, variant: str) -> tuple[Message, ...]:
        """What the model reads under `variant`: id ends with the rating question, full with the rating word."""
        turns: list[Message] = []
        for talk in (self, *self.more):
            turns.append(Message(role="user", content=talk.describe))
            turns.append(Message(role="assistant", content=talk.description))
        turns.append(Message(role="user", content=self.rate))
        if variant == "full" and self.rating is not None:
            turns.append(Message(role="assistant", content=self.rating))
        return tuple(turns)


def parse_source(source: str) -> ConversationFile:
    """`[ASPECT:][SPLIT=]FILE`; without SPLIT the file's name tells, if it can.

    Raises UnknownName when what stands before `:` is no aspect or before `=` no split, and no file has that name.
    """
    match = _PREFIX.fullmatch(source)
    if match is None or Path(source).exists():
        return ConversationFile(path=Path(source), split=_split_of(Path(source)))
    aspect, split, path = match["aspect"], match["split"], Path(match["file"])
    if aspect is not None:
        aspect = ASPECT_NAMES.get(aspect, aspect)
        template_of(aspect)
    if split is not None and split not in SPLITS:
        unknown = UnknownName.of("split", split, SPLITS)
        raise unknown
    return ConversationFile(path=path, split=split or _split_of(path), aspect=aspect)


def aspects_in_name(path: Path) -> set[str]:
    """The aspects that words of the file's name stand for; `align` and `alignment` are correspondence."""
    words = re.split("[^a-z0-9]+", path.stem.lower())
    return {ASPECT_NAMES[word] for word in words if word in ASPECT_NAMES}


def _split_of(path: Path) -> str | None:
    words = set(_SPLIT_WORD.findall(path.stem.lower()))
    return words.pop() if len(words) == 1 else None


def read_conversations(path: Path, split: str | None) -> list[Talk]:
    """Every conversation of `path`. Raises DataError when the file is not JSON, not a list, or empty."""
    records = _records(path, read_text(path))
    if not records:
        message = f"{path}: no conversations in the file."
        raise DataError(message)
    return [_talk(path, number, record, split) for number, record in enumerate(records, start=1)]


def _records(path: Path, text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        parsed: list[Any] = _parse(f"{path}", text)
        return parsed
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if lines[0][1].strip() == "{":
        return [_parse(f"{path}", text)]
    return [_parse(f"{path}, line {number}", line) for number, line in lines]


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        message = f"{where}: not JSON ({error}); expected an M3-AGIQA conversation list."
        raise DataError(message) from error


def _talk(path: Path, number: int, record: Any, split: str | None) -> Talk:
    if not isinstance(record, dict):
        fault = "is not a JSON object"
        return Talk(file=path, where=f"{path.name}, entry {number}", image="", split=split, problems=(fault,))
    entry = cast(Mapping[str, Any], record)
    where = f"{path.name}, id {entry['id']!r}" if "id" in entry else f"{path.name}, entry {number}"
    image = entry.get("image")
    texts, faults = _texts(entry.get("conversations"))
    problems = tuple(_problems(entry, texts, faults))
    if problems:
        name = image if isinstance(image, str) else ""
        return Talk(file=path, where=where, image=name, split=split, problems=problems)
    written_by = entry.get(TEXT_AUTHOR) or TEACHER
    described, rated = entry.get("response_0"), entry.get("response_1")
    return Talk(
        file=path,
        where=where,
        image=cast(str, image),
        split=split,
        prompt=entry.get("prompt"),
        describe=IMAGE_MARK.sub("", texts[0]),
        description=described or texts[1],
        description_author=MODEL if described else written_by,
        rate=texts[2],
        rating=rated or (texts[3] if len(texts) > 3 else None),
        rating_author=MODEL if rated else written_by,
    )


def _problems(entry: Mapping[str, Any], texts: Sequence[str], faults: Sequence[str]) -> Iterator[str]:
    """Why the entry cannot be used; `faults` are those of its messages, whose contents are `texts`."""
    if not _is_text(entry.get("image")):
        yield "has no `image`"
    yield from faults
    for key in ("response_0", "response_1", "prompt"):
        if entry.get(key) is not None and not _is_text(entry[key]):
            yield f"`{key}` is empty or not text"
    if entry.get(TEXT_AUTHOR) not in (None, *TEXT_AUTHORS):
        yield f"`{TEXT_AUTHOR}` is {entry[TEXT_AUTHOR]!r}, none of {', '.join(TEXT_AUTHORS)}"
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
    contents = [turn.get("content") for turn in turns]
    empty = [number for number, content in enumerate(contents, start=1) if not _is_text(content)]
    if _is_text(contents[0]) and not IMAGE_MARK.sub("", cast(str, contents[0])).strip():
        empty.append(1)
    return cast(list[str], contents), [f"message {number} is empty or not text" for number in empty]


def _is_halved(value: Any) -> bool:
    """Whether a text was cut within a character that JSON writes as two, such as an emoji."""
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
