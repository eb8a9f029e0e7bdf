"""`lstm` and `gru` with a norm before and a residual around each layer: values, their start, and runs from before."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from agiqa.heads import HeadConfig, TrainConfig, load_run, load_settings, predict, train_head
from agiqa.heads.evaluation.runs import complete_settings
from agiqa.heads.model.encoders import ENCODERS

LENGTHS = (7, 3, 5, 1)
WIDTH, LAYERS = 8, 3
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}


def ragged():
    torch.manual_seed(0)
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, dtype=torch.float64)
    return tokens, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def one_layer(name, layer, weights, bidirectional):
    """Torch's own module of one layer, with the weights of that number."""
    inputs = weights[f"rnn.weight_ih_l{layer}"].shape[1]
    module = KINDS[name](inputs, WIDTH, batch_first=True, bidirectional=bidirectional).double()
    module.load_state_dict({own: weights[f"rnn.{own.replace('_l0', f'_l{layer}')}"] for own in module.state_dict()})
    return module


def norm(layer, weights):
    module = nn.LayerNorm(len(weights[f"norms.{layer}.weight"])).double()
    module.load_state_dict({own: weights[f"norms.{layer}.{own}"] for own in ("weight", "bias")})
    return module


def composed(name, weights, tokens, mask, bidirectional):
    """The encoder from torch's own modules on packed sequences."""
    states, lengths = tokens, mask.sum(1)
    for layer in range(LAYERS):
        normed = norm(layer, weights)(states)
        packed = pack_padded_sequence(normed, lengths, batch_first=True, enforce_sorted=False)
        packed = one_layer(name, layer, weights, bidirectional)(packed)[0]
        added, _ = pad_packed_sequence(packed, batch_first=True, total_length=tokens.shape[1])
        if states.shape[-1] < added.shape[-1]:
            states = states.repeat(1, 1, 2)
        states = states + added
    return norm(LAYERS, weights)(states) * mask[..., None]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_torchs_norms_and_layers_on_packed_sequences(name, bidirectional):
    tokens, mask = ragged()
    encoder = ENCODERS.get(name)(HeadConfig(width=WIDTH, layers=LAYERS, bidirectional=bidirectional)).double()
    for parameter in encoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    weights = {key: value.detach() for key, value in encoder.state_dict().items()}
    inputs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    found = encoder(inputs[0].masked_fill(~mask[..., None], math.nan), mask)
    wanted = composed(name, weights, inputs[1], mask, bidirectional)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(wanted)
    gradients = [
        torch.autograd.grad((outputs * upstream).sum(), given)[0]
        for outputs, given in zip((found, wanted), inputs, strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def start_of(name, layers, **settings):
    """Of an untrained head over items of one frame: the spread of the pooled vectors over their size, their root mean
    square, and the gradient that reaches the projection."""
    torch.manual_seed(0)
    width = 64
    encoder = ENCODERS.get(name)(HeadConfig(width=width, layers=layers, **settings))
    projection, regressor = nn.Linear(16, width), nn.Linear(encoder.out_width, 1)
    nn.init.xavier_uniform_(projection.weight)
    nn.init.zeros_(projection.bias)
    items = 0.8 * torch.randn(32, 40, 16) + 0.5 * torch.randn(32, 1, 16) + 0.4 * torch.randn(1, 40, 16)
    pooled = encoder(projection(items), torch.ones(32, 40, dtype=torch.bool)).mean(1)
    labels = items[:, :10, 0].mean(1)
    (regressor(pooled).squeeze(1) - labels / labels.std()).square().mean().backward()
    spread = (pooled - pooled.mean(0)).norm(dim=1).mean() / pooled.norm(dim=1).mean()
    return spread.item(), pooled.square().mean().sqrt().item(), projection.weight.grad.norm().item()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_four_layers_start_as_alive_as_one(name, bidirectional):
    one, four = (start_of(name, layers, bidirectional=bidirectional) for layers in (1, 4))
    assert four[0] > 0.9
    assert four[:2] == pytest.approx(one[:2], rel=0.2)
    assert 0.5 < four[2] / one[2] < 2.0


def test_four_plain_layers_of_lstm_start_dead():
    one, four = (start_of("lstm", layers, residual=False) for layers in (1, 4))
    assert four[0] < 0.3 * one[0]
    assert four[2] < 0.1 * one[2]


def test_four_layers_of_lstm_learn_an_order_from_the_first_steps():
    """The label is the difference between the halves of one channel, which their mean does not tell; its variance is 1,
    and after 40 steps four plain layers are there still."""
    losses = {}
    for residual in (True, False):
        torch.manual_seed(0)
        encoder = ENCODERS.get("lstm")(HeadConfig(width=32, layers=4, residual=residual))
        projection, regressor = nn.Linear(4, 32), nn.Linear(32, 1)
        mask = torch.ones(32, 12, dtype=torch.bool)
        optimizer = torch.optim.AdamW(nn.ModuleList([projection, encoder, regressor]).parameters(), lr=1e-3)
        seen = []
        for _ in range(40):
            tokens = torch.randn(32, 12, 4)
            labels = (tokens[:, :6, 0].sum(1) - tokens[:, 6:, 0].sum(1)) / math.sqrt(12)
            loss = (regressor(encoder(projection(tokens), mask)[:, -1]).squeeze(1) - labels).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses[residual] = sum(seen[-20:]) / 20
    assert losses[True] < 0.85, losses
    assert losses[False] > 0.95, losses


@pytest.mark.parametrize("name", KINDS)
def test_the_presets_say_which_form(name):
    forms = {
        preset: load_settings(None, {"encoder": name, "device": "cpu"}, preset=preset)[0].residual
        for preset in (None, "paper", "published")
    }
    assert forms == {None: True, "paper": True, "published": False}


@pytest.mark.parametrize("name", KINDS)
def test_a_run_of_an_agiqa_without_the_setting_is_read_as_plain(make_store, tmp_path, name):
    store = make_store(40)
    head = HeadConfig(projection="sketch", encoder=name, width=8, layers=2, residual=False)
    train = TrainConfig(split="grouped", epochs=1, device="cpu")
    run = train_head(store, tmp_path / "run", head=head, train=train)
    plain = KINDS[name](8, 8, 2)
    of_encoder = {key for key in load_file(run.path / "head.safetensors") if key.startswith("encoder.")}
    assert of_encoder == {f"encoder.rnn.{key}" for key in plain.state_dict()}
    config = json.loads((run.path / "config.json").read_text())
    del config["head"]["residual"]
    (run.path / "config.json").write_text(json.dumps(config))
    old = load_run(run.path)
    assert old.head == head
    assert predict(old, store).tolist() == predict(run, store).tolist()


def test_other_encoders_keep_the_default_where_a_run_lacks_the_setting():
    assert complete_settings({"encoder": "xlstm", "width": 8}) == {"encoder": "xlstm", "width": 8}
    assert complete_settings({"encoder": "lstm", "residual": True})["residual"] is True
    assert complete_settings({"encoder": "gru"})["residual"] is False
