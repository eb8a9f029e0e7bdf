"""Heads on layers and pooled rows of stores: the same numbers as on stores that hold nothing else."""

import json

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from agiqa.errors import HeadError, UnknownName
from agiqa.heads import HeadConfig, TrainConfig, evaluate, load_run, predict, train_head
from agiqa.heads.data.features import Located
from tests.heads.layered_stores import LAYERS, made_states, mos_of, pooled_states, write_store

POOLED = ("mean@question", "max@answer", "mean@answer", "last")
STATES = made_states()
MOS = mos_of(STATES["16"])
HEAD = HeadConfig(projection="hidden", encoder="gru", pooling="mean@answer", width=6)
LINEAR = HEAD.model_copy(update={"encoder": "none"})
QUICK = TrainConfig(epochs=2, lr=1e-2, batch_size=16, device="cpu")
MIX = LINEAR.model_copy(update={"layer_mix": "softmax"})


def on(layer, **changes):
    return TrainConfig(**{**QUICK.model_dump(), "layer": layer, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def store(folder):
    return write_store(folder / "tokens.agiqa", STATES, MOS)


@pytest.fixture(scope="module")
def pooled(folder):
    return write_store(folder / "pooled.agiqa", pooled_states(STATES, POOLED), MOS, pooled=POOLED)


@pytest.fixture(scope="module")
def only_8(folder):
    return write_store(folder / "only-8.agiqa", {"8": STATES["8"]}, MOS)


@pytest.fixture(scope="module")
def run_8(store, folder):
    return train_head(store, folder / "run-8", head=HEAD, train=on("8"))


def test_a_head_on_one_layer_of_many_is_the_head_on_a_store_of_that_layer(store, only_8, run_8, tmp_path):
    alone = train_head(only_8, tmp_path / "alone", head=HEAD, train=QUICK)
    assert [row["predicted"] for row in run_8.predictions] == [row["predicted"] for row in alone.predictions]
    assert run_8.metrics["test"] == alone.metrics["test"]
    np.testing.assert_array_equal(predict(run_8, only_8), predict(run_8, store))
    assert (run_8.spec.layer, run_8.metrics["layer"], run_8.store_id) == ("8", "8", store.id)
    assert alone.spec.layer == "8"


def test_the_layer_is_read_again_without_being_named(store, run_8):
    again = load_run(run_8.path)
    scores = evaluate(again, store)
    assert scores["srcc"] == run_8.metrics["test"]["srcc"]
    assert evaluate(again, store, "validation")["n"] == run_8.metrics["validation"]["n"]
    assert again.predict(store.layer("8")).tolist() == again.predict(store.path).tolist()


def test_the_run_records_its_layer(store, run_8):
    config = json.loads((run_8.path / "config.json").read_text())
    assert config["features"]["layer"] == "8"
    assert config["train"]["layer"] == "8"
    assert isinstance(store, Located)
    assert config["location"] == store.location


def test_a_run_of_before_reads_the_last_layer(store, folder, tmp_path):
    run = train_head(store, tmp_path / "run", head=HEAD, train=QUICK)
    expected = predict(run, store)
    config = json.loads((run.path / "config.json").read_text())
    for name in ("layer", "pooled", "tap"):
        del config["features"][name]
    del config["train"]["layer"], config["head"]["layer_mix"]
    (run.path / "config.json").write_text(json.dumps(config))
    old = load_run(run.path)
    assert old.spec.layer == "last"
    np.testing.assert_array_equal(predict(old, store), expected)


def test_a_store_without_the_layer_is_refused_with_what_it_has(run_8, folder):
    other = write_store(folder / "only-16.agiqa", {"16": STATES["16"]}, MOS)
    with pytest.raises(UnknownName, match=r"no layer '8'.*Stored: 16") as caught:
        predict(run_8, other)
    assert f"The head {run_8.path} reads layer 8." in caught.value.__notes__


def test_a_store_of_another_model_is_refused_where_no_w_lm_tells(run_8, folder):
    other = write_store(folder / "other.agiqa", {"8": STATES["8"]}, MOS, model="another")
    with pytest.raises(HeadError, match="features of the model made up, and the store has those of another"):
        predict(run_8, other)


def test_a_training_that_starts_from_a_run_reads_its_layer(store, run_8, tmp_path):
    further = train_head(store, tmp_path / "further", start=run_8, train=QUICK)
    assert further.spec.layer == "8"
    with pytest.raises(HeadError, match=r"Layer 8 of .* is asked for, and the source is its layer 16"):
        train_head(store, tmp_path / "other", start=run_8, train=on("16"))


@pytest.mark.parametrize("layer", ["8", "8+16+last"])
def test_a_pooled_row_gives_the_numbers_of_a_store_of_that_row_alone(pooled, folder, tmp_path, layer):
    alone = folder / f"alone-{layer}.agiqa"
    one = write_store(alone, pooled_states(STATES, ["mean@answer"]), MOS, pooled=["mean@answer"])
    runs = [
        train_head(source, tmp_path / str(k), head=LINEAR, train=on(layer)) for k, source in enumerate((pooled, one))
    ]
    assert runs[0].predictions == runs[1].predictions
    assert runs[0].spec.pooled == ("mean@answer",)


def test_a_linear_head_on_pooled_rows_reads_tokens_too(store, pooled, tmp_path):
    run = train_head(pooled, tmp_path / "run", head=LINEAR, train=on("16"))
    np.testing.assert_allclose(predict(run, store), predict(run, pooled), rtol=1e-5)
    largest = train_head(
        pooled, tmp_path / "max", head=LINEAR.model_copy(update={"pooling": "max@answer"}), train=QUICK
    )
    with pytest.raises(HeadError, match=r"trained on the pooled rows max@answer, and the store holds tokens"):
        predict(largest, store)


def test_a_sequence_of_pooled_rows_is_read_if_an_encoder_is_given(pooled, store, tmp_path, capsys):
    run = train_head(pooled, tmp_path / "run", head=HEAD, train=on("8"))
    assert run.spec.pooled == POOLED
    note = "the encoder 'gru' reads the 4 pooled rows of each item"
    assert any(note in line for line in run.metrics["notes"])
    assert note in capsys.readouterr().err
    assert len(predict(run, pooled)) == 60
    with pytest.raises(HeadError, match=r"trained on the pooled rows .*, and the store holds tokens"):
        predict(run, store)


def test_the_default_head_fits_the_store(pooled, tmp_path):
    run = train_head(pooled, tmp_path / "run", train=on("-1"))
    assert (run.head.encoder, run.head.pooling, run.head.projection) == ("none", "mean@answer", "vocabulary")
    assert run.spec.layer == "last"


def test_a_mix_reports_its_weights(store, tmp_path):
    run = train_head(store, tmp_path / "run", head=MIX, train=on("+".join(LAYERS), lr=3e-2, epochs=6))
    weights = run.metrics["layer_weights"]
    assert list(weights) == list(LAYERS)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert max(weights, key=weights.get) == "16"  # the MOS is a function of its states
    reloaded = load_run(run.path)
    np.testing.assert_array_equal(
        [row["predicted"] for row in run.predictions if row["split"] == "test"],
        reloaded.predict(store, [row["item"] for row in run.predictions if row["split"] == "test"]),
    )


def test_an_interrupted_training_of_another_layer_does_not_resume(store, tmp_path):
    """The layer is part of the key of the saved state."""
    from agiqa.heads.training.experiment import Experiment

    keys = [
        Experiment(source=store.layer(layer), run=tmp_path / "run", head=HEAD, train=on(layer)).key()
        for layer in ("8", "16")
    ]
    assert keys[0]["train"]["layer"] != keys[1]["train"]["layer"]
    assert keys[0]["store"] == keys[1]["store"]


def test_a_closed_form_below_a_network_chooses_among_all_pooled_rows(pooled, store, tmp_path):
    head = LINEAR.model_copy(update={"init": "ridge", "strength": 1.0, "init_pooling": "mean@question"})
    still = on("16", lr=1e-12)
    run = train_head(pooled, tmp_path / "init", head=head, train=still)
    ridge = HeadConfig(encoder="ridge", strength=1.0, pooling="mean@question")
    alone = train_head(pooled, tmp_path / "ridge", head=ridge, train=on("16", validation=0.0))
    fitted = train_head(pooled, tmp_path / "fitted", head=head, train=on("16", lr=1e-12, validation=0.0))
    np.testing.assert_allclose(fitted.predict(pooled), alone.predict(pooled), atol=1e-5)
    np.testing.assert_allclose(run.predict(store), run.predict(pooled), atol=1e-5)
    assert run.config["closed"]["pooling"] == "mean@question"


def test_a_ridge_on_several_layers_standardises_each_channel(store, tmp_path):
    run = train_head(store, tmp_path / "run", head=HeadConfig(encoder="ridge", strength=3.0), train=on("8+16+last"))
    answers = [[STATES[layer][k][-2:].astype(np.float64).mean(0) for layer in LAYERS] for k in range(len(MOS))]
    rows = np.array(answers).reshape(len(MOS), -1)
    known = [k for k in range(len(MOS)) if store.items.splits[k] == "train"]
    scaler = StandardScaler().fit(rows[known])
    model = Ridge(alpha=3.0).fit(scaler.transform(rows[known]), MOS[known])
    np.testing.assert_allclose(run.predict(store), model.predict(scaler.transform(rows)), atol=1e-6)
    assert (run.spec.layer, run.spec.width) == ("8+16+last", 12)
