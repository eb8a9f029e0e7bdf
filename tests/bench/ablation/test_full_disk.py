"""A full disk under an ablation and a report: the error names the file and the cause, and the same command finishes later."""

import json
import subprocess

import pytest
import yaml

from agiqa.bench.ablation.ablation import run_ablation
from agiqa.bench.ablation.grids import read_grid
from agiqa.bench.recording.result_folders import RESULTS
from agiqa.bench.report.writing import write_report
from tests.store.disk.test_disk import mount

BASE = {"projection": "hidden", "encoder": "gru", "width": 24, "epochs": 2, "batch_size": 8, "device": "cpu"}
GROWING = [f"{size}k" for size in range(24, 400, 24)]


@pytest.fixture
def disk(tmp_path):
    """A function that resizes the file system at `tmp_path/disk`."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={GROWING[0]}", "tmpfs", path)

    def resize(size):
        mount("-o", f"remount,size={size}", path)

    resize.path = path
    yield resize
    subprocess.run(["umount", path], check=True)


def told(error):
    """What the command line prints of it, which names a file and the cause."""
    text = "\n".join([str(error), *error.__notes__])
    assert "No space left on device" in text
    assert text.count("while ") == 1
    return text


def file_of(text, folder):
    """The file below `folder` that a message says was being written."""
    return text.partition(f"while writing {folder}/")[2].partition(";")[0]


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    grid = folder / "grid.yaml"
    grid.write_text(yaml.safe_dump({"base": BASE, "seeds": [0, 1], "runs": [{"name": "head"}]}))
    return grid, run_ablation({"": store}, read_grid(grid), folder / "out", grid=grid, workers=1), folder / "out"


def test_an_ablation_names_the_file_and_goes_on_where_there_is_room(disk, store, undisturbed):
    grid, whole, _ = undisturbed
    out, files, errors = disk.path / "out", [], []
    for size in GROWING:
        disk(size)
        try:
            done = run_ablation({"": store}, read_grid(grid), out, grid=grid, workers=1)
        except OSError as error:
            files.append(file_of(told(error), out))
            continue
        errors += done.failed.values()
        if not done.failed:
            break
    else:
        pytest.fail("it never ended well")
    lines = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    errors += [line["error"] for line in lines if "error" in line]
    assert files
    assert all(files)
    assert any(name.startswith("baselines") for name in files)
    assert errors
    for error in errors:
        assert "No space left on device" in error
        assert file_of(error, out / "runs").startswith("head"), error
    assert any("head.safetensors" in error for error in errors)
    assert [row.get("test") for row in done.rows] == [row.get("test") for row in whole.rows]


def test_a_report_names_the_file(disk, undisturbed):
    out, files = disk.path / "report", []
    for size in ["12k", "40k", "120k", "200k", "300k", "2m"]:
        disk(size)
        try:
            report = write_report([undisturbed[2]], out)
        except OSError as error:
            files.append(told(error))
    assert report.page.is_file()
    assert any(f"while writing {out / 'index.html'};" in text for text in files)
    assert any(f"to {out / 'pictures'};" in text for text in files)
