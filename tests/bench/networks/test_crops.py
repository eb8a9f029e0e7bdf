"""Squares and crops against plain numpy, and batches that batch normalisation can train on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from agiqa.bench.networks.architectures.contract import Network
from agiqa.bench.networks.config import NetworkConfig
from agiqa.bench.networks.crops import CropReader, batch_count, batches, fixed_crops, random_crops
from agiqa.bench.networks.pictures import open_squares, square
from agiqa.errors import DataError

CPU = torch.device("cpu")


def config(**settings):
    return NetworkConfig(network="n", source="s", **{"resize": 12, "image_size": 8, **settings})


@pytest.fixture
def squares():
    return np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)


def test_crops_are_those_of_numpy(squares):
    crops = random_crops(np.arange(5), config(train_crops=40), torch.Generator().manual_seed(0))
    assert len(crops) == 200
    assert sorted(np.bincount(crops.images)) == [40] * 5
    assert set(crops.tops.tolist()) == set(crops.lefts.tolist()) == set(range(5))
    assert 60 < int(crops.flips.sum()) < 140
    pixels = CropReader(squares, config(), Network(), CPU).read(crops)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    for k in range(len(crops)):
        image, top, left, flip = (int(part[k]) for part in (crops.images, crops.tops, crops.lefts, crops.flips))
        cut = squares[image, top : top + 8, left : left + 8].astype(np.float64) / 255
        cut = cut[:, ::-1] if flip else cut
        wanted = (cut - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(pixels[k].permute(1, 2, 0).numpy(), wanted, atol=1e-5)


def test_an_epoch_draws_the_same_crops_again_and_another_one_others():
    first, again, other = (
        random_crops(np.arange(20), config(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.images.tolist() == again.images.tolist() != other.images.tolist()
    assert not random_crops(np.arange(20), config(flip=False), torch.Generator()).flips.any()


@pytest.mark.parametrize(
    ("count", "places"),
    [
        (1, [(2, 2)]),
        (5, [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]),
        (9, [(a, b) for a in (0, 2, 4) for b in (0, 2, 4)]),
    ],
)
def test_test_crops_are_at_fixed_places(count, places):
    crops = fixed_crops(np.array([3, 1]), config(test_crops=count))
    assert crops.images.tolist() == [3] * count + [1] * count
    assert list(zip(crops.tops.tolist(), crops.lefts.tolist(), strict=True)) == places * 2
    assert not crops.flips.any()


@pytest.mark.parametrize(
    ("count", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (4, [4]), (1, [1]), (5, [5]), (3, [3])]
)
def test_no_batch_holds_a_single_crop_unless_there_is_only_one(count, sizes):
    found = list(batches(count, 4))
    assert [len(batch) for batch in found] == sizes
    assert torch.cat(found).tolist() == list(range(count))
    assert batch_count(count, 4) == len(sizes)


def test_a_square_is_the_middle_of_the_resized_image():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    wanted = np.asarray(image.resize((40, 20), Image.Resampling.BILINEAR))[:, 10:30]
    np.testing.assert_array_equal(square(image, 20), wanted)
    assert square(image.rotate(90, expand=True), 20).shape == (20, 20, 3)
    assert square(image, 50).shape == (50, 50, 3)


def test_images_are_decoded_once_by_workers_or_without(source, tmp_path):
    alone = open_squares(source.images, 16, tmp_path / "a", workers=0)
    beside = open_squares(source.images, 16, tmp_path / "b", workers=2)
    assert alone.shape == (24, 16, 16, 3)
    np.testing.assert_array_equal(alone, beside)
    for k in (0, 23):
        with Image.open(source.images[k].image) as image:
            np.testing.assert_array_equal(alone[k], square(image.convert("RGB"), 16))
    (path,) = (tmp_path / "a").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert open_squares(source.images, 16, tmp_path / "a", workers=0)[-1, -1, -1, -1] == 0  # not decoded again
    open_squares(source.images, 8, tmp_path / "a", workers=0)
    assert len(list((tmp_path / "a").iterdir())) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_changed_is_named_and_leaves_no_cache(source, tmp_path, workers):
    other = replace(source.images[1], image=source.images[2].image)
    with pytest.raises(DataError, match=r"002\.png: the image file was replaced"):
        open_squares([source.images[0], other], 16, tmp_path, workers=workers)
    gone = replace(source.images[1], image=tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"gone\.png: no such image"):
        open_squares([gone], 16, tmp_path, workers=workers)
    assert [path for path in tmp_path.iterdir() if path.suffix == ".npy"] == []
