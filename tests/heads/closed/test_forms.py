"""Heads in closed form, from the store to the run folder and back, each against scikit-learn with the same folds."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from agiqa.errors import ConfigError, DataError, HeadError, UnknownName
from agiqa.heads import HeadConfig, TrainConfig, evaluate, load_run, make_partition, train_head
from agiqa.heads.closed.forms import TRIED_STRENGTHS, TRIED_WIDTHS
from agiqa.heads.closed.regressions import STRENGTHS
from agiqa.heads.data.prompt_groups import prompt_groups
from agiqa.heads.settings.config import CLOSED_FORMS
from tests.heads.conftest import MemoryStore
from tests.heads.label_stores import BOTH, with_correspondence

GROUPED = TrainConfig(split="grouped", device="cpu")


@dataclass(frozen=True, kw_only=True)
class PooledStore(MemoryStore):
    """Rows are poolings: two for each item."""

    pooled: tuple[str, ...] = ("mean@image", "mean@answer")


@dataclass(frozen=True, kw_only=True)
class TappedStore(MemoryStore):
    """Rows are patches."""

    tap: str | None = "timm"


@pytest.fixture
def store(make_store):
    """90 items of 30 prompts with two labels, token ids, and an answer behind a question of one token or more."""
    made = with_correspondence(make_store(90, prompts=30, width=5))
    random, lengths = np.random.default_rng(3), [len(rows) for rows in made.features]
    roles = [np.array([2] * (length - 3) + [3] * 3, np.uint8) for length in lengths]
    ids = [random.integers(0, 9, size=length).astype(np.int32) for length in lengths]
    return replace(made, roles=roles, ids=ids)


def pooled(store, items, *roles):
    """The mean of the rows of each role, side by side, in float64."""
    return np.stack(
        [
            np.concatenate([store.features[k][store.roles[k] == role].astype(np.float64).mean(0) for role in roles])
            for k in items
        ]
    )


def known_and_tested(store, config=GROUPED):
    partition = make_partition(store, config)
    return np.concatenate([partition.train, partition.validation]), partition.train, partition.test


def chosen_by_hand(known, mos, groups, predictors):
    """The place of the predictor with the least squared error over folds without a common prompt."""
    errors = np.zeros(len(predictors))
    for kept, held in GroupKFold(5).split(known, groups=groups):
        for place, predict in enumerate(predictors):
            errors[place] += np.square(predict(known[kept], mos[kept], known[held]) - mos[held]).sum()
    return int(errors.argmin())


def by_ridge(strength):
    return lambda known, mos, unknown: Ridge(alpha=strength).fit(known, mos).predict(unknown)


def by_kernel(scale, alpha):
    gamma = 1 / (2 * scale**2)

    def predict(known, mos, unknown):
        model = KernelRidge(alpha=alpha, kernel="rbf", gamma=gamma).fit(known, mos - mos.mean())
        return model.predict(unknown) + mos.mean()

    return predict


def kernels_of(rows):
    """All kernels that are tried, and their settings."""
    median = np.median(pdist(rows))
    settings = [(width, strength) for width in TRIED_WIDTHS for strength in TRIED_STRENGTHS]
    spread = {width: 1 - rbf_kernel(rows, gamma=1 / (2 * (width * median) ** 2)).mean() for width in TRIED_WIDTHS}
    return [by_kernel(width * median, strength * spread[width]) for width, strength in settings]


@pytest.mark.parametrize(("encoder", "pooling"), [("ridge", "mean@question+mean@answer"), ("krr", None)])
def test_a_closed_form_is_that_of_scikit_learn_and_is_read_back(store, tmp_path, encoder, pooling):
    given = {} if pooling is None else {"pooling": pooling}
    run = train_head(store, tmp_path / "run", head=HeadConfig(encoder=encoder, **given), train=GROUPED)
    items, train, test = known_and_tested(store)
    roles, mos = ((2, 3) if pooling else (3,)), store.items.labels["quality"]
    expected = []
    for fitted in (items, train):  # the head that is kept, and the one that the validation items judge
        scaler = StandardScaler().fit(pooled(store, fitted, *roles))
        rows = scaler.transform(pooled(store, fitted, *roles))
        tried = [by_ridge(strength) for strength in STRENGTHS] if encoder == "ridge" else kernels_of(rows)
        groups = prompt_groups([store.items.prompts[k] for k in fitted])
        best = tried[chosen_by_hand(rows, mos[fitted], groups, tried)]
        asked = test if fitted is items else np.setdiff1d(items, train)
        expected.append(best(rows, mos[fitted], scaler.transform(pooled(store, asked, *roles))))
    told = {
        part: [row["predicted"] for row in run.predictions if row["split"] == part] for part in ("test", "validation")
    }
    assert told["test"] == pytest.approx(expected[0], abs=1e-5)
    assert told["validation"] == pytest.approx(expected[1], abs=1e-5)
    again = load_run(run.path)
    assert again.predict(store, test) == pytest.approx(told["test"], rel=1e-12)
    assert evaluate(again, store)["srcc"] == pytest.approx(run.metrics["test"]["srcc"])
    assert run.config["closed"]["pooling"] == (pooling or "mean@answer")
    assert run.metrics["refit"]


def test_tfidf_is_that_of_scikit_learn_on_token_ids(store, tmp_path):
    head = HeadConfig(encoder="tfidf", strength=0.5, pooling="mean@answer")
    run = train_head(store, tmp_path / "run", head=head, train=GROUPED)
    texts = [" ".join(f"t{one}" for one in ids[roles == 3]) for ids, roles in zip(store.ids, store.roles, strict=True)]
    items, _, test = known_and_tested(store)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    known = vectorizer.fit_transform([texts[k] for k in items]).toarray()
    unknown = vectorizer.transform([texts[k] for k in test]).toarray()
    expected = Ridge(alpha=0.5).fit(known, store.items.labels["quality"][items]).predict(unknown)
    assert run.predict(store, test) == pytest.approx(expected, abs=2e-3)  # scikit-learn iterates on sparse rows
    assert np.corrcoef(run.predict(store, test), expected)[0, 1] > 0.9999


def test_tfidf_reads_no_images_and_no_ngrams_across_what_it_does_not_count(store, tmp_path):
    roles = [np.where(np.arange(len(ids)) == 1, 1, 2).astype(np.uint8) for ids in store.ids]
    pictured = replace(store, roles=roles)
    run = train_head(pictured, tmp_path / "run", head=HeadConfig(encoder="tfidf"), train=GROUPED)
    changed = replace(pictured, ids=[np.where(one == 1, 7, ids) for one, ids in zip(roles, store.ids, strict=True)])
    assert run.predict(changed).tolist() == run.predict(pictured).tolist()
    keys = set(run.load_head(pictured, device=torch.device("cpu")).state_dict()["keys"].tolist())
    items, _, _ = known_and_tested(store)
    across = {(int(store.ids[k][0] + 1) << 21) + int(store.ids[k][2] + 1) for k in items}
    beside = {
        (int(a + 1) << 21) + int(b + 1)
        for k in items
        for a, b in zip(store.ids[k][2:-1], store.ids[k][3:], strict=True)
    }
    assert beside <= keys
    assert not (across - beside) & keys


@pytest.mark.parametrize("encoder", [name for name in CLOSED_FORMS if name != "rating-words"])
def test_several_labels_are_fitted_one_by_one(store, tmp_path, encoder):
    both = TrainConfig(split="grouped", label=BOTH, device="cpu")
    run = train_head(store, tmp_path / "both", head=HeadConfig(encoder=encoder), train=both)
    predicted = run.predict(store)
    for number, label in enumerate(run.train.labels):
        config = GROUPED.model_copy(update={"label": label})
        alone = train_head(store, tmp_path / label, head=HeadConfig(encoder=encoder), train=config)
        assert alone.predict(store) == pytest.approx(predicted[:, number], rel=1e-9)
        mine, theirs = alone.config["closed"]["fits"][0], run.config["closed"]["fits"][number]
        assert mine.get("strength") == theirs.get("strength")
        assert mine["inner_rmse"] == pytest.approx(theirs["inner_rmse"])


def test_the_linear_kernel_is_the_ridge_and_fixed_settings_are_kept(store, tmp_path):
    heads = {
        "ridge": HeadConfig(encoder="ridge"),
        "linear": HeadConfig(encoder="krr", kernel="linear"),
        "fixed": HeadConfig(encoder="krr", strength=0.7, kernel_width=1.5),
    }
    runs = {name: train_head(store, tmp_path / name, head=head, train=GROUPED) for name, head in heads.items()}
    assert runs["linear"].predict(store) == pytest.approx(runs["ridge"].predict(store))
    fit = runs["fixed"].config["closed"]["fits"][0]
    assert (fit["strength"], fit["width"], fit["at_edge"]) == (0.7, 1.5, [])


def test_auto_pools_all_tokens_where_some_item_has_no_answer(store, make_store, tmp_path):
    silent = replace(store, roles=[np.full(len(one), 2, np.uint8) for one in store.roles])
    for name, one in (("silent", silent), ("answers only", make_store(60))):
        run = train_head(one, tmp_path / name, head=HeadConfig(encoder="ridge"), train=GROUPED)
        assert run.config["closed"]["pooling"] == "mean"


def test_a_closed_form_is_calibrated_and_resists_the_order_of_items(store, tmp_path):
    large = replace(store, items=replace(store.items, labels={"quality": store.items.labels["quality"] * 20}))
    config = GROUPED.model_copy(update={"calibrate": True, "validation": 0.4})
    run = train_head(large, tmp_path / "run", head=HeadConfig(encoder="ridge", strength=1e5), train=config)
    line = run.metrics["calibration"]
    plain = train_head(
        large,
        tmp_path / "plain",
        head=HeadConfig(encoder="ridge", strength=1e5),
        train=config.model_copy(update={"calibrate": False}),
    )
    assert line["slope"] > 2
    assert run.predict(large) == pytest.approx(plain.predict(large) * line["slope"] + line["intercept"])
    backwards = np.arange(90)[::-1]
    assert run.predict(large, backwards)[::-1] == pytest.approx(run.predict(large))


def test_pooled_rows_are_read_by_name(store, tmp_path):
    rows = [np.stack([pooled(store, [k], 2)[0], pooled(store, [k], 3)[0]]).astype(np.float32) for k in range(90)]
    source = PooledStore(**{**vars(store), "features": rows, "roles": [np.array([1, 3], np.uint8)] * 90})
    runs = {
        name: train_head(one, tmp_path / name, head=HeadConfig(encoder="ridge", pooling=pooling), train=GROUPED)
        for name, one, pooling in (
            ("tokens", store, "mean@answer"),
            ("rows", source, "mean@answer"),
            ("auto", source, "auto"),
            ("image", source, "mean@image"),
        )
    }
    assert runs["rows"].predict(source) == pytest.approx(runs["tokens"].predict(store), abs=1e-5)
    assert runs["auto"].predict(source) == pytest.approx(runs["rows"].predict(source))
    assert runs["image"].predict(source) != pytest.approx(runs["rows"].predict(source), abs=1e-2)
    with pytest.raises(UnknownName, match="Known: mean@answer, mean@image"):
        train_head(source, tmp_path / "max", head=HeadConfig(encoder="ridge", pooling="max@image"), train=GROUPED)


def test_what_a_closed_form_cannot_do_is_said(store, tmp_path):
    def train(path="bad", source=store, start=None, **settings):
        return train_head(source, tmp_path / path, head=HeadConfig(**settings), train=GROUPED, start=start)

    with pytest.raises(ConfigError, match="'attention' has weights that are learned by epochs"):
        train(encoder="ridge", pooling="attention")
    with pytest.raises(ConfigError, match="has a name twice"):
        train(encoder="ridge", pooling="mean+mean")
    with pytest.raises(UnknownName, match="Did you mean 'answer'"):
        train(encoder="krr", pooling="mean@answr")
    with pytest.raises(DataError, match="has no image token to pool"):
        train(encoder="ridge", pooling="mean@image")
    with pytest.raises(UnknownName, match="Did you mean 'ridge'"):
        train(encoder="rigde")
    run = train("ridge", encoder="ridge")
    with pytest.raises(HeadError, match="fitted anew"):
        train(encoder="ridge", start=run)
    config = json.loads((run.path / "config.json").read_text())
    del config["closed"]
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError, match="does not hold the closed form"):
        load_run(run.path).predict(store)
    of_tokens = train("tfidf", encoder="tfidf")
    with pytest.raises(DataError, match="has no token ids"):
        of_tokens.predict(PooledStore(**vars(store)))
