"""Item tables with small sizes in the footer and pages that unpack to far more: refused before any page is unpacked."""

import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agiqa.errors import DamagedStore
from agiqa.store.format.items import read_items, write_items
from agiqa.store.format.parquet_pages import bytes_of_pages
from tests.store.conftest import make_content

LONG = 150_000_000


def varint(value, length=0):
    """A positive number as the compact protocol writes it, in at least `length` bytes."""
    left, found = value << 1, []
    while left or len(found) < length or not found:
        found.append(left & 127 | 128)
        left >>= 7
    return bytes([*found[:-1], found[-1] & 127])


def tell(path, old, new):
    """Replace the number `old` by `new`, in as many bytes, everywhere in the footer of the file at `path`."""
    raw = path.read_bytes()
    start = len(raw) - 8 - struct.unpack("<I", raw[-8:-4])[0]
    footer = raw[start:-8].replace(varint(old), varint(new, len(varint(old))))
    assert footer != raw[start:-8]
    path.write_bytes(raw[:start] + footer + raw[-8:])


def table_of(prompts):
    columns = {name: [f"{name} {row}" for row in range(len(prompts))] for name in ("name", "split", "generator")}
    return pa.table(
        {**columns, "prompt": pa.array(prompts), "description": pa.array([None] * len(prompts), pa.string())}
    )


def unpacked_by_footer(metadata):
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    return sum(group.column(column).total_uncompressed_size for group in groups for column in range(group.num_columns))


def refused_without_memory(path, says):
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(DamagedStore, match=says):
            read_items(path)
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 16 << 20


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_page_that_is_larger_than_the_footer_says(tmp_path, dictionary):
    path = tmp_path / "items.parquet"
    pq.write_table(table_of(["x" * LONG]), path, compression="zstd", use_dictionary=dictionary, write_statistics=False)
    prompt = pq.read_metadata(path).row_group(0).column(3)
    assert prompt.path_in_schema == "prompt"
    tell(path, prompt.total_uncompressed_size, 100)
    assert unpacked_by_footer(pq.read_metadata(path)) < 1000
    refused_without_memory(path, f"items.parquet holds {LONG // 1000}[0-9]{{3}} bytes")


def test_texts_that_are_told_by_the_one_before(tmp_path):
    """DELTA_BYTE_ARRAY stores only the new part of each text, so the size of the page says nothing about the texts."""
    path = tmp_path / "items.parquet"
    encodings = {"prompt": "DELTA_BYTE_ARRAY"}
    pq.write_table(table_of(["x" * 200_000] * 2_000), path, use_dictionary=False, column_encoding=encodings)
    refused_without_memory(path, r"cannot be read \(a page of prompt .* encodings \[7\]")


KINDS = [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"row_group_size": 7}, {"compression": "none"}]
KINDS += [{"write_page_checksum": True}, {"data_page_size": 100}, {"write_page_index": True}]


@pytest.mark.parametrize("kind", KINDS, ids=[str(*kind) for kind in KINDS])
def test_sound_pages_are_counted_to_the_byte(tmp_path, kind):
    """The footer counts headers too, which differ by what a header says; their own bytes are not unpacked."""
    items, path = make_content([1] * 50).items, tmp_path / "items.parquet"
    pq.write_table(items.table(), path, **{"compression": "zstd", **kind})
    metadata = pq.read_metadata(path)
    columns = metadata.num_row_groups * metadata.num_columns
    with path.open("rb") as file:
        headers = unpacked_by_footer(metadata) - bytes_of_pages(file, metadata)
    assert 10 * columns < headers
    assert read_items(path).same_as(items)


def test_headers_of_random_bytes_end_in_one_error(tmp_path):
    path, random = tmp_path / "items.parquet", np.random.default_rng(3)
    items = make_content([1] * 50).items
    write_items(path, items)
    raw, start = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0).dictionary_page_offset
    told: list[str] = []
    for _ in range(50):
        changed = bytearray(raw)
        changed[start + int(random.integers(0, 20))] = int(random.integers(0, 256))
        path.write_bytes(changed)
        try:
            read_items(path)
        except DamagedStore as error:
            told.append(str(error))
    assert len(told) > 25
    assert all(str(path) in message for message in told)
