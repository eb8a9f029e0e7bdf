"""Whole trainings on a CUDA device: where features are kept, precision, graphs and resumption."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from agiqa.heads import HeadConfig, TrainConfig, train_head
from agiqa.heads.evaluation.scoring import evaluate
from tests.heads.training.test_resuming import BreakingProgress, Broken, numbers

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, which these trainings run on"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch.compile looks at it
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # by torch's compiler, for mlstm_kernels
]

SMALL = {"width": 32, "num_heads": 2, "blocks": 2, "layers": 2, "dropout": 0.2}
FAST = TrainConfig(split="grouped", epochs=4, batch_size=8, lr=5e-3, save_seconds=0, device="cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("encoder", ["xlstm", "lstm", "gru", "mamba2", "transformer", "none"])
def test_every_head_goes_on_to_the_same_numbers(make_store, tmp_path, encoder, precision):
    store = make_store(60, width=16, encoding="hidden")
    head = HeadConfig(projection="vocabulary", encoder=encoder, **SMALL)
    config = FAST.model_copy(update={"precision": precision, "ema": 0.9})
    whole = train_head(store, tmp_path / "whole", head=head, train=config)
    with pytest.raises(Broken):
        train_head(store, tmp_path / "run", head=head, train=config, progress=BreakingProgress(epoch=3))
    again = train_head(store, tmp_path / "run", head=head, train=config)
    assert numbers(again.path) == numbers(whole.path)
    assert ("CUDA graphs" in whole.config["kernels"]) == (encoder != "none")
    assert whole.metrics["features"]["keep"] == "device"


def test_where_features_are_kept_changes_no_number(make_store, tmp_path):
    store = make_store(60, width=16, encoding="hidden", logical_dtype="bfloat16")
    head = HeadConfig(projection="hidden", encoder="gru", **SMALL)
    found = [
        numbers(train_head(store, tmp_path / keep, head=head, train=FAST.model_copy(update={"keep": keep})).path)
        for keep in ("device", "ram", "stream")
    ]
    assert found[0] == found[1] == found[2]


def rmse_of_a_training(store, path, train):
    head = HeadConfig(projection="hidden", encoder="transformer", **{**SMALL, "dropout": 0.0})
    run = train_head(store, path, head=head, train=train)
    evaluate(run, store)
    return json.loads((path / "metrics.json").read_text())["test"]["rmse"], run.config["kernels"]


def test_a_compiled_head_learns_and_predicts_as_another(make_store, tmp_path):
    store = make_store(60, width=16, encoding="hidden")
    plain, _ = rmse_of_a_training(store, tmp_path / "plain", FAST.model_copy(update={"cuda_graphs": False}))
    # torch.compile cannot look through the shape checks that tests put on heads, so it runs where they are not.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        compiled = FAST.model_copy(update={"compile": True})
        found, kernels = pool.submit(rmse_of_a_training, store, tmp_path / "compiled", compiled).result()
    assert "torch.compile" in kernels
    assert found == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("encoder", ["xlstm", "gru"])
def test_following_the_test_scores_changes_no_weight_beside_cuda_graphs(make_store, tmp_path, encoder):
    store = make_store(60, width=16, encoding="hidden")
    head = HeadConfig(projection="vocabulary", encoder=encoder, **SMALL)
    plain, traced = (
        train_head(store, tmp_path / str(on), head=head, train=FAST.model_copy(update={"paper_compatible": on}))
        for on in (False, True)
    )
    assert numbers(traced.path)["weights"] == numbers(plain.path)["weights"]
    assert traced.metrics["test"] == plain.metrics["test"]
    assert traced.metrics["paper_compatible"]["bias"]["srcc"] >= 0
