"""The prompt of a second question, from that of the first, without reading the image again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agiqa.extract.data.items import Message
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.expansions import common_ends
from agiqa.extract.models.rendering import Renderer


@dataclass(frozen=True, kw_only=True)
class NextPrompt:
    """The tokens of a conversation that goes on."""

    ids: NDArray[np.int32]
    """(n,)"""
    seen: int
    """The image's tokens are among this many at the beginning; 0 without an image."""


def next_prompt(
    renderer: Renderer,
    prepared: Prepared,
    before: Sequence[Message],
    after: Sequence[Message],
    *,
    answer: bool = True,
) -> NextPrompt | None:
    """The prompt for an answer to `after`, which begins with `before`, whose prompt is `prepared`.

    Without `answer`, the tokens of `after` alone. What stands for the image in the text of `before` became other tokens
    in `prepared`; they stand for it in `after` too. None if the texts differ before the end of those tokens.
    """
    image = bool(prepared.inputs)
    now = renderer.tokenize(renderer.render(after, image=image, answer=answer))[0]
    if not image:
        return NextPrompt(ids=now, seen=0)
    was, ids = renderer.tokenize(renderer.render(before, image=True, answer=True))[0], prepared.token_ids
    _, rest = common_ends(was, ids)
    stop, seen = len(was) - rest, len(ids) - rest
    if not np.array_equal(was[:stop], now[:stop]):
        return None
    return NextPrompt(ids=np.concatenate([ids[:seen], now[stop:]]), seen=seen)
