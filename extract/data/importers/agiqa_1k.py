"""AGIQA-1K: 1,080 images of two models, with MOS of quality from 0 to 5.

Layout: `AIGC_MOS_Zscore.xlsx` (Image, Prompt, MOS: normalised MOS), or `AIGC_all.csv` (Image, Score: mean scores, no
prompts), and the folder `file` of images called MODEL_OBJECT_ACTION_PLACE_STYLE.jpg. The README of the repository
lcysyzxdxc/AGIQA-1k-Database describes the sheet and says what the numbers mean; the csv lies in the repository. The
sheet itself could not be read: the names of its columns are those that public code reads. The csv has one name without
its last number (dreamStudio_8_9_1_.jpg). The set has no split.
"""

import re
from dataclasses import replace

from agiqa.extract.data.importers.contract import Download, Labels, PublishedSet, labelled_image, rows_of

_NAME = re.compile(r"(deepai|dreamStudio)_(\d+)_(\d+)_(\d)_(\d?)\.(?:jpg|png)")
_OBJECTS = ("bird", "cat", "dog", "batman", "snoppy", "teddy bear", "kid", "man", "woman", "alien", "demon", "witch")
_ACTIONS = (
    *("driving aircraft", "driving bike", "driving car", "having hamburger", "having icecream", "having pizza"),
    *("playing baseball", "playing football", "playing yoga", "using CD", "using laptop", "using phone"),
    *("wearing coat", "wearing hat", "wearing shirt"),
)
_PLACES = ("city", "wild")
_STYLES = ("anime style", "realistic style")


def _read(download: Download) -> Labels:
    table = download.table(download.need("AIGC_MOS_Zscore.xlsx", "AIGC_all.csv"))
    table.need("name")
    table.need("mos_quality")
    composed = "prompt" not in table.header
    found = [labelled_image(where, cells) for where, cells in rows_of(table)]
    if composed:
        found = [replace(one, prompt=_prompt_of(one.name)) for one in found]
    note = (
        f"{table.path.name} has no prompts; they are composed of the numbers in the file names, by the list in the "
        "README of AGIQA-1K. Their wording is not that of AIGC_MOS_Zscore.xlsx."
    )
    return Labels(images=tuple(found), notes=(note,) if composed else ())


def _prompt_of(name: str) -> str:
    """The words that the numbers in a file name stand for; empty for another name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return ""
    numbers = [int(number) if number else -1 for number in match.groups()[1:]]
    lists = (_OBJECTS, _ACTIONS, _PLACES, _STYLES)
    words = [known[number] for known, number in zip(lists, numbers, strict=True) if 0 <= number < len(known)]
    return ", ".join([" ".join(words[:2]), *words[2:]])


AGIQA_1K = PublishedSet(
    name="agiqa-1k",
    title="AGIQA-1K",
    source="https://github.com/lcysyzxdxc/AGIQA-1k-Database",
    mos_range=(0.0, 5.0),
    image_name=_NAME,
    example="deepai_0_3_1_0.jpg",
    signs=("AIGC_all.csv",),
    read=_read,
    notes=(
        "Generators are called as in the file names: deepai is Stable Diffusion 2.0, dreamStudio is Stable Inpainting "
        "1.0. AGIQA-1K has no split.",
    ),
)
