"""The contents of a store and of an HDF5 file, for comparison."""

import h5py
import numpy as np
import zarr

from agiqa.store import verify


def arrays_of(store):
    return {name: node for name, node in store.group.members(max_depth=None) if isinstance(node, zarr.Array)}


def assert_same_store(found, expected):
    assert found.id == expected.id
    assert found.provenance == expected.provenance
    assert found.items.same_as(expected.items)
    here, there = arrays_of(found), arrays_of(expected)
    assert sorted(here) == sorted(there)
    for name, array in there.items():
        assert here[name].dtype == array.dtype
        np.testing.assert_array_equal(here[name][...], array[...], err_msg=name)
        assert dict(here[name].attrs) == dict(array.attrs)
    assert verify(found, "numeric").sound


def content_of(path):
    """All that an HDF5 file says: values by name, and attributes by name."""
    with h5py.File(path) as file:
        values, attributes = {}, {"": dict(file.attrs)}

        def visit(name, node):
            attributes[name] = dict(node.attrs)
            if isinstance(node, h5py.Dataset):
                values[name] = node[...].tobytes(), node.shape, node.dtype.str, node.chunks

        file.visititems(visit)
    return values, attributes
