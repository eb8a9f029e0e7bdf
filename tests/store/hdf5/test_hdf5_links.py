"""HDF5 files that lead elsewhere, into other files or datasets, and files that are locked or may not be read."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import pytest

from agiqa.errors import BusyStore, SchemaError
from agiqa.store.hdf5.files import METADATA_SHA256, metadata_sha256
from agiqa.store.hdf5.importing import import_hdf5
from tests.store.workers import Workers

SECRET = b"what this user may read and the sender of the file may not"


def again(file, name, make):
    """Replace the dataset `name` by what `make(values)` creates there, with the same attributes."""
    values, attributes = file[name][...], dict(file[name].attrs)
    del file[name]
    make(values)
    for key, value in attributes.items():
        file[name].attrs[key] = value
    file.attrs[METADATA_SHA256] = metadata_sha256(file)


def external_storage(file, folder, name):
    local = folder / "secret"
    local.write_bytes(SECRET * 1000)

    def make(values):
        external = [(str(local), 0, values.nbytes)]
        file.create_dataset(name, shape=values.shape, dtype=values.dtype, external=external)

    again(file, name, make)


def external_link(file, folder, name):
    other = folder / "other.h5"

    def make(values):
        with h5py.File(other, "w") as beside:
            beside["data"] = values
        file[name] = h5py.ExternalLink(str(other), "data")

    again(file, name, make)


def soft_link(file, _folder, name):
    def make(values):
        file["elsewhere"] = values
        file[name] = h5py.SoftLink("/elsewhere")

    again(file, name, make)


def virtual(file, folder, name):
    other = folder / "other.h5"

    def make(values):
        with h5py.File(other, "w") as beside:
            beside["data"] = values
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[...] = h5py.VirtualSource(str(other), "data", shape=values.shape, dtype=values.dtype)
        file.create_virtual_dataset(name, layout)

    again(file, name, make)


WAYS = {
    "external storage": external_storage,
    "an external link": external_link,
    "a soft link": soft_link,
    "a virtual dataset": virtual,
}


@pytest.mark.parametrize("name", ["lm_head/weight", "items/prompt", "items/missing/generator", "index/n_tokens"])
@pytest.mark.parametrize("way", WAYS)
def test_what_leads_elsewhere_is_refused_by_name(copy, tmp_path, way, name):
    """No byte of another file is read: those of the link targets cannot be read at all."""
    with h5py.File(copy, "r+") as file:
        WAYS[way](file, tmp_path, name)
    for other in ("secret", "other.h5"):
        (tmp_path / other).unlink(missing_ok=True)
    with pytest.raises(SchemaError, match=f"'/{name}' is {way}|'/{name}' has {way}"):
        import_hdf5(copy, tmp_path / "again.agiqa")
    assert not (tmp_path / "again.agiqa").exists()


@pytest.mark.parametrize(
    "kind", [h5py.ExternalLink("other.h5", "/"), h5py.SoftLink("/items"), h5py.ExternalLink("/", "/")]
)
def test_groups_that_lead_elsewhere_are_refused_by_name(copy, tmp_path, kind):
    with h5py.File(copy, "r+") as file:
        del file["items"]
        file["items"] = kind
    with pytest.raises(SchemaError, match="'/items' is a"):
        import_hdf5(copy, tmp_path / "again.agiqa")


def test_a_locked_file_is_not_called_damaged(copy, tmp_path):
    """Another process has it open for writing, as an editor or a notebook does."""
    command = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", command, copy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(BusyStore, match=r"s\.h5 is locked: another program has it open for writing"):
            import_hdf5(copy, tmp_path / "again.agiqa")
        other.communicate("\n")
    assert len(import_hdf5(copy, tmp_path / "again.agiqa").items) == 3


def test_a_file_that_may_not_be_read_is_not_called_damaged(exported):
    if os.getuid():
        pytest.skip("becoming another user needs root")
    workers = Workers()
    with tempfile.TemporaryDirectory() as folder:  # which, unlike those of pytest, can be opened to others
        Path(folder).chmod(0o755)
        copy = Path(shutil.copy(exported, folder))
        copy.chmod(0)
        outcome = workers.run("import_file", copy, Path(folder, "again.agiqa"), user=65534)
    workers.close()
    assert (outcome.error, "Permission denied" in outcome.message) == ("PermissionError", True), outcome
