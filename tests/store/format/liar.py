"""Stores with false metadata and matching records, and the errors of readers with little memory and time."""

import hashlib
import json
import warnings
from contextlib import suppress

import numpy as np
import pyarrow.parquet as pq
import zarr

from agiqa.store import create_whole_array
from agiqa.store.disk.files import canonical_json, sha256_of_file

MEMORY, SECONDS = 2 << 30, 20


class Liar:
    """A sound store, and methods that falsify it and make its records match."""

    def __init__(self, path):
        self.path = path
        self.zarr = path / "store.zarr"
        self.manifest = path / "MANIFEST.json"

    def root(self, change):
        """Change the root metadata, which contain the attributes and the metadata of all arrays and groups."""
        self._rewrite(self.zarr / "zarr.json", change)

    def attributes(self, **changed):
        """Change root attributes, their copies in the provenance, and the id, which is its hash."""

        def change(metadata):
            attributes = metadata["attributes"]
            attributes.update(changed)
            shared = {name: value for name, value in changed.items() if name in attributes["provenance"]}
            attributes["provenance"].update(shared)
            attributes["id"] = hashlib.sha256(canonical_json(attributes["provenance"]).encode()).hexdigest()

        self.root(change)

    def array(self, name, change):
        """Change the metadata of the array `name`, in its own file and in the root metadata."""
        self.root(lambda metadata: change(metadata["consolidated_metadata"]["metadata"][name]))
        self._rewrite(self.zarr / name / "zarr.json", change)

    def shape(self, name, *shape, chunk=None):
        def change(metadata):
            metadata["shape"] = list(shape)
            if chunk is not None:
                metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = chunk

        self.array(name, change)

    def values(self, name, values):
        """Replace the array `name` by another."""
        group = zarr.open_group(self.zarr, mode="r+", use_consolidated=False)
        create_whole_array(group, name, values)
        with warnings.catch_warnings(action="ignore"):  # of Zarr, that consolidated metadata are young
            zarr.consolidate_metadata(self.zarr)

    def some(self, name, **changed):
        """Change some entries of an array of the index."""
        values = np.asarray(zarr.open_group(self.zarr, mode="r")[name][...])
        for position, value in changed.items():
            values[int(position.removeprefix("at"))] = value
        self.values(name, values)

    def items(self, change):
        table = pq.ParquetFile(self.path / "items.parquet").read()
        pq.write_table(change(table), self.path / "items.parquet")

    def listed(self, change):
        """Make MANIFEST.json match the files, then change it."""
        self.agree()
        self._rewrite(self.manifest, change)

    def agree(self):
        """Make MANIFEST.json match the files, except commit records."""
        manifest, root = json.loads(self.manifest.read_text()), self._metadata()
        files = sorted(file for file in self.zarr.rglob("*") if file.is_file())
        manifest["objects"] = [self._entry(file) for file in files]
        manifest["labels"] = self._entry(self.path / "items.parquet")
        with suppress(AttributeError, KeyError, TypeError):  # where the lie is that there is none
            manifest["id"] = root["attributes"]["id"]
        self.manifest.write_text(json.dumps(manifest))
        for record in (self.path / "commits").glob("*"):
            record.unlink()

    def _metadata(self):
        with suppress(RecursionError):
            return json.loads((self.zarr / "zarr.json").read_text())

    def _entry(self, file):
        size = file.stat().st_size
        sha256 = sha256_of_file(file) if size < 1 << 30 else "0" * 64
        return {"path": file.relative_to(self.path).as_posix(), "bytes": size, "sha256": sha256}

    def _rewrite(self, path, change):
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))


def judged(workers, liar, *, agree=True):
    """The result of each step of reading, in a process with little memory and little time."""
    if agree:
        liar.agree()
    outcome = workers.run("read_everything", liar.path, memory=MEMORY, seconds=SECONDS)
    assert (outcome.code, outcome.error, outcome.message) == (0, "", "")
    assert outcome.peak < 512 << 20
    return {name: (error, text) for name, (error, text) in outcome.result.items()}


def refused(workers, liar, error, says, *, agree=True):
    """Check that a step raised `error` with `says` in its message, and that every error is one of agiqa."""
    found = judged(workers, liar, agree=agree)
    failures = [step for step in found.values() if step[0]]
    assert any(name == error and says in text for name, text in failures), found
    assert {name for name, _ in failures} <= {"SchemaError", "DamagedStore", "StoreError", "DataError"}, found
