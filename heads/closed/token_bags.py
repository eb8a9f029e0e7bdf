"""TF-IDF: what a bag of n-grams says, of stored token ids or, where a source has none, of the words of its texts.

As scikit-learn's TfidfVectorizer: counts times log((1 + items) / (1 + items with the n-gram)) + 1, scaled to length 1.
Words are found as it finds them, in lower case. The texts of an item are its prompt and its description.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from agiqa.errors import DataError, UnknownName
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.model.pooling import AUTO
from agiqa.store import TOKEN_ROLES

Keys = NDArray[np.int64]
"""n-grams as numbers: each token takes 21 bits; an n-gram of words is a hash of 64 bits."""
LONGEST = 3
"""Tokens of the longest n-gram that a number of 64 bits holds."""
_BITS = 21
_WORD = re.compile(r"\b\w\w+\b")


@runtime_checkable
class HasTokenIds(Protocol):
    """A FeatureSource that knows the token ids and roles of its items, as stores do."""

    def tokens(self, items: Sequence[int] | NDArray[Any], /) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]: ...


@runtime_checkable
class Described(Protocol):
    """An item table with descriptions, as those of stores are."""

    @property
    def descriptions(self) -> Sequence[str | None]: ...


def has_token_ids(source: FeatureSource) -> bool:
    """Whether the rows of `source` are tokens with ids: not those of a vision encoder, nor pooled rows."""
    return isinstance(source, HasTokenIds) and not getattr(source, "pooled", ()) and not getattr(source, "tap", None)


def has_texts(source: FeatureSource) -> bool:
    """Whether an item of `source` has a prompt or a description."""
    return any(source.items.prompts) or any(_descriptions(source))


def read_bags(source: FeatureSource, items: NDArray[np.int64], counted: str, *, ngrams: int) -> list[Keys]:
    """The n-grams of each item, of 1 to `ngrams` tokens that follow each other.

    `counted` names the roles of the tokens to count, as a pooling does: `mean@question+mean@answer`. `auto` counts all
    but those of images. Raises DataError for a source without token ids, and UnknownName for a role.
    """
    wanted = _wanted(counted)
    if not isinstance(source, HasTokenIds) or not has_token_ids(source):
        message = (
            f"{location_of(source)} has no token ids, which this tfidf counts. Give a store whose rows are tokens, as "
            "`agiqa extract` writes it by default."
        )
        raise DataError(message)
    return [_ngrams(ids, np.isin(roles, wanted), ngrams) for ids, roles in source.tokens(items)]


def read_word_bags(source: FeatureSource, items: NDArray[np.int64], counted: str, *, ngrams: int) -> list[Keys]:
    """The n-grams of each item's texts, of 1 to `ngrams` words that follow each other.

    Raises DataError for a source without texts, or where `counted` names roles, which words do not have.
    """
    if _roles(counted):
        message = (
            f"{location_of(source)} has no token ids, so that tfidf counts the words of prompts and descriptions, and "
            f"these have no roles to choose by {counted!r}. Leave the pooling out, or give a store whose rows are "
            "tokens."
        )
        raise DataError(message)
    prompts, descriptions = source.items.prompts, _descriptions(source)
    if not has_texts(source):
        message = f"{location_of(source)} has neither prompts nor descriptions, whose words this tfidf counts."
        raise DataError(message)
    return [_word_ngrams(f"{prompts[item]}\n{descriptions[item] or ''}", ngrams) for item in items.tolist()]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The n-grams of some items and their weights."""

    keys: Keys
    """Ascending."""
    idf: NDArray[np.float64]

    @classmethod
    def of(cls, bags: Sequence[Keys]) -> "Vocabulary":
        """The n-grams that occur in `bags`. Raises DataError where none does."""
        once = [np.unique(bag) for bag in bags]
        keys, counts = np.unique(np.concatenate(once), return_counts=True)
        if not len(keys):
            message = "tfidf finds nothing to count in any training item: no token of its roles, or no word."
            raise DataError(message)
        return cls(keys=keys, idf=np.log((1 + len(bags)) / (1 + counts)) + 1)

    def vectors(self, bags: Sequence[Keys]) -> csr_array:
        """The vectors (items, n-grams), sparse, of length 1; 0 for an item without a known n-gram."""
        ends, columns, values = [0], [np.zeros(0, np.int64)], [np.zeros(0)]
        for bag in bags:
            found, counts = np.unique(bag, return_counts=True)
            places = np.searchsorted(self.keys, found).clip(max=len(self.keys) - 1)
            known = self.keys[places] == found
            weights = counts[known] * self.idf[places[known]]
            columns.append(places[known])
            values.append(weights / max(float(np.sqrt((weights * weights).sum())), np.finfo(np.float64).tiny))
            ends.append(ends[-1] + int(known.sum()))
        parts = (np.concatenate(values), np.concatenate(columns), np.array(ends))
        return csr_array(parts, shape=(len(bags), len(self.keys)))


def _descriptions(source: FeatureSource) -> Sequence[str | None]:
    items = source.items
    return items.descriptions if isinstance(items, Described) else [None] * len(items.names)


def _roles(counted: str) -> list[str]:
    """The roles that `counted` names; none where it stands for all."""
    names = [part.strip().partition("@")[2] for part in counted.split("+")]
    return [] if counted == AUTO or not all(names) else names


def _wanted(counted: str) -> list[int]:
    names = _roles(counted) or [name for name in TOKEN_ROLES if name != "image"]
    for name in names:
        if name not in TOKEN_ROLES:
            kind = "token role"
            raise UnknownName.of(kind, name, TOKEN_ROLES)
    return [TOKEN_ROLES[name] for name in names]


def _ngrams(ids: NDArray[np.int32], counted: NDArray[np.bool_], longest: int) -> Keys:
    """The n-grams of 1 to `longest` tokens, all of them counted ones that follow each other."""
    tokens, found = ids.astype(np.int64) + 1, [np.zeros(0, np.int64)]
    keys, whole = tokens, counted
    for length in range(1, longest + 1):
        if length > 1:
            keys, whole = (keys[:-1] << _BITS) + tokens[length - 1 :], whole[:-1] & counted[length - 1 :]
        found.append(keys[whole])
    return np.concatenate(found)


def _word_ngrams(text: str, longest: int) -> Keys:
    words = _WORD.findall(text.lower())
    grams = [
        " ".join(words[k : k + length]) for length in range(1, longest + 1) for k in range(len(words) - length + 1)
    ]
    hashes = b"".join(hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in grams)
    return np.frombuffer(hashes, dtype="<i8").astype(np.int64)
