"""Crops of images as batches of normalised pixels, cut out on the device that trains."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from agiqa.bench.networks.architectures.contract import Network, Pixels
from agiqa.bench.networks.config import CENTRE_AND_CORNERS, NetworkConfig
from agiqa.bench.networks.pictures import Squares

_SHARE_OF_MEMORY = 0.3
"""Of the free memory of a GPU; images that take less are kept there."""
Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Which images to crop, and where."""

    images: Int64[Tensor, " crop"]
    """Positions in the squares."""
    tops: Int64[Tensor, " crop"]
    lefts: Int64[Tensor, " crop"]
    flips: Bool[Tensor, " crop"]

    def __len__(self) -> int:
        """Their number."""
        return len(self.images)

    def at(self, places: Tensor) -> "Crops":
        """Those at `places`."""
        return Crops(
            images=self.images[places], tops=self.tops[places], lefts=self.lefts[places], flips=self.flips[places]
        )


def random_crops(items: Numbers, config: NetworkConfig, generator: torch.Generator) -> Crops:
    """The crops of one epoch of training, in random order; the same generator state draws the same ones."""
    images = torch.from_numpy(items).repeat_interleave(config.train_crops)
    images = images[torch.randperm(len(images), generator=generator)]
    room = config.resize - config.image_size + 1
    tops, lefts = (torch.randint(room, (len(images),), generator=generator) for _ in range(2))
    flips = torch.rand(len(images), generator=generator) < (0.5 if config.flip else 0.0)
    return Crops(images=images, tops=tops, lefts=lefts, flips=flips)


def fixed_crops(items: Numbers, config: NetworkConfig) -> Crops:
    """The crops whose scores are averaged, image by image."""
    places = _places(config)
    tops, lefts = (torch.tensor([place[axis] for place in places]).repeat(len(items)) for axis in range(2))
    images = torch.from_numpy(items).repeat_interleave(len(places))
    return Crops(images=images, tops=tops, lefts=lefts, flips=torch.zeros(len(images), dtype=torch.bool))


def _places(config: NetworkConfig) -> list[tuple[int, int]]:
    """Top and left of each test crop."""
    room = config.resize - config.image_size
    if config.test_crops == CENTRE_AND_CORNERS:
        return [(0, 0), (0, room), (room, 0), (room, room), (room // 2, room // 2)]
    side = math.isqrt(config.test_crops)
    along = [room // 2] if side == 1 else [round(number * room / (side - 1)) for number in range(side)]
    return [(top, left) for top in along for left in along]


class CropReader:
    """Reads crops of squares as pixels on a device."""

    def __init__(self, squares: Squares, config: NetworkConfig, network: Network, device: torch.device) -> None:
        """The squares are kept in the memory of a GPU if they are small, else read from their file batch by batch."""
        self._squares, self._size, self._device = squares, config.image_size, device
        mean, std = (
            torch.tensor(values, device=device)[:, None, None] * 255.0 for values in (network.mean, network.std)
        )
        self._mean, self._factor = mean, 1.0 / std
        self._kept: Tensor | None = None
        if device.type == "cuda" and squares.nbytes < _SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]:
            self._kept = torch.from_numpy(np.array(squares)).to(device)  # a mapped file cannot be written to

    def read(self, crops: Crops) -> Pixels:
        """The normalised pixels of the crops, float32, in the memory format channels_last."""
        along = torch.arange(self._size)
        rows = crops.tops[:, None] + along
        columns = crops.lefts[:, None] + torch.where(crops.flips[:, None], along.flip(0), along)
        where, rows, columns = (part.to(self._device, non_blocking=True) for part in (crops.images, rows, columns))
        if self._kept is None:
            squares, where = self._read(crops.images.numpy()), torch.arange(len(crops), device=self._device)
        else:
            squares = self._kept
        cut = squares[where[:, None, None], rows[:, :, None], columns[:, None, :]]
        pixels: Pixels = (cut.permute(0, 3, 1, 2).float() - self._mean) * self._factor
        return pixels

    def _read(self, images: Numbers) -> UInt8[Tensor, "crop height width 3"]:
        found = torch.from_numpy(self._squares[images])
        if self._device.type == "cuda":
            return found.pin_memory().to(self._device, non_blocking=True)
        return found


def batches(count: int, size: int) -> Iterator[Tensor]:
    """The places of `count` crops in batches of `size`; a last batch of one joins the batch before it.

    Batch normalisation cannot train on one crop.
    """
    ends = [*range(size, count, size), count]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    start = 0
    for end in ends:
        yield torch.arange(start, end)
        start = end


def batch_count(count: int, size: int) -> int:
    """How many `batches` there are."""
    whole, rest = divmod(count, size)
    return max(1, whole + (rest > 1))
