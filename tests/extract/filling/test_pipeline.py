"""Stores filled with workers, threads and several processes: the same bytes, the same errors, nothing lost."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, DataError, WorkerError
from agiqa.extract import ExtractionSettings, LengthRule, open_backbone, run_extraction
from agiqa.extract.filling import crew
from agiqa.extract.filling.engines import ModelProcess, OnDevices, striped
from agiqa.extract.filling.plan import prepare_planned, tokenise
from agiqa.extract.filling.staging import coordinates_on_device
from agiqa.extract.filling.targets import Target
from agiqa.extract.models import preparing
from agiqa.extract.models.batches import BatchRunner, even_batches
from agiqa.extract.models.checkpoints import resolve_checkpoint
from agiqa.extract.models.huggingface import TextBackbone
from agiqa.extract.models.loading import load_config
from agiqa.extract.models.opening import devices_of_host
from agiqa.extract.models.preparing import Preparation
from agiqa.store import UnitWriter, make_basis, moments_of, open_store, verify
from tests.extract.jobs import extract, inputs
from tests.extract.small_sets import write_set, write_talks


def fill_set(folder, count=12):
    folder = write_set(folder, count, images=True)
    write_talks(folder)
    return folder


def objects_of(path):
    manifest = json.loads((path / "MANIFEST.json").read_text())
    return {entry["path"]: entry["sha256"] for entry in manifest["objects"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return fill_set(tmp_path_factory.mktemp("sets") / "pictures")


@pytest.fixture(scope="module")
def plain(pictures, tiny_vision_checkpoint, tmp_path_factory):
    return extract(pictures, tiny_vision_checkpoint, tmp_path_factory.mktemp("stores") / "plain.agiqa").store


def test_devices_and_workers_change_no_byte(pictures, tiny_vision_checkpoint, tmp_path):
    path, options = tmp_path / "s.agiqa", {"encoding": "sketch", "rank": 6}
    half = extract(pictures, tiny_vision_checkpoint, path, devices=2, workers=1, part=(2, 2), **options)
    assert half.store.committed_units() == list(range(1, half.store.geometry.units, 2))
    assert half.fill is not None
    assert half.fill.units == len(half.store.committed_units())
    whole = extract(pictures, tiny_vision_checkpoint, path, workers=1, **options).store
    alone = extract(pictures, tiny_vision_checkpoint, tmp_path / "alone.agiqa", **options).store
    assert objects_of(whole.path) == objects_of(alone.path)
    assert verify(whole, "numeric").sound


def planned_items(folder, checkpoint):
    data_set, backbone = inputs(folder, checkpoint)
    tokenised = tokenise(data_set, backbone, LengthRule())
    return backbone, tokenised.planned


def opener_of(checkpoint):
    return partial(open_backbone, str(checkpoint))


def test_workers_prepare_what_this_process_would_and_name_what_is_bad(tiny_vision_checkpoint, tmp_path, monkeypatch):
    folder = fill_set(tmp_path / "set", 6)
    backbone, planned = planned_items(folder, tiny_vision_checkpoint)
    own = list(Preparation(backbone).each(prepare_planned, planned))
    (folder / "images" / "005.png").write_bytes(b"no image")
    for shared_bytes in (1 << 60, 0):  # by value, then through shared memory
        monkeypatch.setattr(preparing, "_SHARED_BYTES", shared_bytes)
        with Preparation(backbone, workers=1, opener=opener_of(tiny_vision_checkpoint)) as preparation:
            for found, expected in zip(preparation.each(prepare_planned, planned[:5]), own[:5], strict=True):
                np.testing.assert_array_equal(found.token_ids, expected.token_ids)
                assert torch.equal(found.inputs["pixel_values"], expected.inputs["pixel_values"])
            with pytest.raises(DataError, match=r"005\.png: the image file was replaced or changed") as caught:
                list(preparation.each(prepare_planned, planned))
            assert caught.value.__notes__ == ["while reading item '005.png'"]
            with pytest.raises(WorkerError, match="fewer --prepare-workers"):
                list(preparation.each(die, [1, 2, 3]))


def die(_backbone, _number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_devices_name_an_item_that_fails_and_keep_what_is_finished(tiny_vision_checkpoint, tmp_path):
    folder, path = fill_set(tmp_path / "set"), tmp_path / "s.agiqa"
    extract(folder, tiny_vision_checkpoint, path, plan_only=True)
    store, (_, planned) = open_store(path, allow_partial=True), planned_items(folder, tiny_vision_checkpoint)
    picture = folder / "images" / "005.png"
    content = picture.read_bytes()
    picture.unlink()
    process = ModelProcess(opener=opener_of(tiny_vision_checkpoint), device="cpu", workers=0, processes=2, batch_size=1)
    engine = OnDevices(process=process, devices=["cpu", "cpu"])
    with pytest.raises(DataError, match=r"005\.png: no such image") as caught:
        engine.fill(store, planned, Target(encoding="hidden"), part=(1, 1), advance=lambda _items: None)
    assert caught.value.__notes__[0] == "while reading item '005.png'"
    assert "on cpu" in caught.value.__notes__[-1]
    picture.write_bytes(content)
    store = extract(folder, tiny_vision_checkpoint, path).store
    assert verify(store, "full").sound


class OpenerThatMeets:
    """Unpickling it waits until two processes have begun to unpickle theirs."""

    def __init__(self, folder, checkpoint):
        self.arguments = folder, checkpoint

    def __reduce__(self):
        return opener_after_meeting, self.arguments


def opener_after_meeting(folder, checkpoint):
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < until, "the other process has not started"
        time.sleep(0.01)
    return opener_of(checkpoint)


def test_a_process_that_is_slow_to_start_keeps_no_other_from_starting(tiny_vision_checkpoint, tmp_path):
    folder, path, meeting = fill_set(tmp_path / "set"), tmp_path / "s.agiqa", tmp_path / "meeting"
    meeting.mkdir()
    extract(folder, tiny_vision_checkpoint, path, plan_only=True)
    _, planned = planned_items(folder, tiny_vision_checkpoint)
    larger_than_a_pipe = "x" * (1 << 20)
    items = [replace(one, item=replace(one.item, description=larger_than_a_pipe)) for one in planned]
    opener = OpenerThatMeets(meeting, tiny_vision_checkpoint)
    process = ModelProcess(opener=opener, device="cpu", workers=0, processes=2, batch_size=1)
    engine = OnDevices(process=process, devices=["cpu", "cpu"])
    store = open_store(path, allow_partial=True)
    report = engine.fill(store, items, Target(encoding="hidden"), part=(1, 1), advance=lambda _items: None)
    assert report.items == len(items)


def half_a_message(connection, *_):
    """The main function of a process that is killed while it sends."""
    os.write(connection.fileno(), (1000).to_bytes(4, "big") + b"the beginning")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_within_a_message_is_one_that_died(tiny_vision_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "_begin", half_a_message)
    folder, path = fill_set(tmp_path / "set"), tmp_path / "s.agiqa"
    extract(folder, tiny_vision_checkpoint, path, plan_only=True)
    with pytest.raises(WorkerError, match=r"process 0 on cpu was killed by signal 9.* units are left"):
        extract(folder, tiny_vision_checkpoint, path, devices=2)


def test_a_killed_device_process_costs_no_unit(tiny_vision_checkpoint, tmp_path):
    folder, path, killed = fill_set(tmp_path / "set", 60), tmp_path / "s.agiqa", []

    def kill_one():
        while not killed:
            for record in (path / "commits").glob("[0-9]*.json"):
                killed.append(int(json.loads(record.read_text())["worker"].split(":")[1]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.001)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    # unless the other one was through before, it does the rest; else that is reported
    with suppress(WorkerError):
        extract(folder, tiny_vision_checkpoint, path, devices=2, batch_size=1)
    killer.join()
    store = extract(folder, tiny_vision_checkpoint, path).store
    workers = {json.loads(record.read_text())["worker"] for record in (path / "commits").glob("[0-9]*.json")}
    assert f"{os.uname().nodename}:{killed[0]}" in workers
    assert len(workers) >= 2
    assert verify(store, "full").sound


def test_a_killed_run_takes_its_processes_with_it(agiqa, tiny_vision_checkpoint, tmp_path):
    folder, path = fill_set(tmp_path / "set", 40), tmp_path / "s.agiqa"
    options = ("--model", tiny_vision_checkpoint, "--conversations", folder / "talks.json", "--device", "cpu")
    command = ("extract", folder, path, *options, "--batch-size", 1, "--devices", 2, "--prepare-workers", 0)
    outcome = agiqa.killed(*command, when=lambda: any((path / "commits").glob("[0-9]*.json")))
    assert outcome.code in (-9, 0)
    record = next((path / "commits").glob("[0-9]*.json"))
    process = int(json.loads(record.read_text())["worker"].split(":")[1])
    until = time.monotonic() + 20
    while Path(f"/proc/{process}/cmdline").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not Path(f"/proc/{process}/cmdline").exists()
    assert agiqa(*command, "--devices", 1, "--json").json["state"] == "complete"
    assert verify(open_store(path), "full").sound


def test_workers_without_an_opener_are_refused(pictures, tiny_vision_checkpoint):
    _, backbone = inputs(pictures, tiny_vision_checkpoint)
    with pytest.raises(ConfigError, match="Worker processes need an `opener` that opens the backbone again"):
        Preparation(backbone, workers=2)


def test_a_write_that_fails_stops_the_run_and_costs_no_other_unit(pictures, tiny_vision_checkpoint, tmp_path):
    path, plain = tmp_path / "s.agiqa", tmp_path / "plain.agiqa"
    for planned in (path, plain):
        extract(pictures, tiny_vision_checkpoint, planned, plan_only=True)
    store = open_store(path, allow_partial=True)
    blocked = store.layout.features_object(4).parent
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file where a folder must be")
    with pytest.raises(OSError, match="Not a directory") as caught:
        extract(pictures, tiny_vision_checkpoint, path)
    assert any("writing unit 4" in note for note in caught.value.__notes__)
    finished = store.committed_units()
    assert set(range(4)) <= set(finished)
    assert 4 not in finished
    blocked.unlink()
    for planned in (path, plain):
        extract(pictures, tiny_vision_checkpoint, planned)
    assert objects_of(path) == objects_of(plain)


class SmallDevice(TextBackbone):
    """A text model on a device whose memory holds `most` items."""

    most = 2
    seen: list[int]

    def layer_states(self, batch, layers):
        self.seen.append(len(batch))
        if len(batch) > self.most:
            message = "tried to allocate 1 TiB"
            raise torch.OutOfMemoryError(message)
        return super().layer_states(batch, layers)


def small_device(checkpoint, most):
    found = resolve_checkpoint(str(checkpoint))
    backbone = SmallDevice(found, load_config(found), dtype="auto", device="cpu")
    backbone.most, backbone.seen = most, []
    return backbone


@pytest.mark.parametrize("encoding", ["hidden", "sketch"])
def test_a_batch_that_does_not_fit_is_halved_once_and_for_all(encoding, tiny_text_checkpoint, tmp_path, capsys):
    folder = write_set(tmp_path / "set", 64)
    write_talks(folder)
    data_set, _ = inputs(folder, tiny_text_checkpoint)
    backbone = small_device(tiny_text_checkpoint, 2)
    rank = 6 if encoding == "sketch" else None
    settings = ExtractionSettings(encoding=encoding, rank=rank, batch_size=16)
    result = run_extraction(data_set, backbone, tmp_path / "s.agiqa", settings)
    assert verify(result.store, "numeric").sound
    assert sum(size for size in backbone.seen if size <= 2) >= 64
    fill = backbone.seen[backbone.seen.index(2) :] if encoding == "hidden" else []
    assert all(size <= 2 for size in fill)
    assert "not enough memory for a batch of" in capsys.readouterr().err
    assert result.fill is not None
    assert result.fill.batch_size <= 2


def test_an_item_that_does_not_fit_alone_is_named(tiny_text_checkpoint, tmp_path):
    folder = write_set(tmp_path / "set", 4)
    write_talks(folder)
    data_set, _ = inputs(folder, tiny_text_checkpoint)
    backbone = small_device(tiny_text_checkpoint, 0)
    with pytest.raises(WorkerError, match=r"not enough memory for item '00\d\.png' \(\d+ tokens\), even alone"):
        run_extraction(data_set, backbone, tmp_path / "s.agiqa", ExtractionSettings())


def test_batches_hold_items_of_like_length_and_are_of_like_size():
    batches = even_batches([5, 1, 9, 2, 7, 3, 8, 4, 6], 4)
    assert batches == [[1, 3, 5], [7, 0, 8], [4, 6, 2]]
    assert even_batches([], 4) == []
    runner, seen = BatchRunner(4), []
    runner.run(lambda piece: seen.append(list(piece)), list(range(9)), name=str)
    assert [len(piece) for piece in seen] == [3, 3, 3]
    assert list(chain.from_iterable(seen)) == list(range(9))


def test_units_that_another_run_holds_are_counted_once(pictures, tiny_vision_checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    store = extract(pictures, tiny_vision_checkpoint, path, plan_only=True).store
    units = store.geometry.units
    with UnitWriter(store).claim(units - 1) as mine:
        assert mine
        there = extract(pictures, tiny_vision_checkpoint, path, devices=2, workers=0).fill
    assert there is not None
    assert (there.units, there.busy_units) == (units - 1, 1)


def test_more_gpus_than_there_are_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"torch sees \d+ CUDA devices\. Give fewer; .*CUDA_VISIBLE_DEVICES"):
        devices_of_host(torch.device("cuda"), 99)


def test_processes_begin_apart_and_end_with_each_others_units():
    orders = [striped([3, 4, 5, 6, 7], process, 2) for process in range(2)]
    assert orders == [[3, 5, 7, 6, 4], [4, 6, 7, 5, 3]]


def test_a_sketch_of_a_device_is_that_of_the_host():
    random = np.random.default_rng(0)
    hidden = random.standard_normal((300, 64)).astype(np.float32)
    weight = random.standard_normal((200, 64)).astype(np.float32)
    basis = make_basis(weight, moments_of([hidden], 64), rank=16, lm_head_sha256="-", calibration="-")
    for dtype in (torch.float32, torch.bfloat16):
        states = torch.from_numpy(hidden).to(dtype)
        found = coordinates_on_device(states, torch.from_numpy(basis.map)).numpy()
        own = states.double().numpy() @ basis.map.astype(np.float64).T
        assert np.abs(found - own).max() < 3e-6 * np.abs(own).max()
        assert np.abs(basis.coordinates(states.float().numpy()) - own).max() < 3e-6 * np.abs(own).max()
