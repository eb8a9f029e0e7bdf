"""Planning without pixels beside loading and writing: the same bytes as one after the other, and errors in their order."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import partial

import numpy as np
import pytest
from PIL import Image

from agiqa.errors import DataError, ModelError, WorkerError
from agiqa.extract import ExtractionSettings, LengthRule, open_backbone, run_extraction
from agiqa.extract.filling.crew import Crew
from agiqa.extract.filling.engines import ModelProcess, OnDevices
from agiqa.extract.filling.plan import tokenise
from agiqa.extract.models.ahead import Ahead
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.preparing import Preparation
from agiqa.store import open_store, verify
from agiqa.workers import ABANDONED
from tests.extract.jobs import extract, inputs
from tests.extract.small_sets import write_set, write_talks
from tests.extract.tiny_minicpm import write_minicpm_checkpoint

SIZES = [(64, 50), (30, 20), (300, 40), (40, 300), (64, 64), (200, 200), (8, 8), (57, 56)]


@pytest.fixture(scope="module")
def tiny_minicpm_checkpoint(tmp_path_factory):
    return write_minicpm_checkpoint(tmp_path_factory.mktemp("minicpm") / "tiny")


def save_other_kind(image, path, kind):
    """Under a name that says PNG, for Pillow goes by the content."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]}
    kinds = [
        lambda: image.save(path, "JPEG", exif=exif),
        lambda: image.convert("CMYK").save(path, "JPEG"),
        lambda: image.convert("P").save(path, transparency=0),
        lambda: image.convert("RGBA").save(path, exif=exif),
        lambda: Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257).save(path),
        lambda: image.save(path, "GIF", **frames),
        lambda: image.save(path, "WEBP", **frames),
        lambda: image.save(path, "TIFF"),
    ]
    kinds[kind]()


def save_odd_images(folder):
    """Images of many sizes, modes and turns under the names of a small set; two of each size, and animations."""
    noise, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    for position in range(24):
        width, height = SIZES[position // 2 % len(SIZES)]
        image = Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8))
        path = folder / "images" / f"{position:03d}.png"
        if position >= 16:
            save_other_kind(image, path, position - 16)
        else:
            image.save(path, **({"exif": exif} if position % 4 == 3 else {}))


@pytest.fixture(scope="module")
def odd_set(tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("sets") / "odd", 24, images=True)
    write_talks(folder)
    save_odd_images(folder)
    return folder


def objects_of(path):
    manifest = json.loads((path / "MANIFEST.json").read_text())
    return {entry["path"]: entry["sha256"] for entry in manifest["objects"]}


@pytest.mark.parametrize("family", ["tiny_minicpm_checkpoint", "tiny_vision_checkpoint"])
def test_a_plan_by_sizes_is_the_plan_of_full_preparation(family, odd_set, request):
    checkpoint = request.getfixturevalue(family)
    data_set, backbone = inputs(odd_set, checkpoint)
    assert all(item.checked_size is not None for item in data_set.items)
    planned = tokenise(data_set, backbone, LengthRule())
    for item, one in zip(data_set.items, planned.tokenised, strict=True):
        whole = backbone.prepare(item.conversation, item.image)
        np.testing.assert_array_equal(one.token_ids, whole.token_ids)
        np.testing.assert_array_equal(one.roles, whole.roles)


def test_a_store_planned_by_sizes_has_the_bytes_of_one_prepared_in_full(
    odd_set, tiny_minicpm_checkpoint, tmp_path, monkeypatch
):
    fast = extract(odd_set, tiny_minicpm_checkpoint, tmp_path / "fast.agiqa").store
    backbone = type(inputs(odd_set, tiny_minicpm_checkpoint)[1])
    monkeypatch.setattr(backbone, "outline", HuggingFaceBackbone.outline)
    slow = extract(odd_set, tiny_minicpm_checkpoint, tmp_path / "slow.agiqa").store
    assert objects_of(fast.path) == objects_of(slow.path)
    assert fast.id == slow.id


def test_tokens_that_differ_from_the_plan_end_the_fill_and_name_the_item(
    odd_set, tiny_minicpm_checkpoint, tmp_path, monkeypatch
):
    backbone = type(inputs(odd_set, tiny_minicpm_checkpoint)[1])
    right = backbone.outline

    def wrong(self, conversation, image, **options):
        outline = right(self, conversation, image, **options)
        if str(image).endswith("005.png"):
            outline.token_ids[-1] = 0
        return outline

    monkeypatch.setattr(backbone, "outline", wrong)
    with pytest.raises(DataError, match=r"item '005\.png' has changed since the store was planned"):
        extract(odd_set, tiny_minicpm_checkpoint, tmp_path / "s.agiqa")


class Meeting:
    """A load that begins, then waits until the plan has failed or ended."""

    def __init__(self, backbone, monkeypatch, *, error=None):
        self.begun, self.error, self.loads = threading.Event(), error, 0
        self._load = backbone.load
        monkeypatch.setattr(backbone, "load", self.load)

    def load(self):
        self.loads += 1
        self.begun.set()
        if self.error is not None:
            raise self.error
        self._load()


def run(data_set, backbone, path, **settings):
    return run_extraction(data_set, backbone, path, ExtractionSettings(device="cpu", **settings))


def test_a_plan_that_fails_beside_a_load_is_the_error(odd_set, tiny_minicpm_checkpoint, tmp_path, monkeypatch):
    data_set, backbone = inputs(odd_set, tiny_minicpm_checkpoint)
    meeting = Meeting(backbone, monkeypatch, error=ModelError("no such weights"))
    before = set(threading.enumerate())
    with pytest.raises(DataError, match="24 problems"):
        run(data_set, backbone, tmp_path / "s.agiqa", length=LengthRule(max_tokens=3))
    assert meeting.begun.is_set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    assert not (tmp_path / "s.agiqa").exists()


def test_a_load_that_fails_beside_a_plan_is_the_error_and_the_plan_is_kept(
    odd_set, tiny_minicpm_checkpoint, tmp_path, monkeypatch
):
    data_set, backbone = inputs(odd_set, tiny_minicpm_checkpoint, variant="no_id")  # without views to try out
    Meeting(backbone, monkeypatch, error=ModelError("no such weights"))
    path = tmp_path / "s.agiqa"
    with pytest.raises(ModelError, match="no such weights"):
        run(data_set, backbone, path, variant="no_id")
    monkeypatch.undo()
    assert open_store(path, allow_partial=True).committed_units() == []
    assert verify(extract(odd_set, tiny_minicpm_checkpoint, path, variant="no_id").store, "full").sound


def test_the_model_loads_while_the_data_set_is_read(odd_set, tiny_minicpm_checkpoint, tmp_path, monkeypatch):
    data_set, backbone = inputs(odd_set, tiny_minicpm_checkpoint)
    meeting = Meeting(backbone, monkeypatch)
    began_first = []

    def read():
        began_first.append(meeting.begun.wait(60))
        return data_set

    result = run(read, backbone, tmp_path / "s.agiqa")
    assert began_first == [True]
    assert "check" in result.seconds
    expected = extract(odd_set, tiny_minicpm_checkpoint, tmp_path / "expected.agiqa").store
    assert objects_of(result.store.path) == objects_of(expected.path)


@pytest.mark.parametrize("devices", [None, 2])
def test_a_data_set_that_cannot_be_read_beside_a_load_is_the_error(devices, odd_set, tiny_minicpm_checkpoint, tmp_path):
    backbone = inputs(odd_set, tiny_minicpm_checkpoint)[1]

    def read():
        message = "no such images"
        raise DataError(message)

    settings = ExtractionSettings(device="cpu", devices=devices)
    opener = partial(open_backbone, str(tiny_minicpm_checkpoint))
    with pytest.raises(DataError, match="no such images"):
        run_extraction(read, backbone, tmp_path / "s.agiqa", settings, opener=opener)
    assert not (tmp_path / "s.agiqa").exists()


def test_nothing_is_loaded_for_a_plan_or_a_finished_store(odd_set, tiny_minicpm_checkpoint, tmp_path, monkeypatch):
    extract(odd_set, tiny_minicpm_checkpoint, tmp_path / "done.agiqa")
    data_set, backbone = inputs(odd_set, tiny_minicpm_checkpoint)
    meeting = Meeting(backbone, monkeypatch)
    run(data_set, backbone, tmp_path / "done.agiqa")
    run(data_set, backbone, tmp_path / "plan.agiqa", plan_only=True)
    assert meeting.loads == 0


def test_processes_that_cannot_load_end_with_their_own_error(odd_set, tiny_minicpm_checkpoint, tmp_path):
    data_set, backbone = inputs(odd_set, tiny_minicpm_checkpoint)
    opener = partial(opened_without_weights, tiny_minicpm_checkpoint)
    settings = ExtractionSettings(device="cpu", devices=2)
    with pytest.raises(ModelError, match="no such weights") as caught:
        run_extraction(data_set, backbone, tmp_path / "s.agiqa", settings, opener=opener)
    assert caught.value.__notes__[-1] in ("in process 0 on cpu", "in process 1 on cpu")


def opened_without_weights(checkpoint, *, device):
    backbone = open_backbone(str(checkpoint), device=device)

    def load():
        message = "no such weights"
        raise ModelError(message)

    backbone.load = load
    return backbone


def test_a_block_that_fails_waits_for_no_thread_but_for_one_that_finishes():
    gate, done = threading.Event(), []

    def work():
        gate.wait()
        done.append(True)

    message = "first"
    with pytest.raises(ValueError, match="first"), Ahead(work):
        raise ValueError(message)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == ABANDONED]
    assert not done
    gate.set()
    thread.join()
    with pytest.raises(ValueError, match="first"), Ahead(work, finishes=True):
        raise ValueError(message)
    assert len(done) == 2
    with Ahead(partial(int, "no number")) as ahead, pytest.raises(ValueError, match="invalid literal"):
        ahead.result()


FOREVER = """
import sys, threading
from unittest.mock import patch
from agiqa.cli import main
from agiqa.extract.models.huggingface import HuggingFaceBackbone
with patch.object(HuggingFaceBackbone, "load", lambda self: threading.Event().wait()):
    main(sys.argv[1:])
"""


@pytest.fixture
def ctrl_c_interrupts():
    """Also where the tests run in the background of a shell, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_while_a_result_is_awaited_leaves_the_thread_alone():
    main, go_on = threading.main_thread().ident, threading.Event()

    def interrupt():
        waits = False
        while not waits:
            found = sys._current_frames()[main]
            waits = any(frame.f_code.co_name == "result" for frame, _ in traceback.walk_stack(found))
        signal.pthread_kill(main, signal.SIGINT)
        go_on.wait()

    with pytest.raises(KeyboardInterrupt), Ahead(interrupt) as ahead:
        ahead.result()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == ABANDONED]
    go_on.set()
    thread.join()


def test_a_command_whose_plan_fails_does_not_wait_for_its_load(odd_set, tiny_minicpm_checkpoint, tmp_path):
    arguments = ["extract", odd_set, tmp_path / "s.agiqa", "--model", tiny_minicpm_checkpoint, "--device", "cpu"]
    asked = [*map(str, arguments), "--conversations", str(odd_set / "talks.json"), "--max-tokens", "3"]
    command = [sys.executable, "-W", "ignore", "-c", FOREVER, *asked]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "24 problems" in ended.stderr


def test_a_plan_that_fails_ends_the_processes_that_load(odd_set, tiny_minicpm_checkpoint, tmp_path):
    data_set, backbone = inputs(odd_set, tiny_minicpm_checkpoint)
    settings = ExtractionSettings(device="cpu", devices=2, length=LengthRule(max_tokens=3))
    opener = partial(open_backbone, str(tiny_minicpm_checkpoint))
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="24 problems"), Crew(2, on_cpu=False) as crew:  # noqa: PT012
        processes = set(multiprocessing.active_children()) - before
        assert len(processes) == 2
        run_extraction(data_set, backbone, tmp_path / "s.agiqa", settings, opener=opener, crew=crew)
    assert not any(process.is_alive() for process in processes)


def die_at_first(here, _advance, *, note, times):
    """A task that kills its process the first `times` times."""
    died = note.read_text() if note.exists() else ""
    if len(died) < times:
        note.write_text(died + "x")
        os.kill(os.getpid(), signal.SIGKILL)
    return here.backbone.hidden_size


def test_a_task_whose_process_dies_is_given_to_another_once(tiny_text_checkpoint, tmp_path, capsys):
    opener = partial(open_backbone, str(tiny_text_checkpoint))
    process = ModelProcess(opener=opener, device="cpu", workers=0, processes=2, batch_size=1)
    with Crew(2, on_cpu=True) as crew:
        crew.open(process, ["cpu", "cpu"], items=0)
        engine = OnDevices(process=process, devices=["cpu", "cpu"], crew=crew)
        task = partial(die_at_first, note=tmp_path / "once", times=1)
        width = open_backbone(str(tiny_text_checkpoint)).hidden_size
        assert engine.run(task, items=0, advance=lambda _items: None) == width
        assert "process 0 on cpu was killed by signal 9; another one tries" in capsys.readouterr().err
        task = partial(die_at_first, note=tmp_path / "twice", times=2)
        with pytest.raises(WorkerError, match=r"process 0 on cpu was killed by signal 9, as another one had before"):
            engine.run(task, items=0, advance=lambda _items: None)


class OpensLater:
    """Opens a backbone in a worker only once a file is there."""

    def __init__(self, checkpoint, gate):
        self.checkpoint, self.gate = checkpoint, gate

    def __call__(self, *, device):
        while not self.gate.exists():
            time.sleep(0.01)
        return open_backbone(str(self.checkpoint), device=device)


def test_this_process_prepares_checked_images_while_its_workers_start(odd_set, tiny_minicpm_checkpoint, tmp_path):
    data_set, backbone = inputs(odd_set, tiny_minicpm_checkpoint)
    gate = tmp_path / "gate"
    opener = OpensLater(tiny_minicpm_checkpoint, gate)
    alone = tokenise(data_set, backbone, LengthRule())
    with Preparation(backbone, workers=2, opener=opener) as preparation:
        here = tokenise(data_set, backbone, LengthRule(), preparation=preparation)
        assert not gate.exists()
        gate.touch()
        assert set(preparation.each(own_id, [1, 2])) & {os.getpid()} == set()
        there = tokenise(data_set, backbone, LengthRule(), preparation=preparation)
    for found in (here, there):
        for one, expected in zip(found.tokenised, alone.tokenised, strict=True):
            np.testing.assert_array_equal(one.token_ids, expected.token_ids)
            assert one.key == expected.key


def own_id(_backbone, _argument):
    return os.getpid()


def test_workers_that_never_start_hold_up_no_end(odd_set, tiny_minicpm_checkpoint, tmp_path):
    _, backbone = inputs(odd_set, tiny_minicpm_checkpoint)
    with Preparation(
        backbone, workers=2, opener=OpensLater(tiny_minicpm_checkpoint, tmp_path / "never")
    ) as preparation:
        assert list(preparation.each(own_id, [1, 2], is_safe=bool)) == [os.getpid()] * 2
