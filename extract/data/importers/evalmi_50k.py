"""EvalMi-50K: 50,400 images of 24 models for 2,100 prompts, with MOS of quality and correspondence from 0 to 100.

Layout: the folder `AIGI2025` with a folder of images per model, called NUMBER.png by their prompt, and the labels in
`imgnames.txt`, `mos1.txt` (perception) and `mos2.txt` (correspondence), a line per image, with `prompts.txt`, a line
per prompt; or in `MOS&QA/AIGI2025_MOS_yn.xlsx` of the repository IntMeGroup/LMM4LMM, with its `prompts/Englishall.txt`.
The text files are those of the Hugging Face data set wangjiarui/EvalMi-50K as public code reads them. The data set's
page and the sheet could not be read, so the names of the columns of the sheet are guessed: `--columns` says them where
they are others. The scale follows from the paper (arXiv 2504.08358), whose MOS lie around 50. The training code names
five folds, whose files are not published in the repository.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from agiqa.errors import DataError
from agiqa.extract.data.importers.contract import Download, LabelledImage, Labels, PublishedSet, mos_of, rows_of
from agiqa.store.disk.files import read_text

_COLUMNS = {
    "name": ("imgname", "imgnames", "image_name", "img_name", "name", "image"),
    "mos_quality": ("mos1", "mos_1", "perception", "quality"),
    "mos_correspondence": ("mos2", "mos_2", "correspondence", "alignment"),
}
_PROMPTS = ("prompts.txt", "Englishall.txt")


def _read(download: Download) -> Labels:
    path = download.need("imgnames.txt", "AIGI2025_MOS_yn.xlsx", "AIGI2025_MOS_yn.csv")
    rows = list((_of_texts if path.suffix == ".txt" else _of_sheet)(download, path))
    return Labels(images=tuple(_with_prompts(download, rows)))


def _of_texts(download: Download, names: Path) -> Iterator[LabelledImage]:
    columns = {"image": _lines(download, names), "quality": _lines(download, download.need("mos1.txt"))}
    second = download.find("mos2.txt")
    if second is not None:
        columns["correspondence"] = _lines(download, second)
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        message = f"{names.parent}: the text files differ in their number of lines ({told}); download them again."
        raise DataError(message)
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        cells = dict(zip(columns, values, strict=True))
        name = cells.pop("image").replace("\\", "/")
        yield _image(name, "", cells, f"{names.name}, line {number}")


def _of_sheet(download: Download, path: Path) -> Iterator[LabelledImage]:
    table = download.table(path, _COLUMNS)
    table.need("name")
    table.need("mos_quality", why="which is the MOS of perception")
    for where, cells in rows_of(table):
        yield _image(cells.get("name", ""), cells.get("prompt", ""), mos_of(cells), where)


def _image(path: str, prompt: str, mos: dict[str, str], where: str) -> LabelledImage:
    name = "/".join(path.split("/")[-2:])
    generator = name.partition("/")[0] if "/" in name else None
    return LabelledImage(name=name, images=(name,), prompt=prompt, mos=mos, generator=generator, where=where)


def _with_prompts(download: Download, rows: Sequence[LabelledImage]) -> Iterator[LabelledImage]:
    """The images with the prompts of their numbers, which count from 0 if one of them is 0, else from 1.

    Raises DataError where neither 0 nor the number of prompts is among them: they may count from either then.
    """
    if all(row.prompt for row in rows):
        yield from rows
        return
    path = download.need(*_PROMPTS)
    prompts, numbers = _lines(download, path), [_number(row) for row in rows]
    first = 0 if 0 in numbers else 1
    if first == 1 and max(numbers) < len(prompts):
        message = (
            f"{path} has {len(prompts)} lines and the images are numbered {min(numbers)} to {max(numbers)}, so its "
            "first line may be the prompt of number 0 or of number 1. Give the label files of all images."
        )
        raise DataError(message)
    for row, number in zip(rows, numbers, strict=True):
        place = number - first
        if not 0 <= place < len(prompts):
            message = f"{row.where}: {row.name} has no prompt: {path} has {len(prompts)} lines, counted from {first}."
            raise DataError(message)
        yield replace(row, prompt=row.prompt or prompts[place])


def _number(row: LabelledImage) -> int:
    stem = row.name.rpartition("/")[2].partition(".")[0]
    if not stem.isdecimal():
        message = f"{row.where}: {row.name} is not called by the number of its prompt, such as SDXL_base_1/0001.png."
        raise DataError(message)
    return int(stem)


def _lines(download: Download, path: Path) -> list[str]:
    lines = read_text(download.used(path)).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.strip() for line in lines]


EVALMI_50K = PublishedSet(
    name="evalmi-50k",
    title="EvalMi-50K",
    source="https://github.com/IntMeGroup/LMM4LMM",
    mos_range=(0.0, 100.0),
    image_name=re.compile(r"\d{1,4}\.(?:png|jpg)"),
    example="SDXL_base_1/0001.png",
    signs=("imgnames.txt", "AIGI2025_MOS_yn.xlsx"),
    read=_read,
    notes=(
        "MOS of perception are the label quality. Generators are the folders of the images. No split is published.",
    ),
)
