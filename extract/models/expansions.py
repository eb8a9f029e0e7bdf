"""What a processor makes of the mark of an image in a text: the roles of the tokens, and tokens by the image's size.

Plans need no pixels, since a processor's expansions are learned once per size.

In all known families the tokens of an image follow from its size. Nothing is taken for granted: an expansion is used
from the third conversation on, once the second has confirmed it, and only where the text around the mark is the same.
A family whose expansions do not repeat goes through its processor each time. The fill compares all tokens again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ModelError
from agiqa.store import TOKEN_ROLES

_Decode = Callable[[Sequence[int]], str]
"""From token ids to their text."""
Tokens = tuple[NDArray[np.int32], NDArray[np.uint8]]
"""Token ids (n,) and roles (n,)."""
Size = tuple[int, int]
"""(width, height) in pixels."""

_FOLLOWING = 8
"""Tokens behind the mark that must be the same, beside all in front of it."""
_ROLES = 256
"""More than the number of roles."""
_MOST_SIZES, _MOST_PER_SIZE = 4096, 8


@dataclass(kw_only=True)
class _Expansion:
    """The difference between one text and the processor's version of it."""

    pattern: NDArray[np.int32]
    """The beginning of the text: all up to the mark, and some tokens more."""
    replaced: int
    """Tokens of the text up to the end of the mark."""
    tokens: Tokens
    """What replaces them."""
    confirmed: bool = False

    def matches(self, text: Tokens) -> bool:
        """Whether `text` begins as the one that it was learned from."""
        return np.array_equal(text[0][: len(self.pattern)], self.pattern)

    def applied(self, text: Tokens) -> Tokens:
        """`text` with its mark replaced."""
        (ids, roles), (new_ids, new_roles) = text, self.tokens
        return np.concatenate([new_ids, ids[self.replaced :]]), np.concatenate([new_roles, roles[self.replaced :]])


class Expansions:
    """The expansions of one processor by the image's size."""

    def __init__(self) -> None:
        """None is known yet."""
        self._known: dict[Size, list[_Expansion]] = {}
        self.repeat = True
        """Whether all conversations so far agreed."""

    def expanded(self, size: Size, text: Tokens) -> Tokens | None:
        """`text` with an image of `size`, as the processor would return it; None if that is not known."""
        known = self._find(size, text)
        return known.applied(text) if known is not None and known.confirmed and self.repeat else None

    def learn(self, size: Size, text: Tokens, whole: Tokens) -> None:
        """Take note that the processor made `whole` of `text` with an image of `size`."""
        known = self._find(size, text)
        if known is not None:
            known.confirmed = _equal(known.applied(text), whole)
            self.repeat = self.repeat and known.confirmed
            return
        found = self._known.setdefault(size, []) if len(self._known) < _MOST_SIZES else []
        if len(found) < _MOST_PER_SIZE:
            found.append(_difference(text, whole))

    def _find(self, size: Size, text: Tokens) -> _Expansion | None:
        return next((known for known in self._known.get(size, ()) if known.matches(text)), None)


def _difference(text: Tokens, whole: Tokens) -> _Expansion:
    """What was replaced: at least the mark, whose role differs even if the processor leaves one token in its place."""
    old, new = (ids.astype(np.int64) * _ROLES + roles for ids, roles in (text, whole))
    _, after = common_ends(old, new)
    replaced, end = len(old) - after, len(new) - after
    tokens = whole[0][:end], whole[1][:end]
    return _Expansion(pattern=text[0][: replaced + _FOLLOWING], replaced=replaced, tokens=tokens)


def _equal(left: Tokens, right: Tokens) -> bool:
    return np.array_equal(left[0], right[0]) and np.array_equal(left[1], right[1])


def common_beginning(left: NDArray[np.integer[Any]], right: NDArray[np.integer[Any]]) -> int:
    """The number of equal values at the beginning of two arrays."""
    most = min(len(left), len(right))
    differing = np.flatnonzero(left[:most] != right[:most])
    return int(differing[0]) if len(differing) else most


def common_ends(left: NDArray[np.integer[Any]], right: NDArray[np.integer[Any]]) -> tuple[int, int]:
    """The number of equal values at the beginning of two arrays, and of those behind them at the end."""
    before = common_beginning(left, right)
    return before, common_beginning(left[before:][::-1], right[before:][::-1])


def expand_roles(
    name: str,
    text_ids: NDArray[np.int32],
    text_roles: NDArray[np.uint8],
    expanded_ids: NDArray[np.int32],
    image_token_id: int,
    *,
    decode: _Decode | None = None,
) -> NDArray[np.uint8]:
    """Roles (m,) of `expanded_ids` (m,), the processor's version of `text_ids` (n,) with roles `text_roles` (n,).

    Tokens found in both keep their role. Of the others, image tokens get the role image, and what the processor adds,
    such as row and column marks, the role special. With `decode`, a content that differs by white space alone keeps its
    role. Raises ModelError if words differ, or there is no image token.
    """
    roles = np.full(len(expanded_ids), TOKEN_ROLES["special"], dtype=np.uint8)
    for old, new, same in _blocks(text_ids, expanded_ids):
        if same:
            roles[new] = text_roles[old]
            continue
        kept = np.flatnonzero(text_roles[old] != TOKEN_ROLES["special"])
        if not len(kept):
            continue
        respelt = _respelt(text_ids[old][kept].tolist(), expanded_ids[new].tolist(), decode)
        if respelt is None or len(set(text_roles[old][kept].tolist())) > 1:
            message = f"{name}: its processor changes words and not just the image's place, so roles are unknown."
            raise ModelError(message)
        roles[new.stop - respelt : new.stop] = text_roles[old][kept[0]]
    seen = expanded_ids == image_token_id
    if not seen.any():
        message = f"{name}: its processor made no image token (id {image_token_id}) of the image."
        raise ModelError(message)
    roles[seen] = TOKEN_ROLES["image"]
    return roles


def _blocks(old: NDArray[np.int32], new: NDArray[np.int32]) -> list[tuple[slice, slice, bool]]:
    """(tokens of `old`, tokens of `new`, whether they are equal), in order.

    Most processors only replace the image's mark, so the beginning and the end agree and the matcher has little to do.
    """
    before, after = common_ends(old, new)
    middle = slice(before, len(old) - after), slice(before, len(new) - after)
    blocks = [(slice(0, before), slice(0, before), True)]
    matcher = SequenceMatcher(None, old[middle[0]].tolist(), new[middle[1]].tolist(), autojunk=False)
    for tag, *edges in matcher.get_opcodes():
        first, last, start, stop = (edge + before for edge in edges)
        blocks.append((slice(first, last), slice(start, stop), tag == "equal"))
    blocks.append((slice(len(old) - after, len(old)), slice(len(new) - after, len(new)), True))
    return blocks


def _respelt(content: list[int], block: list[int], decode: _Decode | None) -> int | None:
    """How many tokens at the end of `block` have the text of `content`, but for white space; None if none have."""
    if decode is None:
        return None
    text = decode(content).strip()
    for count in range(1, len(block) + 1):
        found = decode(block[-count:]).strip()
        if found == text:
            return count
        if len(found) > len(text):
            break
    return None
