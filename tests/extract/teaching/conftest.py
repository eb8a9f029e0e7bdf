"""Servers and data sets that the tests of teaching share. A test file may have a `server` of its own."""

import pytest

from tests.extract.small_sets import write_set
from tests.extract.teaching.batch_runs import Taught
from tests.extract.teaching.runs import make_data
from tests.extract.teaching.wire_formats import PROVIDERS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("set"))


@pytest.fixture(params=PROVIDERS)
def server(request):
    with PROVIDERS[request.param]() as running:
        yield running


@pytest.fixture
def openai():
    with PROVIDERS["openai"]() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), 8, images=True)


@pytest.fixture
def taught(server, folder, tmp_path):
    """For a `server` of batches."""
    return Taught(server, folder, tmp_path / "teacher.jsonl")
