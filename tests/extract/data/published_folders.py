"""Tiny folders in the layouts of published data sets. All names follow the sets; values and pictures are made up."""

import csv
import json
from pathlib import Path

import numpy as np
import openpyxl
import scipy.io

from tests.extract.small_sets import save_noise


def write_csv(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def write_xlsx(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def save_all(folder, *names):
    for number, name in enumerate(names):
        save_noise(folder / name, seed=number)


def agiqa_3k(folder: Path) -> Path:
    header = ["name", "prompt", "adj1", "adj2", "style", "mos_quality", "std_quality", "mos_align", "std_align"]
    names = ["sd1.5_normal_000.jpg", "midjourney_lowstep_001.jpg", "AttnGAN_normal_002.jpg"]
    rows = [[name, f"a cat {k}", "", "", "", 1.5 + k, 0.25, 2.5, 0.75] for k, name in enumerate(names)]
    write_csv(folder / "AGIQA-3K" / "data.csv", header, *rows)
    save_all(folder / "AGIQA-3K" / "all", *names)
    return folder


def agiqa_1k(folder: Path, *, prompts: bool = True) -> Path:
    names = ["deepai_0_3_1_0.jpg", "dreamStudio_5_9_0_1.jpg", "dreamStudio_8_9_1_.jpg"]
    if prompts:
        rows = [[name, f"a bird {k}", 0.5 + k] for k, name in enumerate(names)]
        write_xlsx(folder / "AIGC_MOS_Zscore.xlsx", ["Image", "Prompt", "MOS"], *rows)
    else:
        write_csv(folder / "AIGC_all.csv", ["Image", "Score"], *([name, 0.5 + k] for k, name in enumerate(names)))
    save_all(folder / "file", *names)
    return folder


def aigciqa2023(folder: Path, *, table: bool, count: int = 6) -> Path:
    """2,400 rows, and the first `count` images."""
    numbers = np.arange(2400)
    values = {aspect: 20.0 + shift + numbers / 60 for shift, aspect in enumerate(("quality", "authenticity", "corr"))}
    if table:
        parts = ("quality", "authenticity", "correspondence")
        header = ["", "name", "prompt", "style", "class", *(f"{p}_mos" for p in parts), *(f"{p}_std" for p in parts)]
        rows = [
            [n, f"{n}.png", f"prompt {n % 400 // 4}", "Basic", "Animals", *(v[n] for v in values.values()), 1.5, 1, 1]
            for n in numbers.tolist()
        ]
        write_csv(folder / "AIGCIQA2023.csv", header, *rows)
    else:
        for number, column in enumerate(values.values(), start=1):
            for kind, name, array in (("MOS", f"mosz{number}", column), ("STD", f"SD{number}", column / 40)):
                path = folder / "AIGCIQA2023" / "DATA" / kind / f"{name}.mat"
                path.parent.mkdir(parents=True, exist_ok=True)
                scipy.io.savemat(path, {"MOSz" if kind == "MOS" else "SD": array[:, None]})
        prompts = [["Basic", "Animals", f"prompt {k}"] for k in range(100)]
        write_xlsx(folder / "AIGCIQA2023_Prompts.xlsx", *prompts)
    save_all(folder / "AIGCIQA2023" / "Image" / "allimg", *(f"{number}.png" for number in range(count)))
    save_all(folder / "AIGCIQA2023" / "Image" / "Controlnet", "0.png")
    return folder


def aigiqa_20k(folder: Path, *, suffix: str = "xlsx") -> Path:
    write = write_xlsx if suffix == "xlsx" else write_csv
    parts = {"train": ["DALLE2_0000.png", "LCM_Pixart_0086.png"], "val": ["SSD1B_1909.png"], "test": ["SD1.4_0003.png"]}
    for part, names in parts.items():
        rows = [[name, f"a dog {name}", 3.5 if part == "train" else None] for name in names]
        write(folder / f"info_{part}.{suffix}", ["name", "prompt", "mos"], *rows)
        save_all(folder / part, *names)
    return folder


def pku_i2iqa(folder: Path) -> Path:
    names = ["SD_000_00.jpg", "SD_000_01.jpg", "MJ_000_00.jpg"]
    rows = [["000.jpg", "corgi, happy", name, 1.71 + k, 1.25, 3.5] for k, name in enumerate(names)]
    header = ["Image_prompt", "Text_prompt", "Generated_image", "MOS_q", "MOS_a", "MOS_c"]
    write_xlsx(folder / "I2IQA" / "I2IQA_annotation.xlsx", header, *rows)
    save_all(folder / "I2IQA" / "Generated_image" / "All", *names)
    save_all(folder / "I2IQA" / "Image_prompt", "000.jpg")
    return folder


def evalmi_50k(folder: Path, *, sheet: bool = False) -> Path:
    names = ["SDXL_base_1/0001.png", "SDXL_base_1/0002.png", "Kolors/0001.png"]
    if sheet:
        header = ["image_name", "perception", "correspondence"]
        rows = [[name, 16.5 + k, 70.0] for k, name in enumerate(names)]
        write_xlsx(folder / "MOS&QA" / "AIGI2025_MOS_yn.xlsx", header, *rows)
    else:
        for name, lines in {
            "imgnames": names,
            "mos1": [16.5 + k for k in range(3)],
            "mos2": [70.0] * 3,
        }.items():
            (folder / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / ("Englishall.txt" if sheet else "prompts.txt")).write_text("a photo of a bench\na photo of a cow\n")
    save_all(folder / "AIGI2025", *names)
    return folder


def q_eval_100k(folder: Path) -> Path:
    names = ["Images/flux.1.schnell-en/a1.png", "Images/sdxl/b2.png"]
    for file, score in (("image_quality_train", 3.5), ("image_alignment_train", 4.25)):
        records = [
            {"image_path": name, "prompt": f"a fountain {k}", "gt_score": score, "model": name.split("/")[1]}
            for k, name in enumerate(names)
        ]
        path = folder / "Images_train_jsons" / f"{file}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records))
    save_all(folder, *names)
    return folder
