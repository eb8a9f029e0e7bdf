"""The rating words that a model answered, from conversation files, for the items of a store."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from agiqa.errors import DataError
from agiqa.extract.data.conversations import Conversation, aspects_in_name, read_conversations
from agiqa.extract.data.matching import Match, prompt_faults, row_name
from agiqa.extract.describing.describing import images_without_answer
from agiqa.heads.evaluation.rating_words import RATING_WORDS, parse_rating_word
from agiqa.store.format.items import MODEL

MIDDLE = len(RATING_WORDS) // 2
"""The class of the middle word."""


class RatingWords:
    """The class of each item's rating word, 0 (bad) to 4 (excellent), as files tell it."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read M3-AGIQA conversation files, such as `agiqa describe` writes and `agiqa words` scores.

        A file whose name holds one aspect (`quality_test_res.json`) is on that aspect, another one on any.
        Raises DataError for a file that cannot be read, or a conversation in it that cannot be used.
        """
        self._files = [
            (_aspect_of(path), images_without_answer(path), read_conversations(path, None)) for path in files
        ]
        problems = [
            f"{talk.where}: {'; '.join(talk.problems)}"
            for _, _, talks in self._files
            for talk in talks
            if talk.problems
        ]
        if problems:
            where = "the conversations with rating words"
            raise DataError.from_problems(where, problems)

    def of(self, prompts: Mapping[str, str], label: str) -> dict[str, int | None]:
        """By name, the class of each item's word on the aspect `label`; None for an answer without a clear word.

        `prompts` are those of the items, by name. Raises DataError where an item has no word of the model's own, as
        the teacher's was written with the MOS in view, or one about another prompt.
        """
        if not self._files:
            message = "no files with rating words were given"
            raise DataError(message)
        found = self._own(prompts, label)
        lacking = [name for name in prompts if name not in found]
        if lacking:
            message = (
                f"{len(lacking)} of the {len(prompts)} items of a test part, {lacking[0]!r} first, have no rating word "
                f"of the model's own on {label}; the teacher's words were written with the MOS in view"
            )
            raise DataError(message)
        matches = {name: Match(prompts[name], "the store", talk) for name, talk in found.items()}
        faults = prompt_faults(matches, prompts.values())
        if faults:
            where = "the conversations with rating words"
            raise DataError.from_problems(where, list(faults.values()))
        return {name: _class_of(talk) for name, talk in found.items()}

    def _own(self, names: Mapping[str, object], label: str) -> dict[str, Conversation]:
        """The conversation of every item that has a word of the model's own."""
        found: dict[str, Conversation] = {}
        for aspect, silent, talks in self._files:
            for talk in talks if aspect in (None, label) else ():
                name = row_name(talk.image, names)
                if name is None or not (talk.rating_author == MODEL or talk.image in silent):
                    continue
                if name in found:
                    message = f"{talk.where}: the item {name!r} has a rating word of the model's own already"
                    raise DataError(message)
                found[name] = talk
        return found


def _class_of(talk: Conversation) -> int | None:
    word = parse_rating_word(talk.rating) if talk.rating_author == MODEL and talk.rating else None
    return None if word is None else RATING_WORDS.index(word)


def _aspect_of(path: Path) -> str | None:
    """The one aspect that the name of the file holds; None where it holds none, or several."""
    named = aspects_in_name(path)
    return named.pop() if len(named) == 1 else None
