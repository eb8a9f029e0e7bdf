"""PKU-I2IQA: 1,600 images that two models made of 200 images and texts, with MOS of three aspects from 0 to 5.

Layout: `I2IQA_annotation.xlsx` or `.csv` (the image that was given, its text, the generated image, MOS_q, MOS_a and
MOS_c, in this order; the columns of the images are called Image_prompt and Generated_image), the folder
`Generated_image/All` of images called MODEL_PROMPT_NUMBER.jpg (SD or MJ), and `Image_prompt`. The repository
jiquan123/I2IQA links the archive but lists no files. These are the names that public code reads: that of
kguniverse/I2IQA_scripts, and of TanSongBai/AMFF-Net, which publishes all rows. The name of the column of texts is not
known: it is the one after that of the given images. Papers split at random, three of the four images of a prompt for
training; no split is published.
"""

import re
from dataclasses import replace

from agiqa.errors import DataError
from agiqa.extract.data.importers.contract import (
    IMAGE_SUFFIXES,
    Download,
    LabelledImage,
    Labels,
    PublishedSet,
    labelled_image,
    rows_of,
)
from agiqa.store.format.tables import open_table

_MOS = {"mos_quality": "MOS_q", "mos_authenticity": "MOS_a", "mos_correspondence": "MOS_c"}
_GIVEN = "Image_prompt"
"""The column of the images that were given."""
_NAME = re.compile(r"(SD|MJ)_\d{3}_\d\d\.(?:jpg|png)")


def _read(download: Download) -> Labels:
    path = download.need("I2IQA_annotation.xlsx", "I2IQA_annotation.csv")
    header = open_table(path).header
    if download.columns is None and len(header) < 6:
        message = (
            f"{path}: {len(header)} columns (found: {', '.join(header)}); expected the given image, its text, the "
            "generated image, MOS_q, MOS_a and MOS_c."
        )
        raise DataError(message)
    columns = {meaning: (name,) for meaning, name in _MOS.items()}
    given = header.index(_GIVEN) if _GIVEN in header[:-2] else 0  # a column of row numbers may come before it
    texts, generated = header[given + 1 : given + 3]
    table = download.table(path, {"name": ("Generated_image", generated), "prompt": (texts,), **columns})
    for meaning in ("name", "prompt", *_MOS):
        table.need(meaning)
    found: list[LabelledImage] = []
    for where, cells in rows_of(table):
        one = labelled_image(where, cells)
        found.append(replace(one, images=(f"All/{one.name}", one.name), reference=cells.get(_GIVEN) or None))
    wrong = next((one for one in found if one.prompt.lower().endswith(IMAGE_SUFFIXES)), None)
    if wrong is not None:
        message = (
            f"{wrong.where}: the prompt {wrong.prompt!r} of {wrong.name} is the name of an image; say which column has "
            f"the texts (found: {', '.join(header)}): --columns prompt=COLUMN,name=COLUMN."
        )
        raise DataError(message)
    return Labels(images=tuple(found))


PKU_I2IQA = PublishedSet(
    name="pku-i2iqa",
    title="PKU-I2IQA",
    source="https://github.com/jiquan123/I2IQA",
    mos_range=(0.0, 5.0),
    image_name=_NAME,
    example="SD_000_00.jpg",
    signs=("I2IQA_annotation.xlsx", "I2IQA_annotation.csv"),
    read=_read,
    notes=(
        "Generators are called as in the file names: SD is Stable Diffusion 1.5, MJ is Midjourney. The column "
        "`reference` names the image that each was given; no model reads it. PKU-I2IQA has no published split.",
    ),
)
