"""Groups of prompts that count as the same: one rule for splits, leak counts, intervals and baselines.

A model reads "a cat." and "A  cat" as nearly the same question, so a split that puts one of them in training and the
other in the test part does not test on new prompts. The comparison ignores only what does not describe the picture;
letters, digits, emoji and signs such as `+` or `$` count.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_APOSTROPHES = "'`\u00b4\u2018\u2019\u201b\u2032\uff07\u02bc\u02b9\u02bb"
_IN_A_WORD = re.compile(rf"(?<=[^\W\d_])[{_APOSTROPHES}](?=[^\W_])|(?<=\d)[{_APOSTROPHES}](?=[^\W\d_])")
"""Apostrophes within words, but not between digits: 6'2 is not 62."""
_PUNCTUATION_BY_USE = frozenset(f"{_APOSTROPHES}^~|<>\u00a8\u00af\u00b8\u02cb\u2212\u2044")
"""Characters that stand for quotes, dashes, brackets and separators, and that Unicode calls symbols or letters."""
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Joiners, fillers and variation selectors that have no shape, and that Unicode calls marks or letters."""


def normalise_prompt(prompt: str) -> str:
    """The prompt without differences of case, punctuation, white space, and Unicode spelling of the same text.

    Compatible characters are one (NFKC), as are upper and lower case. Characters without a shape are dropped.
    Punctuation becomes white space; an apostrophe within a word is dropped. White space becomes one space, and is
    dropped beside a wide character such as a Chinese one or an emoji. A prompt of punctuation alone keeps it.
    Normalising twice changes nothing.
    """
    seen = unicodedata.normalize("NFC", prompt.translate(_SEEN))
    kept = " ".join(_folded(seen).split())
    return _bare(seen) or _bare(kept) or kept


def prompt_groups(prompts: Sequence[str]) -> NDArray[np.int64]:
    """A group number per prompt, equal for equal normalised prompts; numbers follow the sorted prompts."""
    normal = {prompt: normalise_prompt(prompt) for prompt in set(prompts)}
    numbers = {prompt: number for number, prompt in enumerate(sorted(set(normal.values())))}
    return np.array([numbers[normal[prompt]] for prompt in prompts], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class PromptOverlap:
    """How many prompts of some items are also prompts of a training."""

    same: int
    """Equal to one of the training after `normalise_prompt`."""
    verbatim: int
    """Those of `same` that are equal letter by letter."""

    def note(self) -> str:
        """An addition to a sentence about `same`: how many are only nearly equal; empty where none is."""
        return f" ({self.verbatim} verbatim, {self.same - self.verbatim} nearly)" if self.verbatim < self.same else ""


class KnownPrompts:
    """The prompts of a training, in which others can be looked up."""

    def __init__(self, prompts: Iterable[str]) -> None:
        """Remember `prompts`."""
        self._verbatim = frozenset(prompts)
        self._normal = frozenset(normalise_prompt(prompt) for prompt in self._verbatim)

    def count(self, prompts: Iterable[str]) -> PromptOverlap:
        """How many of `prompts` are known; one that is given twice counts twice."""
        same = [prompt for prompt in prompts if normalise_prompt(prompt) in self._normal]
        return PromptOverlap(same=len(same), verbatim=sum(prompt in self._verbatim for prompt in same))


def _folded(text: str) -> str:
    """The text composed, compatible and without case: equal for what Unicode calls a compatibility caseless match."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return unicodedata.normalize("NFKC", decomposed)


def _bare(text: str) -> str:
    """The words of the text without punctuation, which folding may bring out of other characters."""
    return _spaced(_folded(_without_punctuation(_folded(_without_punctuation(text)))))


def _without_punctuation(text: str) -> str:
    """Punctuation as spaces, and nothing where an apostrophe stands within a word, such as `don't` or `1980's`."""
    return _IN_A_WORD.sub("", text).translate(_SPACES)


def _spaced(text: str) -> str:
    """The words of the text, with a space where the characters on both sides are narrow."""
    words = text.split()
    spaces = ["" if _is_wide(one[-1]) or _is_wide(other[0]) else " " for one, other in pairwise(words)]
    return "".join(word + space for word, space in zip(words, [*spaces, ""], strict=True)) if words else ""


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _seen(character: str) -> str:
    """Nothing for a character without shape and width, such as a zero-width space; else the character."""
    is_control = unicodedata.category(character) in ("Cf", "Cc") and not character.isspace()
    return "" if is_control or _INVISIBLE.match(character) else character


def _space(character: str) -> str:
    """A space for punctuation; else the character."""
    is_punctuation = character in _PUNCTUATION_BY_USE or unicodedata.category(character).startswith("P")
    return " " if is_punctuation else character


class _Replacements(dict[int, str]):
    """A table for `str.translate` that computes each entry at its first use."""

    def __init__(self, replace: Callable[[str], str]) -> None:
        """`replace` gives the replacement of a character."""
        super().__init__()
        self._replace = replace

    def __missing__(self, code: int) -> str:
        """The replacement of the character with this code point."""
        self[code] = self._replace(chr(code))
        return self[code]


_SEEN, _SPACES = _Replacements(_seen), _Replacements(_space)
