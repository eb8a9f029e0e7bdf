"""Parquet files and folders saved by Hugging Face `datasets`, with images in them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from agiqa.errors import DataError
from agiqa.extract.data.datasets import load_data_set
from agiqa.progress import said_to


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGIQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def picture(seed):
    """The bytes of a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def table_of(*seeds, paths=True, **more):
    images = [{"bytes": picture(seed), "path": f"{seed}.png" if paths else None} for seed in seeds]
    columns = {"image": images, "prompt": [f"p{seed}" for seed in seeds], "mos": [seed / 2 for seed in seeds]}
    return pa.table({**columns, **more})


def save(folder, *parts):
    """A data set in the files that `save_to_disk` writes, one per part."""
    folder.mkdir(parents=True)
    names = [f"data-{k:05}-of-{len(parts):05}.arrow" for k in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def load(data, **options):
    with said_to(lambda _: None):
        return load_data_set(data, variant="no_id", images=True, **options)


def check(data, expected, cache):
    """Names, prompts and MOS; and the files, which are the images' bytes."""
    assert [(item.name, item.prompt, dict(item.labels)) for item in data.items] == [
        (name, f"p{seed}", {"quality": seed / 2}) for name, seed in expected
    ]
    for item, (_, seed) in zip(data.items, expected, strict=True):
        assert item.image.parent == cache
        assert item.image.read_bytes() == picture(seed)


@pytest.mark.parametrize("paths", [True, False])
def test_images_in_parquet(tmp_path, cache, paths):
    pq.write_table(table_of(1, 2, 3, paths=paths), tmp_path / "t.parquet")
    names = ["1.png", "2.png", "3.png"] if paths else ["image_1", "image_2", "image_3"]
    check(load(tmp_path / "t.parquet"), list(zip(names, (1, 2, 3), strict=True)), cache)
    check(load(tmp_path / "t.parquet"), list(zip(names, (1, 2, 3), strict=True)), cache)
    assert len(list(cache.iterdir())) == 3


def test_a_saved_data_set_of_many_rows_in_two_files(tmp_path, cache):
    seeds = [seed % 10 for seed in range(150)]
    folder = save(tmp_path / "set", table_of(*seeds, paths=False), table_of(9, 8, paths=False))
    check(load(folder), [(f"image_{k}", seed) for k, seed in enumerate([*seeds, 9, 8], start=1)], cache)
    assert len(list(cache.iterdir())) == 10


def test_a_saved_data_set_with_splits(tmp_path, cache):
    for split, seed in (("train", 1), ("validation", 2), ("test", 3)):
        save(tmp_path / "set" / split, table_of(seed))
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    data = load(tmp_path / "set")
    check(data, [("train/1.png", 1), ("val/2.png", 2), ("test/3.png", 3)], cache)
    assert [item.split for item in data.items] == ["train", "val", "test"]


def test_what_cannot_be_read(tmp_path):
    two = table_of(1, 2).set_column(0, "image", [[{"bytes": picture(k), "path": "a.png"} for k in (1, 2)]])
    pq.write_table(two, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"two different images are called 'a\.png'"):
        load(tmp_path / "t.parquet")
    folder = save(tmp_path / "set", table_of(1))
    (folder / "data-00000-of-00001.arrow").write_bytes(b"none")
    with pytest.raises(DataError, match="set: cannot be read as Arrow"):
        load(folder)
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match="set: cannot be read as Arrow"):
        load(folder)
