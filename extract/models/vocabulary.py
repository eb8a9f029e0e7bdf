"""Token ids that a model has no embedding for: of its tokenizer, which may belong to other weights, and of an item."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError, ModelError, listed


class Vocabulary:
    """The token ids that a model reads."""

    def __init__(self, name: str, tokenizer: Any, *, size: int, rows: Callable[[], int], image_id: int | None) -> None:
        """`size` is the stated vocabulary; some models have more `rows` of embeddings, for marks of images.

        Raises ModelError where the tokenizer makes ordinary tokens that have no row. Special ones may lack theirs as
        long as no text holds them: published checkpoints of text models have kept image marks of their siblings.
        """
        self.name = name
        self._tokenizer = tokenizer
        self._size = size
        self._rows = rows
        self._image_id = image_id
        beyond = {token: place for token, place in tokenizer.get_vocab().items() if place >= size}
        special = {*tokenizer.all_special_ids, image_id}
        special |= {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
        strange = sorted(token for token, place in beyond.items() if place not in special)
        if strange and max(beyond.values()) >= rows():
            message = (
                f"{name}: the tokenizer has ids up to {max(beyond.values())}, and the model's vocabulary is {rows()} "
                f"({listed(strange)} have no embedding). Give the tokenizer that belongs to the weights, or resize the "
                "model's embeddings and save it."
            )
            raise ModelError(message)

    def refuse_strangers(self, token_ids: NDArray[np.int32]) -> None:
        """Raise DataError for `token_ids` (n,) that hold one without an embedding; an image's mark needs none."""
        beyond = {int(place) for place in token_ids[token_ids >= self._size]} - {self._image_id}
        if beyond and max(beyond) >= self._rows():
            token = self._tokenizer.convert_ids_to_tokens(max(beyond))
            message = (
                f"its text holds the token {token!r} (id {max(beyond)}), and the vocabulary of {self.name} is "
                f"{self._rows()}; take it out of the text, or use a model with an embedding for it."
            )
            raise DataError(message)
