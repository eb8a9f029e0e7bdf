"""Stacks of runs on different layers, pooled rows and shorter conversations: each member reads what it was trained on."""

import numpy as np
import pytest

from agiqa.errors import HeadError
from agiqa.heads import HeadConfig, TrainConfig, evaluate, load_run, stack_runs, train_head
from agiqa.store import Prefixes
from tests.heads.layered_stores import made_states, mos_of, pooled_states, write_store

COUNT = 120
STATES = made_states(COUNT)
MOS = mos_of(STATES["16"])
POOLED = ("mean@question", "mean@answer")
QUICK = TrainConfig(epochs=1, batch_size=16, device="cpu", validation=0.4)
GRU = HeadConfig(projection="hidden", encoder="gru", width=4)
RIDGE = HeadConfig(encoder="ridge")


def on(**changes):
    return QUICK.model_copy(update=changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stacks")


@pytest.fixture(scope="module")
def store(folder):
    rows = np.array([[len(rows) - 1] for rows in STATES["last"]], np.int32)
    prefixes = Prefixes(names=("id",), rows=rows, authors=np.zeros((COUNT, 1), np.uint8))
    return write_store(folder / "tokens.agiqa", STATES, MOS, variant="full", prefixes=prefixes)


def is_mean(stack, runs, store):
    mean = np.mean([run.predict(store) for run in runs], axis=0)
    assert stack.predict(store) == pytest.approx(mean, abs=1e-9)
    test = [row for row in stack.predictions if row["split"] == "test"]
    assert [row["predicted"] for row in test] == pytest.approx(mean[[row["item"] for row in test]], abs=1e-5)
    assert evaluate(stack, store)["srcc"] == pytest.approx(stack.metrics["test"]["srcc"])


def test_members_read_their_own_layers(store, tmp_path):
    layers = {"8": GRU, "last": GRU, "16+last": RIDGE}
    runs = [
        train_head(store, tmp_path / name, head=head, train=on(layer=name, seed=len(name)))
        for name, head in layers.items()
    ]
    stack = stack_runs(runs, tmp_path / "stack", store, weights="equal")
    is_mean(load_run(stack.path), runs, store)
    assert {stack.spec.layer, stack.train.layer, stack.metrics["layer"]} == {"8+16+last"}
    twice = stack_runs([stack, runs[0]], tmp_path / "twice", store, weights="equal")
    is_mean(twice, [stack, runs[0]], store)
    fitted = stack_runs(runs, tmp_path / "fitted", store)
    weights = fitted.config["closed"]["weights"]["quality"]
    assert weights[2] > 0.5  # the MOS is in layer 16
    other = write_store(tmp_path / "without-8.agiqa", {name: STATES[name] for name in ("16", "last")}, MOS)
    with pytest.raises(LookupError, match="no layer '8'"):
        stack.predict(other)


def test_members_read_their_own_pooled_rows(folder, tmp_path):
    rows = write_store(folder / "pooled.agiqa", pooled_states(STATES, POOLED), MOS, pooled=POOLED)
    linear = GRU.model_copy(update={"encoder": "none"})
    heads = {"question": "mean@question", "answer": "mean@answer"}
    runs = [
        train_head(rows, tmp_path / name, head=linear.model_copy(update={"pooling": pooling}), train=on(layer="16"))
        for name, pooling in heads.items()
    ]
    runs.append(train_head(rows, tmp_path / "ridge", head=RIDGE, train=on(layer="8")))
    stack = stack_runs(runs, tmp_path / "stack", rows, weights="equal")
    is_mean(stack, runs, rows)
    assert (stack.spec.layer, stack.spec.pooled) == ("8+16", POOLED)


def test_runs_of_one_shorter_conversation_are_added_up(store, tmp_path):
    runs = [train_head(store, tmp_path / f"{seed}", head=GRU, train=on(variant="id", seed=seed)) for seed in (0, 1)]
    is_mean(stack_runs(runs, tmp_path / "stack", store, weights="equal"), runs, store)
    whole = train_head(store, tmp_path / "full", head=GRU, train=QUICK)
    with pytest.raises(HeadError, match=r"full was not trained on .*, read as the variant 'id': a stack needs runs of"):
        stack_runs([runs[0], whole], tmp_path / "bad", store)


def test_items_that_were_kept_back_have_no_part_in_the_weights(store, tmp_path):
    kept_back = on(validation=0.6, calibration_share=0.3)
    runs = [train_head(store, tmp_path / one.encoder, head=one, train=kept_back) for one in (RIDGE, GRU)]
    stack = stack_runs(runs, tmp_path / "stack", store)
    parts = {part: [row for row in stack.predictions if row["split"] == part] for part in ("validation", "calibration")}
    assert [row["item"] for row in parts["calibration"]] == [
        row["item"] for row in runs[0].predictions if row["split"] == "calibration"
    ]
    told = [row["predicted"] for row in parts["calibration"]]
    weights, members = stack.config["closed"]["weights"]["quality"], {}
    for run in runs:
        members |= {(run.path.name, row["item"]): row["predicted"] for row in run.predictions}
    sums = [
        sum(weight * members[run.path.name, row["item"]] for weight, run in zip(weights, runs, strict=True))
        for row in parts["calibration"]
    ]
    assert np.ptp(np.array(told) - sums) == pytest.approx(0, abs=1e-9)  # but for the intercept
    assert stack.metrics["test"]["intervals"]["validation_items"] == len(parts["calibration"])
    mixed = [runs[0], train_head(store, tmp_path / "all", head=GRU, train=on(validation=0.6))]
    assert stack_runs(mixed, tmp_path / "mixed", store).train.calibration_share == 0.0
