"""The first layer of the demo's vision tower: random filters of known scale, and units that vote on their strength.

A plain random patch embedding answers to brightness and large shapes so loudly that sharpness, noise and
block edges cannot be heard. These filters are random too, but each is local, free of a mean and of one
scale, and its gain makes up for how little energy pictures have at that scale. The units behind them
rectify with limits (`relu6`) at several gains, in pairs of opposite sign (the concatenated ReLU of Shang
et al., 2016), so that the votes of many units form a soft histogram of the strength of every kind of filter.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCK = 8
"""Side of the blocks that JPEG codes an image in; some filters sit on their edges, others within."""
_LOUDNESS = 1.5
_COLOUR_LOUDNESS = 2.0
_WINDOW = 1.5
"""Standard deviation of a filter's window, in cells of its scale."""
_GAINS = (2.0, 4.4, 9.6, 20.9, 45.7, 100.0)
_LIMIT = 6.0
"""Where relu6 stops."""
_USUAL = 0.4
"""Share of the limit that a unit reaches on an ordinary picture; the bias takes it off."""
_VOTES = 16.0
"""How far the votes of all kinds together move a channel between their extremes, as a standard deviation."""
_OWN_VIEW = 0.4
"""Standard deviation of what a unit says besides the vote of its kind."""

UNITS_PER_FILTER = 2 * len(_GAINS)
"""Units of the first feed-forward layer for every filter: both signs, at every gain."""


@dataclass(frozen=True, kw_only=True)
class FilterKind:
    """`cell` is the scale in pixels; `coloured` filters see colour differences only, the others brightness only.

    `border` says, at the finest scale, whether filters sit on the edges of JPEG's blocks or within blocks.
    """

    cell: int
    coloured: bool = False
    border: bool = False


KINDS = (
    FilterKind(cell=1),
    FilterKind(cell=1, border=True),
    FilterKind(cell=1, coloured=True),
    FilterKind(cell=2),
    FilterKind(cell=2, coloured=True),
    FilterKind(cell=4),
    FilterKind(cell=4, coloured=True),
    FilterKind(cell=1, border=True, coloured=True),
)
"""The kinds of filters; filter k is of kind k modulo their number."""


def draw_filters(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Random patch filters (count, 3, side, side), float32; `side` is a multiple of 8 and at least 24."""
    return torch.stack([_filter(index, side, generator) for index in range(count)])


def _filter(index: int, side: int, generator: torch.Generator) -> Tensor:
    """One filter (3, side, side): high-passed noise on the cells of its scale, under a bell-shaped window."""
    kind = KINDS[index % len(KINDS)]
    cells = side // kind.cell
    noise = torch.randn(1, 3 if kind.coloured else 1, cells, cells, generator=generator).expand(1, 3, -1, -1)
    if kind.coloured:
        noise = noise - noise.mean(1, keepdim=True)
    noise = noise - nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    if kind.cell > 1:
        noise = nn.functional.interpolate(noise, size=(side, side), mode="bilinear")
    centre = _centre(index // len(KINDS), kind, side, generator)
    bells = torch.exp(-((torch.arange(side) + 0.5 - centre) ** 2) / (2 * (_WINDOW * kind.cell) ** 2))
    window = bells[0][:, None] * bells[1][None, :]
    drawn = noise[0] * window
    drawn = drawn - window * drawn.sum((1, 2), keepdim=True) / window.sum()
    loudness = _LOUDNESS * (_COLOUR_LOUDNESS if kind.coloured else 1.0) / kind.cell
    return drawn * (loudness / float(drawn.norm()))


def _centre(number: int, kind: FilterKind, side: int, generator: torch.Generator) -> Tensor:
    """Row and column (2, 1) of the window of the `number`-th filter of this kind, in pixels."""
    margin = 2 * kind.cell
    centre = margin + (side - 2 * margin) * torch.rand(2, 1, generator=generator)
    if kind.border:
        centre[number % 2] = BLOCK * (1 + number // 2 % (side // BLOCK - 1))
    elif kind.cell == 1:
        # Near the middle of a block, where the window does not reach its edges.
        centre = BLOCK * (centre / BLOCK).floor() + BLOCK / 2 + 0.25 * (centre % BLOCK - BLOCK / 2)
    return centre


def unit_weights(filters: int) -> Tensor:
    """Weights (units, filters) from the filters to the units: every filter with both signs at every gain."""
    eye = torch.eye(filters)
    return torch.cat([sign * gain * eye for gain in _GAINS for sign in (1.0, -1.0)])


def vote_weights(filters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights (filters, units) and bias (filters,) from the units back to the stream.

    Units of one kind of filter and one gain speak with one voice into a random direction, which averages
    out the accidents of single filters; a usual picture is moved to about zero.
    """
    groups = len(KINDS) * len(_GAINS)
    kind = torch.arange(filters) % len(KINDS)
    group = torch.cat([len(KINDS) * gain + kind for gain in range(len(_GAINS)) for _ in range(2)])
    directions = torch.randn(filters, groups, generator=generator) * _VOTES / math.sqrt(groups)
    own = torch.randn(filters, len(group), generator=generator) * _OWN_VIEW / math.sqrt(filters)
    weight = (directions[:, group] * len(KINDS) / filters + own) / _LIMIT
    return weight, -_USUAL * directions.sum(1)
