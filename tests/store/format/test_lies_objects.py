"""False objects with right checksums, links and pipes: no crash, no endless wait, no write outside the store."""

import os
import random
import struct

import google_crc32c
import numpy as np
import pytest

from agiqa.errors import DamagedStore
from agiqa.store import create_store, open_store, repair, seal, verify
from agiqa.store.format.objects import ObjectCodec
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.format.liar import MEMORY, SECONDS, judged, refused


def linked(place, elsewhere):
    """Move what is at `place` to `elsewhere`, and leave a link."""
    place.rename(elsewhere)
    place.symlink_to(elsewhere)


@pytest.mark.parametrize("part", ["features/c/1/0", "features/c/1", "features", "tokens/roles/c/0", "lm_head"])
def test_links_out_of_a_store_are_named_and_nothing_is_written_or_removed_behind_them(tmp_path, part):
    content = make_content([5] * 4)
    store = make_store(tmp_path / "s.agiqa", content)
    outside = tmp_path / "outside"
    linked(store.layout.zarr / part, outside)
    before = {file: file.read_bytes() for file in [outside, *outside.rglob("*")] if file.is_file()}
    np.testing.assert_array_equal(open_store(store.path).read(range(4)).rows, np.concatenate(content.hidden))
    for work in (lambda: verify(open_store(store.path), "full"), lambda: repair(open_store(store.path))):
        with pytest.raises(DamagedStore, match=r"is a link out of the store.*cp -RL"):
            work()
    store.layout.manifest.unlink()
    with pytest.raises(DamagedStore, match="is a link out of the store"):
        seal(open_store(store.path, allow_partial=True))
    assert {file: file.read_bytes() for file in before} == before


def test_a_unit_is_not_written_through_a_link(tmp_path):
    content = make_content([5] * 4)
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content, units=[0])
    outside = tmp_path / "outside"
    linked(store.layout.zarr / "features" / "c", outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(DamagedStore, match="is a link out of the store"):
        fill(store, content)
    assert sorted(outside.rglob("*")) == before


def replaced(liar, kind):
    place = liar.zarr / "tokens" / "roles" / "c" / "0"
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "circle":
        place.symlink_to(place)
    elif kind == "zeros without end":
        place.symlink_to("/dev/zero")
    else:
        with place.open("wb") as file:
            file.truncate(1 << 40)


@pytest.mark.parametrize("kind", ["pipe", "folder", "circle", "zeros without end", "a terabyte"])
def test_what_is_no_object_is_not_waited_for_or_read(liar, workers, kind):
    liar.agree()
    replaced(liar, kind)
    found = judged(workers, liar, agree=False)
    assert (found["rows"][0], "tokens/roles" in found["rows"][1]) == ("DamagedStore", True)
    assert "tokens/roles/c/0" in found["verify"][1]


def with_crc(raw):
    return raw + struct.pack("<I", google_crc32c.value(raw))


SHARD_INDICES = {
    "beyond the file": [(2**40, 100)],
    "a chunk without end": [(0, 2**62)],
    "around the end of numbers": [(2**64 - 8, 16)],
    "into the index": [(10, 200)],
    "a chunk of nothing": [(0, 0)],
    "a chunk of a checksum": [(0, 4)],
    "overlapping the header": [(4, 60)],
}


@pytest.mark.parametrize("entries", SHARD_INDICES.values(), ids=SHARD_INDICES)
def test_the_index_of_a_shard_that_lies(liar, workers, entries):
    file = liar.zarr / "features" / "c" / "0" / "0"
    codec = ObjectCodec.of(open_store(liar.path).array("features"))
    chunks = codec.rows // codec.chunk_rows
    index = np.full((chunks, 2), 2**64 - 1, "<u8")
    index[: len(entries)] = entries
    file.write_bytes(file.read_bytes()[: -16 * chunks - 4] + with_crc(index.tobytes()))
    refused(workers, liar, "DamagedStore", "unit 0 of 'features'")


def test_headers_of_compressed_chunks_that_lie(liar, workers, tmp_path):
    """Every field of Blosc's header, with matching checksums: no crash and no other values."""
    file = liar.zarr / "tokens" / "roles" / "c" / "0"
    sound, moments = file.read_bytes()[:-4], random.Random(0)
    right = judged(workers, liar)["rows"]
    interesting = (0, 1, 2, 15, 16, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, len(sound) - 1, len(sound) + 1)
    lies = [sound[:at] + bytes([value]) + sound[at + 1 :] for at in range(4) for value in (0, 1, 7, 0x93, 255)]
    lies += [
        sound[:at] + struct.pack("<I", value) + sound[at + 4 :] for at in (4, 8, 12, 16, 20) for value in interesting
    ]
    for _ in range(100):
        lie = bytearray(sound)
        for _ in range(moments.randint(1, 4)):
            lie[moments.randrange(len(lie))] = moments.randrange(256)
        lies.append(bytes(lie))
    told = workers.run("read_chunks", liar.path, [with_crc(lie).hex() for lie in lies], memory=MEMORY, seconds=SECONDS)
    assert (told.code, told.message) == (0, "")
    assert told.peak < 512 << 20
    assert {error for error, _ in told.result} <= {"", "DamagedStore"}
    assert sum(error == "DamagedStore" for error, _ in told.result) > 40
    assert right[0] == ""
