"""Closed forms, and networks that learn their residual, on a CUDA device against the CPU."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from agiqa.heads import HeadConfig, TrainConfig, load_run, stack_runs, train_head
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.training.closed_base import fit_base
from tests.heads.label_stores import BOTH, with_correspondence

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, which these fits run on"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch.compile looks at it
]
GRU = HeadConfig(projection="sketch", encoder="gru", width=16, init="ridge", strength=10.0)
TRANSFORMER = GRU.model_copy(update={"encoder": "transformer", "dropout": 0.0, "num_heads": 2, "layers": 2})
QUICK = TrainConfig(split="grouped", epochs=3, lr=1e-2, validation=0.3, batch_size=16)
FORMS = {
    "ridge": {"pooling": "mean@question+mean@answer"},
    "krr": {"pooling": "mean@answer"},
    "linear krr": {"encoder": "krr", "kernel": "linear"},
    "tfidf": {},
    "stack": {},
}


@pytest.fixture
def store(make_store):
    """90 items of 30 prompts with two labels, token ids, and an answer behind a question of one token or more."""
    made = with_correspondence(make_store(90, prompts=30, width=5))
    random, lengths = np.random.default_rng(3), [len(rows) for rows in made.features]
    roles = [np.array([2] * (length - 3) + [3] * 3, np.uint8) for length in lengths]
    ids = [random.integers(0, 9, size=length).astype(np.int32) for length in lengths]
    return replace(made, roles=roles, ids=ids)


def trained(store, path, head, *, device, **changes):
    return train_head(store, path, head=head, train=QUICK.model_copy(update={"device": device, **changes}))


def both(store, folder, head, **changes):
    """The run of a head on the CPU, and that on the GPU."""
    return [
        trained(store, folder / name, head, device=device, **changes)
        for name, device in (("one", "cpu"), ("two", DEVICE))
    ]


def scores(run, part):
    return [row["predicted"] for row in run.predictions if row["split"] == part]


@pytest.mark.parametrize("name", FORMS)
def test_a_closed_form_is_that_of_the_cpu(store, tmp_path, name):
    """All is float64, so that the devices also choose the same settings."""
    head = HeadConfig(**{"encoder": name, **FORMS[name]})
    cpu, gpu = both(store, tmp_path, head, label=BOTH, calibrate=True, validation=0.5)
    one, other = cpu.predict(store), gpu.predict(store)
    assert other == pytest.approx(one, rel=1e-5, abs=1e-5)
    for mine, theirs in zip(gpu.config["closed"]["fits"], cpu.config["closed"]["fits"], strict=True):
        assert {key: mine.get(key) for key in ("strength", "width")} == {
            key: theirs.get(key) for key in ("strength", "width")
        }
    again = load_run(gpu.path)  # what one device wrote, each device reads
    for device in ("cpu", DEVICE):
        assert again.predict(store, device=device) == pytest.approx(one, rel=1e-5, abs=1e-5)


def test_offsets_of_a_base_are_those_of_the_cpu_and_are_read_on_the_device(make_store):
    store = make_store(60, prompts=20)
    offsets = {}
    for name in ("cpu", DEVICE):
        device = torch.device(name)
        features = FeatureSet.from_store(store, range(60), device=device)
        train, validation = (
            LabelledItems.at(features, np.array(places), "quality") for places in (range(40), range(45, 55))
        )
        base = fit_base(features, GRU, QUICK, train=train, validation=validation, device=device)
        places = torch.tensor([3, 50, 0], device=device)
        read = base.at(places)
        assert (read.device.type, read.dtype) == (name, torch.float32)
        torch.testing.assert_close(read.cpu(), base.offsets[places.cpu()].float())
        offsets[name] = base.offsets
    torch.testing.assert_close(offsets[DEVICE], offsets["cpu"], rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("form", ["ridge", "krr"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_a_network_that_learns_nothing_leaves_the_closed_form(make_store, tmp_path, form, graphs):
    store = make_store(150, prompts=60)
    head = GRU.model_copy(update={"init": form, "strength": 0.5, "init_pooling": "mean"})
    run = trained(store, tmp_path / "init", head, device=DEVICE, lr=1e-12, cuda_graphs=graphs)
    closed = HeadConfig(encoder=form, strength=0.5, pooling="mean")
    alone = trained(store, tmp_path / "alone", closed, device="cpu")
    assert scores(run, "validation") == pytest.approx(scores(alone, "validation"), abs=1e-5)
    assert run.metrics["chosen_epoch"] == 0


def residual_on(store, path, device, changes):
    """The test predictions of a residual that was learned, the epoch and the kernels."""
    run = trained(store, path, TRANSFORMER, device=device, epochs=6, **changes)
    return scores(run, "test"), run.metrics["chosen_epoch"], run.config["kernels"]


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [
        ({}, ("CUDA graphs",)),
        ({"cuda_graphs": False}, ()),
        ({"compile": True, "cuda_graphs": False}, ("torch.compile",)),
        ({"compile": True}, ("torch.compile", "CUDA graphs")),
    ],
    ids=["graphs", "plain", "compiled", "compiled and graphs"],
)
def test_a_residual_is_learned_as_on_the_cpu(make_store, tmp_path, changes, kernels):
    store = make_store(150, prompts=60)
    expected, epoch, _ = residual_on(store, tmp_path / "cpu", "cpu", {})
    ridge = trained(store, tmp_path / "ridge", HeadConfig(encoder="ridge", strength=10.0), device="cpu")
    # torch.compile cannot look through the shape checks that tests put on heads, so it runs where they are not.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found, chosen, used = pool.submit(residual_on, store, tmp_path / "gpu", DEVICE, changes).result()
    assert all(kernel in used for kernel in kernels)
    assert epoch > 0
    assert chosen > 0
    learned = np.array(expected) - scores(ridge, "test")
    assert np.linalg.norm(np.subtract(found, expected)) <= 0.1 * np.linalg.norm(learned)


def test_a_stack_of_runs_of_both_devices_is_read_on_each(make_store, tmp_path):
    store = make_store(150, prompts=60)
    runs = [
        trained(store, tmp_path / "init", GRU, device=DEVICE),
        trained(store, tmp_path / "ridge", HeadConfig(encoder="ridge"), device="cpu"),
    ]
    stack = stack_runs(runs, tmp_path / "stack", store)
    one, other = (stack.predict(store, device=device) for device in ("cpu", DEVICE))
    assert other == pytest.approx(one, rel=1e-4, abs=1e-4)
