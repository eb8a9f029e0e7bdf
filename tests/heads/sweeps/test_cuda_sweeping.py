"""Heads that share a GPU, in one process or in several, give the numbers of one at a time; on a CUDA device only."""

from pathlib import Path

import pytest
import torch

from agiqa.heads import HeadConfig, HeadJob, TrainConfig, train_head, train_heads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, which these sweeps share")
FILES = ("head.safetensors", "predictions.csv", "config.json", "parts.json")


@pytest.mark.parametrize("workers", [1, 2])
def test_heads_that_share_a_gpu_give_the_numbers_of_single_trainings(make_store, tmp_path: Path, workers):
    store = make_store(80, encoding="hidden", logical_dtype="bfloat16", width=16)
    train = TrainConfig(split="grouped", epochs=2, lr=1e-2, batch_size=8, device="cuda", keep="device")
    heads = {encoder: HeadConfig(projection="vocabulary", encoder=encoder, width=16) for encoder in ("none", "gru")}
    jobs = [
        HeadJob(run=tmp_path / f"{name}-{seed}", head=head, train=train.model_copy(update={"split_seed": seed}))
        for name, head in heads.items()
        for seed in range(2)
    ]
    for outcome in train_heads(store, jobs, workers=workers):
        run, job = outcome.load(), outcome.job
        assert run.metrics["features"]["keep"] == "device"
        alone = train_head(store, tmp_path / "alone" / job.run.name, head=job.head, train=job.train)
        assert [(run.path / name).read_bytes() for name in FILES] == [
            (alone.path / name).read_bytes() for name in FILES
        ]
        assert run.metrics["test"] == alone.metrics["test"]
