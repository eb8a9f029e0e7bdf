"""A small set of pictures whose brightness is their MOS, loaded as a command loads it."""

import pytest

from agiqa.bench.networks.images import ImageSource
from agiqa.extract import load_data_set
from tests.extract.small_sets import write_set


@pytest.fixture(scope="session")
def pictured(tmp_path_factory):
    """24 pictures of 40 x 32 pixels; every fourth is in the split test."""
    return write_set(tmp_path_factory.mktemp("pictured") / "set", 24, images=True)


@pytest.fixture(scope="session")
def source(pictured):
    data_set = load_data_set(pictured, variant="no_id", images=True)
    return ImageSource(data_set=data_set, location=str(pictured))
