"""Rows and conversations matched by image name and by prompt; an entry without a match is reported.

Names alone match too much: images of two data sets may have the same names. The prompt in a question is found by the
wording around it: that of a template, or one that several questions of the file share. If every question of a file is
the same, none names a prompt, and no prompts are compared.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from heapq import nlargest
from pathlib import Path
from typing import NamedTuple

from agiqa.errors import DataError
from agiqa.extract.data.conversations import Conversation
from agiqa.extract.data.labels import Row
from agiqa.extract.data.templates import PROMPT, templates

_SAME_WORDS = 0.9
"""Share of common words from which two prompts count as two spellings of one.

AIGCIQA2023's table says "I see How you did there" where its conversations say "I see what you did there".
"""

_WORDINGS = 16
"""Wordings of one file, the most frequent first, that are looked for in each of its questions."""

Pair = tuple[Row, Conversation | None]


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Rows with their conversations, in the order of the table."""

    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


class Match(NamedTuple):
    """A conversation, and the prompt of the item that it was matched with by name."""

    prompt: str
    source: str
    """Where the prompt is written, for messages."""
    conversation: Conversation


def join(table: Path, rows: Sequence[Row], conversations: Sequence[Conversation]) -> Joined:
    """Pair each row of `table` with its conversation, or with None if there are no conversations at all.

    Raises DataError when no conversation belongs to any row.
    """
    first = _first_by_name(rows)
    if not conversations:
        alone: list[Pair] = [(row, None) for row in rows if not row.name or first[row.name] is row]
        return Joined(pairs=tuple(alone), problems=tuple(_repeats(table, rows, first)), notes=())
    chosen, problems = _choose(table, rows, first, conversations)
    named = {name for one in conversations if (name := row_name(one.image, first)) is not None}
    problems.extend(_repeats(table, [row for row in rows if row.name in named], first))
    pairs: list[Pair] = [(first[name], one) for name, one in chosen.items()]
    pairs.sort(key=lambda pair: pair[0].number)
    left = sum(row.name not in named for row in rows)
    notes = (f"{left} of {len(rows)} rows of {table.name} are left out: no conversation names them.",) if left else ()
    return Joined(pairs=tuple(pairs), problems=tuple(problems), notes=notes)


def join_aspects(table: Path, rows: Sequence[Row], conversations: Mapping[str, Sequence[Conversation]]) -> Joined:
    """Pair each row with its conversations on several aspects: that on the first, with the others in its `more`.

    `conversations` holds those of each aspect, in the order in which the model reads them. A row with some of the
    aspects but not all is a problem, and the notes count such rows by aspect. Raises DataError when an aspect has no
    conversation, or none that belongs to a row.
    """
    first = _first_by_name(rows)
    problems: list[str] = []
    chosen: dict[str, dict[str, Conversation]] = {}
    for aspect, given in conversations.items():
        if not given:
            message = f"No descriptions of {aspect}; give their file: --conversations {aspect}:FILE."
            raise DataError(message)
        chosen[aspect], faults = _choose(table, rows, first, given)
        problems.extend(f"{aspect}: {fault}" for fault in faults)
    named = sorted({name for found in chosen.values() for name in found}, key=lambda name: first[name].number)
    problems.extend(_repeats(table, [row for row in rows if row.name in set(named)], first))
    pairs: list[Pair] = []
    for name in named:
        found = [by_name[name] for by_name in chosen.values() if name in by_name]
        lacking = [aspect for aspect, by_name in chosen.items() if name not in by_name]
        splits = {one.split for one in found if one.split is not None}
        if lacking or len(splits) > 1:
            fault = (
                f"no description of {' and '.join(lacking)}" if lacking else f"in the splits {sorted(splits)} at once"
            )
            problems.append(f"{name} ({table.name}, line {first[name].number}): {fault} ({found[0].where} has it)")
        else:
            pairs.append((first[name], replace(found[0], more=tuple(found[1:]), split=next(iter(splits), None))))
    return Joined(pairs=tuple(pairs), problems=tuple(problems), notes=tuple(_notes(table, rows, named, chosen)))


def _notes(
    table: Path, rows: Sequence[Row], named: Sequence[str], chosen: Mapping[str, Mapping[str, Conversation]]
) -> Iterator[str]:
    left = sum(row.name not in set(named) for row in rows)
    if left:
        yield f"{left} of {len(rows)} rows of {table.name} are left out: no conversation names them."
    for aspect, found in chosen.items():
        if len(found) < len(named):
            yield f"{len(named) - len(found)} of {len(named)} images have no description of {aspect}."


def row_name(image: str, rows: Mapping[str, object]) -> str | None:
    """The row that `image` (a path such as data/set/images/0.png) ends in: its longest known tail."""
    parts = image.replace("\\", "/").split("/")
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if tail in rows), None)


def _first_by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in reversed(rows)}


def _repeats(table: Path, rows: Sequence[Row], first: Mapping[str, Row]) -> Iterator[str]:
    for row in rows:
        if row.name and first[row.name] is not row:
            yield f"{row.name} ({table.name}, line {row.number}): duplicate of line {first[row.name].number}"


def _choose(
    table: Path, rows: Sequence[Row], first: Mapping[str, Row], conversations: Sequence[Conversation]
) -> tuple[dict[str, Conversation], list[str]]:
    """The conversation of each row name, and the problems of those that cannot be used; `first` is the row of a name.

    Raises DataError when no conversation belongs to any row.
    """
    named, problems = dict[str, Conversation](), list[str]()
    for one in conversations:
        name = row_name(one.image, first)
        if one.problems:
            problems.append(f"{one.where}: {'; '.join(one.problems)}")
        elif name is None:
            problems.append(f"{one.where}: no row of {table.name} is named like its image {one.image!r}")
        elif name in named:
            problems.append(f"{one.where}: the image {name} has a conversation already ({named[name].where})")
        else:
            named[name] = one
    if not named and not any(one.problems for one in conversations):
        files = ", ".join(dict.fromkeys(str(one.file) for one in conversations))
        message = (
            f"{files} and {table} have no image in common: the conversations speak of {conversations[0].image!r}, "
            f"the table of {rows[0].name!r}. Is it the table of another data set?"
        )
        raise DataError(message)
    matches = {
        name: Match(first[name].prompt, f"{table.name}, line {first[name].number}", one)
        for name, one in named.items()
        if first[name].prompt
    }
    strangers = prompt_faults(matches, (row.prompt for row in rows))
    return {name: one for name, one in named.items() if name not in strangers}, [*problems, *strangers.values()]


def prompt_faults(matches: Mapping[str, Match], prompts: Iterable[str]) -> dict[str, str]:
    """A line about each conversation that is about another prompt than its item; by item name, as are `matches`.

    White space and Unicode composition do not count, nor does one word in ten. `prompts` are those of all items: a
    conversation with the prompt of another item is never a spelling of its own.
    """
    known = {_clean(prompt) for prompt in prompts}
    files: dict[Path, dict[str, Match]] = defaultdict(dict)
    for name, match in matches.items():
        files[match.conversation.file][name] = match
    faults: dict[str, str] = {}
    for members in files.values():
        questions = _Questions(members.values(), known)
        for name, (prompt, source, one) in members.items():
            own, expected = _clean(prompt), f"{one.where}: {name} has the prompt {prompt!r} ({source}), and"
            for named in questions.prompts_of(own, one):
                if named is None:
                    faults[name] = f"{expected} its question does not name it: {one.describe!r}"
                elif named != own and (named in known or not _alike(named, own)):
                    faults[name] = f"{expected} the conversation is about {named!r}"
    return faults


class _Questions:
    """The first questions of one file, and their wordings around the prompt."""

    def __init__(self, members: Iterable[Match], prompts: Collection[str]) -> None:
        """Learn wordings that no template has from questions that hold their item's prompt; `prompts` of all items."""
        others = [
            (question, _clean(one.prompt))
            for one in members
            if not _prompts_in(question := _clean(one.conversation.describe), _template_wordings())
        ]
        self._all_alike = len({question for question, _ in others}) == 1
        self._prompts = prompts
        self._held_by: dict[str, set[str]] = defaultdict(set)
        for question, own in others:
            wording = _wording(question, own)
            if wording is not None:
                self._held_by[wording].add(own)
        self._known = nlargest(_WORDINGS, self._held_by, key=lambda wording: len(self._held_by[wording]))

    def prompts_of(self, own: str, conversation: Conversation) -> Iterator[str | None]:
        """The prompts that the conversation states and its question names; None if the question should name one.

        `own` is the prompt of its item.
        """
        question = _clean(conversation.describe)
        if conversation.prompt is not None:
            yield _clean(conversation.prompt)
        of_template = _prompts_in(question, _template_wordings())
        if of_template:
            yield own if own in of_template else of_template[0]
        elif not self._all_alike:
            named = self._named(question, own)
            if named is not None or conversation.prompt is None:
                yield named

    def _named(self, question: str, own: str) -> str | None:
        """The words of the question at the place of the prompt in its wording; None if its wording is not known."""
        wording = _wording(question, own)
        if wording is not None and self._is_shared(wording):
            return own
        for other in self._known:
            for named in _prompts_in(question, [other]):
                if wording is None or self._is_shared(other) or named in self._prompts:
                    return named
        return None if wording is None else own

    def _is_shared(self, wording: str) -> bool:
        return len(self._held_by[wording]) > 1


@cache
def _template_wordings() -> tuple[str, ...]:
    return tuple(_clean(template.describe) for template in templates().values())


def _wording(question: str, prompt: str) -> str | None:
    """The question with `prompt` replaced by PROMPT; None if it does not hold `prompt` as whole words."""
    if not prompt or prompt not in question:
        return None
    found, count = re.subn(rf"(?<!\w){re.escape(prompt)}(?!\w)", lambda _: PROMPT, question)
    return found if count else None


def _prompts_in(question: str, wordings: Iterable[str]) -> list[str]:
    """The words of the question at the place of the prompt, for each wording that the question is in."""
    found: list[str] = []
    for wording in wordings:
        before, _, after = wording.partition(PROMPT)
        after = after.rpartition(PROMPT)[2]
        if question.startswith(before) and question.endswith(after) and len(question) > len(before) + len(after):
            found.append(question[len(before) : len(question) - len(after)].strip())
    return found


def _clean(text: str) -> str:
    """The text for comparisons: composed Unicode, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _alike(one: str, other: str) -> bool:
    return SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio() >= _SAME_WORDS
