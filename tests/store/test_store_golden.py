"""Stores of every version that was released are read for ever, by agiqa and by a reader made from FORMAT.md alone."""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from agiqa.store import open_store, verify, view
from tests.store import golden

ARCHIVES = sorted(golden.FOLDER.glob("*.tar.gz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.gz"))
def unpacked(request, tmp_path) -> tuple[str, Path]:
    with tarfile.open(request.param) as file:
        file.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    return folder.stem, folder


class SecondReader:
    """What FORMAT.md says, with zarr, pyarrow and nothing of agiqa."""

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "MANIFEST.json").read_text())
        for entry in [*self.manifest["objects"], self.manifest["labels"]]:
            raw = (folder / entry["path"]).read_bytes()
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (entry["bytes"], entry["sha256"])
        self.group = zarr.open_group(folder / "store.zarr", mode="r")
        self.attributes = dict(self.group.attrs)
        self.table = pq.read_table(folder / "items.parquet").to_pylist()

    def rows(self, item: int, array: str = "features") -> np.ndarray:
        start, count = (int(self.group[f"index/{name}"][item]) for name in ("row_start", "n_tokens"))
        unit = int(self.group["index/unit"][item])
        assert unit * self.attributes["unit_rows"] <= start
        assert start + count <= (unit + 1) * self.attributes["unit_rows"]
        return np.asarray(self.group[array][start : start + count])

    def floats(self, values: np.ndarray) -> np.ndarray:
        if self.attributes["logical_dtype"] == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def logits(self, item: int) -> np.ndarray:
        rows, encoding = self.rows(item), self.attributes["encoding"]
        if encoding == "logits":
            return self.floats(rows)
        if encoding == "sketch":
            return self.floats(rows) @ np.asarray(self.group["basis/q"][...]).T
        if encoding == "int8":
            scale = self.rows(item, "tokens/scale")[:, None] * np.asarray(self.group["scale/rms"][...])
            rows = rows * scale + np.asarray(self.group["scale/mean"][...])
        else:
            rows = self.floats(rows)
        return rows @ np.asarray(self.group["lm_head/weight"][...]).T


def test_there_is_a_golden_store_of_every_kind():
    assert {path.name for path in ARCHIVES} >= {f"v1-{kind}.tar.gz" for kind in golden.KINDS}


def test_agiqa_reads_it(unpacked):
    kind, folder = unpacked
    store = open_store(folder)
    assert verify(store, "numeric").sound
    assert store.items.same_as(golden.items())
    assert store.status.tolist() == [0, 1, 0, 0, 0]
    for item in range(5):
        np.testing.assert_array_equal(store.read([item]).roles, golden.roles(item))
        explicit = golden.hidden_of(item) @ golden.lm_head().T
        if kind == "sketch":
            coordinates = view(store, "sketch").item(item)
            np.testing.assert_allclose(coordinates, explicit @ store.basis().q, atol=1e-2)
            continue
        close = {"hidden": 1e-5, "int8": 0.03}.get(kind, 2**-7 * np.abs(explicit).max(initial=1.0))
        np.testing.assert_allclose(view(store, "logits").item(item), explicit, atol=close)


def test_a_reader_made_from_the_specification_agrees(unpacked):
    kind, folder = unpacked
    other, store = SecondReader(folder), open_store(folder)
    assert [row["name"] for row in other.table] == golden.items().names
    assert [row["mos_quality"] for row in other.table] == [1.5, 2.0, None, 4.25, 5.0]
    canonical = json.dumps(other.attributes["provenance"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert other.attributes["id"] == hashlib.sha256(canonical.encode()).hexdigest() == other.manifest["id"]
    for item in range(5):
        np.testing.assert_array_equal(other.rows(item, "tokens/ids"), golden.token_ids(item))
        np.testing.assert_array_equal(other.rows(item, "tokens/roles"), golden.roles(item))
        if kind != "sketch":
            np.testing.assert_allclose(other.logits(item), view(store, "logits").item(item), atol=2e-2)
        if kind == "kept-logits":
            np.testing.assert_array_equal(other.floats(other.rows(item, "logits")), view(store, "logits").item(item))


@pytest.mark.parametrize("kind", golden.KINDS)
def test_todays_stores_have_the_layout_of_the_golden_ones(kind, tmp_path):
    made = golden.write(kind, tmp_path / f"{kind}.agiqa").path
    with tarfile.open(golden.FOLDER / f"v1-{kind}.tar.gz") as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    assert {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()} == names
