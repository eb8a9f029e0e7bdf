"""Vision towers, projectors and image encoders of timm on a GPU, against the same on the CPU in float32."""

from functools import partial

import numpy as np
import pytest
import torch

from agiqa.extract import ExtractionSettings, load_data_set, open_backbone, run_extraction
from agiqa.extract.models.checks import relative_error
from agiqa.store import verify
from tests.extract import tiny_vision_models
from tests.extract.small_sets import write_set
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import write_vision_checkpoint
from tests.extract.tiny_timm import needs_timm, write_pictures, write_weights

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("exact_convolutions"),
]
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
ITEMS = 12
FAMILIES = {
    "llava": write_vision_checkpoint,
    "qwen25": tiny_vision_models.write_qwen25,
    "internvl": tiny_vision_models.write_internvl,
    "minicpm": write_minicpm_checkpoint,
}
TAPS = {"vision": ("1", "2", "last"), "vision:1": ("last",), "projector": ("last",)}
"""Layers by tap: the towers have two blocks."""
SIDES = {"test_vit": None, "resnet10t": 64, "efficientnet_lite0": 64, "test_convnext": 64}
"""Image sizes by encoder: one with a class token, and convolutional networks."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 4)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("sets") / "pictured", ITEMS, images=True)
    return load_data_set(folder, variant="no_id", images=True)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return str(FAMILIES[request.param](folder) or folder)


@pytest.fixture(scope="module", params=SIDES)
def encoder(request, tmp_path_factory):
    """What opens an encoder of timm."""
    weights = write_weights(tmp_path_factory.mktemp("timm"), request.param)
    return partial(open_backbone, f"timm:{request.param}", weights=weights, image_size=SIDES[request.param])


def compare(opener, pictures, layers, dtype):
    """Compare the states of all pictures, in one batch and alone."""
    exact, backbone = opener(device="cpu", dtype="float32"), opener(device=DEVICE, dtype=dtype)
    batch = [exact.prepare((), picture) for picture in pictures]
    expected = exact.layer_states(batch, layers)
    (alone,) = backbone.layer_states(batch[1:2], layers)
    together = backbone.layer_states(batch, layers)
    for found, wanted in zip([*together, alone], [*expected, expected[1]], strict=True):
        assert list(found) == list(layers)
        for layer, states in found.items():
            assert (states.device.type, str(states.dtype)) == (DEVICE, f"torch.{dtype}")
            assert relative_error(states.cpu(), wanted[layer]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tap", TAPS)
def test_taps_are_those_of_the_cpu(checkpoint, tap, dtype, pictures):
    compare(partial(open_backbone, checkpoint, tap=tap), pictures, TAPS[tap], dtype)


@needs_timm
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layers_of_timm_are_those_of_the_cpu(encoder, dtype, pictures):
    count = encoder(device="cpu").layer_count
    compare(encoder, pictures, ("1", str(count - 1), "last"), dtype)


@needs_timm
def test_blocks_of_timm_are_those_of_the_cpu(encoder, pictures):
    if encoder.args == ("timm:test_vit",):
        pytest.skip("its layers are its blocks")
    compare(partial(encoder, tap="blocks"), pictures, ("2", "4", "last"), "float32")


def stores_agree(opener, data_set, layers, tmp_path, **settings):
    """Fill a store on each device, and compare their rows."""
    stores = []
    for device in ("cpu", DEVICE):
        chosen = ExtractionSettings(variant="no_id", layers=layers, batch_size=5, device=device, **settings)
        path = tmp_path / f"{len(stores)}.agiqa"
        backbone = opener(device=device, dtype="float32")
        stores.append(run_extraction(data_set, backbone, path, chosen, opener=partial(opener, dtype="float32")).store)
    expected, found = stores
    assert verify(found, "numeric").sound
    assert found.layers == expected.layers
    for layer in found.layers:
        one, other = (store.layer(layer).read(range(ITEMS)).float32() for store in (found, expected))
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other)


@pytest.mark.parametrize("tap", ["vision", "projector"])
def test_a_store_of_a_tap_has_the_rows_of_the_cpu(checkpoint, tap, pictured, tmp_path):
    stores_agree(partial(open_backbone, checkpoint, tap=tap), pictured, TAPS[tap], tmp_path)


@needs_timm
def test_a_store_of_an_encoder_has_the_rows_of_the_cpu(encoder, pictured, tmp_path):
    stores_agree(encoder, pictured, ("1", "last"), tmp_path, pool_tokens="mean,max")
