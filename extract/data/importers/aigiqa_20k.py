"""AIGIQA-20K (AIGCIQA-20k, AIGCQA-30K-Image): 20,000 images of 15 models, with one MOS of quality from 0 to 5.

Layout: `info_train`, `info_val` and `info_test` as xlsx or csv (name, prompt, mos), and the folders `train`, `val` and
`test` of images called MODEL_NUMBER.png. They are those of the ModelScope data set lcysyzxdxc/AIGCQA-30K-Image as
public code reads them: info_train is published in wangpuyi/MA-AGIQA, and the loader in strawhatboy/M3-AGIQA joins a
`data.csv` with MOS of all images with these three tables. The data set's own page could not be read. The challenge
hid the MOS of val and test. MOS of test may stay empty; val images without MOS cannot be used and are left out.
"""

import re

from agiqa.errors import DataError
from agiqa.extract.data.importers.contract import Download, LabelledImage, Labels, PublishedSet, mos_of, rows_of
from agiqa.store.format.labels import SPLITS

_NAME = re.compile(r"([A-Za-z][\w.-]*?)_(\d{4,5})\.(?:png|jpg)")


def _read(download: Download) -> Labels:
    tables = {split: download.find(f"info_{split}.xlsx", f"info_{split}.csv") for split in SPLITS}
    if tables["train"] is None:
        download.need("info_train.xlsx", "info_train.csv")
    absent = [f"info_{split}" for split, path in tables.items() if path is None]
    known = _mos_of_all(download)
    found: list[LabelledImage] = []
    hidden = 0
    for split, path in tables.items():
        if path is None:
            continue
        table = download.table(path)
        table.need("name")
        table.need("prompt")
        for where, cells in rows_of(table):
            name = cells.get("name", "").rpartition("/")[2]
            mos = mos_of(cells) or known.get(name, {})
            if split == "val" and not mos:
                hidden += 1
                continue
            match = _NAME.fullmatch(name)
            found.append(
                LabelledImage(
                    name=name,
                    images=(f"{split}/{name}", name),
                    prompt=cells.get("prompt", ""),
                    mos=mos,
                    generator=None if match is None else match[1],
                    split=split,
                    where=where,
                )
            )
    notes = [f"{hidden} val images have no published MOS and are left out."] if hidden else []
    notes += [f"There is no {' and no '.join(absent)}: only the other parts are imported."] if absent else []
    if not any(one.mos for one in found):
        message = f"{tables['train']}: no MOS; expected the columns name, prompt and mos."
        raise DataError(message)
    return Labels(images=tuple(found), notes=tuple(notes))


def _mos_of_all(download: Download) -> dict[str, dict[str, str]]:
    """The MOS by image name in a data.csv, if there is one."""
    path = download.find("data.csv")
    if path is None:
        return {}
    return {cells.get("name", "").rpartition("/")[2]: mos_of(cells) for _, cells in rows_of(download.table(path))}


AIGIQA_20K = PublishedSet(
    name="aigiqa-20k",
    title="AIGIQA-20K",
    source="https://www.modelscope.cn/datasets/lcysyzxdxc/AIGCQA-30K-Image",
    mos_range=(0.0, 5.0),
    image_name=_NAME,
    example="LCM_Pixart_0086.png",
    signs=("info_train.xlsx", "info_train.csv", "info_val.xlsx", "info_val.csv"),
    read=_read,
)
