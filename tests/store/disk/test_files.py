"""Hashes of files, which are read in blocks."""

import hashlib

import pytest

from agiqa.store.disk import files


@pytest.mark.parametrize("size", [0, 1, files._BLOCK - 1, files._BLOCK, files._BLOCK + 1])
def test_hashes_of_files_are_those_of_their_bytes(size, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(251)) * (size // 251) + b"z" * (size % 251))
    assert files.sha256_of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
