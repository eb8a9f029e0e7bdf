"""Roles of the tokens that a processor makes of one image placeholder."""

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ModelError
from agiqa.store import TOKEN_ROLES


def expand_roles(
    name: str,
    text_ids: NDArray[np.int32],
    text_roles: NDArray[np.uint8],
    expanded_ids: NDArray[np.int32],
    image_token_id: int,
) -> NDArray[np.uint8]:
    """Roles (m,) of `expanded_ids` (m,), the processor's version of `text_ids` (n,) with roles `text_roles` (n,).

    What both begin and end with keeps its role. In between lies what stands for the image: image tokens get
    the role image, row and column marks special. Raises ModelError when words differ too, or no image token
    came out.
    """
    shortest = min(len(text_ids), len(expanded_ids))
    before = _common(text_ids[:shortest], expanded_ids[:shortest])
    rest = shortest - before
    after = _common(text_ids[len(text_ids) - rest :][::-1], expanded_ids[len(expanded_ids) - rest :][::-1])
    replaced = text_roles[before : len(text_roles) - after]
    if np.any(replaced != TOKEN_ROLES["special"]):
        message = f"{name}: its processor changes words and not just the image's place, so roles cannot be told."
        raise ModelError(message)
    roles = np.full(len(expanded_ids), TOKEN_ROLES["special"], dtype=np.uint8)
    roles[:before] = text_roles[:before]
    roles[len(roles) - after :] = text_roles[len(text_roles) - after :]
    seen = expanded_ids == image_token_id
    if not seen.any():
        message = f"{name}: its processor made no image token (id {image_token_id}) of the image."
        raise ModelError(message)
    roles[seen] = TOKEN_ROLES["image"]
    return roles


def _common(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """How many leading elements of two arrays of one length agree."""
    differing = np.flatnonzero(left != right)
    return int(differing[0]) if len(differing) else len(left)
