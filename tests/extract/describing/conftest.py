"""A model that reads images, and images for it to describe."""

import pytest

from tests.extract.small_sets import write_set
from tests.extract.tiny_models import roomy, write_vision_checkpoint


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    return roomy(write_vision_checkpoint(tmp_path_factory.mktemp("vision")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), 10, images=True)
