"""Whole trainings: what they write, how they resume, what they refuse, and what the model has learnt."""

import csv
import json
import os
import resource
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from agiqa.errors import BusyStore, ConfigError, ModelError, SettingsConflict, WorkerError
from agiqa.extract.data.templates import Template, fill
from agiqa.extract.describing.asking import Describer
from agiqa.extract.describing.rounds import DescriptionSettings
from agiqa.extract.tuning import learner as learning
from agiqa.extract.tuning import training
from agiqa.extract.tuning.folder import AdapterFolder
from agiqa.extract.tuning.recipes import recipe_of
from agiqa.extract.tuning.tuning import TuningSettings, run_tuning
from agiqa.version import this_commit
from agiqa.workers import MODULES_TO_PREPARE_ITEMS, context_of_processes
from tests.extract.tuning.talks import load_talks, opener_for, quick

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def opener(minicpm):
    """Opens the tiny MiniCPM, which sees each picture in one slice."""
    return opener_for(minicpm, max_slices=1)


def tuned(opener, data, out, recipe, **settings):
    """The result of a training."""
    given = {"val_share": 0.3, **settings}
    return run_tuning(data, opener(device="cpu"), out, TuningSettings(recipe=recipe, **given), opener=opener)


def curves(out):
    with (out / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(out):
    """The lines of curves.csv without the seconds, in which two equal trainings differ."""
    return [{**row, "seconds": ""} for row in curves(out)]


def test_eight_items_are_learnt_by_heart(opener, data, tmp_path):
    """Greedy `describe` then repeats each text and word exactly, and stops. Short questions make it fast."""
    short = Template(describe="{prompt}?", rate="Rate.", one_round="-")
    items = []
    for item in data.items:
        ask, told, rate, word = item.conversation
        ask, rate = replace(ask, content=fill(short.describe, item.prompt)), replace(rate, content=short.rate)
        items.append(replace(item, conversation=(ask, told, rate, word)))
    recipe = quick(rank=16, alpha=16, lr=6e-3, steps=84, weight_decay=0.0, warmup=0.1)
    result = tuned(opener, replace(data, items=tuple(items)), tmp_path / "adapter", recipe, val_share=0)
    assert result.as_dict()["steps"] == 84
    describer = Describer(opener(device="cpu", adapter=str(tmp_path / "adapter")), DescriptionSettings())
    describer.wording = short
    found = [(one.description, one.rating_word, one.cut) for one in describer.describe(items)]
    assert found == [(item.conversation[1].content, item.conversation[3].content, False) for item in items]


def test_the_folder_of_a_finished_training(opener, data, tmp_path):
    out = tmp_path / "adapter"
    result = tuned(opener, data, out, quick(steps=6, validations=3), tensorboard=True, seed=5)
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        "curves.csv",
        "tensorboard",
        "tuning.json",
    ]
    record = json.loads((out / "tuning.json").read_text())
    assert record["recipe"]["name"] == "published"
    assert record["seed"] == 5
    assert record["commit"] == this_commit()
    assert (record["data"]["train"], record["data"]["validation"]) == (6, 2)
    assert record["model"]["files"].keys() >= {"config.json", "tokenizer.json"}
    rows = curves(out)
    assert [row["step"] for row in rows if row["loss"]] == [str(n) for n in range(1, 7)]
    validations = {int(row["step"]): float(row["validation_loss"]) for row in rows if row["validation_loss"]}
    assert list(validations) == [0, 2, 4, 6]
    best = min((loss, step) for step, loss in validations.items() if step > 0)
    assert (record["result"]["validation_loss"], record["result"]["best_step"]) == best
    assert result.as_dict()["best_step"] == best[1]
    with pytest.raises(SettingsConflict, match="holds an adapter already"):
        tuned(opener, data, out, quick(steps=6, validations=3), seed=5)


def test_the_best_validation_is_kept_and_training_stops_early(opener, data, tmp_path):
    """A learning rate that soon spoils the model: the adapter is that of a shorter training up to the best step."""
    recipe = quick(lr=0.05, steps=40, validations=40, patience=2, schedule="constant", warmup=0, clip=None)
    whole = tuned(opener, data, tmp_path / "whole", recipe).as_dict()
    assert whole["best_step"] + 2 == whole["steps"] < 40
    short = replace(recipe, steps=whole["best_step"], validations=1, patience=0)
    tuned(opener, data, tmp_path / "short", short)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "short"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_validation_and_test_items_are_never_trained_on(opener, data, tmp_path, monkeypatch):
    parts = ["train", "val", "test", "train", "val", None, "test", "train"]
    split = replace(data, items=tuple(replace(item, split=part) for item, part in zip(data.items, parts, strict=True)))
    trained, backward = set(), learning.summed_loss

    def noted(backbone, batch):
        trained.update(example.name for example in batch)
        return backward(backbone, batch)

    monkeypatch.setattr(learning, "summed_loss", noted)
    tuned(opener, split, tmp_path / "adapter", quick(steps=5))
    assert trained == {item.name for item, part in zip(data.items, parts, strict=True) if part in ("train", None)}


def die_after_four_steps(checkpoint, folder, out):
    """The main function of a process that kills itself after the fourth step of `long_run`."""
    add = AdapterFolder.add_curve

    def add_and_die(self, values):
        add(self, values)
        if values["step"] == 4 and "loss" in values:
            os.kill(os.getpid(), signal.SIGKILL)

    AdapterFolder.add_curve = add_and_die
    torch.set_num_threads(1)
    long_run(opener_for(checkpoint, max_slices=1), load_talks(folder), out)


def long_run(opener, data, out):
    """A training with everything that must be restored: dropout, momentum, epochs, a schedule, a best adapter."""
    recipe = quick(dropout=0.2, steps=7, batch_size=4, micro_batch=2, validations=4, patience=5)
    return tuned(opener, data, out, recipe, checkpoint_minutes=0)


def test_a_killed_training_resumes_to_the_same_numbers(minicpm, talks, opener, data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long_run(opener, data, whole)
    process = context_of_processes(MODULES_TO_PREPARE_ITEMS).Process(
        target=die_after_four_steps, args=(minicpm, talks, killed)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (killed / "training" / "best" / WEIGHTS).exists()
    assert not (killed / WEIGHTS).exists()
    long_run(opener, data, killed)
    one, other = load_file(whole / WEIGHTS), load_file(killed / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert numbers(whole) == numbers(killed)
    records = [json.loads((out / "tuning.json").read_text()) for out in (whole, killed)]
    for record in records:
        record["result"].pop("seconds")
        record["result"].pop("tokens_per_second")
    assert records[0] == records[1]


def test_a_full_disk_keeps_the_last_checkpoint(opener, data, tmp_path):
    """Checkpoints are larger than the largest file that may be written; then there is room."""
    out, recipe = tmp_path / "adapter", quick("light", steps=3, validations=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*state\.safetensors") as caught:
            tuned(opener, data, out, recipe, checkpoint_minutes=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the last checkpoint is kept" in caught.value.__notes__[0]
    assert [path.name for path in (out / "training").iterdir()] == ["settings.json"]
    assert tuned(opener, data, out, recipe).as_dict()["steps"] == 3


def test_the_best_adapter_is_that_of_the_checkpoint(opener, data, tmp_path, monkeypatch):
    """A kill between the checkpoint of the best step and its adapter: the adapter is written by the next run.

    On a GPU steps are not repeated to the bit. So no run may go on from an earlier step than that of the best adapter.
    """
    recipe = quick(steps=4, validations=4, schedule="constant", warmup=0)
    tuned(opener, data, tmp_path / "whole", recipe)
    save, calls = AdapterFolder.save_adapter, []

    def interrupted(folder, path, tensors, config):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(folder, path, tensors, config)

    monkeypatch.setattr(AdapterFolder, "save_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(opener, data, tmp_path / "cut", recipe)
    monkeypatch.undo()
    folder = AdapterFolder.__new__(AdapterFolder)
    folder.training = tmp_path / "cut" / "training"
    assert (folder.state_facts()["done"], folder.state_facts()["best_step"]) == (3, 3)
    seen = []
    monkeypatch.setattr(
        AdapterFolder,
        "save_adapter",
        lambda folder, path, tensors, config: (seen.append(path.name), save(folder, path, tensors, config)),
    )
    tuned(opener, data, tmp_path / "cut", recipe)
    assert len(seen) == 2
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_validation_loss_that_is_not_a_number_names_the_items(opener, data, tmp_path, monkeypatch):
    compute = training.validation_sums

    def spoilt(backbone, batch):
        loss, right = compute(backbone, batch)
        return loss * (float("nan") if any(one.name == chosen for one in batch) else 1.0), right

    chosen = data.items[1].name
    split = replace(
        data, items=tuple(replace(item, split="val" if n < 3 else "train") for n, item in enumerate(data.items))
    )
    monkeypatch.setattr(training, "validation_sums", spoilt)
    with pytest.raises(ModelError, match=f"The validation loss after step 0 is nan, with the items {chosen}. Look"):
        tuned(opener, split, tmp_path / "adapter", quick(micro_batch=1))


def test_ctrl_c_leaves_a_checkpoint(opener, data, tmp_path, monkeypatch, capsys):
    """In the middle of the fourth step, whose second micro-batch is the eighth."""
    compute, calls = learning.summed_loss, []

    def interrupted(backbone, batch):
        calls.append(batch)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return compute(backbone, batch)

    recipe = quick(dropout=0.2, steps=6, micro_batch=2, validations=1)
    tuned(opener, data, tmp_path / "whole", recipe)
    monkeypatch.setattr(learning, "summed_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(opener, data, tmp_path / "stopped", recipe)
    monkeypatch.undo()
    capsys.readouterr()
    tuned(opener, data, tmp_path / "stopped", recipe)
    assert "resume after step 3 of 6" in capsys.readouterr().err
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_an_unfinished_training_of_other_settings_is_refused(opener, data, tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    monkeypatch.setattr("agiqa.extract.tuning.folder.AdapterFolder.finish", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(opener, data, out, quick(steps=2))
    monkeypatch.undo()
    with pytest.raises(SettingsConflict, match=r"recipe\.lr was 0.001, and is 0.002 now"):
        tuned(opener, data, out, quick(steps=2, lr=2e-3))
    with pytest.raises(SettingsConflict, match=r"data\.sha256 was"):
        tuned(opener, replace(data, items=(*data.items[:-1], replace(data.items[-1], name="x"))), out, quick(steps=2))
    assert tuned(opener, data, out, quick(steps=2)).as_dict()["steps"] == 2


def _interrupted(*_arguments):
    raise KeyboardInterrupt


def test_folders_that_are_refused(opener, data, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(SettingsConflict, match="holds other files"):
        tuned(opener, data, tmp_path / "other", quick())
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text("{}")
    with pytest.raises(SettingsConflict, match="holds an adapter already"):
        tuned(opener, data, tmp_path / "theirs", quick())


def test_one_run_at_a_time(opener, data, tmp_path):
    from agiqa.store.disk.locks import exclusive_lock

    (tmp_path / "adapter").mkdir()
    with exclusive_lock(tmp_path / "adapter" / ".lock"), pytest.raises(BusyStore, match="Another run is training"):
        tuned(opener, data, tmp_path / "adapter", quick())


def test_a_loss_that_is_not_a_number_stops_and_names_the_items(opener, data, tmp_path, monkeypatch):
    """The third batch: the state before it is kept as an adapter, and equals that of a training of two steps."""
    compute, calls = learning.summed_loss, []

    def spoilt(backbone, batch):
        calls.append([example.name for example in batch])
        return compute(backbone, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(learning, "summed_loss", spoilt)
    recipe = quick(steps=5, schedule="constant", warmup=0)
    with pytest.raises(ModelError, match="Step 3: the loss is nan, with the items") as caught:
        tuned(opener, data, tmp_path / "spoilt", recipe, val_share=0)
    assert all(name in str(caught.value) for name in calls[2])
    monkeypatch.undo()
    tuned(opener, data, tmp_path / "short", replace(recipe, steps=2), val_share=0)
    good = tmp_path / "spoilt" / "training" / "last-good"
    one, other = load_file(good / WEIGHTS), load_file(tmp_path / "short" / WEIGHTS)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert opener(device="cpu", adapter=str(good)).adapter is not None


def test_lack_of_memory_names_a_recipe_that_fits(opener, data, tmp_path, monkeypatch):
    def exhausted(_backbone, _batch):
        message = "CUDA out of memory. Tried to allocate 2.00 GiB."
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr(learning, "summed_loss", exhausted)
    with pytest.raises(
        WorkerError, match=r"ran out of memory \(.*2\.00 GiB\.\)\. The recipe published .* --recipe light \(about"
    ):
        tuned(opener, data, tmp_path / "adapter", quick())


def test_float16_is_refused(opener, data, tmp_path):
    with pytest.raises(ModelError, match=r"gradients in float16 .* --dtype bfloat16"):
        run_tuning(
            data, opener(device="cpu", dtype="float16"), tmp_path / "a", TuningSettings(recipe=quick()), opener=opener
        )


def test_two_processes_give_the_numbers_of_one(opener, data, tmp_path):
    """Three micro-batches per step, two of them on the first process, with dropout.

    AdamW turns a gradient of 0 but for rounding, as that of the biases of keys, into a whole step of any sign. So a few
    weights may differ; losses, norms and all other weights may not.
    """
    recipe = quick(dropout=0.2, steps=2, batch_size=3, micro_batch=1, validations=1)
    for devices in (1, 2):
        tuned(opener, data, tmp_path / str(devices), recipe, devices=devices)
    for one, other in zip(*(curves(tmp_path / name) for name in "12"), strict=True):
        for name in ("loss", "grad_norm", "validation_loss", "word_accuracy"):
            assert bool(one[name]) == bool(other[name])
            assert not one[name] or float(one[name]) == pytest.approx(float(other[name]), rel=1e-5)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in "12")
    close = torch.cat([torch.isclose(one[name], other[name], rtol=1e-4, atol=2e-5).flatten() for name in one])
    assert close.float().mean() > 0.999


def test_tensorboard_must_be_there(opener, data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ConfigError, match="pip install 'agiqa\\[tensorboard\\]'"):
        tuned(opener, data, tmp_path / "adapter", recipe_of("published"), tensorboard=True)
