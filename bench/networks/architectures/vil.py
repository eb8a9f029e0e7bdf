"""ViL, the Vision-LSTM (Alkin et al. 2024, arXiv 2406.04303): mLSTM blocks that read patches in alternating directions.

16 x 16 patches with position embeddings; 24 blocks, of which the odd ones read from the top left and the even ones from
the bottom right; the first and the last token, concatenated. A block normalises and projects up by 2 into two branches.
It convolves one of them (3 x 3, depthwise) and makes queries and keys of that, and values of what came before, by
matrices of 4 x 4 channels. It runs an mLSTM of 4 heads, and gates the result with the other branch.

The code is written here; the mLSTM is that of our heads. Layer shapes and initial values are those of the papers (ViL's
Fig. 1 and Section 3, second version; the block of xLSTM in Fig. 11 of Beck et al. 2024, arXiv 2405.04517) and of the
authors' code (github.com/NX-AI/vision-lstm), which was read for them. Published parameters with a classifier of 1,000
classes (Table 1): ViL-T 6 M, ViL-S 23 M, ViL-B 89 M.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from agiqa.bench.networks.architectures.contract import Pixels
from agiqa.bench.networks.architectures.encoders import EncoderNetwork
from agiqa.errors import ConfigError
from agiqa.heads.model.encoders.mlstm import mlstm

WIDTHS = {"vil_tiny": 192, "vil_small": 384, "vil_base": 768}
"""Channels of the tokens."""
BLOCKS, PATCH, EXPANSION, HEADS, SMALL = 24, 16, 2, 4, 4
"""Blocks; pixels of a patch; factor of the projection up; heads of the mLSTM; channels of queries that are mixed."""
_PARTS = 3
"""Queries, keys and values."""
_FORGET_BIASES = (3.0, 6.0)
_INPUT_SD = 0.1
Tokens = Float[Tensor, "batch token channel"]
Parts = Float[Tensor, "part batch token channel"]


class SmallMatrices(nn.Module):
    """The queries, keys and values: each a linear layer whose matrix is block-diagonal, with blocks of 4 x 4."""

    def __init__(self, width: int, *, sd: float) -> None:
        """Normal weights of this standard deviation, and biases of 0."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(_PARTS, width // SMALL, SMALL, SMALL).normal_(std=sd))
        self.bias = nn.Parameter(torch.zeros(_PARTS, width))

    def forward(self, tokens: Parts) -> Parts:
        """What queries, keys and values are made of, mixed."""
        mixed = torch.einsum("pbtgi,pgoi->pbtgo", tokens.unflatten(-1, (-1, SMALL)), self.weight.to(tokens.dtype))
        return mixed.flatten(-2) + self.bias[:, None, None]


class ViLBlock(nn.Module):
    """One block with its residual connection."""

    def __init__(self, width: int) -> None:
        """Random weights: small ones before the cell, smaller ones after it, and gates that remember."""
        super().__init__()
        inner = EXPANSION * width
        small = math.sqrt(2 / (5 * width))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * inner)
        self.convolution = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.parts = SmallMatrices(inner, sd=small)
        self.gates = nn.Linear(_PARTS * inner, 2 * HEADS)
        self.head_norm = nn.GroupNorm(HEADS, inner)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = nn.Linear(inner, width)
        for linear, sd in ((self.up, small), (self.down, 2 / math.sqrt(width)), (self.gates, 0.0)):
            nn.init.normal_(linear.weight, std=sd)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            entry, forget = self.gates.bias.split(HEADS)
            entry.normal_(std=_INPUT_SD)
            forget.copy_(torch.linspace(*_FORGET_BIASES, HEADS))

    def forward(self, tokens: Tokens, side: int, *, backwards: bool) -> Tokens:
        """The tokens after the block; `side` are the rows and columns of patches."""
        in_order = tokens.flip(1) if backwards else tokens
        branch, gate = self.up(self.norm(in_order)).chunk(2, dim=-1)
        nearby = functional.silu(self._convolved(branch, side))
        passed = self.skip * nearby + self._remembered(nearby, branch)
        found: Tensor = self.down(passed * functional.silu(gate))
        return tokens + (found.flip(1) if backwards else found)

    def _convolved(self, tokens: Tokens, side: int) -> Tokens:
        """The convolution over the grid of patches."""
        grid = tokens.mT.unflatten(2, (side, side))
        convolved: Tensor = self.convolution(grid)
        return convolved.flatten(2).mT

    def _remembered(self, nearby: Tokens, branch: Tokens) -> Tokens:
        """The mLSTM, which reads the tokens in their order, and the norm of each of its heads."""
        parts: Tensor = self.parts(torch.stack([nearby, nearby, branch]))
        query, key, value = parts.unflatten(-1, (HEADS, -1)).transpose(2, 3)
        gates: Tensor = self.gates(parts.permute(1, 2, 0, 3).flatten(2)).float()
        entry, forget = gates.mT[..., None].chunk(2, dim=1)
        hidden = mlstm(query, key, value, entry, forget).to(parts.dtype)
        rows = hidden.transpose(1, 2).flatten(0, 1)
        normed: Tensor = self.head_norm(rows.flatten(1)).view_as(nearby)
        return normed


class ViLEncoder(nn.Module):
    """Pixels to the first and last token, concatenated: twice `width` features."""

    def __init__(self, width: int, *, image_size: int, blocks: int = BLOCKS) -> None:
        """Random weights for images of `image_size` pixels. Raises ConfigError unless patches fill them."""
        super().__init__()
        if image_size % PATCH:
            message = f"ViL reads patches of {PATCH} pixels, and {image_size} is no multiple of that. Set --image-size."
            raise ConfigError(message)
        self.side = image_size // PATCH
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.empty(1, self.side, self.side, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(ViLBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch channel"]:
        """The features."""
        tokens = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions.flatten(1, 2)
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, self.side, backwards=number % 2 == 1)
        tokens = self.norm(tokens)
        return torch.cat([tokens[:, 0], tokens[:, -1]], dim=1)


def vil_network(name: str, *, image_size: int, hidden: int) -> EncoderNetwork:
    """The encoder `name`, one of WIDTHS, with random weights and a regressor, for images of `image_size` pixels."""
    return EncoderNetwork(ViLEncoder(WIDTHS[name], image_size=image_size), 2 * WIDTHS[name], hidden=hidden)
