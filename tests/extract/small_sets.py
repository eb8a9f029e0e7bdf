"""Small seeded data sets on disk, whose words or pixels determine the MOS, and conversations about them."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

GOOD, BAD = ["sharp", "vivid", "clean"], ["blurry", "dull", "noisy"]
COLUMNS = ["name", "prompt", "mos_quality", "split", "description"]


def write_set(folder: Path, count: int = 24, *, images: bool = False, seed: int = 0) -> Path:
    """data.csv with a description per row (and images/ with noise); MOS is 5 times the share of good words.

    Every fourth item is in the split test; two neighbours share a prompt.
    """
    random = np.random.default_rng(seed)
    rows = []
    for position in range(count):
        share = random.uniform(0.0, 1.0)
        words = [str(random.choice(GOOD if random.uniform() < share else BAD)) for _ in range(random.integers(3, 12))]
        mos = 5.0 * sum(word in GOOD for word in words) / len(words)
        split = "test" if position % 4 == 3 else "train"
        rows.append([f"{position:03d}.png", f"a picture {position // 2}", round(mos, 3), split, " ".join(words)])
        if images:
            save_noise(folder / "images" / rows[-1][0], seed=1000 * seed + position, brightness=mos / 5.0)
    return write_table(folder, rows)


def write_table(folder: Path, rows: list[list[object]], columns: list[str] = COLUMNS) -> Path:
    """data.csv in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder


def read_table(folder: Path) -> list[dict[str, str]]:
    """The rows of data.csv."""
    with (folder / "data.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save_noise(path: Path, *, seed: int, brightness: float = 0.5) -> None:
    """A picture of 40 x 32 noisy pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).uniform(0.0, 0.4, (32, 40, 3)) + 0.6 * brightness
    Image.fromarray((noise * 255).astype(np.uint8)).save(path)


def write_talks(folder: Path, *, name: str = "talks.json") -> Path:
    """An M3-AGIQA conversation file with short questions about every row of data.csv."""
    contents = "<image>\nWhat do you see?", "{}", "Rate it.", "fair"
    talks = [
        {
            "id": row["name"],
            "image": f"set/images/{row['name']}",
            "conversations": [
                {"role": ("user", "assistant")[turn % 2], "content": content.format(row["description"])}
                for turn, content in enumerate(contents)
            ],
        }
        for row in read_table(folder)
    ]
    (folder / name).write_text(json.dumps(talks), encoding="utf-8")
    return folder / name
