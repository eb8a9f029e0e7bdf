"""Image networks on a GPU, against the same on the CPU; and a whole run of `agiqa baseline`."""

import json
import math

import numpy as np
import pytest
import torch

from agiqa.bench.networks.building import random_network
from agiqa.bench.networks.config import network_config
from agiqa.bench.networks.fitting import Task, Trainer
from agiqa.bench.networks.networks import Wanted, run_networks
from agiqa.bench.networks.runs import Protocols
from agiqa.bench.networks.training import Setting
from agiqa.heads.training.progress import LineProgress
from tests.bench.networks.test_fitting import COUNT, config, run

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("exact_convolutions"),
]
OTHERS = ("vil_tiny", "hyperiqa", "dbcnn", "stairiqa", "test_vit")


@pytest.fixture(scope="module")
def pictures():
    """Noise around a grey level, and MOS that follow this level."""
    random = np.random.default_rng(0)
    level = random.uniform(40, 215, COUNT)
    noise = random.normal(0, 20, (COUNT, 36, 36, 3))
    return np.clip(level[:, None, None, None] + noise, 0, 255).astype(np.uint8), level / 50


def trainer(pictures, settings, device):
    squares, mos = pictures
    torch.manual_seed(0)
    task = Task(train=np.arange(32, COUNT), validation=np.arange(32), mos=mos, seed=0)
    return Trainer(random_network(settings), squares, settings, task, device=torch.device(device))


def small(name, **changes):
    usual = {"image_size": 32, "resize": 36, "batch_size": 16, "weights": "none", "lr": 1e-4, "alone_epochs": 0}
    return network_config(name, {**usual, **changes})


def test_it_learns_in_mixed_precision_and_a_state_goes_on(pictures, tmp_path):
    one = trainer(pictures, config(epochs=4), DEVICE)
    epochs = run(one, 4)
    assert max(epoch.validation_srcc for epoch in epochs) > 0.8
    assert epochs[-1].train_loss < epochs[0].train_loss
    torch.save(one.state(), tmp_path / "state")
    again = trainer(pictures, config(epochs=4), DEVICE)
    again.restore(torch.load(tmp_path / "state", weights_only=True, map_location="cpu"))
    one.load_best()
    again.load_best()
    for predicted in (one.predict(np.arange(32)), again.predict(np.arange(32))):
        np.testing.assert_allclose(predicted, one.outcome.validation_predictions[:, 0], rtol=1e-2)


def test_an_epoch_in_full_precision_is_that_of_the_cpu(pictures):
    settings = config(precision="fp32", lr=1e-4)
    cpu, gpu = (trainer(pictures, settings, device) for device in ("cpu", DEVICE))
    (expected,), (found,) = run(cpu, 1), run(gpu, 1)
    assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-3)
    np.testing.assert_allclose(gpu.predict(np.arange(32)), cpu.predict(np.arange(32)), rtol=1e-2)


@pytest.mark.parametrize("name", OTHERS)
def test_scores_are_those_of_the_cpu_and_each_network_is_trained(pictures, name):
    cpu, gpu = (trainer(pictures, small(name, precision="fp32"), device) for device in ("cpu", DEVICE))
    expected, found = (one.predict(np.arange(8)) for one in (cpu, gpu))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    mixed = trainer(pictures, small(name), DEVICE)
    (epoch,) = run(mixed, 1)
    assert math.isfinite(epoch.train_loss)
    assert not np.array_equal(mixed.predict(np.arange(8)), found)


def test_a_whole_run_on_the_gpu(source, tmp_path):
    settings = config(epochs=2, image_size=32, resize=36, batch_size=8)
    wanted = Wanted(networks=(settings,), protocols=Protocols(labels=["quality"], names=["published"], seeds=[0]))
    setting = Setting(source=source, device=torch.device(DEVICE), save_seconds=0.0, keep_weights=True)
    done = run_networks(wanted, tmp_path / "out", setting, LineProgress(lambda _line: None), workers=0)
    assert (done.failed, done.trained) == ({}, 1)
    folder = tmp_path / "out" / "runs" / done.runs[0]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test"]["srcc"] is not None
    assert json.loads((folder / "config.json").read_text())["device"] != "cpu"
    assert (folder / "network.safetensors").is_file()
