"""A full disk in a push or a pull: the message names the file that could not be written, what is kept and what to do."""

import errno
import os
import subprocess

import pytest

from agiqa.store.sharing.pulling import plan_pull, pull, run_pull
from agiqa.store.sharing.pushing import push
from tests.store.conftest import make_content, make_store
from tests.store.sharing.copies import assert_equal_stores


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("wide") / "wide.agiqa", make_content([37] * 60, width=64))


@pytest.fixture
def disk(tmp_path):
    """A file system with room for less than the store."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def fill_up(disk, *, but):
    status = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - but)


def told(error):
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    assert "Free some space" in text
    assert "run the same command again" in text
    return text


def test_a_push_to_a_full_disk_names_the_file_there(wide, disk):
    there = disk / "there"
    fill_up(disk, but=100_000)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        push(wide, there.as_uri(), jobs=1)
    text = told(caught.value)
    assert f"while pushing to {there.as_uri()}; what was sent is kept" in text
    assert f"'{there}/store.zarr/" in text
    assert str(wide.path) not in text
    (disk / "filler").unlink()
    assert push(wide, there.as_uri()).skipped > 0
    assert_equal_stores(there, wide.path)


def test_a_pull_to_a_full_disk_names_the_file_here(wide, disk):
    copy, url = disk / "copy", wide.path.as_uri()
    plan = plan_pull(url, copy)
    filled = []

    def others_fill_it(_bytes):
        if not filled:
            fill_up(disk, but=50_000)
            filled.append(True)

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        run_pull(plan, jobs=1, advance=others_fill_it)
    text = told(caught.value)
    assert f"while pulling {url} to {copy}; what was fetched is kept" in text
    assert f"'{copy}/" in text
    (disk / "filler").unlink()
    assert pull(url, copy).skipped > 0
    assert_equal_stores(copy, wide.path)


def test_a_pull_that_cannot_fit_is_refused_before_anything_is_fetched(wide, disk):
    fill_up(disk, but=100_000)
    with pytest.raises(ValueError, match=r"bytes free.*Free some space"):
        pull(wide.path.as_uri(), disk / "copy")
    assert not (disk / "copy" / "store.zarr").exists()
