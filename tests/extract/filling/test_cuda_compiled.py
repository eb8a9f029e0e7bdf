"""Stores that are filled with compiled layers on GPUs."""

from functools import partial

import numpy as np
import pytest
import torch

from agiqa.bench.measurements.extract import made_up_data
from agiqa.bench.measurements.random_models import SHAPES
from agiqa.extract import ExtractionSettings, run_extraction

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns of its own code
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    opener = partial(SHAPES["tiny"], folder / "model")
    backbone = opener(device="cuda")
    return opener, backbone, made_up_data(folder / "images", backbone, items=40, tokens=480, pixels=112)


@pytest.mark.parametrize("devices", [1, 2])
def test_compiled_layers_fill_the_rows_of_plain_ones(work, tmp_path, devices):
    if devices > torch.cuda.device_count():
        pytest.skip("fewer CUDA devices than the fill is for")
    opener, backbone, data = work

    def rows(choice):
        settings = ExtractionSettings(compile=choice, devices=devices, device="cuda")
        store = run_extraction(data, backbone, tmp_path / f"{choice}.agiqa", settings, opener=opener).store
        assert store.provenance.get("compiled", False) is (choice == "always")
        return store.read(list(range(40))).float32()

    plain, compiled = rows("never"), rows("always")
    assert np.linalg.norm(plain - compiled) <= 0.02 * np.linalg.norm(plain)


def test_a_short_job_is_not_compiled_by_itself(work, tmp_path):
    opener, backbone, data = work
    store = run_extraction(data, backbone, tmp_path / "s.agiqa", ExtractionSettings(), opener=opener).store
    assert "compiled" not in store.provenance
