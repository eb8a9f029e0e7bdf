"""Roles of the tokens that a processor makes of one image placeholder."""

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ModelError
from agiqa.store import TOKEN_ROLES

Decode = Callable[[Sequence[int]], str]
"""From token ids to their text."""


def expand_roles(
    name: str,
    text_ids: NDArray[np.int32],
    text_roles: NDArray[np.uint8],
    expanded_ids: NDArray[np.int32],
    image_token_id: int,
    *,
    decode: Decode | None = None,
) -> NDArray[np.uint8]:
    """Roles (m,) of `expanded_ids` (m,), the processor's version of `text_ids` (n,) with roles `text_roles` (n,).

    Tokens of both keep their role. What else is there stands for the image, or is the processor's own: image tokens
    get the role image, row and column marks special. A content that the processor only sets apart by white space keeps
    its role by its text, if `decode` is given. Raises ModelError when words differ, or no image token came out.
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
            message = f"{name}: its processor changes words and not just the image's place, so roles cannot be told."
            raise ModelError(message)
        roles[new.stop - respelt : new.stop] = text_roles[old][kept[0]]
    seen = expanded_ids == image_token_id
    if not seen.any():
        message = f"{name}: its processor made no image token (id {image_token_id}) of the image."
        raise ModelError(message)
    roles[seen] = TOKEN_ROLES["image"]
    return roles


def _blocks(old: NDArray[np.int32], new: NDArray[np.int32]) -> list[tuple[slice, slice, bool]]:
    """(tokens of `old`, tokens of `new`, whether they are the same) in order.

    Most processors only fill the image's place; there the beginning and the end agree. Some write more elsewhere.
    """
    shortest = min(len(old), len(new))
    before = _common(old[:shortest], new[:shortest])
    rest = shortest - before
    after = _common(old[len(old) - rest :][::-1], new[len(new) - rest :][::-1])
    middle = slice(before, len(old) - after), slice(before, len(new) - after)
    blocks = [(slice(0, before), slice(0, before), True)]
    matcher = SequenceMatcher(None, old[middle[0]].tolist(), new[middle[1]].tolist(), autojunk=False)
    for tag, *edges in matcher.get_opcodes():
        first, last, start, stop = (edge + before for edge in edges)
        blocks.append((slice(first, last), slice(start, stop), tag == "equal"))
    blocks.append((slice(len(old) - after, len(old)), slice(len(new) - after, len(new)), True))
    return blocks


def _respelt(content: list[int], block: list[int], decode: Decode | None) -> int | None:
    """How many tokens at the end of `block` are the text of `content`, but for white space; None if none are."""
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


def _common(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """How many leading elements of two arrays of one length agree."""
    differing = np.flatnonzero(left != right)
    return int(differing[0]) if len(differing) else len(left)
