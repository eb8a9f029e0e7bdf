"""AIGCIQA2023: 2,400 images of six models, with MOS of three aspects from 0 to 100.

Layout as downloaded: `DATA/MOS/mosz1.mat` to `mosz3.mat` (variable MOSz, (2400, 1): quality, authenticity,
correspondence), `DATA/STD/SD1.mat` to `SD3.mat` (SD), `AIGCIQA2023_Prompts.xlsx` (100 prompts in the third column), and
`Image/allimg/NUMBER.png`. Or the table `AIGCIQA2023.csv` of the repository wangjiarui153/AIGCIQA2023 (name, prompt,
style, class, quality_mos, authenticity_mos, correspondence_mos, and quality_std and so on), which its `transer.py`
makes of these files: image n has prompt (n modulo 400) // 4. The README says which file has which aspect.

Images 0 to 399 are of the first model, and so on. The order of the models is that of AIGIQA2023+.csv in the repository
IntMeGroup/MINT-IQA, by the same authors, of which three pieces were read (Controlnet, DALLE, Lafite, Unidiffuser);
Glide and stable-diffusion are placed by the same order in public code. Whether the sheet of prompts has a header could
not be read: both forms are accepted. The set has no split.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from agiqa.errors import DataError, first_line
from agiqa.extract.data.importers.contract import Download, LabelledImage, Labels, PublishedSet, mos_of, rows_of, std_of
from agiqa.store.format.tables import read_table

GENERATORS = ("Controlnet", "DALLE", "Glide", "Lafite", "stable-diffusion", "Unidiffuser")
"""In the order of the image numbers."""
_PER_GENERATOR, _PER_PROMPT = 400, 4
_IMAGES, _PROMPTS = 2400, 100
_ASPECTS = ("quality", "authenticity", "correspondence")
_PROMPT_FILES = ("AIGCIQA2023_Prompts.xlsx", "AIGCIQA2023_Prompts.csv", "prompts.xlsx", "prompt.xlsx")
_COLUMNS = {f"mos_{aspect}": (f"{aspect}_mos",) for aspect in _ASPECTS}


def _read(download: Download) -> Labels:
    table = download.find("AIGCIQA2023.csv", "AIGCIQA2023.xlsx")
    if table is None and download.find("mosz1.mat") is None:
        download.need("AIGCIQA2023.csv", "DATA/MOS/mosz1.mat")
    found = _of_matrices(download) if table is None else _of_table(download, table)
    if any("/allimg/" in f"/{path}" for path in download.images()):  # the folders of the models may have such names too
        found = [replace(one, images=(f"allimg/{one.name}",)) for one in found]
    return Labels(images=tuple(found))


def _of_table(download: Download, path: Path) -> list[LabelledImage]:
    table = download.table(path, _COLUMNS)
    for meaning in ("name", "prompt", "mos_quality"):
        table.need(meaning)
    found: list[LabelledImage] = []
    for where, cells in rows_of(table):
        name = cells.get("name", "").rpartition("/")[2]
        found.append(_image(name, cells.get("prompt", ""), mos_of(cells), std_of(cells), where))
    return found


def _image(name: str, prompt: str, mos: dict[str, str], std: dict[str, str], where: str) -> LabelledImage:
    number = name.partition(".")[0]
    known = number.isdecimal() and int(number) < _IMAGES
    generator = GENERATORS[int(number) // _PER_GENERATOR] if known else None
    return LabelledImage(name=name, images=(name,), prompt=prompt, mos=mos, std=std, generator=generator, where=where)


def _of_matrices(download: Download) -> list[LabelledImage]:
    mos = {aspect: _column(download, f"mosz{k}.mat", "MOSz") for k, aspect in enumerate(_ASPECTS, start=1)}
    names = {aspect: f"SD{k}.mat" for k, aspect in enumerate(_ASPECTS, start=1)}
    std = {aspect: _column(download, name, "SD") for aspect, name in names.items() if download.find(name) is not None}
    prompts = _prompts(download)
    return [
        _image(
            f"{number}.png",
            prompts[number % _PER_GENERATOR // _PER_PROMPT],
            {aspect: repr(values[number]) for aspect, values in mos.items()},
            {aspect: repr(values[number]) for aspect, values in std.items()},
            f"mosz1.mat, value {number}",
        )
        for number in range(_IMAGES)
    ]


def _column(download: Download, name: str, variable: str) -> list[float]:
    """The 2,400 values of a MATLAB file. Raises DataError for any other content."""
    import scipy.io

    path = download.used(download.need(name))
    try:
        found: Any = scipy.io.loadmat(str(path)).get(variable)
    except (NotImplementedError, OSError, TypeError, ValueError) as error:
        message = f"{path}: cannot be read as a MATLAB file ({first_line(error)}); download it again."
        raise DataError(message) from error
    if found is None or found.size != _IMAGES:
        size = "no variable of that name" if found is None else f"{found.size} values"
        message = f"{path}: {size} ({variable}); AIGCIQA2023 has {_IMAGES}."
        raise DataError(message)
    return [float(value) for value in found.ravel()]


def _prompts(download: Download) -> list[str]:
    """The 100 prompts: a column called so, or the third column of a sheet without header."""
    path = download.used(download.need(*_PROMPT_FILES))
    header, rows = read_table(path)
    titles = [title.lower() for title in header]
    place = next((titles.index(title) for title in ("prompt", "prompts", "text") if title in titles), None)
    cells = [row.cells for row in rows] if place is not None else [header, *(row.cells for row in rows)]
    if place is None and len(cells) == _PROMPTS + 1:
        cells = cells[1:]
    column = 2 if place is None else place
    found = [row[column].strip() if len(row) > column else "" for row in cells]
    if len(found) != _PROMPTS or not all(found):
        message = f"{path}: {sum(map(bool, found))} prompts in its column {column + 1}; AIGCIQA2023 has {_PROMPTS}."
        raise DataError(message)
    return found


AIGCIQA2023 = PublishedSet(
    name="aigciqa2023",
    title="AIGCIQA2023",
    source="https://github.com/wangjiarui153/AIGCIQA2023",
    mos_range=(0.0, 100.0),
    image_name=re.compile(r"\d{1,4}\.png"),
    example="0.png",
    signs=("mosz1.mat", "AIGCIQA2023.csv", *_PROMPT_FILES[:2]),
    std_column="raw_std",
    read=_read,
    notes=(
        "The standard deviations (about 0.6 to 1.5) are not on the scale 0 to 100 of the MOS, so their columns are "
        "called raw_std_quality and so on, which no command takes for deviations of the MOS.",
        "Generators follow from the image numbers, 400 per model. AIGCIQA2023 has no split of its own; the "
        "conversation files of M3-AGIQA have one.",
    ),
)
