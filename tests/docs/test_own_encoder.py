"""The page docs/own-encoder.md and its template are run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli_own_parts import stored
from tests.command_line import REPOSITORY

PAGE = (REPOSITORY / "docs" / "own-encoder.md").read_text()
TEMPLATE = REPOSITORY / "docs" / "own_encoder" / "running_mean.py"
SMALL = "--projection hidden --width 8 --epochs 2 --batch-size 8 --split grouped --device cpu"


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def folder(agiqa, tmp_path):
    """A folder like a clone of the repository, in which the commands run."""
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    agiqa.folder = tmp_path
    yield tmp_path
    agiqa.folder = REPOSITORY


def test_the_commands_of_the_page_run(agiqa, folder):
    store = stored(folder)
    script = block("bash").replace("$STORE", str(store)).replace("$SMALL", SMALL)
    commands = [shlex.split(line, comments=True) for line in script.splitlines()]
    for program, *arguments in commands:
        if program == "agiqa":
            outcome = agiqa(*arguments)
            assert outcome.code == 0, outcome.err
            continue
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *arguments, "-p", "no:cacheprovider"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert len((folder / "scores.csv").read_text().splitlines()) == 61


def test_the_other_parts_of_the_page_are_registered_and_train(agiqa, tmp_path):
    file, out = tmp_path / "other_parts.py", tmp_path / "run"
    file.write_text(block("python"))
    listed = agiqa("parts", "--import", file, "--json").json["parts"]
    own = {(part["kind"], part["name"]): part for part in listed if part["from"] != "agiqa"}
    assert set(own) == {
        ("pooling", "sum-of-roots"),
        ("loss", "fourth-power"),
        ("loss", "spread"),
        ("table format", ".pairs"),
    }
    assert all(part["from"] == "other_parts" and part["file"] == str(file) for part in own.values())
    assert own["loss", "spread"]["summary"] == "The squared difference of the deviations of predictions and labels."
    parts = ("--encoder", "none", "--pooling", "sum-of-roots", "--loss", "mse+0.1*fourth-power+spread")
    trained = agiqa("train", stored(tmp_path), out, "--import", file, *parts, *shlex.split(SMALL), "--json")
    assert trained.json["epochs_run"] == 2


def test_the_pooling_of_the_page_obeys_the_laws(tmp_path):
    checks = "\nfrom agiqa import check_pooling\ncheck_pooling('sum-of-roots')\n"
    done = subprocess.run(
        [sys.executable, "-c", block("python") + checks], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_template_has_twenty_lines():
    code = [line for line in Path(TEMPLATE).read_text().splitlines() if line.strip()]
    assert len(code) <= 20
