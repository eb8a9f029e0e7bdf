"""Names that differ from their files in folder, case or extension: found, announced, and refused where unclear."""

import pytest
from PIL import Image

from agiqa.errors import DataError
from agiqa.extract.data.datasets import load_data_set
from agiqa.progress import said_to


def save(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return folder


def load(folder, *names):
    """Names and files of the items, and what was said."""
    (folder / "data.csv").write_text("name,prompt,mos\n" + "".join(f"{name},x{k},1\n" for k, name in enumerate(names)))
    said = []
    with said_to(said.append):
        data = load_data_set(folder, variant="no_id", images=True)
    told = [line for line in said if not line.startswith("check:")]
    return {item.name: item.image for item in data.items}, told


@pytest.mark.parametrize(
    ("file", "written", "kind"),
    [
        ("images/a.png", "A.PNG", "case"),
        ("images/sd1.5_a.png", "sd1.5_a", "extension"),
        ("images/a.jpg", "a.png", "extension"),
        ("images/sd/a.png", "a.png", "folder"),
        ("images/a.png", "x/images/a.png", "folder"),
        ("images/sd/A.png", "x/sd/a.png", "folder and case"),
    ],
)
def test_one_difference_is_found_and_announced(tmp_path, file, written, kind):
    found, said = load(save(tmp_path, file), written)
    assert found == {file.removeprefix("images/"): tmp_path / file}
    name = file.removeprefix("images/")
    assert said == [
        f"{tmp_path / 'data.csv'}: image names that differ in {kind}: 1, such as {written!r}, read as {name!r}"
    ]


def test_each_kind_is_announced_once(tmp_path):
    files = [f"images/{k}.png" for k in range(20)]
    _, said = load(save(tmp_path, *files), *(str(k) for k in range(10)), *(f"{k}.PNG" for k in range(10, 20)))
    assert len(said) == 2
    assert all(": 10, such as" in line for line in said)


def test_names_that_exist_are_left_alone(tmp_path):
    found, said = load(save(tmp_path, "images/a.png", "images/A.png", "images/s/a.png"), "a.png", "A.png", "s/a.png")
    assert list(found) == ["a.png", "A.png", "s/a.png"]
    assert said == []


@pytest.mark.parametrize(
    ("files", "written"),
    [(("a.png", "a.jpg"), "a"), (("sd/a.png", "glide/a.png"), "a.png"), (("A.png", "a.PNG"), "a.png")],
)
def test_several_candidates_are_refused_and_listed(tmp_path, files, written):
    with pytest.raises(DataError) as caught:
        load(save(tmp_path, *(f"images/{file}" for file in files)), written)
    assert f"{written!r} may be" in str(caught.value)
    assert all(file in str(caught.value) for file in files)


def test_an_image_of_another_folder_is_not_taken(tmp_path):
    with pytest.raises(DataError, match="no image of that name"):
        load(save(tmp_path, "images/sd/a.png"), "glide/a.png")


def test_two_rows_of_one_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="duplicate of line 2"):
        load(save(tmp_path, "images/a.png"), "a.png", "a")


def test_absolute_paths(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", "b.png")
    folder = save(tmp_path / "set", "images/a.png")
    found, _ = load(folder, folder / "images/a.png", elsewhere / "b.png")
    assert found == {
        "a.png": folder / "images/a.png",
        "b.png": elsewhere / "b.png",
    }
    with pytest.raises(DataError, match="no such file, and no image of that name in"):
        load(folder, "/etc/passwd")
