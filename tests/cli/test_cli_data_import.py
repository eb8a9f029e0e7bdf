"""`agiqa data import`: tiny folders in the layouts of published sets become a set that the other commands read."""

import csv
import hashlib
import json
import shutil

import pytest

from agiqa.commands.data import PUBLISHED_SETS
from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.data.importers.agiqa_3k import AGIQA_3K
from agiqa.extract.data.importers.sets import IMPORTERS
from tests.cli.refusals import misuse, refuse
from tests.extract.data import published_folders as published
from tests.extract.data.published_folders import save_all, write_csv


def run(agiqa, name, folder, out, *options):
    return agiqa("data", "import", name, folder, out, *options, "--json")


def read(out):
    """The items of an imported folder, read without options."""
    return load_data_set(out, variant="no_id", images=True)


def rows_of(out):
    with (out / "data.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def shown(data):
    return [(item.name, item.prompt, dict(item.labels), item.generator, item.split) for item in data.items]


def test_the_help_lists_the_registered_sets():
    assert sorted(PUBLISHED_SETS) == IMPORTERS.names()


def test_agiqa_3k(agiqa, tmp_path):
    folder, out = published.agiqa_3k(tmp_path / "down"), tmp_path / "out"
    printed = run(agiqa, "agiqa-3k", folder, out).json
    data = read(out)
    assert shown(data) == [
        ("sd1.5_normal_000.jpg", "a cat 0", {"quality": 1.5, "correspondence": 2.5}, "sd1.5", None),
        ("midjourney_lowstep_001.jpg", "a cat 1", {"quality": 2.5, "correspondence": 2.5}, "midjourney", None),
        ("AttnGAN_normal_002.jpg", "a cat 2", {"quality": 3.5, "correspondence": 2.5}, "AttnGAN", None),
    ]
    assert data.mos_range == (0.0, 5.0)
    assert {row["std_quality"] + "/" + row["std_correspondence"] for row in rows_of(out)} == {"0.25/0.75"}
    assert printed["labels"] == {"quality": 3, "correspondence": 3}
    assert printed["generators"] == {"AttnGAN": 1, "midjourney": 1, "sd1.5": 1}
    assert (printed["missing"], printed["unlabelled"], printed["changed"]) == ([], 0, True)
    record = json.loads((out / "source.json").read_text())
    table = folder / "AGIQA-3K" / "data.csv"
    assert record["files"] == {"AGIQA-3K/data.csv": hashlib.sha256(table.read_bytes()).hexdigest()}
    assert (record["set"], record["mos_range"], record["images"]) == ("agiqa-3k", [0.0, 5.0], "linked")


@pytest.mark.parametrize("prompts", [True, False])
def test_agiqa_1k(agiqa, tmp_path, prompts):
    out = tmp_path / "out"
    outcome = run(agiqa, "agiqa-1k", published.agiqa_1k(tmp_path / "down", prompts=prompts), out)
    composed = ["bird having hamburger, wild, anime style", "teddy bear using CD, city, realistic style"]
    data = read(out)
    wanted = [f"a bird {k}" for k in range(3)] if prompts else [*composed, "woman using CD, wild"]
    assert [item.prompt for item in data.items] == wanted
    assert [item.labels["quality"] for item in data.items] == [0.5, 1.5, 2.5]
    assert [item.generator for item in data.items] == ["deepai", "dreamStudio", "dreamStudio"]
    assert ("they are composed of the numbers" in outcome.err) == (not prompts)
    assert outcome.json["mos_range"] == [0.0, 5.0]


@pytest.mark.parametrize("table", [True, False])
def test_aigciqa2023_keeps_its_scale(agiqa, tmp_path, table):
    """As a table, or as MATLAB files and a sheet of prompts; its images are numbered by model and prompt."""
    folder, out = published.aigciqa2023(tmp_path / "down", table=table), tmp_path / "out"
    save_all(folder / "AIGCIQA2023" / "Image" / "allimg", "1234.png", "2399.png")
    printed = run(agiqa, "aigciqa2023", folder, out, "--on-bad-item", "skip").json
    assert (printed["items"], len(printed["missing"]), printed["mos_range"]) == (8, 2392, [0.0, 100.0])
    data = read(out)
    found = {item.name: item for item in data.items}
    assert data.mos_range == (0.0, 100.0)
    assert {name: item.generator for name, item in found.items() if len(name) > 5} == {
        "1234.png": "Lafite",
        "2399.png": "Unidiffuser",
    }
    assert [found[name].prompt for name in ("3.png", "4.png", "1234.png", "2399.png")] == [
        f"prompt {k}" for k in (0, 1, 8, 99)
    ]
    assert dict(found["1234.png"].labels) == pytest.approx(
        {"quality": 20 + 1234 / 60, "authenticity": 21 + 1234 / 60, "correspondence": 22 + 1234 / 60}
    )
    assert float(rows_of(out)[0]["raw_std_quality"]) == pytest.approx(1.5 if table else 0.5)


@pytest.mark.parametrize("suffix", ["xlsx", "csv"])
def test_aigiqa_20k_has_its_published_split(agiqa, tmp_path, suffix):
    """The MOS of val and test are hidden: val cannot be used without."""
    out = tmp_path / "out"
    outcome = run(agiqa, "aigiqa-20k", published.aigiqa_20k(tmp_path / "down", suffix=suffix), out)
    assert shown(read(out)) == [
        ("DALLE2_0000.png", "a dog DALLE2_0000.png", {"quality": 3.5}, "DALLE2", "train"),
        ("LCM_Pixart_0086.png", "a dog LCM_Pixart_0086.png", {"quality": 3.5}, "LCM_Pixart", "train"),
        ("SD1.4_0003.png", "a dog SD1.4_0003.png", {}, "SD1.4", "test"),
    ]
    assert "1 val images have no published MOS and are left out" in outcome.err
    assert outcome.json["unlabelled"] == 1


def test_aigiqa_20k_with_a_table_of_all_mos(agiqa, tmp_path):
    folder, out = published.aigiqa_20k(tmp_path / "down", suffix="csv"), tmp_path / "out"
    names = ["DALLE2_0000.png", "LCM_Pixart_0086.png", "SSD1B_1909.png", "SD1.4_0003.png"]
    write_csv(folder / "data.csv", ["name", "prompt", "mos"], *([name, "x", 2 + k / 2] for k, name in enumerate(names)))
    assert run(agiqa, "aigiqa-20k", folder, out).json["splits"] == {"train": 2, "val": 1, "test": 1}
    assert [item.labels["quality"] for item in read(out).items] == [3.5, 3.5, 3.0, 3.5]


def test_pku_i2iqa_names_the_images_that_were_given(agiqa, tmp_path):
    out = tmp_path / "out"
    run(agiqa, "pku-i2iqa", published.pku_i2iqa(tmp_path / "down"), out)
    labels = {"quality": 1.71, "correspondence": 3.5, "authenticity": 1.25}
    assert shown(read(out))[0] == ("SD_000_00.jpg", "corgi, happy", labels, "SD", None)
    assert [row["reference"] for row in rows_of(out)] == ["000.jpg"] * 3


def test_pku_i2iqa_with_a_column_of_row_numbers(agiqa, tmp_path):
    """The texts follow the given images; a column of images is never taken for them."""
    folder, out = published.pku_i2iqa(tmp_path / "down"), tmp_path / "out"
    path, row = folder / "I2IQA" / "I2IQA_annotation.xlsx", [0, "000.jpg", "corgi", "SD_000_00.jpg", 1.71, 1.25, 3.5]
    header = ["Image_prompt", "Text_prompt", "Generated_image", "MOS_q", "MOS_a", "MOS_c"]
    published.write_xlsx(path, ["", "given", *header[1:]], row)
    refuse(run(agiqa, "pku-i2iqa", folder, out), "the prompt '000.jpg' of SD_000_00.jpg is the name of an image")
    published.write_xlsx(path, ["", *header], row)
    run(agiqa, "pku-i2iqa", folder, out)
    assert [(item.name, item.prompt) for item in read(out).items] == [("SD_000_00.jpg", "corgi")]


@pytest.mark.parametrize("sheet", [True, False])
def test_evalmi_50k(agiqa, tmp_path, sheet):
    out = tmp_path / "out"
    run(agiqa, "evalmi-50k", published.evalmi_50k(tmp_path / "down", sheet=sheet), out)
    data = read(out)
    assert shown(data) == [
        (name, prompt, {"quality": mos, "correspondence": 70.0}, name.split("/")[0], None)
        for name, prompt, mos in (
            ("SDXL_base_1/0001.png", "a photo of a bench", 16.5),
            ("SDXL_base_1/0002.png", "a photo of a cow", 17.5),
            ("Kolors/0001.png", "a photo of a bench", 18.5),
        )
    ]
    assert data.mos_range == (0.0, 100.0)


def test_evalmi_50k_does_not_guess_whether_numbers_count_from_0(agiqa, tmp_path):
    folder, out = published.evalmi_50k(tmp_path / "down"), tmp_path / "out"
    (folder / "prompts.txt").write_text("a bench\na cow\na cat\n")
    refuse(
        run(agiqa, "evalmi-50k", folder, out), "prompts.txt has 3 lines", "numbered 1 to 2", "number 0 or of number 1"
    )


def test_imports_in_the_folder_of_the_download_are_left_out(agiqa, tmp_path):
    folder = published.agiqa_3k(tmp_path / "down")
    run(agiqa, "agiqa-3k", folder, folder / "one", "--copy")
    table = folder / "one" / "data.csv"
    table.write_text(table.read_text().replace("a cat 0", "a dog"))
    printed = run(agiqa, "agiqa-3k", folder, folder / "two").json
    assert (printed["items"], printed["unlabelled"]) == (3, 0)
    assert [item.prompt for item in read(folder / "two").items] == ["a cat 0", "a cat 1", "a cat 2"]


def test_a_sheet_with_other_columns_is_read_by_columns(agiqa, tmp_path):
    folder, out = published.evalmi_50k(tmp_path / "down", sheet=True), tmp_path / "out"
    rows = [[name, 16.5, 70.0] for name in ("SDXL_base_1/0001.png", "SDXL_base_1/0002.png")]
    published.write_xlsx(folder / "MOS&QA" / "AIGI2025_MOS_yn.xlsx", ["picture", "a", "b"], *rows)
    refuse(run(agiqa, "evalmi-50k", folder, out), "no column 'name' (found: picture, a, b)", "--columns name=COLUMN")
    columns = "name=picture,quality=a,correspondence=b"
    assert run(agiqa, "evalmi-50k", folder, out, "--columns", columns).json["items"] == 2


def test_q_eval_100k_joins_two_files_and_tells_its_scale_from_the_values(agiqa, tmp_path):
    out = tmp_path / "out"
    outcome = run(agiqa, "q-eval-100k", published.q_eval_100k(tmp_path / "down"), out)
    labels = {"quality": 3.5, "correspondence": 4.25}
    name = "flux.1.schnell-en/a1.png"
    assert shown(read(out))[0] == (name, "a fountain 0", labels, "flux.1.schnell-en", "train")
    assert "The scale 0 to 5 is taken from the values" in outcome.err


def test_the_same_import_again_changes_nothing(agiqa, tmp_path):
    folder, out = published.agiqa_3k(tmp_path / "down"), tmp_path / "out"
    run(agiqa, "agiqa-3k", folder, out)
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*")}
    assert run(agiqa, "agiqa-3k", folder, out).json["changed"] is False
    assert {path: path.lstat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("copy", [True, False])
def test_a_killed_import_is_completed(agiqa, tmp_path, copy):
    """While data.csv is missing, no command reads the folder."""
    folder, out = published.aigciqa2023(tmp_path / "down", table=True, count=2400), tmp_path / "out"
    options = ("--copy",) if copy else ()
    images = out / "images"
    killed = agiqa.killed(
        *("data", "import", "aigciqa2023", folder, out, *options),
        when=lambda: images.is_dir() and any(images.iterdir()),
    )
    if killed.code == -9:
        assert not (out / "data.csv").exists()
        refuse(agiqa("data", "check", out), "data.csv: no such file")
    assert run(agiqa, "aigciqa2023", folder, out, *options).json["items"] == 2400
    assert {path.name for path in images.iterdir()} == {f"{k}.png" for k in range(2400)}
    assert (images / "0.png").is_symlink() == (not copy)


def test_images_that_were_missing_are_added(agiqa, tmp_path):
    folder, out = published.agiqa_3k(tmp_path / "down"), tmp_path / "out"
    image = folder / "AGIQA-3K" / "all" / "AttnGAN_normal_002.jpg"
    content = image.read_bytes()
    image.unlink()
    refuse(
        run(agiqa, "agiqa-3k", folder, out),
        "1 of 3 images are missing (AttnGAN_normal_002.jpg). Complete the download",
        "--on-bad-item skip",
    )
    assert not out.exists()
    outcome = run(agiqa, "agiqa-3k", folder, out, "--on-bad-item", "skip")
    assert (outcome.json["items"], outcome.json["missing"]) == (2, ["AttnGAN_normal_002.jpg"])
    assert "missing image: AttnGAN_normal_002.jpg" in outcome.err
    assert json.loads((out / "source.json").read_text())["missing"] == ["AttnGAN_normal_002.jpg"]
    image.write_bytes(content)
    assert run(agiqa, "agiqa-3k", folder, out).json["items"] == 3
    assert len(read(out).items) == 3


def test_an_image_of_another_folder_does_not_stand_in(agiqa, tmp_path):
    """Images of all models of EvalMi-50K have the same names; AIGCIQA2023 has folders beside allimg."""
    folder, out = published.evalmi_50k(tmp_path / "down"), tmp_path / "out"
    shutil.rmtree(folder / "AIGI2025" / "Kolors")
    printed = run(agiqa, "evalmi-50k", folder, out, "--on-bad-item", "skip").json
    assert printed["missing"] == ["Kolors/0001.png"]
    folder, out = published.aigciqa2023(tmp_path / "other", table=True), tmp_path / "out2"
    (folder / "AIGCIQA2023" / "Image" / "allimg" / "0.png").unlink()
    assert "0.png" in run(agiqa, "aigciqa2023", folder, out, "--on-bad-item", "skip").json["missing"]
    flat = published.aigciqa2023(tmp_path / "flat", table=True)
    (flat / "AIGCIQA2023" / "Image" / "allimg").rename(flat / "images")
    shutil.rmtree(flat / "AIGCIQA2023")
    assert run(agiqa, "aigciqa2023", flat, tmp_path / "out3", "--on-bad-item", "skip").json["items"] == 6


def test_copies_stay_when_the_download_goes(agiqa, tmp_path):
    folder, out = published.agiqa_3k(tmp_path / "down"), tmp_path / "out"
    run(agiqa, "agiqa-3k", folder, out, "--copy")
    shutil.rmtree(folder)
    assert len(read(out).items) == 3


def test_a_folder_of_another_set_is_named(agiqa, tmp_path):
    out = tmp_path / "out"
    folders = {
        "agiqa-3k": published.agiqa_3k(tmp_path / "a"),
        "aigiqa-20k": published.aigiqa_20k(tmp_path / "b"),
        "pku-i2iqa": published.pku_i2iqa(tmp_path / "c"),
        "evalmi-50k": published.evalmi_50k(tmp_path / "d"),
        "aigciqa2023": published.aigciqa2023(tmp_path / "e", table=True),
        "q-eval-100k": published.q_eval_100k(tmp_path / "f"),
        "agiqa-1k": published.agiqa_1k(tmp_path / "g"),
    }
    for name, folder in folders.items():
        asked = "agiqa-1k" if name != "agiqa-1k" else "agiqa-3k"
        refuse(run(agiqa, asked, folder, out), folder, f"agiqa data import {name} {folder} OUT")
    assert not out.exists()


def test_labels_without_images(agiqa, tmp_path):
    folder, out = published.agiqa_3k(tmp_path / "down"), tmp_path / "out"
    shutil.rmtree(folder / "AGIQA-3K" / "all")
    (folder / "AGIQA-3K.zip").write_bytes(b"")
    for options in ((), ("--on-bad-item", "skip")):
        refuse(
            run(agiqa, "agiqa-3k", folder, out, *options),
            "the labels name 3 images, and none of them is there",
            "Unpack AGIQA-3K.zip in the folder",
        )
    assert not out.exists()


def test_images_without_labels(agiqa, tmp_path):
    folder = published.agiqa_3k(tmp_path / "down")
    (folder / "AGIQA-3K" / "data.csv").unlink()
    refuse(run(agiqa, "agiqa-3k", folder, tmp_path / "out"), "no data.csv", "found: no files but images")


def test_rows_that_cannot_be_items(agiqa, tmp_path):
    folder, out = tmp_path / "down", tmp_path / "out"
    names = [f"sd1.5_normal_00{k}.jpg" for k in range(5)]
    rows = [[names[0], "a", 1], [names[1], "", 2], [names[2], "c", 7], [names[3], "d", ""], [names[3], "d", 3]]
    write_csv(folder / "data.csv", ["name", "prompt", "mos_quality"], *rows, [names[0], "a", 1])
    save_all(folder / "all", *names)
    refuse(
        run(agiqa, "agiqa-3k", folder, out),
        f"{names[1]} (data.csv, line 3): the prompt is empty",
        f"{names[2]} (data.csv, line 4): MOS of quality is 7, outside 0 to 5",
        f"{names[3]} (data.csv, line 5): no MOS",
        f"data.csv, line 6: {names[3]} is in data.csv, line 5 too, with other labels",
    )
    printed = run(agiqa, "agiqa-3k", folder, out, "--on-bad-item", "skip").json
    assert (printed["items"], len(printed["problems"])) == (1, 4)
    assert "1 rows that repeat an earlier one are left out." in printed["notes"]


def test_a_download_that_has_moved(agiqa, tmp_path):
    folder, out = published.agiqa_3k(tmp_path / "down"), tmp_path / "out"
    run(agiqa, "agiqa-3k", folder, out)
    folder.rename(tmp_path / "elsewhere")
    refuse(agiqa("data", "check", out), f"links to {folder}/", "which is gone", "import the set again")
    assert run(agiqa, "agiqa-3k", tmp_path / "elsewhere", out).json["changed"]
    assert len(read(out).items) == 3


def test_text_files_that_do_not_fit_each_other(agiqa, tmp_path):
    folder, out = published.evalmi_50k(tmp_path / "down"), tmp_path / "out"
    (folder / "prompts.txt").write_text("a photo of a bench\n")
    refuse(run(agiqa, "evalmi-50k", folder, out), "SDXL_base_1/0002.png has no prompt", "has 1 lines, counted from 1")
    (folder / "mos2.txt").write_text("70.0\n")
    refuse(
        run(agiqa, "evalmi-50k", folder, out), "differ in their number of lines (image 3, quality 3, correspondence 1)"
    )


def test_where_no_import_may_go(agiqa, tmp_path):
    folder, foreign = published.agiqa_3k(tmp_path / "down"), tmp_path / "foreign"
    save_all(foreign, "mine.png")
    refuse(run(agiqa, "agiqa-3k", folder, foreign), f"{foreign} has files that no import made")
    refuse(run(agiqa, "agiqa-3k", folder, folder), "is the folder to import from")
    refuse(run(agiqa, "agiqa-3k", tmp_path / "none", tmp_path / "out"), "no such folder of AGIQA-3K")
    out = tmp_path / "out"
    run(agiqa, "agiqa-3k", folder, out)
    refuse(run(agiqa, "agiqa-3k", out, tmp_path / "twice"), f"{out} is an import already")
    other = published.agiqa_1k(tmp_path / "other")
    refuse(run(agiqa, "agiqa-1k", other, out), f"{out} holds an import of agiqa-3k, not of agiqa-1k")
    with (out / "data.csv").open("a") as stream:
        stream.write("more.jpg,x,1,1,,,\n")
    refuse(run(agiqa, "agiqa-3k", folder, out), "data.csv was changed after its import")
    misuse(run(agiqa, "agiqa3k", folder, out), "Did you mean 'agiqa-3k'?")


def test_damaged_files_of_aigciqa2023(agiqa, tmp_path):
    folder, out = published.aigciqa2023(tmp_path / "down", table=False), tmp_path / "out"
    path = folder / "AIGCIQA2023" / "DATA" / "MOS" / "mosz2.mat"
    path.write_bytes(b"<html>not found</html>" * 20)
    refuse(run(agiqa, "aigciqa2023", folder, out), path, "cannot be read as a MATLAB file")


def test_the_scale_of_an_import_is_that_of_its_store(agiqa, tiny_vision_checkpoint, tmp_path):
    """Without any option: extract records it, and `store labels` and `words` use it."""
    folder, out, store = published.aigciqa2023(tmp_path / "down", table=True), tmp_path / "out", tmp_path / "s.agiqa"
    run(agiqa, "aigciqa2023", folder, out, "--on-bad-item", "skip")
    made = agiqa("extract", out, store, "--model", tiny_vision_checkpoint, "--variant", "no_id", "--device", "cpu")
    assert made.code == 0, made.err
    scales = agiqa("store", "info", store, "--json").json["mos_ranges"]
    assert list(scales.values()) == [[0.0, 100.0]] * 3
    again = agiqa("store", "labels", store, out / "data.csv", "--json").json
    assert (again["changed"], again["rescaled"]) == (False, [])
    answers = tmp_path / "answers.csv"
    write_csv(answers, ["name", "answer"], *([f"{k}.png", "poor"] for k in range(6)))
    scores = agiqa("words", answers, "--labels", out / "data.csv", "--json").json
    assert scores["accuracy"] == 1.0  # a MOS of 20 of 100 is poor
    refuse(agiqa("words", answers, "--labels", out / "data.csv", "--mos-range", 0, 5), "outside 0 to 5")
    teacher = (
        "--api",
        "openai",
        "--teacher",
        "m",
        "--base-url",
        "http://localhost:9/v1",
        "--dry-run",
        "--val-share",
        0,
    )
    assert agiqa("teach", out, tmp_path / "t.jsonl", *teacher, "--json").json["items"] == 6
    short = ("--model", tiny_vision_checkpoint, "--max-new-tokens", 3, "--device", "cpu", "--json")
    assert agiqa("describe", out, tmp_path / "d.jsonl", *short).json["items"] == 6


def test_a_user_can_add_a_set():
    """As a module given by --import does."""
    from dataclasses import replace

    own = replace(AGIQA_3K, name="my-set")
    IMPORTERS.add("my-set", own)
    try:
        assert IMPORTERS.get("my-set") is own
    finally:
        IMPORTERS._parts.pop("my-set")
