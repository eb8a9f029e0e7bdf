"""What is kept of stores read in place: whose bytes they are, what a damaged one does, and a cache that cannot be written."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import ConfigError
from agiqa.store import join_labels, open_store
from agiqa.store.disk.files import sha256_of_file
from agiqa.store.format.layout import cache_root
from agiqa.store.sharing import in_place
from agiqa.store.sharing.in_place import open_remote
from tests.store.conftest import make_store
from tests.store.sharing.copies import largest_object
from tests.store.sharing_servers import REPOSITORY, web_server


def assert_same_rows(remote, local):
    expected, found = local.read(range(40)), remote.read(range(40))
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.roles, expected.roles)
    np.testing.assert_array_equal(remote.lm_head(), local.lm_head())


@pytest.mark.parametrize("open_first", ["mine", "yours"])
def test_two_stores_of_one_id_never_meet(stored, served, tmp_path, content, open_first):
    other = replace(content, hidden=[rows ^ 1 for rows in content.hidden], lm_head=content.lm_head + 1)
    yours = make_store(tmp_path / "yours.agiqa", other)
    assert yours.id == stored.id
    with web_server(yours.path) as there:
        urls = {"mine": served.url, "yours": there.url}
        stores = {name: open_remote(urls[name]) for name in (open_first, *({"mine", "yours"} - {open_first}))}
        stores[open_first].read([0, 7])
        for _ in range(2):
            assert_same_rows(stores["mine"], stored)
            assert_same_rows(stores["yours"], yours)
            stores = {name: open_remote(url) for name, url in urls.items()}


def test_copies_with_other_labels_share_what_is_the_same(stored, served, tmp_path):
    mine = open_remote(served.url)
    labels = stored.items.labels["quality"][0]
    relabelled = open_store(shutil.copytree(stored.path, tmp_path / "relabelled.agiqa"))
    (tmp_path / "labels.csv").write_text("name,mos_quality\nimage_0.png,1.25\n")
    join_labels(relabelled, tmp_path / "labels.csv")
    with web_server(relabelled.path) as there:
        yours = open_remote(there.url)
        assert yours.items.labels["quality"][0] == 1.25
        assert {name for name, _ in there.behaviour.asked} == {"MANIFEST.json", "items.parquet"}
    assert mine.items.labels["quality"][0] == labels
    assert open_remote(served.url).items.labels["quality"][0] == labels


def flipped(raw):
    return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda raw: raw[:-1], lambda raw: raw + b"x", lambda _: b"", None])
def test_whatever_happens_to_a_kept_object_it_is_fetched_again(stored, served, cache, damage):
    assert_same_rows(open_remote(served.url), stored)
    kept = [path for path in cache.rglob("*") if path.is_file() and "locks" not in path.parts]
    assert len(kept) > 40
    for path in kept:
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes()))
    remote = open_remote(served.url)
    assert_same_rows(remote, stored)
    assert remote.items.same_as(stored.items)
    np.testing.assert_array_equal(np.asarray(remote.array("features")[:]), np.asarray(stored.array("features")[:]))


def test_an_object_that_changes_while_the_store_is_open_is_fetched_again(stored, served):
    remote = open_remote(served.url)
    assert_same_rows(remote, stored)
    name = largest_object(stored)
    unit = int(name.split("/")[3])
    for other in (
        flipped((stored.path / name).read_bytes()),
        (stored.path / largest_of_others(stored, name)).read_bytes(),
    ):
        (remote.path / name).write_bytes(other)
        np.testing.assert_array_equal(remote.read_unit(unit), stored.read_unit(unit))
        np.testing.assert_array_equal(np.asarray(remote.array("features")[:]), np.asarray(stored.array("features")[:]))


def test_a_change_that_keeps_the_time_of_the_file_is_seen(stored, served):
    remote = open_remote(served.url)
    assert_same_rows(remote, stored)
    name = largest_object(stored)
    kept = remote.path / name
    before, raw = kept.stat(), flipped(kept.read_bytes())
    with kept.open("r+b") as file:  # as `rsync --inplace --times` writes
        file.write(raw)
    os.utime(kept, ns=(before.st_atime_ns, before.st_mtime_ns))
    unit = int(name.split("/")[3])
    np.testing.assert_array_equal(remote.read_unit(unit), stored.read_unit(unit))


def test_a_cache_that_is_deleted_while_a_store_is_open_is_fetched_again(stored, served, cache):
    remote = open_remote(served.url)
    shutil.rmtree(cache)
    assert_same_rows(remote, stored)


def test_a_relative_cache_stays_where_it_was(stored, served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGIQA_CACHE", "here")
    remote = open_remote(served.url)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same_rows(remote, stored)
    assert not list((tmp_path / "elsewhere").iterdir())


def largest_of_others(store, name):
    return next(
        other
        for unit in range(store.geometry.units)
        if (other := f"store.zarr/features/c/{unit}/0") != name and (store.path / other).exists()
    )


def test_what_is_kept_is_hashed_once_by_each_process(stored, served, monkeypatch):
    assert_same_rows(open_remote(served.url), stored)
    hashed = []

    def counted(path):
        hashed.append(path)
        return sha256_of_file(path)

    monkeypatch.setattr(in_place, "sha256_of_file", counted)
    remote = open_remote(served.url)
    for _ in range(4):
        assert_same_rows(remote, stored)
    assert len(set(hashed)) > 40
    assert len(hashed) < 2 * len(set(hashed))  # a thread that reads ahead may hash what the reader is hashing


def test_what_an_earlier_version_kept_is_not_looked_at(stored, served, cache):
    old = cache / "stores" / stored.id
    shutil.copytree(stored.path, old)
    (old / "MANIFEST.json").rename(old / "REMOTE.json")
    path = old / largest_object(stored)
    path.write_bytes(path.read_bytes()[::-1])
    assert_same_rows(open_remote(served.url), stored)
    assert path.exists()


def test_a_full_cache_that_cannot_be_written_is_read(stored, served, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")
    try:
        monkeypatch.setenv("AGIQA_CACHE", str(disk))
        assert_same_rows(open_remote(served.url), stored)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        remote = open_remote(served.url)
        assert_same_rows(remote, stored)
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        shutil.rmtree(remote.path)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(ConfigError, match=r"cannot be written.*Set AGIQA_CACHE"):
            remote.read([0])
        with pytest.raises(ConfigError, match=r"cannot be written.*Set AGIQA_CACHE"):
            open_remote(served.url)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_home_that_cannot_be_written_names_the_variable_that_helps(served, monkeypatch):
    monkeypatch.delenv("AGIQA_CACHE")
    monkeypatch.setenv("HOME", "/proc/none")
    with pytest.raises(ConfigError, match=r"/proc/none/.*cannot be written.*Set AGIQA_CACHE") as caught:
        open_remote(served.url)
    assert "pull" in str(caught.value)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a process as a user that has no home")
def test_a_user_without_a_home_is_told_the_variable_that_helps():
    script = "from agiqa.store.format.layout import cache_root; cache_root()"
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "AGIQA_CACHE")}
    code = f"import os; os.setuid(54321); {script}"
    done = subprocess.run(
        [sys.executable, "-c", f"import agiqa.store.format.layout; {code}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "ConfigError" in done.stderr
    assert "Set AGIQA_CACHE" in done.stderr


def test_a_cache_of_no_known_user_is_refused(monkeypatch):
    monkeypatch.setenv("AGIQA_CACHE", "~no_such_user_here/cache")
    with pytest.raises(ConfigError, match="AGIQA_CACHE"):
        cache_root()
