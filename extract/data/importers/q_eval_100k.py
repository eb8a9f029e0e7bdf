"""Q-Eval-100K: the public images (training part) of 60,000, with scores of quality and correspondence.

Layout: `Images_train_jsons/image_quality_train.json` and `image_alignment_train.json`, lists of records {image_path,
prompt, gt_score, model}, and the images below the folder that image_path starts from (such as
`Images/flux.1.schnell-en/NAME.png`). The README of the repository zzc-1998/Q-Eval says that only the training instances
are public, in the Hugging Face data set AGI-Eval-Official/Q-Eval-100K; the files and keys are those that public code
reads. Its page could not be read. No document read states the scale of gt_score: it is taken from the values. Videos
are left out.
"""

import re
from dataclasses import replace
from pathlib import Path

from agiqa.extract.data.importers.contract import Download, LabelledImage, Labels, PublishedSet, mos_of, rows_of

_FILES = {"quality": "image_quality_train.json", "correspondence": "image_alignment_train.json"}


def _read(download: Download) -> Labels:
    paths = {aspect: download.find(name) for aspect, name in _FILES.items()}
    if not any(paths.values()):
        download.need(*_FILES.values())
    found: dict[str, LabelledImage] = {}
    further: list[LabelledImage] = []
    for aspect, path in paths.items():
        for one in [] if path is None else _of_file(download, path, aspect):
            before = found.get(one.name)
            if before is None:
                found[one.name] = one
            elif before.prompt == one.prompt and not before.mos.keys() & one.mos.keys():
                found[one.name] = replace(before, mos={**before.mos, **one.mos})
            else:
                further.append(one)
    absent = [_FILES[aspect] for aspect, path in paths.items() if path is None]
    notes = (f"There is no {absent[0]}, so there are no MOS of it.",) if absent else ()
    return Labels(images=(*found.values(), *further), notes=notes)


def _of_file(download: Download, path: Path, aspect: str) -> list[LabelledImage]:
    columns = {"name": ("image_path",), f"mos_{aspect}": ("gt_score",), "generator": ("model",)}
    table = download.table(path, columns)
    for meaning in ("name", "prompt", f"mos_{aspect}"):
        table.need(meaning)
    return [
        LabelledImage(
            name=cells.get("name", "").removeprefix("Images/"),
            images=(cells.get("name", ""),),
            prompt=cells.get("prompt", ""),
            mos=mos_of(cells),
            generator=cells.get("generator") or None,
            split="train",
            where=where,
        )
        for where, cells in rows_of(table)
    ]


Q_EVAL_100K = PublishedSet(
    name="q-eval-100k",
    title="Q-Eval-100K",
    source="https://github.com/zzc-1998/Q-Eval",
    mos_range=None,
    image_name=re.compile(r"(?!)"),
    example="flux.1.schnell-en/NAME.png",
    signs=tuple(_FILES.values()),
    read=_read,
    notes=("Only the training part is public: all images are in the split train, so train with --split grouped.",),
)
