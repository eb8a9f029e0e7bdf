"""Image files as providers take them: their own bytes where possible, else the pixels that agiqa's models see."""

import io
from dataclasses import dataclass

from PIL import Image

from agiqa.extract.data.images import ImageFile, open_image
from agiqa.extract.teaching.chats import Picture

MIMES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
"""Formats that every provider takes."""

LONGEST_SIDE = 3072
"""Pixels. Providers scale larger images down themselves, to this or less."""
MOST_BYTES = 10_000_000
"""Largest file that is sent; base64 makes it a third larger, and Gemini takes requests of 20 MB."""

_ORIENTATION = 0x0112
_JPEG_QUALITY = 95


@dataclass(frozen=True, kw_only=True)
class _Shape:
    mime: str | None
    """None for a format that not every provider takes."""
    size: tuple[int, int]
    plain: bool
    """Whether every decoder shows the same pixels: 8 bits, upright, opaque, not animated."""


def picture_of(file: ImageFile) -> Picture:
    """The image in `file` as it is sent.

    A PNG, JPEG or WebP file is sent unchanged. Other formats, turned, transparent, animated or 16-bit images are sent
    as PNG of the pixels that `open_image` gives. Images above LONGEST_SIDE are scaled down; a file above MOST_BYTES
    becomes a JPEG of quality 95. Raises DataError as `open_image`.
    """
    shape = _shape(file)
    if shape.mime is not None and shape.plain and max(shape.size) <= LONGEST_SIDE and len(file.content) <= MOST_BYTES:
        return Picture(content=file.content, mime=shape.mime, size=shape.size)
    image = open_image(file)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    content = _encoded(image, "PNG")
    if len(content) > MOST_BYTES:
        return Picture(content=_encoded(image, "JPEG", quality=_JPEG_QUALITY), mime=MIMES["JPEG"], size=image.size)
    return Picture(content=content, mime=MIMES["PNG"], size=image.size)


def _shape(file: ImageFile) -> _Shape:
    """What the header of an image file says; the file is known to be readable."""
    with Image.open(io.BytesIO(file.content)) as image:
        plain = (
            image.mode in ("RGB", "L", "P")
            and not image.has_transparency_data
            and image.getexif().get(_ORIENTATION, 1) == 1
            and getattr(image, "n_frames", 1) == 1
        )
        return _Shape(mime=MIMES.get(image.format or ""), size=image.size, plain=plain)


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
