"""Images as squares of one size, decoded once: a file of bytes in the cache, which all runs of that size share."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from agiqa.errors import DataError
from agiqa.extract.data.images import open_image, read_image_file
from agiqa.extract.data.items import Item
from agiqa.progress import say, track
from agiqa.store.disk.files import canonical_json, removed_on_failure, telling_disk_errors

Squares = NDArray[np.uint8]
"""(images, size, size, 3)."""
_FEWEST_FOR_WORKERS = 200
"""Below this count, starting worker processes costs more than they save."""


class _Decoded(Dataset[Any]):
    """Images, decoded and resized as they are asked for."""

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self._items, self._size = items, size

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, position: int) -> Squares | DataError:
        """The square, or the error: raised in a worker, it would lose its message among the lines of a traceback."""
        item = self._items[position]
        assert item.image is not None  # the data set was loaded with its images
        try:
            file = read_image_file(item.image)
            if item.image_sha256 not in (None, file.sha256):
                return DataError(f"{item.image}: the image file was replaced during this run. Run the command again.")
            return square(open_image(file), self._size)
        except DataError as error:
            return error


def square(image: Image.Image, size: int) -> Squares:
    """The image with a shorter side of `size` pixels (bilinear, antialiased), and the middle of its longer side."""
    width, height = image.size
    factor = size / min(width, height)
    resized = image.resize(
        (max(size, round(width * factor)), max(size, round(height * factor))), Image.Resampling.BILINEAR
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.uint8)


def open_squares(items: Sequence[Item], size: int, cache: Path, *, workers: int | None = None) -> Squares:
    """The squares of all images, in their order, mapped from `cache`; decoded into it where they are not there.

    `workers` are processes that decode; by default one per core, and none for few images. Raises DataError for an
    image that cannot be read, or that changed since `items` were made, and disk errors as `telling_disk_errors`.
    """
    key = hashlib.sha256(canonical_json([size, [item.image_sha256 for item in items]]).encode()).hexdigest()
    path = cache / f"{size}-{key[:16]}.npy"
    if not path.exists():
        with telling_disk_errors(f"writing {path}", "no training is lost"):
            cache.mkdir(parents=True, exist_ok=True)
            _decode(items, size, path, _default_workers(len(items)) if workers is None else workers)
    squares: Squares = np.load(path, mmap_mode="r")
    return squares


def _unchanged(found: Any) -> Any:
    return found


def _default_workers(images: int) -> int:
    cores = len(os.sched_getaffinity(0))
    return cores if images >= _FEWEST_FOR_WORKERS and cores > 1 else 0


def _decode(items: Sequence[Item], size: int, path: Path, workers: int) -> None:
    """Decode all images into the file `path`, which appears when it is complete."""
    temporary = path.with_suffix(".new")
    shape = (len(items), size, size, 3)
    say(f"{len(items)} images as squares of {size} pixels: {np.prod(shape) / 1e9:.2f} GB in {path}")
    with removed_on_failure(temporary, of=path):
        squares = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        loader: DataLoader[Any] = DataLoader(
            _Decoded(items, size), batch_size=None, num_workers=workers, collate_fn=_unchanged
        )
        with track("decode", len(items), "images", brief=True) as advance:
            for position, found in enumerate(loader):
                if isinstance(found, DataError):
                    raise found
                squares[position] = found
                advance(1)
        squares.flush()
        temporary.rename(path)
