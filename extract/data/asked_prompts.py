"""Whether conversations are about the prompts of their items: images of two data sets may have the same names.

A question names its prompt where its wording has it: the wording of a template, or one that several questions of the
file share. A file in which every question is the same names no prompts, and there is nothing to compare.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from functools import cache
from heapq import nlargest
from pathlib import Path
from typing import NamedTuple

from agiqa.extract.data.conversations import Talk
from agiqa.extract.data.templates import PROMPT, templates

_SAME_WORDS = 0.9
"""Share of words in common from which two prompts are one that is spelled in two ways.

AIGCIQA2023's table says "I see How you did there" where its conversations say "I see what you did there".
"""

_WORDINGS = 16
"""Wordings of one file that are looked for in each of its questions."""


class Asked(NamedTuple):
    """A conversation, and the prompt of the item that it was matched with."""

    prompt: str
    place: str
    """Where the prompt stands, for messages."""
    talk: Talk


def prompt_faults(asked: Mapping[str, Asked], prompts: Iterable[str]) -> dict[str, str]:
    """By name of the item, a line about each conversation that is about another prompt; `asked` is by that name too.

    White space and Unicode composition do not count, nor does a word in ten. `prompts` are those of all items: a
    conversation with the prompt of another item is no spelling of its own.
    """
    known = {_clean(prompt) for prompt in prompts}
    files: dict[Path, dict[str, Asked]] = defaultdict(dict)
    for name, one in asked.items():
        files[one.talk.file][name] = one
    faults: dict[str, str] = {}
    for members in files.values():
        questions = _Questions(members.values(), known)
        for name, (prompt, place, talk) in members.items():
            own, expected = _clean(prompt), f"{talk.where}: {name} has the prompt {prompt!r} ({place}), and"
            for named in questions.prompts_of(own, talk):
                if named is None:
                    faults[name] = f"{expected} its question does not name it: {talk.describe!r}"
                elif named != own and (named in known or not _alike(named, own)):
                    faults[name] = f"{expected} the conversation is about {named!r}"
    return faults


class _Questions:
    """The first questions of one file, and what their wording is around the prompt."""

    def __init__(self, members: Iterable[Asked], prompts: Collection[str]) -> None:
        """Learn the wordings that no template has from the questions that hold the prompt of their item.

        `prompts` are those of all items.
        """
        others = [
            (question, _clean(one.prompt)) for one in members if not _of_template(question := _question(one.talk))
        ]
        self._all_alike = len({question for question, _ in others}) == 1
        self._prompts = prompts
        self._held_by: dict[str, set[str]] = defaultdict(set)
        for question, own in others:
            wording = _wording(question, own)
            if wording is not None:
                self._held_by[wording].add(own)
        self._known = nlargest(_WORDINGS, self._held_by, key=lambda wording: len(self._held_by[wording]))

    def prompts_of(self, own: str, talk: Talk) -> Iterator[str | None]:
        """The prompts that the conversation states and that its question names; None where it should name one.

        `own` is the prompt of its item.
        """
        question = _question(talk)
        if talk.prompt is not None:
            yield _clean(talk.prompt)
        of_template = _of_template(question)
        if of_template:
            yield own if own in of_template else of_template[0]
        elif not self._all_alike:
            named = self._named(question, own)
            if named is not None or talk.prompt is None:
                yield named

    def _named(self, question: str, own: str) -> str | None:
        """What the question has where its wording has the prompt; None where no wording is known for it."""
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


def _question(talk: Talk) -> str:
    return _clean(talk.describe)


def _of_template(question: str) -> list[str]:
    """The prompt in a question in the words of a template; empty for other words."""
    return _prompts_in(question, _template_wordings())


@cache
def _template_wordings() -> tuple[str, ...]:
    return tuple(_clean(template.describe) for template in templates().values())


def _wording(question: str, prompt: str) -> str | None:
    """The question with its prompt cut out; None where it does not hold the prompt, as whole words."""
    if not prompt or prompt not in question:
        return None
    found, count = re.subn(rf"(?<!\w){re.escape(prompt)}(?!\w)", lambda _: PROMPT, question)
    return found if count else None


def _prompts_in(question: str, wordings: Iterable[str]) -> list[str]:
    """What stands in the question where each wording has its prompt; nothing of a wording that it does not have."""
    found: list[str] = []
    for wording in wordings:
        before, _, after = wording.partition(PROMPT)
        after = after.rpartition(PROMPT)[2]
        if question.startswith(before) and question.endswith(after) and len(question) > len(before) + len(after):
            found.append(question[len(before) : len(question) - len(after)].strip())
    return found


def _clean(text: str) -> str:
    """The text as it is compared: composed Unicode, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _alike(one: str, other: str) -> bool:
    return SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio() >= _SAME_WORDS
