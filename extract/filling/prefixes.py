"""How many tokens of an item belong to the shorter conversations with which its own begins."""

from collections.abc import Mapping

import numpy as np

from agiqa.errors import DataError, ModelError
from agiqa.extract.data.images import ImageFile
from agiqa.extract.data.items import Item
from agiqa.extract.models import Backbone, Prepared

NO_BEGINNING = -1
"""Instead of a number of rows: the tokens of the shorter conversation are not the first ones of the item."""


def rows_of_beginnings(
    backbone: Backbone,
    item: Item,
    image: ImageFile | None,
    whole: Prepared,
    *,
    limit: int,
    ends: Mapping[str, int],
) -> tuple[int, ...]:
    """The rows of each shorter conversation of `item`, whose tokens, cut at `limit`, are `whole`; or NO_BEGINNING.

    `ends` has the number of messages of each. It is rendered and tokenised as for a store of its own.
    """
    found: list[int] = []
    for count in ends.values():
        try:
            short = backbone.outline(item.conversation[:count], image, size=item.checked_size)
        except (DataError, ModelError):  # a template that refuses the shorter conversation may take the whole one
            found.append(NO_BEGINNING)
            continue
        rows = min(len(short.token_ids), limit)
        same = np.array_equal(short.token_ids[:rows], whole.token_ids[:rows])
        found.append(rows if same and np.array_equal(short.roles[:rows], whole.roles[:rows]) else NO_BEGINNING)
    return tuple(found)
