"""AGIQA-3K: 2,982 images of six models, with MOS of quality and correspondence from 0 to 5.

Layout: `data.csv` (name, prompt, adj1, adj2, style, mos_quality, std_quality, mos_align, std_align) and the images,
which are called MODEL_SETTING_NUMBER.jpg. The README of the repository lcysyzxdxc/AGIQA-3k-Database lists the columns
and links the archive; the table of the archive is the one that agiqa's tests read. The README calls the table
AIGC_MOS_Zscore.xlsx, a name under which no copy was found. The set has no split of its own.
"""

import re
from dataclasses import replace

from agiqa.extract.data.importers.contract import Download, Labels, PublishedSet, labelled_image, rows_of, std_of

_NAME = re.compile(r"(AttnGAN|DALLE2|glide|midjourney|sd1\.5|xl2\.2)_[a-z]+_\d+\.jpg")


def _read(download: Download) -> Labels:
    table = download.table(download.need("data.csv", "AIGC_MOS_Zscore.xlsx"))
    for meaning in ("name", "prompt", "mos_quality"):
        table.need(meaning)
    rows = rows_of(table)
    return Labels(images=tuple(replace(labelled_image(where, cells), std=std_of(cells)) for where, cells in rows))


AGIQA_3K = PublishedSet(
    name="agiqa-3k",
    title="AGIQA-3K",
    source="https://github.com/lcysyzxdxc/AGIQA-3k-Database",
    mos_range=(0.0, 5.0),
    image_name=_NAME,
    example="sd1.5_normal_000.jpg",
    signs=(),
    read=_read,
    notes=("AGIQA-3K has no split of its own; the conversation files of M3-AGIQA have one.",),
)
