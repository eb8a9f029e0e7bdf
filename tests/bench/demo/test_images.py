import csv
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agiqa.bench.demo.images import ASPECTS, COLUMNS, GENERATORS, draw_data_set
from agiqa.bench.demo.scenes import SIDE
from agiqa.errors import ConfigError


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "data.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]) -> None:
    for name in ("one", "two"):
        draw_data_set(tmp_path / name, count=15, seed=3)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_another_seed_gives_other_pictures_and_prompts(tmp_path: Path) -> None:
    for seed in (3, 4):
        draw_data_set(tmp_path / str(seed), count=15, seed=seed)
    first, second = rows_of(tmp_path / "3"), rows_of(tmp_path / "4")
    assert {row["prompt"] for row in first} != {row["prompt"] for row in second}
    for before, after in zip(first, second, strict=True):
        pictures = [
            (tmp_path / seed / "images" / row["name"]).read_bytes() for seed, row in (("3", before), ("4", after))
        ]
        assert pictures[0] != pictures[1]


def test_the_table_lists_exactly_the_pictures_on_disk(drawn: Path) -> None:
    rows = rows_of(drawn)
    assert tuple(rows[0]) == COLUMNS
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) == 60
    assert sorted(names) == sorted(path.name for path in (drawn / "images").iterdir())
    assert all(re.fullmatch(r"[a-z0-9-]+_\d{4}\.(png|jpg)", name) for name in names)
    assert {Path(name).suffix for name in names} == {".png", ".jpg"}


def test_every_picture_is_an_rgb_picture_of_the_format_that_its_name_says(drawn: Path) -> None:
    for path in (drawn / "images").iterdir():
        with Image.open(path) as image:
            assert image.format == {".png": "PNG", ".jpg": "JPEG"}[path.suffix]
            assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
            assert np.asarray(image).std() > 4


def test_no_prompt_occurs_in_both_splits_and_each_is_painted_by_every_generator(drawn: Path) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    makers: dict[str, list[str]] = defaultdict(list)
    for row in rows_of(drawn):
        splits[row["prompt"]].add(row["split"])
        makers[row["prompt"]].append(row["generator"])
    assert all(len(split) == 1 for split in splits.values())
    assert all(sorted(names) == sorted(GENERATORS) for names in makers.values())


@pytest.mark.parametrize(("count", "seed"), [(10, 0), (10, 1), (10, 2), (13, 0), (13, 1), (50, 0)])
def test_both_splits_have_items_and_the_test_split_about_a_fifth(tmp_path: Path, count: int, seed: int) -> None:
    draw_data_set(tmp_path, count=count, seed=seed)
    rows = rows_of(tmp_path)
    assert len(rows) == count
    prompts = {row["prompt"]: row["split"] for row in rows}
    held_out = sum(split == "test" for split in prompts.values())
    assert 1 <= held_out < len(prompts)
    assert abs(held_out - len(prompts) / 5) <= 1


def test_opinions_stay_on_the_scale_and_use_it(drawn: Path) -> None:
    for aspect in ASPECTS:
        opinions = np.array([float(row[f"mos_{aspect}"]) for row in rows_of(drawn)])
        assert opinions.min() >= 0
        assert opinions.max() <= 5
        assert opinions.std() > 0.6


def test_neither_prompt_nor_name_tells_how_bad_a_picture_is(drawn: Path) -> None:
    quality: dict[str, list[float]] = defaultdict(list)
    for row in rows_of(drawn):
        assert not re.search(r"blur|nois|jpe?g|compress|bad|poor|quality", row["prompt"])
        quality[row["prompt"]].append(float(row["mos_quality"]))
    spreads = [np.std(values) for values in quality.values()]
    assert np.mean(spreads) > 0.6


@pytest.mark.parametrize("count", [0, 9, 10**6])
def test_an_impossible_count_is_refused_before_anything_is_written(tmp_path: Path, count: int) -> None:
    with pytest.raises(ConfigError, match=f"count is {count}"):
        draw_data_set(tmp_path / "out", count=count)
    assert not (tmp_path / "out").exists()
