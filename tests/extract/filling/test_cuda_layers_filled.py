"""Layers and pooled rows that a GPU computes for a store, against transformers and NumPy on the CPU in float32."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agiqa.extract import ExtractionSettings, LengthRule, load_data_set, open_backbone, run_extraction
from agiqa.extract.filling.plan import tokenise
from agiqa.extract.filling.pooling import parse_poolings, pooled
from agiqa.extract.models.loading import quiet_transformers
from agiqa.store import verify
from tests.extract.filling.test_layers import pool
from tests.extract.filling.test_pooling import ROLES, expected
from tests.extract.small_sets import write_set, write_talks
from tests.extract.tiny_models import write_deep_checkpoint

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns of its own code
]
ITEMS = 12
LAYERS = ("0", "2", "last")
POOLED = ("mean@answer", "max@question", "mean", "first", "last")
NAMES = [f"{method}{role}" for method in ("mean", "max", "first", "last") for role in ("", "@image", "@special")]
"""Poolings of tokens that follow each other, and of some that do not."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_pooled_on_the_device_are_those_of_numpy(dtype):
    random = torch.Generator().manual_seed(0)
    states = {
        layer: torch.randn(len(ROLES), width, generator=random) for layer, width in (("2", 6), ("4", 6), ("8", 3))
    }
    there = {layer: rows.to(DEVICE, dtype) for layer, rows in states.items()}
    found = pooled(parse_poolings(",".join(NAMES)), there, dict.fromkeys(states, ROLES))
    for layer, given in there.items():
        assert (found[layer].device.type, found[layer].dtype) == (DEVICE, dtype)
        wide = given.double().cpu().numpy()
        wanted = torch.from_numpy(np.stack([expected(name, wide) for name in NAMES])).to(dtype)
        tolerance = 1e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(found[layer].cpu(), wanted, rtol=tolerance, atol=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_deep_checkpoint(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("sets") / "texts", ITEMS)
    write_talks(folder)
    return load_data_set(folder, conversations=[str(folder / "talks.json")], images=False)


@pytest.fixture(scope="module")
def own(checkpoint, texts):
    """By transformers alone, on the CPU: for each item its roles and, by layer, its states (tokens, D)."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    found = []
    for one in tokenise(texts, open_backbone(str(checkpoint), device="cpu"), LengthRule()).tokenised:
        ids = torch.from_numpy(one.token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True).hidden_states
        names = [*map(str, range(len(states) - 1)), "last"]
        found.append((one.roles, {name: rows[0].numpy() for name, rows in zip(names, states, strict=True)}))
    return found


@pytest.mark.parametrize("compiling", ["never", "always"])
@pytest.mark.parametrize("poolings", [(), POOLED], ids=["tokens", "pooled"])
def test_a_store_has_the_rows_of_transformers_and_numpy(compiling, poolings, checkpoint, texts, own, tmp_path):
    settings = ExtractionSettings(layers=LAYERS, pool_tokens=poolings, compile=compiling, batch_size=5, device=DEVICE)
    opener = partial(open_backbone, str(checkpoint), dtype="float32")
    store = run_extraction(texts, opener(device=DEVICE), tmp_path / "s.agiqa", settings, opener=opener).store
    assert store.provenance.get("compiled", False) is (compiling == "always")
    assert verify(store, "numeric").sound
    for position, (roles, states) in enumerate(own):
        for layer in LAYERS:
            rows = states[layer].astype(np.float64)
            wanted = np.stack([pool(name, roles, rows) for name in poolings]) if poolings else rows
            found = store.layer(layer).read([position]).float32()
            assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)
