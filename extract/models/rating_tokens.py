"""The tokens with which a model's answer begins when it is one of the rating words."""

from typing import Any

import numpy as np

from agiqa.extract.data.items import Message
from agiqa.extract.models.rendering import Renderer
from agiqa.store import TOKEN_ROLES
from agiqa.store.format.labels import RATING_WORDS

RATING_TOKENS = "rating_tokens"
"""The entry of a store's provenance, which heads of the kind `rating-words` read."""


def rating_tokens(backbone: object) -> dict[str, int] | None:
    """By word the id of its first token as an answer, in the chat template of the model.

    None for a backbone without chat template, and where two words begin with the same token.
    """
    renderer: Any = getattr(backbone, "renderer", None)
    if not isinstance(renderer, Renderer):
        return None
    found = {word: _first_token(renderer, word) for word in RATING_WORDS}
    return found if len(set(found.values())) == len(found) else None


def _first_token(renderer: Renderer, word: str) -> int:
    conversation = [Message(role="user", content="?"), Message(role="assistant", content=word)]
    ids, roles = renderer.tokenize(renderer.render(conversation))
    return int(ids[np.flatnonzero(roles == TOKEN_ROLES["answer"])[0]])
