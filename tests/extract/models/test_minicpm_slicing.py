"""Slicing of images, against a second implementation of the published rule."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agiqa.extract.models.minicpm.slicing import cut, patches_of, slicing_of

PUBLISHED = {"most": 9, "resolution": 448, "patch": 14}


def whole_patches(width, height):
    return max(round(width / 14) * 14, 14), max(round(height / 14) * 14, 14)


def about_448(width, height):
    tall = int(448 / math.sqrt(width / height))
    return whole_patches(int(tall * (width / height)), tall)


def published_rule(width, height, most=9):
    """(overview, grid, scaled), case by case as method.md and the published settings describe them."""
    wanted = min(math.ceil(width * height / (448 * 448)), most)
    if wanted <= 1:
        return about_448(width, height), None, None
    overview = about_448(width, height) if width * height > 448 * 448 else whole_patches(width, height)
    best, least = None, math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        for columns in range(1, count + 1):
            if count in (1, *range(most + 1, most + 3)) or count % columns:
                continue
            error = abs(math.log(width / height) - math.log(columns / (count // columns)))
            if error < least:  # of grids that are mirror images, rounding decides for a square image
                best, least = (columns, count // columns), error
    columns, rows = best
    wide = max(round(width / columns) * columns, columns) / columns
    tall = max(round(height / rows) * rows, rows) / rows
    one = about_448(wide, tall)
    return overview, best, (one[0] * columns, one[1] * rows)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([1, 4, 9]))
def test_every_size_is_cut_by_the_published_rule(width, height, most):
    found = slicing_of((width, height), **{**PUBLISHED, "most": most})
    assert (found.overview, found.grid, found.scaled) == published_rule(width, height, most)
    if found.grid is not None:
        assert math.prod(found.grid) <= most
        assert all(length % (14 * count) == 0 for length, count in zip(found.scaled, found.grid, strict=True))


@pytest.mark.parametrize(
    ("size", "slices"),
    [((1, 1), 0), ((448, 448), 0), ((449, 448), 2), ((512, 512), 2), ((1024, 1024), 6), ((20000, 10), 0)],
)
def test_numbers_of_slices(size, slices):
    grid = slicing_of(size, **PUBLISHED).grid
    assert (0 if grid is None else math.prod(grid)) == slices


def test_slices_side_by_side_are_the_scaled_image():
    noise = np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    slicing = slicing_of(image.size, **PUBLISHED)
    overview, *slices = cut(image, slicing)
    assert overview.size == slicing.overview
    columns, rows = slicing.grid
    lines = [
        np.concatenate([np.asarray(piece) for piece in slices[row * columns :][:columns]], 1) for row in range(rows)
    ]
    expected = np.asarray(image.resize(slicing.scaled, resample=Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.concatenate(lines, 0), expected)


def test_patches_are_rows_of_channels():
    pixels = np.random.default_rng(1).integers(0, 255, (28, 42, 3), dtype=np.uint8)
    patches, size = patches_of(Image.fromarray(pixels), 14)
    assert size == (2, 3)
    for number in range(6):
        row, column = divmod(number, 3)
        expected = pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].transpose(2, 0, 1)
        np.testing.assert_array_equal(patches[number].reshape(3, 14, 14), expected)
