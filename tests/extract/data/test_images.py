"""Every kind of image file comes out upright and RGB, or as one clear error."""

import os
import random

import numpy as np
import pytest
from PIL import Image, features

from agiqa.errors import DataError
from agiqa.extract.data import images
from agiqa.extract.data.images import open_image


def pixel(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (200, 10, 20), (200, 10, 20)),
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("P", 0, (0, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_modes(tmp_path, mode, colour, expected):
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 100, 255], [0, 100, 255]), ([0, 257 * 100, 65535], [0, 100, 255]), ([0, 0, 0], [0] * 3)],
)
def test_tiffs_of_32_bit_integers_hold_eight_or_sixteen_bits(tmp_path, values, expected):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as image:
        assert image.mode == "I"
    found = np.asarray(open_image(tmp_path / "a.tiff"))
    np.testing.assert_array_equal(found[0], np.repeat(np.array(expected)[:, None], 3, axis=1))


@pytest.mark.parametrize("values", [[-1, 5], [0, 70000]])
def test_tiffs_of_32_bit_integers_of_another_range_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=rf"a\.tiff: .*integers from {values[0]} to {values[1]}, without a known range"):
        open_image(tmp_path / "a.tiff")


def test_sixteen_bits_of_other_formats_stay_dark(tmp_path):
    """A PGM states its range; Pillow opens it as 32-bit integers too."""
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0, 200, 0, 100]))
    assert np.asarray(open_image(tmp_path / "a.pgm")).max() == 0


def test_cmyk_and_transparent_palettes(tmp_path):
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert pixel(tmp_path / "a.jpg") == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    palette.save(tmp_path / "b.png", transparency=0)
    assert pixel(tmp_path / "b.png") == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 10, 3), dtype=np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 10)


def test_truncated_files_are_not_half_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.bmp", "a.webp", "a.gif"):
        path = tmp_path / name
        Image.fromarray(noise).save(path)
        data = path.read_bytes()
        for kept in (len(data) // 2, 20, 0):
            path.write_bytes(data[:kept])
            with pytest.raises(DataError, match=rf"{name}: not a readable image \(.+\)"):
                open_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of broken EXIF that it passes over
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "avif"])
def test_bytes_gone_wrong_are_one_clear_error_or_none(tmp_path, kind):
    """Each decoder raises its own errors; none of them may end a run."""
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    noise = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    path, draw, refused = tmp_path / f"a.{kind}", random.Random(5), list[str]()
    Image.fromarray(noise).save(path, exif=exif)
    whole = path.read_bytes()
    for _ in range(150):
        spoilt = bytearray(whole)
        for _ in range(draw.choice([1, 2, 8])):
            spoilt[draw.randrange(draw.choice([120, len(spoilt)]))] = draw.randrange(256)
        path.write_bytes(spoilt)
        try:
            assert open_image(path).mode == "RGB"
        except DataError as error:
            refused.append(str(error))
    assert refused
    assert all(message.startswith(str(path)) for message in refused)


def test_missing_folders_and_floats_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.png: no such image"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(DataError, match="not a readable image"):
        open_image(tmp_path)
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="floating-point"):
        open_image(tmp_path / "a.tiff")


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match=r"a\.png: the image has 64 x 64 pixels, more than 1000"):
        open_image(tmp_path / "a.png")
    for limit in (3000, 1000):  # Pillow warns above its own limit and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=r"a\.png: the image has"):
            open_image(tmp_path / "a.png")


def test_what_is_no_regular_file_or_too_large_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: not a readable image \(not a regular file\)"):
        open_image(tmp_path / "a.png")
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(DataError, match=r"b\.png: the file has 1073741825 bytes, more than 1073741824; shrink it"):
        open_image(tmp_path / "b.png")
