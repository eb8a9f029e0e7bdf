"""Full, failing and read-only disks: one clear message, nothing half-written counts, and the same command finishes
once there is room."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from agiqa.store import UnitWriter, create_store, join_labels, open_store, seal, verify
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.reading.store import is_planned
from tests.store.conftest import fill, make_content, make_store, plan_of, write_model
from tests.store.hdf5_files import content_of
from tests.store.workers import REPOSITORY

LENGTHS = [37] * 60
PAGE = 4096


@pytest.fixture(scope="module")
def content():
    return make_content(LENGTHS, width=64)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, content):
    return make_store(tmp_path_factory.mktemp("whole") / "s.agiqa", content)


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")


class Disk:
    """A file system of its own, to fill up and to write-protect."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def leave(self, free: int) -> None:
        """Fill it up but for `free` bytes."""
        self._filler.unlink(missing_ok=True)
        status = os.statvfs(self.path)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - free)

    def make_room(self) -> None:
        self._filler.unlink()

    def protect(self) -> None:
        mount("-o", "remount,ro", self.path)

    def files(self) -> dict[str, bytes]:
        found = (path for path in self.path.rglob("*") if path.is_file() and path != self._filler)
        return {path.relative_to(self.path).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", path)
    yield Disk(path)
    subprocess.run(["umount", path], check=True)


def told(error, doing):
    """The text that the command line prints for `error`. Checks that it says what was being done, and what to do."""
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    assert f"while {doing}" in text
    assert text.count("while ") == 1
    assert "run the same command again." in text
    return text


def same(store, undisturbed):
    """Check that the store has the bytes of an undisturbed one, but for records and card, which name run and path."""
    files = {path.relative_to(store.path).as_posix() for path in store.path.rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(undisturbed.path).as_posix() for path in undisturbed.path.rglob("*") if path.is_file()
    }
    for name in files:
        mine, other = (folder / name for folder in (store.path, undisturbed.path))
        if name.startswith("commits/0"):
            assert json.loads(mine.read_text())["objects"] == json.loads(other.read_text())["objects"]
        else:
            assert mine.read_bytes() == other.read_bytes(), name


def full_at_every_size(disk, run, *, doing, named, step=PAGE):
    """Run with more and more room on the full disk until it succeeds; returns how often it failed, each time clearly."""
    failures = 0
    while True:
        disk.leave(failures * step)
        before = disk.files()
        try:
            run()
        except OSError as error:
            failures += 1
            text = told(error, doing)
            assert all(part in text for part in (os.strerror(errno.ENOSPC), "Free some space", named))
            yield before
        else:
            assert failures > 0
            return


def test_full_while_planning(disk, content, undisturbed):
    path = disk.path / "s.agiqa"
    runs = full_at_every_size(
        disk, lambda: create_store(path, plan_of(content)), doing=f"writing the plan of {path}", named=str(path)
    )
    for before in runs:
        assert disk.files() == before
        assert not path.exists()
        assert [left.name for left in disk.path.iterdir()] == ["filler"]
    disk.make_room()
    store = create_store(path, plan_of(content))
    fill(store, content)
    same(seal(store), undisturbed)


def test_full_while_writing_what_comes_from_the_model(disk, content, undisturbed):
    store = create_store(disk.path / "s.agiqa", plan_of(content))
    writer = UnitWriter(store)
    doing = f"writing what {store.path} keeps of the model"
    for _ in full_at_every_size(
        disk, lambda: write_model(writer, content), doing=doing, named=str(store.path), step=PAGE
    ):
        assert not store.layout.model_commit.exists()
    disk.make_room()
    fill(store, content)
    same(seal(store), undisturbed)


def test_full_while_filling(disk, content, undisturbed):
    store = create_store(disk.path / "s.agiqa", plan_of(content))
    fill(store, content, units=[])
    done = []
    for _ in full_at_every_size(disk, lambda: fill(store, content), doing="writing unit", named=f"{store.path}/"):
        done.append(len(store.committed_units()))
        assert not verify(store, "full").damage
        assert not [path for path in store.path.rglob("*") if path.name.endswith(".partial")]
        assert not list(store.layout.commits.glob(".*"))
    assert done == sorted(done)
    assert len(set(done)) > 4
    disk.make_room()
    same(seal(store), undisturbed)


def test_full_while_sealing(disk, content, undisturbed):
    store = create_store(disk.path / "s.agiqa", plan_of(content))
    fill(store, content)
    for _ in full_at_every_size(
        disk,
        lambda: seal(store),
        doing=f"sealing {store.path}; all its units are kept",
        named=str(store.path),
        step=PAGE,
    ):
        assert not open_store(store.path, allow_partial=True).is_sealed
        assert not verify(open_store(store.path, allow_partial=True), "full").damage
    disk.make_room()
    same(seal(store), undisturbed)


@pytest.mark.parametrize("finished", [True, False])
def test_full_while_labels_are_joined(disk, content, tmp_path, finished):
    store = create_store(disk.path / "s.agiqa", plan_of(content))
    fill(store, content)
    if finished:
        store = seal(store)
    table = tmp_path / "labels.csv"
    table.write_text("name,mos_quality\n" + "".join(f"{name},2.125\n" for name in content.items.names))
    for before in full_at_every_size(
        disk, lambda: join_labels(store, table), doing=f"working on {store.path}", named=str(store.path), step=PAGE
    ):
        labels = open_store(store.path, allow_partial=True).items.labels["quality"]
        np.testing.assert_array_equal(labels, content.items.labels["quality"])
        left = {name for name in disk.files() if name not in before and "/locks/" not in name}
        assert left <= {"s.agiqa/.items.parquet.next"}  # which `agiqa store gc` and the next join replace
    assert set(open_store(store.path, allow_partial=True).items.labels["quality"]) == {2.125}


def agiqa(*arguments):
    command = [sys.executable, "-m", "agiqa", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_the_command_line_says_it_in_one_message(disk, undisturbed):
    """A sketch with no room for its plan, then for all its units; then it finishes."""
    out, whole = disk.path / "k.agiqa", disk.path.with_name("whole") / "k.agiqa"
    assert agiqa("store", "sketch", undisturbed.path, whole, "--rank", 4).returncode == 0
    pages = sum(-(-path.stat().st_size // PAGE) for path in whole.rglob("*") if path.is_file())
    for free, doing in (
        (1, f"while writing the plan of {out}; "),
        (pages - 20, f"of {out}; finished units are kept. "),
    ):
        disk.leave(free * PAGE)
        done = agiqa("store", "sketch", undisturbed.path, out, "--rank", 4)
        assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False), done.stderr
        assert done.stderr.count("error: ") == done.stderr.count("No space left on device") == 1
        assert doing in done.stderr
        assert "Free some space and run the same command again." in done.stderr
    assert is_planned(out)
    disk.make_room()
    assert agiqa("store", "sketch", undisturbed.path, out, "--rank", 4).returncode == 0
    same(open_store(out), open_store(whole))


def test_an_export_to_a_full_disk_ends_in_one_message(disk, undisturbed):
    """With no room at all, for half of the file, for nearly all of it; each time in a process that ends normally."""
    out = disk.path / "s.h5"
    whole = export_hdf5(undisturbed, disk.path.with_name("whole.h5"), compression="none")
    pages = -(-whole.bytes // PAGE)
    for free in (2, pages // 2, pages - 2):
        disk.leave(free * PAGE)
        done = agiqa("store", "export", undisturbed.path, out, "--compression", "none")
        assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False), done.stderr
        assert done.stderr.count("No space left on device") == 1
        assert f"'{out}'" in done.stderr
        assert f"while exporting to {out}; no file is left behind. Free some space" in done.stderr
        disk.make_room()
        assert disk.files() == {}
    export_hdf5(undisturbed, out, compression="none")
    assert content_of(out) == content_of(whole.path)
    assert [path.name for path in disk.path.iterdir()] == ["s.h5"]


def write_protected(error, doing):
    text = told(error, doing)
    assert error.errno == errno.EROFS
    assert "Make the file system writable" in text
    return text


def test_a_write_protected_disk_is_told_and_a_store_on_it_is_read(disk, content, undisturbed, tmp_path):
    planned = create_store(disk.path / "planned.agiqa", plan_of(content))
    unsealed = create_store(disk.path / "unsealed.agiqa", plan_of(content))
    fill(unsealed, content)
    shutil.copytree(undisturbed.path, disk.path / "s.agiqa")
    table = tmp_path / "labels.csv"
    table.write_text(f"name,mos_quality\n{content.items.names[0]},2.125\n")
    disk.protect()
    before = disk.files()
    cases = {
        "writing the plan of": lambda: create_store(disk.path / "new.agiqa", plan_of(content)),
        "writing what": lambda: fill(planned, content),
        "computing unit 0 of": lambda: UnitWriter(planned).claim(0).__enter__(),
        "sealing": lambda: seal(unsealed),
        "working on": lambda: join_labels(open_store(disk.path / "s.agiqa"), table),
    }
    for doing, run in cases.items():
        with pytest.raises(OSError, match="Read-only file system") as caught:
            run()
        assert str(disk.path) in write_protected(caught.value, doing)
    assert disk.files() == before
    store = open_store(disk.path / "s.agiqa")
    np.testing.assert_array_equal(store.read(np.arange(60)).rows, undisturbed.read(np.arange(60)).rows)
    assert verify(store, "numeric").sound
    assert create_store(store.path, plan_of(content)).is_sealed


@pytest.fixture
def shared():
    """A folder that other users can enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_another_user_reads_a_store_and_is_told_that_he_cannot_write(shared, workers):
    if os.getuid():
        pytest.skip("becoming another user needs root")
    content = make_content(LENGTHS)
    fill(create_store(shared / "unfinished", plan_of(content)), content, units=[0])
    (shared / "unfinished" / "commits" / "model.json").unlink()
    make_store(shared / "finished", content)
    found = workers.run("be_nobody", shared, LENGTHS).result
    assert {name: step for name, step in found.pop("read")[1].items() if step[0]} == {}
    assert set(found) == {"model", "claim", "write", "plan"}
    for name, (error, message) in found.items():
        assert error == "PermissionError", name
        assert "Permission denied: '" in message
        assert "Give this user the right to write there and run the same command again." in message
    assert not (shared / "new").exists()


def test_the_files_of_a_store_are_readable_to_whom_the_umask_allows(undisturbed):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in undisturbed.path.rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


def test_a_limit_on_file_sizes_is_told(tmp_path, content, workers):
    """Like a quota: the system refuses further writes, without root and on any disk."""
    store = create_store(tmp_path / "s.agiqa", plan_of(make_content(LENGTHS)))
    assert workers.run("fill", store.path, LENGTHS, file_size=3000).code == 1
    outcome = workers.run("fill", store.path, LENGTHS, file_size=3000)
    assert outcome.error == "OSError"
    assert "File too large: '" in outcome.message
    assert "ulimit -f" in outcome.message
    assert not verify(store, "full").damage
    assert workers.run("fill", store.path, LENGTHS).code == 0
    assert verify(seal(store), "numeric").sound


def test_a_disk_that_has_less_room_than_it_says_is_told(tmp_path):
    """A file system in a file that cannot grow: writing succeeds, and only the flush fails."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    backing, path, content = tmp_path / "backing", tmp_path / "disk", make_content([2000] * 60, width=64)
    backing.mkdir()
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", backing)
    try:
        with (backing / "image").open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", backing / "image"], check=True, capture_output=True)
        mount("-o", "loop", backing / "image", path)
        try:
            store = create_store(path / "s.agiqa", plan_of(content))
            with pytest.raises(OSError, match=f"{os.strerror(errno.ENOSPC)}|{os.strerror(errno.EIO)}") as caught:
                fill(store, content)
            assert f"'{store.path}/" in told(caught.value, "writing unit")
            assert len(store.committed_units()) < store.geometry.units
        finally:
            subprocess.run(["umount", path], check=True)
    finally:
        subprocess.run(["umount", backing], check=True)
