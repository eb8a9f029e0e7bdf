"""The expected MOS under the model's probabilities of the rating words, against a softmax by hand in float64."""

import shutil
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from agiqa.errors import ConfigError, DataError, HeadError
from agiqa.heads import HeadConfig, TrainConfig, train_head
from agiqa.heads.closed.words import answer_place
from tests.heads.conftest import MemoryBasis, MemoryItems, MemoryStore
from tests.heads.label_stores import BOTH, with_correspondence
from tests.heads.layered_stores import made_states, mos_of, write_store

TOKENS = [7, 3, 30, 12, 21]
HEAD = HeadConfig(encoder="rating-words")
CONFIG = TrainConfig(split="grouped", device="cpu")


@dataclass(frozen=True, kw_only=True)
class ScaledItems(MemoryItems):
    mos_ranges: dict[str, tuple[float, float]] = field(default_factory=lambda: {"quality": (0.0, 10.0)})


@dataclass(frozen=True, kw_only=True)
class WordStore(MemoryStore):
    provenance: dict[str, Any] = field(
        default_factory=lambda: {
            "rating_tokens": dict(zip(("bad", "poor", "fair", "good", "excellent"), TOKENS, strict=True))
        }
    )


@dataclass(frozen=True, kw_only=True)
class RowBasis(MemoryBasis):
    q: Any


class SketchStore(WordStore):
    def basis(self):
        return RowBasis(id="b", q=self.weights)


def stored(made, **changes):
    return WordStore(**{**vars(made), "items": ScaledItems(**vars(made.items)), **changes})


@pytest.fixture
def store(make_store):
    """60 items of a vocabulary of 40 tokens, with a question, then the header of the answer."""
    made = make_store(60, encoding="hidden")
    return stored(made, roles=[np.array([2] * (len(rows) - 1) + [0], np.uint8) for rows in made.features])


def expected_mos(store, rows):
    """By hand: the middle of the fifth of 0 to 10 of each word."""
    return softmax(rows.astype(np.float64) @ store.weights[TOKENS].astype(np.float64).T, axis=1) @ [1, 3, 5, 7, 9]


def test_the_last_token_is_read_where_the_conversation_ends_with_a_question(store, tmp_path):
    run = train_head(store, tmp_path / "run", head=HEAD, train=CONFIG)
    last = np.stack([rows[-1] for rows in store.features])
    assert run.predict(store) == pytest.approx(expected_mos(store, last))
    assert run.metrics["chosen_by"] == "nothing is fitted"
    others = {"quality": np.random.default_rng(0).permutation(store.items.labels["quality"])}
    again = train_head(
        replace(store, items=replace(store.items, labels=others)), tmp_path / "b", head=HEAD, train=CONFIG
    )
    assert again.predict(store).tolist() == run.predict(store).tolist()


def test_the_token_before_the_answer_is_read_where_it_is_the_end(store, tmp_path):
    long = [np.concatenate([rows, rows]) for rows in store.features]
    for name, end in (("open", []), ("closed", [0])):
        roles = [np.array([0, 3, 2, 0, *[3] * (len(rows) - 4 - len(end)), *end], np.uint8) for rows in long]
        source = replace(store, features=long, roles=roles)
        run = train_head(source, tmp_path / name, head=HEAD, train=CONFIG)
        assert run.predict(source) == pytest.approx(expected_mos(source, np.stack([rows[3] for rows in long])))


@pytest.mark.parametrize(
    ("roles", "place"), [([0, 2, 0], 2), ([2, 3, 3, 2, 0], 4), ([2, 0, 3, 3, 0], 1), ([0, 2, 0, 3], 2), ([3, 3], 1)]
)
def test_the_place_that_predicts_the_answer(roles, place):
    assert answer_place(np.array(roles, np.uint8)) == place


def test_stored_logits_and_sketches_answer_too(store, tmp_path):
    logits = [(rows @ store.weights.T).astype(np.float32) for rows in store.features]
    sources = {
        "logits": replace(store, encoding="logits", features=logits, id="logits"),
        "sketch": SketchStore(**{**vars(store), "encoding": "sketch", "id": "sketch"}),
    }
    wanted = expected_mos(store, np.stack([rows[-1] for rows in store.features]))
    for name, source in sources.items():
        run = train_head(source, tmp_path / name, head=HEAD, train=CONFIG)
        assert run.predict(source) == pytest.approx(wanted, rel=1e-4)
        assert any("a sketch of rank 4 approximates" in note for note in run.metrics["notes"]) == (name == "sketch")


def test_given_tokens_beat_recorded_ones_and_the_variant_is_noted(store, tmp_path):
    asked = replace(store, provenance={"conversation": {"variant": "id"}})
    head = HeadConfig(encoder="rating-words", rating_tokens="7, 3,30,12,21")
    run = train_head(asked, tmp_path / "given", head=head, train=CONFIG)
    recorded = train_head(store, tmp_path / "recorded", head=HEAD, train=CONFIG)
    assert run.predict(asked).tolist() == recorded.predict(store).tolist()
    assert any("extract `--variant full`" in note for note in run.metrics["notes"])


def test_what_rating_words_lack_is_said(store, make_store, tmp_path):
    def train(source=store, config=CONFIG, **settings):
        return train_head(source, tmp_path / "run", head=HeadConfig(encoder="rating-words", **settings), train=config)

    with pytest.raises(DataError, match="does not record the tokens of the rating words"):
        train(replace(store, provenance={}))
    for wrong in ("1,2,3,4", "1,2,3,4,4", "a,2,3,4,5"):
        with pytest.raises(ConfigError, match="five different token ids"):
            train(rating_tokens=wrong)
    with pytest.raises(DataError, match="has 40 tokens in its vocabulary, and a rating word is token 40"):
        train(rating_tokens="1,2,3,4,40")
    with pytest.raises(DataError, match="does not record the scale of its quality MOS"):
        train(replace(store, items=replace(store.items, mos_ranges={})))
    with pytest.raises(ConfigError, match="the model is about one aspect"):
        train(with_correspondence(store), CONFIG.model_copy(update={"label": BOTH}))
    with pytest.raises(ConfigError, match="not fitted to the MOS"):
        train_head(store, tmp_path / "run", head=HeadConfig(encoder="gru", init="rating-words"), train=CONFIG)
    pooled = type("Pooled", (WordStore,), {"pooled": ("mean@answer",)})(**vars(store))
    with pytest.raises(DataError, match="extract with `--pool-tokens mean@answer,last`"):
        train(pooled)


def test_another_layer_than_the_last_is_refused_before_anything_is_read(tmp_path):
    """The chunks of the store are gone, and it is not what the error is about."""
    given = HeadConfig(encoder="rating-words", rating_tokens="1,2,3,4,5")
    for layers, layer, remedy in (
        (("8", "last"), "8", "leave `layer` out"),
        (("8", "last"), "8+last", "leave `layer` out"),
        (("8", "16"), None, r"extract with `--layers 8,16,last`"),
    ):
        states = made_states(layers=layers)
        store = write_store(tmp_path / f"{len(list(tmp_path.iterdir()))}.agiqa", states, mos_of(states["8"]))
        for chunks in [path for path in (store.path / "store.zarr").rglob("c") if "index" not in path.parts]:
            shutil.rmtree(chunks, ignore_errors=True)
        config = TrainConfig(device="cpu", layer=layer)
        with pytest.raises(HeadError, match=rf"would read layer .*{remedy}"):
            train_head(store, tmp_path / "run", head=given, train=config)
    assert not [path.name for path in tmp_path.iterdir() if "run" in path.name]
    states = made_states(layers=("last",))
    tapped = write_store(tmp_path / "tap.agiqa", states, mos_of(states["last"]), tap="projector")
    with pytest.raises(HeadError, match="a model without W_lm"):
        train_head(tapped, tmp_path / "run", head=given, train=TrainConfig(device="cpu"))
