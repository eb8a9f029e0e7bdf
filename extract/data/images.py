"""Images from disk as upright RGB pixels, or one clear error that names the file."""

import hashlib
import io
import multiprocessing
import os
import stat
import struct
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from agiqa.errors import DataError, WorkerError, first_line
from agiqa.store.disk.files import refuse_lfs_pointers
from agiqa.workers import LostAnswer, Work, Workers

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: Pillow's own limit for suspected decompression bombs."""

MAX_BYTES = 1 << 30
"""Largest file that is read as an image; MAX_PIXELS with four channels of 16 bits take less."""

CHECKERS = os.cpu_count() or 1
"""Threads that may check images at the same time, each with a process."""

_UNREADABLE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError),
    *(ValueError, struct.error, zlib.error),
)
"""What Pillow's decoders, and its reader of EXIF, raise for damaged files."""
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """The content of an image file, read once, so that the hash and the pixels are of the same bytes."""

    path: Path
    content: bytes

    def __str__(self) -> str:
        """For messages."""
        return str(self.path)

    @property
    def sha256(self) -> str:
        """Of the content, in hex."""
        return hashlib.sha256(self.content).hexdigest()


ImageSource = Path | ImageFile
"""The path of an image file, or the file as read before."""


def read_image_file(path: Path) -> ImageFile:
    """The file at `path`. Raises DataError when it is missing, not a regular file, or over MAX_BYTES."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            message = f"{path}: not a readable image (not a regular file); replace the file."
            raise DataError(message)
        if status.st_size > MAX_BYTES:
            message = f"{path}: the file has {status.st_size} bytes, more than {MAX_BYTES}; shrink it or leave it out."
            raise DataError(message)
        return ImageFile(path=path, content=path.read_bytes())
    except FileNotFoundError as error:
        message = f"{path}: no such image."
        raise DataError(message) from error
    except OSError as error:
        message = f"{path}: not a readable image ({_reason(error)}); replace the file."
        raise DataError(message) from error


@dataclass(frozen=True, kw_only=True)
class CheckedImage:
    """What is known of an image file after it was decoded."""

    sha256: str
    """Of the file, in hex."""
    size: tuple[int, int]
    """(width, height) of the pixels that `open_image` returns."""


def checked_image(path: Path) -> CheckedImage:
    """Decode the image file at `path`. Raises DataError as `open_image`."""
    file = read_image_file(path)
    return CheckedImage(size=open_image(file).size, sha256=file.sha256)


@contextmanager
def image_checks() -> Generator[Callable[[Path], CheckedImage]]:
    """`checked_image`, run in other processes; up to CHECKERS threads may call it at the same time.

    It raises DataError also for an image that crashes or hangs its decoder, and WorkerError when somebody kills the
    processes. They are forks of this process, which start at once, and only read and decode files.
    """
    workers = Workers(multiprocessing.get_context("fork"), _begin_checks)

    def check(path: Path) -> CheckedImage:
        try:
            found: CheckedImage = workers.ask(checked_image, path)
        except LostAnswer as error:
            if error.blameless:
                message = f"{path}: the process that decoded it {error}, twice, from outside or for want of memory."
                raise WorkerError(message) from error
            message = f"{path}: the process that decoded it {error}, twice; replace the file or leave it out."
            raise DataError(message) from error
        return found

    try:
        yield check
    finally:
        workers.close()


def _begin_checks() -> Work:
    return lambda function, argument: function(argument)


def open_image(source: ImageSource) -> Image.Image:
    """The whole image in `source` as RGB: turned upright by its EXIF tag, alpha laid over white.

    Converts palette, greyscale (8, 16 and 32 bits) and CMYK images; reads the first frame of an animation. Raises
    DataError when the file is truncated, not an image, a Git LFS pointer, or over MAX_PIXELS, and as
    `read_image_file`.
    """
    file = source if isinstance(source, ImageFile) else read_image_file(source)
    path = file.path
    try:
        with Image.open(io.BytesIO(file.content)) as image:
            _refuse_bombs(path, image.size)
            image.load()
            return _to_rgb(path, ImageOps.exif_transpose(image), tiff=image.format == "TIFF")
    except _BOMBS as error:
        message = f"{path}: the image has more than {MAX_PIXELS} pixels; shrink it or leave it out."
        raise DataError(message) from error
    except DataError:
        raise
    except _UNREADABLE as error:
        refuse_lfs_pointers([path], DataError)
        message = f"{path}: not a readable image ({_reason(error)}); replace the file."
        raise DataError(message) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)


def _refuse_bombs(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        message = f"{path}: the image has {width} x {height} pixels, more than {MAX_PIXELS}; shrink it or leave it out."
        raise DataError(message)


def _to_rgb(path: Path, image: Image.Image, *, tiff: bool) -> Image.Image:
    if image.mode == "F":
        message = f"{path}: the pixels are floating-point numbers without a known range; save it as 8-bit RGB."
        raise DataError(message)
    if image.mode == "I" and tiff:
        return _from_32_bit(path, image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _from_32_bit(path: Path, image: Image.Image) -> Image.Image:
    """TIFFs of 32-bit integers hold 8-bit or 16-bit values in practice; their largest value tells which."""
    values = np.asarray(image)
    least, largest = int(values.min()), int(values.max())
    if least < 0 or largest > 65535:
        message = (
            f"{path}: the pixels are 32-bit integers from {least} to {largest}, without a known range; save it as "
            "8-bit RGB."
        )
        raise DataError(message)
    if largest > 255:
        return _from_16_bit(image)
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit greyscale to 8 bits: Pillow's own conversion clips everything above 255 to white."""
    values = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
    return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
