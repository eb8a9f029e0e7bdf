"""Poolings: laws for every registered one over every role, each against a numpy loop, and roles on their way there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agiqa.errors import DataError, HeadError, UnknownName
from agiqa.heads import HeadConfig, LineProgress, TrainConfig
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.evaluation.scoring import predict_items
from agiqa.heads.model.head import build_head, check_parts
from agiqa.heads.model.pooling import POOLINGS, PoolingName, check_item_roles, check_roles, select_role
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.training.fitting import fit_head
from agiqa.store.format.layout import TOKEN_ROLES

WIDTH = 6
LENGTHS = (9, 6, 5, 4)
LONGEST = max(LENGTHS)
ROLES = [None, *TOKEN_ROLES]
CASES = [(name, role) for name in POOLINGS for role in ROLES]
NAMES = [name if role is None else f"{name}@{role}" for name, role in CASES]


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(len(LENGTHS), LONGEST, WIDTH, dtype=torch.float64)


@pytest.fixture
def mask():
    return torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def roles(mask):
    """Every role in every item, scattered: none of them is a prefix."""
    random = np.random.default_rng(3)
    rows = [np.resize(random.permutation(4), LONGEST) for _ in LENGTHS]
    return torch.from_numpy(np.stack(rows).astype(np.uint8)).masked_fill(~mask, 0)


def pooling_of(name):
    """A pooling in float64; a learned query gets values, as after training."""
    torch.manual_seed(5)
    pooling = POOLINGS.get(name)(HeadConfig(), WIDTH).double()
    for parameter in pooling.parameters():
        torch.nn.init.normal_(parameter)
    return pooling


def pooled(name, role, tokens, mask, roles):
    return pooling_of(name)(tokens, mask if role is None else select_role(mask, roles, role))


def attention(rows, query):
    scores = np.array([np.dot(row, query) for row in rows]) / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return sum(weight * row for weight, row in zip(weights / weights.sum(), rows, strict=True))


def oracle(name, rows):
    """The pooling of one item's rows, (tokens, width), in numpy."""
    if name == "attention":
        return attention(rows, pooling_of(name).query.detach().numpy())
    return {
        "mean": lambda: rows.sum(0) / len(rows),
        "max": lambda: np.sort(rows, axis=0)[-1],
        "first": lambda: rows[0],
        "last": lambda: rows[-1],
        "first-last-mean": lambda: (rows[0] + rows[-1]) / 2,
    }[name]()


@pytest.mark.parametrize(("name", "role"), CASES, ids=NAMES)
def test_a_pooling_is_that_of_the_sub_sequence(name, role, tokens, mask, roles):
    found = pooled(name, role, tokens, mask, roles).detach().numpy()
    for row, length in enumerate(LENGTHS):
        wanted = [k for k in range(length) if role is None or roles[row, k] == TOKEN_ROLES[role]]
        assert found[row] == pytest.approx(oracle(name, tokens[row].numpy()[wanted]))


@pytest.mark.parametrize("garbage", [1e3, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "role"), CASES, ids=NAMES)
def test_garbage_in_the_padding_changes_nothing(name, role, garbage, tokens, mask, roles):
    clean = pooled(name, role, tokens, mask, roles)
    for code in (0, 1, 2, 3, 255):
        dirty_roles = roles.masked_fill(~mask, code)
        dirty = pooled(name, role, tokens.masked_fill(~mask[..., None], garbage), mask, dirty_roles)
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize(("name", "role"), CASES, ids=NAMES)
def test_an_item_does_not_feel_its_batch(name, role, tokens, mask, roles):
    together = pooled(name, role, tokens, mask, roles)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(pooled(name, role, tokens[order], mask[order], roles[order]), together[order])
    for row, length in enumerate(LENGTHS):
        parts = (part[row : row + 1, :length] for part in (tokens, mask, roles))
        torch.testing.assert_close(pooled(name, role, *parts)[0], together[row])


@pytest.mark.parametrize(("name", "role"), CASES, ids=NAMES)
def test_gradients_are_finite_and_stay_within_the_role(name, role, tokens, mask, roles):
    tokens = tokens.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    pooling = pooling_of(name)
    chosen = mask if role is None else select_role(mask, roles, role)
    pooling(tokens, chosen).square().sum().backward()
    assert tokens.grad.isfinite().all()
    assert (tokens.grad[~chosen] == 0).all()
    assert (tokens.grad.abs().sum((1, 2)) > 0).all()
    for parameter in pooling.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", POOLINGS.names())
def test_the_order_of_tokens_matters_to_the_ends_only(name, tokens, mask):
    pooling, item = pooling_of(name), tokens[:1]
    order = torch.tensor([4, 2, 7, 0, 8, 1, 3, 6, 5])
    blind = torch.allclose(pooling(item[:, order], mask[:1]), pooling(item, mask[:1]))
    assert blind == (name in ("attention", "max", "mean"))


@pytest.mark.parametrize("name", POOLINGS.names())
def test_one_token_is_its_own_pooling(name, tokens):
    one = tokens[:, :1]
    torch.testing.assert_close(pooling_of(name)(one, torch.ones(len(LENGTHS), 1, dtype=torch.bool)), one[:, 0])


def test_untrained_attention_is_the_mean(tokens, mask):
    attending, mean = (POOLINGS.get(name)(HeadConfig(), WIDTH).double() for name in ("attention", "mean"))
    torch.testing.assert_close(attending(tokens, mask), mean(tokens, mask))


def test_attention_survives_large_scores_and_weighs_in_float32(mask):
    pooling = POOLINGS.get("attention")(HeadConfig(), WIDTH)
    torch.nn.init.constant_(pooling.query, 1e4)
    tokens = torch.randn(len(LENGTHS), LONGEST, WIDTH).bfloat16()
    with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
        found = pooling(tokens, mask)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_names_are_read_and_faults_name_the_nearest():
    assert PoolingName.parse("first-last-mean@answer") == PoolingName(pooling="first-last-mean", role="answer")
    assert PoolingName.parse("max").role is None
    for text, message in [
        ("maen@answer", r"No pooling is called 'maen'\. Did you mean 'mean'"),
        ("mean@anwser", r"No token role is called 'anwser'\. Did you mean 'answer'"),
        ("mean@", "No token role is called ''"),
        ("@answer", "No pooling is called ''"),
        ("mean@image@answer", "No token role is called 'image@answer'"),
    ]:
        with pytest.raises(UnknownName, match=message):
            check_parts(HeadConfig(projection="sketch", pooling=text))


def mixed_store(make_store, n=40, **changes):
    """A store whose items hold tokens of all four roles: 0, 1, 1, 2, 3, 3 ..."""
    store = make_store(n, **changes)
    pattern = np.array([0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 3, 3], dtype=np.uint8)
    return replace(store, roles=[pattern[: len(rows)].copy() for rows in store.features])


def without_answer(store, *items):
    """The same store, with questions where these items had answers."""
    for item in items:
        store.roles[item][store.roles[item] == TOKEN_ROLES["answer"]] = TOKEN_ROLES["question"]
    return store


def test_a_missing_role_names_items_and_role(make_store):
    store = without_answer(mixed_store(make_store), 3, 17)
    items = np.array([17, 5, 3, 8])
    features = FeatureSet.from_store(store, items)
    for call in (
        lambda pooling: check_roles(store, features, pooling),
        lambda pooling: check_item_roles(store, items, pooling),
    ):
        with pytest.raises(
            DataError, match=r"2 problems\n.*'0017\.png' has no answer token.*\n.*'0003\.png'"
        ) as caught:
            call("mean@answer")
        assert "'mean@answer'" in caught.value.__notes__[0]
        call("mean@question")
        call("mean")
        with pytest.raises(UnknownName, match="Did you mean 'answer'"):
            call("mean@answers")


def test_the_check_of_items_reads_on_past_one_block(make_store):
    store = without_answer(mixed_store(make_store, 300), 299)
    with pytest.raises(DataError, match=r"1 problem\n.*'0299\.png'"):
        check_item_roles(store, range(300), "max@answer")


def test_a_head_refuses_what_it_cannot_pool(mask, roles):
    with pytest.raises(HeadError, match="call the head with `roles`"):
        select_role(mask, None, "answer")
    with pytest.raises(DataError, match="1 of 4 items of a batch have no answer token"):
        select_role(mask, torch.where(torch.arange(4)[:, None] == 2, 1, roles).to(torch.uint8), "answer")


@pytest.mark.parametrize("pooling", ["mean@answer", "first@question", "attention@image"])
def test_a_whole_head_pools_the_role_and_encodes_every_token(make_store, mask, roles, pooling):
    torch.manual_seed(0)
    config = HeadConfig(projection="sketch", encoder="gru", width=WIDTH, pooling=pooling)
    head = build_head(config, FeatureSpec.of(make_store(3))).double()
    features = torch.randn(len(LENGTHS), LONGEST, 4, dtype=torch.float64, requires_grad=True)
    name = PoolingName.parse(pooling)
    chosen = mask & (roles == TOKEN_ROLES[name.role])
    encoded = head.encoder(head.projection(features), mask)
    expected = head.regressor(head.pooling(encoded, chosen))
    torch.testing.assert_close(head(features, mask, roles), expected)
    head(features, mask, roles)[0].backward()
    last = int(chosen[0].nonzero().max())
    reached = last if name.pooling != "first" else int(chosen[0].nonzero().min())
    assert (features.grad[0, : reached + 1].abs().sum(-1) > 0).all()


def test_predictions_pool_the_role_of_each_item(make_store):
    store = mixed_store(make_store)
    torch.manual_seed(0)
    config = HeadConfig(projection="sketch", encoder="none", width=WIDTH, pooling="max@answer")
    head = build_head(config, FeatureSpec.of(store)).eval()
    kept = [rows[roles == 3] for rows, roles in zip(store.features, store.roles, strict=True)]
    only_answers = replace(store, features=kept, roles=None)
    items = np.array([7, 0, 39, 12])
    found, alone = (predict_items(head, source, items, batch_size=3) for source in (store, only_answers))
    assert found == pytest.approx(alone, rel=1e-5)
    with pytest.raises(DataError, match=r"'0012\.png' has no answer token"):
        predict_items(head, without_answer(store, 12), items, batch_size=3)


@pytest.mark.parametrize("pooling", ["mean@answer", "last@question", "attention@image", "first-last-mean", "max"])
def test_poolings_train(make_store, pooling):
    store = mixed_store(make_store)
    features = FeatureSet.from_store(store, range(40))
    fit = fit_head(
        features,
        FeatureSpec.of(store),
        HeadConfig(projection="sketch", encoder="gru", width=8, pooling=pooling),
        TrainConfig(epochs=1, batch_size=8, lr=1e-2),
        train=LabelledItems.at(features, np.arange(30), "quality"),
        validation=LabelledItems.at(features, np.arange(30, 40), "quality"),
        epochs=1,
        stage="train",
        progress=LineProgress(lambda _: None),
    )
    assert np.isfinite(fit.validation_predictions).all()
    again = predict_items(fit.head, store, np.arange(30, 40), batch_size=4)
    assert again == pytest.approx(fit.validation_predictions, rel=1e-4)
