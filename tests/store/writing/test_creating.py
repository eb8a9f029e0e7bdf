"""Paths of new stores: folders of a team, links, mount points, long and odd names. And no store without items."""

import os
import shutil
import stat
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from agiqa.errors import ConfigError, DataError, SettingsConflict
from agiqa.store import Items, create_store, open_store, seal, verify
from agiqa.store.writing.creating import check_writable
from tests.store.conftest import fill, make_content, make_store, plan_of

LENGTHS = [37] * 8
GROUP, ANNE, BEN = 54321, 54322, 54323


@pytest.fixture
def team():
    """A folder of a group: all members write there, and what is made there belongs to the group."""
    if os.getuid():
        pytest.skip("becoming two users of one group needs root")
    folder = Path(tempfile.mkdtemp())  # unlike those of pytest, other users can get to it
    os.chown(folder, -1, GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def test_a_colleague_of_the_group_fills_seals_labels_and_collects(team, workers, tmp_path):
    """Anne plans and fills the store, Ben takes over, Anne labels what he has sealed."""
    path, content = team / "s.agiqa", make_content(LENGTHS)
    (team / "labels.csv").write_text(f"name,mos_quality\n{content.items.names[0]},2.5\n")

    def work(user, *job):
        warm = Path(tempfile.mkdtemp(dir=tmp_path))
        outcome = workers.run("as_member", user, GROUP, str(warm), *map(str, job[:2]), *job[2:])
        assert (outcome.code, outcome.message) == (0, "")
        return outcome.result

    work(ANNE, "plan", path, LENGTHS, 2)
    (path / "locks" / "00000003").touch(0o644)  # as by a run of Anne's with another umask
    os.chown(path / "locks" / "00000003", ANNE, GROUP)
    assert work(BEN, "fill", path, LENGTHS) > 0
    work(BEN, "upkeep", path, "seal")
    assert work(ANNE, "upkeep", path, "label")
    (path / "store.zarr" / "features" / "stray").write_bytes(b"x")
    assert work(BEN, "upkeep", path, "collect")
    assert verify(open_store(path), "numeric").sound
    assert open_store(path).items.labels["quality"][0] == 2.5
    for found in [path, *path.rglob("*")]:
        status = found.lstat()
        assert status.st_gid == GROUP, found
        assert stat.S_IMODE(status.st_mode) == (0o2775 if found.is_dir() else 0o664), found


def test_an_empty_folder_with_rights_of_its_own_keeps_them(tmp_path):
    path = tmp_path / "s.agiqa"
    path.mkdir()
    path.chmod(0o2770)
    os.chown(path, -1, os.getgid() if os.getuid() else GROUP)
    before = path.stat()
    store = make_store(path, make_content(LENGTHS))
    assert (path.stat().st_mode, path.stat().st_gid) == (before.st_mode, before.st_gid)
    assert (store.layout.zarr.stat().st_gid, store.layout.manifest.stat().st_gid) == (before.st_gid, before.st_gid)


@pytest.mark.parametrize("there", ["an empty folder", "nothing"])
def test_a_path_that_is_a_link_gets_its_store_where_the_link_leads(tmp_path, there):
    real, path = tmp_path / "disk" / "real.agiqa", tmp_path / "s.agiqa"
    if there == "an empty folder":
        real.mkdir(parents=True)
    path.symlink_to(real)
    check_writable(path)
    store = make_store(path, make_content(LENGTHS))
    assert path.is_symlink()
    assert open_store(real).id == store.id
    assert [left.name for left in real.parent.iterdir()] == ["real.agiqa"]
    assert sorted(left.name for left in tmp_path.iterdir()) == ["disk", "s.agiqa"]


def test_a_mount_point_is_refused_and_a_path_in_it_named(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")
    try:
        for run in (check_writable, lambda place: create_store(place, plan_of(make_content(LENGTHS)))):
            with pytest.raises(
                ConfigError, match=f"{path} is a mount point.* Give a path in it: {path}/features.agiqa"
            ):
                run(path)
        check_writable(path / "features.agiqa")
        assert list(path.iterdir()) == []
    finally:
        subprocess.run(["umount", path], check=True)


def test_the_folder_that_the_command_runs_in_is_refused(tmp_path, monkeypatch):
    """A rename would take its place, and nothing below `.` would be found any more."""
    monkeypatch.chdir(tmp_path)
    for path in (Path(), tmp_path):
        for run in (check_writable, lambda place: create_store(place, plan_of(make_content(LENGTHS)))):
            with pytest.raises(ConfigError, match="is the folder that this command runs in"):
                run(path)
    assert list(tmp_path.iterdir()) == []
    assert make_store(Path("features.agiqa"), make_content([3])).is_sealed
    monkeypatch.chdir("features.agiqa")
    assert create_store(Path(), plan_of(make_content([3]))).is_sealed


def test_names_are_refused_before_any_work_or_work_to_the_end(tmp_path):
    """`é` has two bytes; a plan beside a store has a name that is 15 bytes longer."""
    for name in ("é" * 120, "x" * 240):
        assert verify(make_store(tmp_path / name, make_content([3])), "full").sound
    refused = {"x" * 241: "241 bytes, and that of a store may have 240", "é" * 127: "254 bytes", "x" * 256: "256 bytes"}
    refused[os.fsdecode(b"\xff.agiqa")] = "is not UTF-8"
    for name, message in refused.items():
        for run in (check_writable, lambda place: create_store(place, plan_of(make_content([3])))):
            with pytest.raises(ConfigError, match=message):
                run(tmp_path / name)
    (tmp_path / ("x" * 240)).rename(tmp_path / ("x" * 255))  # one that is there is read and gone on with
    assert create_store(tmp_path / ("x" * 255), plan_of(make_content([3]))).is_sealed
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="a link that leads to itself"):
        check_writable(tmp_path / "loop")
    assert sorted(len(os.fsencode(left.name)) for left in tmp_path.iterdir()) == [4, 240, 255]


def test_a_url_is_no_path_of_a_new_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket/s.agiqa", "https://host/s.agiqa"):
        with pytest.raises(ConfigError, match=r"looks like a URL.*`agiqa store push PATH URL` copies"):
            check_writable(Path(url))
    assert not list(tmp_path.iterdir())
    (tmp_path / "run:").mkdir()
    check_writable(Path("run:/s.agiqa"))  # an odd folder that is there


def test_what_is_there_and_no_store_is_told_before_any_work(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name in ("notes", "file"):
        with pytest.raises(SettingsConflict, match="exists and is not a feature store"):
            check_writable(tmp_path / name)
    unfinished = create_store(tmp_path / "s.agiqa", plan_of(make_content(LENGTHS)))
    check_writable(unfinished.path)
    fill(unfinished, make_content(LENGTHS))
    check_writable(seal(unfinished).path)
    assert not unfinished.layout.locks.exists()
    check_writable(tmp_path / "new" / "folder" / "s.agiqa")
    assert not (tmp_path / "new").exists()


def test_a_plan_without_items_is_refused(tmp_path):
    nothing = Items(names=[], prompts=[], splits=[], generators=[], descriptions=[], labels={})
    with pytest.raises(DataError, match="There are no items"):
        replace(plan_of(make_content([3])), items=nothing, token_ids=[], roles=[], item_keys=[], truncated=[])
