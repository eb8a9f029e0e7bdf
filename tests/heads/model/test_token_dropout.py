"""Token dropout: what is left of an item, and that training pools values of the distribution that evaluation pools."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agiqa.heads import HeadConfig, TrainConfig, train_head
from agiqa.heads.model.head import build_head, drop_tokens
from agiqa.heads.model.pooling import POOLINGS, select_role
from agiqa.heads.model.projection import FeatureSpec
from agiqa.store.format.layout import TOKEN_ROLES

WIDTH = 4
ANSWER = TOKEN_ROLES["answer"]
SPEC = FeatureSpec(encoding="sketch", width=WIDTH, lm_head_sha256="", basis_id="a")
LINEAR = ["mean", "first", "last", "first-last-mean"]


def numbered(lengths, longest=None):
    """Items whose tokens are their own numbers, from 1; padding is 0."""
    mask = torch.arange(longest or max(lengths)) < torch.tensor(lengths)[:, None]
    steps = torch.arange(1.0, mask.shape[1] + 1)
    return (mask * steps)[..., None].expand(-1, -1, WIDTH).contiguous(), mask


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9, 0.99])
def test_what_is_left_keeps_its_order_and_the_padding_is_zero(share):
    torch.manual_seed(0)
    lengths = [1, 2, 3, 7, 20, 20]
    features, mask = numbered(lengths)
    none = torch.zeros((len(lengths), 0), dtype=torch.int64)
    shorter, remains, pooled = drop_tokens(features, mask, mask, none, share=share)
    left = [max(1, n - int(share * n)) for n in lengths]
    assert remains.sum(1).tolist() == left
    assert shorter.shape == (len(lengths), max(left), WIDTH)
    assert torch.equal(pooled, remains)
    for item, count in enumerate(left):
        numbers = shorter[item, :, 0]
        assert bool((numbers[:count].diff() > 0).all())
        assert 1 <= numbers[0] <= numbers[count - 1] <= lengths[item]
        assert not shorter[item, count:].any()
        assert remains[item, :count].all()


def test_the_length_follows_from_the_shape_alone():
    torch.manual_seed(0)
    none = torch.zeros((2, 0), dtype=torch.int64)
    for lengths in ([9, 8], [3, 1]):
        features, mask = numbered(lengths, longest=9)
        shorter, remains, _ = drop_tokens(features, mask, mask, none, share=0.5)
        assert shorter.shape[1] == remains.shape[1] == 5
        assert not shorter[~remains].any()


def test_every_token_of_an_item_is_as_likely_to_stay():
    torch.manual_seed(0)
    draws, length = 20_000, 5
    features, mask = numbered([length] * draws, longest=8)
    none = torch.zeros((draws, 0), dtype=torch.int64)
    shorter, _, _ = drop_tokens(features, mask, mask, none, share=0.5)
    counts = torch.bincount(shorter[..., 0].long().flatten(), minlength=length + 1)[1:]
    deviation = (draws * 0.6 * 0.4) ** 0.5
    assert (counts - 0.6 * draws).abs().max() < 5 * deviation


@pytest.mark.parametrize("name", list(POOLINGS))
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_pooled_token_and_those_read_by_their_place_stay(name, share):
    """One answer token among many others, or two: the pooling reads in training what it reads in evaluation."""
    torch.manual_seed(0)
    config = HeadConfig(projection="sketch", encoder="none", width=WIDTH, token_dropout=share)
    pooling = POOLINGS.get(name)(config, WIDTH)
    features, mask = numbered([12, 6, 2, 1] * 50)
    roles = torch.zeros(mask.shape, dtype=torch.uint8)
    roles[0::4, 3] = roles[1::4, 2] = roles[1::4, 5] = roles[2::4, 1] = roles[3::4, 0] = ANSWER
    pooled = select_role(mask, roles, "answer")
    shorter, remains, still = drop_tokens(features, mask, pooled, pooling.fixed_positions(pooled), share=share)
    assert bool(still.any(1).all())
    assert bool((still <= remains).all())
    if name in ("first", "last", "first-last-mean"):
        assert torch.equal(pooling(shorter, still), pooling(features, pooled))
    one = pooled.sum(1) == 1
    torch.testing.assert_close(pooling(shorter, still)[one], pooling(features, pooled)[one])


def pooled_in_both_modes(pooling, encoder, *, draws=3000):
    """What is pooled of 8 items of 10 to 24 tokens: the mean over draws in training, its error, and in evaluation."""
    torch.manual_seed(1)
    config = HeadConfig(projection="sketch", encoder=encoder, pooling=pooling, width=WIDTH, token_dropout=0.5)
    head = build_head(config, SPEC)
    for name, parameter in head.pooling.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        assert name == "query"
    caught = []
    head.pooling.register_forward_hook(lambda _module, _inputs, outputs: caught.append(outputs.double()))
    lengths = torch.arange(10, 26, 2)
    mask = torch.arange(24) < lengths[:, None]
    features = (torch.randn(8, 1, WIDTH) + 0.5 * torch.randn(8, 24, WIDTH)) * mask[..., None]
    roles = torch.randint(4, mask.shape).to(torch.uint8)
    roles[:, :4] = torch.arange(4, dtype=torch.uint8)
    with torch.no_grad():
        head.train()
        head(*(part.repeat_interleave(draws, 0) for part in (features, mask, roles)))
        head.eval()
        head(features, mask, roles)
    drawn = caught[0].unflatten(0, (8, draws))
    return drawn.mean(1), drawn.std(1) / draws**0.5, caught[1]


@pytest.mark.parametrize("role", ["", "@answer"])
@pytest.mark.parametrize("name", LINEAR)
def test_training_pools_in_the_mean_what_evaluation_pools(name, role):
    """Without an encoder a linear pooling is exact in expectation: within five standard errors of the draws."""
    trained, error, evaluated = pooled_in_both_modes(name + role, "none")
    assert bool(((trained - evaluated).abs() <= 5 * error + 1e-6).all())


@pytest.mark.parametrize("role", ["", "@answer"])
@pytest.mark.parametrize("name", list(POOLINGS))
@pytest.mark.parametrize("encoder", ["none", "gru"])
def test_training_pools_values_of_the_distribution_of_evaluation(name, role, encoder):
    """Spread and level of what is pooled; tokens set to zero halve the spread.

    A recurrent state has read half as much in training, and the maximum of half of the tokens is lower: these differ.
    """
    trained, _, evaluated = pooled_in_both_modes(name + role, encoder, draws=500)
    spread = evaluated.std(0)
    off = ((trained - evaluated) / spread).abs().mean()
    assert off < (0.4 if name == "max" else 0.3 if encoder == "gru" else 0.05)
    assert 0.75 < (trained.std(0).mean() / spread.mean()) < 1.2


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_head_trained_with_token_dropout_predicts_on_the_scale_of_the_labels(make_store, tmp_path, pooling):
    """Had tokens been set to zero and left in the mean, RMSE would be .18 and the slope of MOS on predictions .77."""
    store = make_store(300, published=True)
    random = np.random.default_rng(0)
    centres = random.normal(size=(300, WIDTH))
    features = [
        (centre + 0.1 * random.normal(size=rows.shape)).astype(np.float32)
        for centre, rows in zip(centres, store.features, strict=True)
    ]
    mos = np.array([2.5 + 0.6 * rows[:, 0].mean() for rows in features])
    store = replace(store, features=features, items=replace(store.items, labels={"quality": mos}))
    head = HeadConfig(
        projection="sketch", encoder="none", pooling=pooling, width=8, regressor_hidden=0, token_dropout=0.5
    )
    run = train_head(store, tmp_path / "run", head=head, train=TrainConfig(epochs=12, lr=1e-2))
    rows = np.genfromtxt(run.path / "predictions.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    predicted, truth = rows["predicted"], rows["mos"]
    slope = np.polyfit(predicted, truth, 1)[0]
    assert run.metrics["test"]["rmse"] < 0.04
    assert 0.95 < slope < 1.05
