"""Fills that need a GPU: batches that really do not fit into its memory."""

import gc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from agiqa.bench.measurements.extract import made_up_data
from agiqa.bench.measurements.random_models import SHAPES
from agiqa.extract import ExtractionSettings, run_extraction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ITEMS = 1700
"""Enough for units of about a hundred."""


def test_a_batch_that_the_device_has_no_memory_for_runs_in_halves(tmp_path, capsys):
    """The rows are the same although the first passes fail."""
    opener = partial(SHAPES["tiny"], tmp_path / "model")
    backbone = opener(device="cuda")
    data = made_up_data(tmp_path / "images", backbone, items=ITEMS, tokens=200, pixels=112)
    settings = ExtractionSettings(encoding="hidden", batch_size=4096, workers=None)

    gc.collect()  # what other tests left on the device counts for neither run
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()

    def extracted(name, **changes):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        path = tmp_path / f"{name}.agiqa"
        result = run_extraction(data, backbone, path, replace(settings, **changes), opener=opener)
        assert result.fill is not None
        return result, torch.cuda.max_memory_reserved() - before

    _, little = extracted("alone", batch_size=1)
    free, much = extracted("free")
    assert much > 2 * little
    between = before + (little + much) / 2
    torch.cuda.set_per_process_memory_fraction(between / torch.cuda.get_device_properties(0).total_memory)
    try:
        tight, _ = extracted("tight")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tight.fill.batch_size < free.fill.batch_size
    assert "not enough memory for a batch of" in capsys.readouterr().err
    some = list(range(0, ITEMS, 17))
    whole, halves = (run.store.read(some).float32() for run in (free, tight))
    assert np.linalg.norm(whole - halves) <= 0.02 * np.linalg.norm(whole)
