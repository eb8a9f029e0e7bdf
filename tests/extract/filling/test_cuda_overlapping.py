"""On a GPU: a model that a thread or other processes load while the store is planned fills it with the same bytes."""

import json
from functools import partial

import pytest
import torch

from agiqa.bench.measurements.extract import made_up_data
from agiqa.bench.measurements.random_models import SHAPES
from agiqa.extract import ExtractionSettings, run_extraction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ITEMS = 300


def objects_of(path):
    manifest = json.loads((path / "MANIFEST.json").read_text())
    return {entry["path"]: entry["sha256"] for entry in manifest["objects"]}


@pytest.mark.parametrize("devices", [1, 2])
def test_overlapped_loads_change_no_byte(devices, tmp_path):
    if devices > torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    opener = partial(SHAPES["tiny"], tmp_path / "model")
    backbone = opener(device="cuda")
    data = made_up_data(tmp_path / "images", backbone, items=ITEMS, tokens=200, pixels=112)
    settings = ExtractionSettings(encoding="hidden", batch_size=8, workers=2)
    backbone.load()
    first = run_extraction(data, backbone, tmp_path / "loaded.agiqa", settings, opener=opener).store
    again = ExtractionSettings(encoding="hidden", batch_size=8, workers=2, devices=devices)
    fresh = opener(device="cuda")
    second = run_extraction(data, fresh, tmp_path / "loading.agiqa", again, opener=opener).store
    assert objects_of(first.path) == objects_of(second.path)
