"""The training loop on tiny pictures: what it learns, the choice of the epoch, schedules, and going on from a state."""

import math

import numpy as np
import pytest
import torch

from agiqa.bench.networks.building import random_network
from agiqa.bench.networks.config import network_config
from agiqa.bench.networks.fitting import Task, Trainer, lr_factor
from agiqa.errors import HeadError
from agiqa.heads.evaluation.metrics import score

CPU = torch.device("cpu")
COUNT = 80


def config(**changes):
    usual = {
        "image_size": 32,
        "resize": 36,
        "epochs": 3,
        "batch_size": 16,
        "lr": 1e-3,
        "new_lr_factor": 1,
        "weights": "none",
    }
    return network_config("test_resnet", {**usual, **changes})


@pytest.fixture(scope="module")
def pictures():
    """Noise around a grey level, and MOS that follow this level."""
    random = np.random.default_rng(0)
    level = random.uniform(40, 215, COUNT)
    noise = random.normal(0, 20, (COUNT, 36, 36, 3))
    return np.clip(level[:, None, None, None] + noise, 0, 255).astype(np.uint8), level / 50


def trainer(pictures, settings, *, validation=32, seed=0):
    squares, mos = pictures
    torch.manual_seed(seed)
    task = Task(train=np.arange(validation, COUNT), validation=np.arange(validation), mos=mos, seed=seed)
    return Trainer(random_network(settings), squares, settings, task, device=CPU)


def run(one, epochs):
    return [one.train_epoch(lambda: None) for _ in range(epochs)]


def test_it_learns_and_keeps_the_epoch_of_the_best_validation_srcc(pictures):
    one = trainer(pictures, config(epochs=4))
    epochs = run(one, 4)
    scores = [epoch.validation_srcc for epoch in epochs]
    assert max(scores) > 0.8
    assert epochs[-1].train_loss < epochs[0].train_loss
    outcome = one.outcome
    assert (outcome.epoch, outcome.choice) == (int(np.argmax(scores)) + 1, "highest validation SRCC")
    one.load_best()
    again = one.predict(np.arange(32))
    np.testing.assert_allclose(again, outcome.validation_predictions[:, 0], rtol=1e-6)
    assert score(again, pictures[1][:32])["srcc"] == max(scores)
    assert abs(again.mean() - pictures[1].mean()) < 1.5  # on the scale of the MOS


def test_with_few_validation_items_the_last_epoch_is_kept(pictures):
    one = trainer(pictures, config(), validation=8)
    run(one, 3)
    assert one.outcome.epoch == 3
    assert one.outcome.choice == "last epoch, as 8 validation items are too few to choose by"
    none = trainer(pictures, config(epochs=1), validation=0)
    (epoch,) = run(none, 1)
    assert epoch.validation_srcc is None
    assert none.outcome.choice == "last epoch, as there are no validation items"


def test_a_state_goes_on_to_the_same_numbers(pictures, tmp_path):
    settings = config(alone_epochs=1)
    whole = trainer(pictures, settings)
    run(whole, 4)
    first = trainer(pictures, settings)
    run(first, 2)
    torch.save(first.state(), tmp_path / "state")
    second = trainer(pictures, settings, seed=0)
    second.restore(torch.load(tmp_path / "state", weights_only=True))
    run(second, 2)
    for one, other in zip(whole.outcome.curves, second.outcome.curves, strict=True):
        assert {**one.row(), "seconds": 0} == {**other.row(), "seconds": 0}
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[key])


def test_another_seed_gives_other_numbers(pictures):
    losses = {run(trainer(pictures, config(), seed=seed), 1)[0].train_loss for seed in (0, 0, 1)}
    assert len(losses) == 2


def test_new_layers_are_trained_alone_first(pictures):
    one = trainer(pictures, config(alone_epochs=1, alone_lr=1e-2, epochs=1))
    body, new = one.network.body, one.network.new_layers[0]
    before = [{key: value.clone() for key, value in part.state_dict().items()} for part in (body, new)]
    first, _ = run(one, 1), None
    assert first[0].lr == 1e-2
    assert all(torch.equal(value, before[0][key]) for key, value in body.state_dict().items())  # statistics too
    assert not torch.equal(new[0].weight, before[1]["0.weight"])
    run(one, 1)
    assert not torch.equal(body.state_dict()["conv1.0.weight"], before[0]["conv1.0.weight"])


def test_predictions_are_means_over_the_crops(pictures):
    settings = config(test_crops=9)
    one = trainer(pictures, settings)
    squares, _ = pictures
    crops = [squares[:2, top : top + 32, left : left + 32] for top in (0, 2, 4) for left in (0, 2, 4)]
    mean, std = (torch.tensor(values)[:, None, None] for values in (one.network.mean, one.network.std))
    one.network.eval()
    with torch.no_grad():
        scores = [one.network((torch.from_numpy(crop).permute(0, 3, 1, 2) / 255 - mean) / std) for crop in crops]
    train = pictures[1][32:]
    wanted = torch.stack(scores).mean(0).double().numpy() * train.std() + train.mean()
    np.testing.assert_allclose(one.predict(np.arange(2)), wanted, rtol=1e-5)


def test_a_training_that_diverges_is_told(pictures):
    one = trainer(pictures, config(lr=1e20, optimizer="adamw", warmup=0.0, schedule="constant"))
    with pytest.raises(HeadError, match=r"Training of test_resnet diverged: the loss of epoch \d is (nan|inf)"):
        run(one, 3)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", lambda epoch, _: 1.0),
        ("steps", lambda epoch, _: 0.5 ** ((epoch - 1) // 2)),
        ("cosine", lambda epoch, step: 0.5 * (1 + math.cos(math.pi * ((epoch - 1) * 10 + step) / 60))),
    ],
)
def test_schedules(schedule, wanted):
    settings = config(schedule=schedule, epochs=6, decay=0.5, decay_epochs=2, warmup=0.0)
    for epoch in range(1, 7):
        for step in range(10):
            assert lr_factor(epoch, step, 10, settings) == pytest.approx(wanted(epoch, step))


def test_the_learning_rate_rises_at_first():
    settings = config(epochs=10, warmup=0.2)
    rising = [lr_factor(1 + step // 10, step % 10, 10, settings) for step in range(20)]
    assert rising == sorted(rising)
    assert rising[0] < 0.1 < rising[-1] <= 1.0
    assert lr_factor(3, 0, 10, settings) == 1.0
