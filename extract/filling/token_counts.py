"""Tokens and slices per item, counted by a model's tokenizer and processor before its weights are read."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agiqa.extract.data.items import DataSet, Item
from agiqa.extract.filling.plan import LengthRule, tokenise
from agiqa.extract.filling.pooling import Pooling
from agiqa.extract.filling.targets import roles_by_layer
from agiqa.extract.filling.token_estimates import TokenCounts
from agiqa.extract.models import Backbone
from agiqa.extract.models.minicpm.model import MiniCPMConfig
from agiqa.extract.models.minicpm.slicing import slicing_of
from agiqa.progress import track
from agiqa.store import TOKEN_ROLES
from agiqa.store.format.layers import LAST


def counted(
    data_set: DataSet,
    backbone: Backbone,
    rule: LengthRule,
    *,
    poolings: Sequence[Pooling] = (),
    layers: Sequence[str] = (LAST,),
) -> TokenCounts:
    """The tokens of all items, by the tokenizer and the processor of `backbone`, whose weights are not read.

    Of an image encoder they are the rows of the last of `layers`. Raises DataError as `tokenise`.
    """
    with track("count", len(data_set.items), "items") as advance:
        tokenised = tokenise(data_set, backbone, rule, poolings=poolings, advance=advance)
    config = getattr(backbone, "config", None)
    last = layers[-1]
    roles = [roles_by_layer(backbone, [last], one.roles)[last] for one in tokenised.tokenised]
    return TokenCounts(
        tokens=np.array([len(one) for one in roles], np.int64),
        image_tokens=np.array([(one == TOKEN_ROLES["image"]).sum() for one in roles], np.int64),
        slices=_slices(tokenised.items, config) if isinstance(config, MiniCPMConfig) else None,
        is_exact=True,
        truncated=tokenised.truncated,
        skipped=tuple(tokenised.skipped),
    )


def _slices(items: Sequence[Item], config: MiniCPMConfig) -> NDArray[np.int64]:
    about = {"most": config.slices, "resolution": config.resolution, "patch": config.patch}
    grids = [None if one.image_size is None else slicing_of(one.image_size, **about).grid or (0, 0) for one in items]
    return np.array([0 if grid is None else 1 + grid[0] * grid[1] for grid in grids], np.int64)
