"""Token dropout: in training a random part of each item's tokens is taken out of its sequence.

What stays moves together to the left, in its order, so that encoder and pooling see a shorter item. Tokens that are
only set to zero would still be counted by a mean and read by an encoder: training would then pool values of another
distribution than evaluation does.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def hide_tokens(
    features: Float[Tensor, "batch token channel"],
    mask: Bool[Tensor, "batch token"],
    pooled: Bool[Tensor, "batch token"],
    places: Int64[Tensor, "batch place"],
    *,
    share: float,
) -> tuple[Float[Tensor, "batch left channel"], Bool[Tensor, "batch left"], Bool[Tensor, "batch left"]]:
    """Features, mask and `pooled`, which is a part of the mask, without `share` of the tokens of each item.

    An item of n tokens loses floor(share n) of them, drawn uniformly without replacement from torch's random state.
    The tokens at `places` are never lost, nor is the last one that is left of `pooled`. The new length follows from the
    old one alone, so that nothing is read back from a GPU.
    """
    batch, length = mask.shape
    fewest = max(1, places.shape[1])
    left = min(length, max(length - math.floor(share * length), fewest))
    lengths = mask.sum(1)
    kept = lengths - (share * lengths.double()).floor().long()
    kept = torch.minimum(kept.clamp_min(fewest), lengths)
    stays = _ranks(mask, pooled, places) < kept[:, None]
    steps = torch.arange(length, device=mask.device)
    # padding stands before what is hidden, so that padding remains padding
    index = torch.where(stays, steps, torch.where(mask, steps + 2 * length, steps + length)).argsort(1)[:, :left]
    rows = index + length * torch.arange(batch, device=mask.device)[:, None]
    shorter = features.flatten(0, 1).index_select(0, rows.flatten()).view(batch, left, -1)
    remains = steps[:left] < kept[:, None]
    return shorter, remains, pooled.gather(1, index) & remains


def _ranks(mask: Bool[Tensor, "batch token"], pooled: Bool[Tensor, "batch token"], places: Tensor) -> Tensor:
    """A random order of the tokens of each item, as the rank of each from 0: first those that must stay."""
    draws = torch.rand(mask.shape, device=mask.device)
    one_of_pooled = draws.masked_fill(~pooled, -1.0).argmax(1, keepdim=True)
    draws = draws.masked_fill(~mask, -1.0)
    first = places if places.shape[1] else one_of_pooled
    return draws.scatter(1, first, 2.0).argsort(1, descending=True).argsort(1)
