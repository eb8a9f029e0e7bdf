"""Images from disk as upright RGB pixels, or one clear error that names the file."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from agiqa.errors import DataError, first_line
from agiqa.store.lfs import refuse_lfs_pointers

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: Pillow's own limit for suspected decompression bombs."""

_UNREADABLE = (
    *(
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ),
    *(struct.error, zlib.error),
)
"""What Pillow's decoders, and its reader of EXIF, raise for files that are damaged."""
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def open_image(path: Path) -> Image.Image:
    """The whole image at `path` as RGB: turned upright by its EXIF tag, alpha laid over white.

    Palette, greyscale, 16-bit and 32-bit greyscale and CMYK images are converted; of an animation the first frame is
    read. Raises DataError, naming the file, when it is missing, truncated, no image, a Git LFS pointer, or over
    MAX_PIXELS.
    """
    try:
        with Image.open(path) as image:
            _refuse_bombs(path, image.size)
            image.load()
            return _to_rgb(path, ImageOps.exif_transpose(image), tiff=image.format == "TIFF")
    except FileNotFoundError as error:
        message = f"{path}: no such image."
        raise DataError(message) from error
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
    return first_line(error)


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
    """TIFFs of 32-bit integers hold 8-bit or 16-bit values in practice: which of the two, their largest value tells."""
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
