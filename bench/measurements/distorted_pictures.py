"""Distorted photographs of known severity: photographs from packages, crops of them, and eight distortions.

Nothing of this is kept in the repository. The photographs are those of scikit-image's wheel and of scikit-learn (14),
and of two Debian packages of desktop backgrounds and one of MATE's (26), chosen by eye: no paintings, no drawings.
"""

import csv
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import convolve1d, gaussian_filter

from agiqa.errors import DataError, first_line

SCIKIT_IMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "rocket.jpg"),
)
"""Photographs in the folder `skimage/data` of the wheel; the other pictures are drawings, scans, or series."""
SCIKIT_LEARN = ("china.jpg", "flower.jpg")
DEBIAN: Mapping[str, Sequence[str]] = {
    "lomiri-wallpapers-16.04": (
        *("Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Picture_0B_by_freespace", "Picture_1A_by_freespace"),
        *("Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich"),
        *("friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi"),
        *("picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi"),
    ),
    "lomiri-wallpapers-20.04": ("Kleiber_by_Lukas_Baubkus",),
    "mate-backgrounds": (
        *("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm"),
        *("TwoWings", "Wood", "YellowFlower"),
    ),
}
"""The names without .jpg, below usr/share/backgrounds of each package."""
CROPS = 3
SIDE = 256
"""Pixels of a crop, squared: timm resizes nothing then, and reads the 224 in the middle."""
_SHORTER = 512
"""Larger photographs are first reduced to this shorter side, so that a crop shows more than a blade of grass."""
LEVELS = 5
Pixels = NDArray[np.float64]
"""(height, width, 3), from 0 to 255."""


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """One photograph, and where it came from."""

    name: str
    image: Image.Image


def photographs(work: Path) -> Iterator[Photograph]:
    """All photographs; the packages are downloaded to the folder `work` once. Raises DataError if one is not there."""
    wheel = _downloaded(
        work, "scikit_image-*.whl", [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "scikit-image"]
    )
    with zipfile.ZipFile(wheel) as archive:
        for name in SCIKIT_IMAGE:
            content = io.BytesIO(archive.read(f"skimage/data/{name}"))
            yield Photograph(name=f"skimage-{Path(name).stem}", image=Image.open(content).convert("RGB"))
    spec = find_spec("sklearn")
    folder = Path(next(iter((spec and spec.submodule_search_locations) or ["."]))) / "datasets" / "images"
    for name in SCIKIT_LEARN:
        yield Photograph(name=f"sklearn-{Path(name).stem}", image=Image.open(folder / name).convert("RGB"))
    for package, names in DEBIAN.items():
        deb = _downloaded(work, f"{package}_*.deb", ["apt-get", "download", "-qq", package])
        unpacked = work / package
        if not unpacked.is_dir():
            _run(["dpkg", "-x", str(deb), str(unpacked)], work)
        for name in names:
            (path,) = unpacked.glob(f"usr/share/backgrounds/**/{name}.jpg")
            yield Photograph(name=f"debian-{name}", image=Image.open(path).convert("RGB"))


def downloaded_wheel(work: Path, package: str) -> Path:
    """The wheel of `package` in `work`, which pip downloads there. Raises DataError if pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", package]
    return _downloaded(work, f"{package.replace('-', '_')}-*.whl", command)


def _downloaded(work: Path, pattern: str, command: Sequence[str]) -> Path:
    """The file of `pattern` in `work`, which `command` downloads there."""
    if not list(work.glob(pattern)):
        _run(command, work)
    return next(iter(work.glob(pattern)))


def _run(command: Sequence[str], work: Path) -> None:
    try:
        subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = first_line(error) if isinstance(error, OSError) else (error.stderr.strip().splitlines() or [""])[-1]
        message = f"`{' '.join(command)}` failed ({said}); the experiment needs this package from the network."
        raise DataError(message) from error


def crops(photograph: Photograph, rng: np.random.Generator) -> list[Pixels]:
    """CROPS squares of SIDE pixels, at places drawn by `rng`."""
    image = photograph.image
    scale = min(1.0, _SHORTER / min(image.size))
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    pixels, found = np.asarray(image, np.float64), list[Pixels]()
    for _ in range(CROPS):
        top, left = (int(rng.integers(0, length - SIDE + 1)) for length in pixels.shape[:2])
        found.append(pixels[top : top + SIDE, left : left + SIDE])
    return found


def _blur(pixels: Pixels, sigma: float, _rng: np.random.Generator) -> Pixels:
    return np.asarray(gaussian_filter(pixels, (sigma, sigma, 0)))


def _motion(pixels: Pixels, length: float, _rng: np.random.Generator) -> Pixels:
    return np.asarray(convolve1d(pixels, np.full(int(length), 1 / length), axis=1, mode="nearest"))


def _noise(pixels: Pixels, sd: float, rng: np.random.Generator) -> Pixels:
    return pixels + rng.normal(0, sd, pixels.shape)


def _impulse(pixels: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    drawn = rng.random(pixels.shape[:2])[..., None]
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 255.0, pixels))


def _jpeg(pixels: Pixels, quality: float, _rng: np.random.Generator) -> Pixels:
    file = io.BytesIO()
    _picture(pixels).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file), np.float64)


def _resolution(pixels: Pixels, factor: float, _rng: np.random.Generator) -> Pixels:
    side = max(1, round(SIDE / factor))
    small = _picture(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)


def _contrast(pixels: Pixels, kept: float, _rng: np.random.Generator) -> Pixels:
    mean = pixels.mean((0, 1))
    return np.asarray(mean + kept * (pixels - mean))


def _posterise(pixels: Pixels, steps: float, _rng: np.random.Generator) -> Pixels:
    return np.asarray(np.round(pixels / 255 * (steps - 1)) / (steps - 1) * 255)


DISTORTIONS: Mapping[str, tuple[Callable[[Pixels, float, np.random.Generator], Pixels], Sequence[float]]] = {
    "blur": (_blur, (0.7, 1.2, 2.0, 3.2, 5.0)),
    "motion": (_motion, (3, 5, 9, 15, 23)),
    "noise": (_noise, (5, 10, 18, 30, 50)),
    "impulse": (_impulse, (0.005, 0.015, 0.04, 0.09, 0.18)),
    "jpeg": (_jpeg, (60, 35, 20, 12, 6)),
    "resolution": (_resolution, (1.5, 2.0, 3.0, 4.5, 7.0)),
    "contrast": (_contrast, (0.8, 0.65, 0.5, 0.35, 0.2)),
    "posterise": (_posterise, (40, 20, 12, 8, 5)),
}
"""What each does, and its strength at the levels 1 to 5. Levels of two distortions need not look equally bad."""


def _picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def write_data_set(folder: Path, found: Iterable[Photograph], *, seed: int) -> int:
    """Write every crop with every distortion at every level, and data.csv; returns the number of items.

    The column `prompt` holds the photograph, so that grouped splits hold photographs out whole, and `generator` the
    distortion. A name ends with the level, and `mos_quality` is 6 - level.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = 0
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["name", "prompt", "generator", "mos_quality"])
        for number, photograph in enumerate(found):
            rng = np.random.default_rng([seed, number])
            for place, crop in enumerate(crops(photograph, rng)):
                for kind, (distort, strengths) in DISTORTIONS.items():
                    for level, strength in enumerate(strengths, start=1):
                        name = f"{photograph.name}-{place}-{kind}-{level}.png"
                        _picture(distort(crop, strength, rng)).save(folder / "images" / name, compress_level=1)
                        table.writerow([name, photograph.name, kind, 6 - level])
                        rows += 1
    return rows
