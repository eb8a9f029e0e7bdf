"""Worker processes that really crash, hang, stop or are killed: errors name the question, and no thread waits for ever."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from agiqa import workers
from agiqa.errors import DataError, ModelError, WorkerError
from agiqa.extract import LengthRule, load_data_set, open_backbone
from agiqa.extract.data.datasets import items_of_images
from agiqa.extract.filling import crew
from agiqa.extract.filling.engines import Here
from agiqa.extract.filling.plan import store_plan, tokenise
from agiqa.extract.filling.targets import Target
from agiqa.extract.models.preparing import Preparation
from agiqa.store import create_store, verify
from agiqa.workers import MODULES_TO_PREPARE_ITEMS, LostAnswer, Workers, context_of_processes
from tests.extract.jobs import extract, inputs
from tests.extract.small_sets import write_set, write_talks


def gone(process: int) -> bool:
    """Whether the process has ended, even if its parent has not waited for it yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def answers():
    return lambda function, argument: function(argument)


@pytest.fixture
def pool():
    pool = Workers(multiprocessing.get_context("fork"), answers)
    yield pool
    pool.close()


def end_self(number):
    faulthandler.disable()  # pytest's, which would write a page about each crash
    os.kill(os.getpid(), number)


def signal_self(number, note, _argument=None):
    with note.open("a") as file:
        file.write(f"{os.getpid()}\n")
    end_self(number)
    return "survived"


def own_id(_argument):
    return os.getpid()


def noted(note):
    return [int(line) for line in note.read_text().split()]


def killed_the_first_time(note):
    return "second" if note.exists() else signal_self(signal.SIGKILL, note)


def test_a_crash_is_told_with_its_signal_and_costs_no_other_answer(pool, tmp_path):
    assert pool.ask(abs, -1) == 1
    with pytest.raises(LostAnswer, match=r"^was ended by SIGSEGV$") as caught:
        pool.ask(partial(signal_self, signal.SIGSEGV), tmp_path / "note")
    assert not caught.value.blameless
    assert len(set(noted(tmp_path / "note"))) == 2
    with pytest.raises(LostAnswer, match="ended with exit code 3"):
        pool.ask(os._exit, 3)
    with pytest.raises(LostAnswer, match="SIGKILL") as caught:
        pool.ask(partial(signal_self, signal.SIGKILL), tmp_path / "note")
    assert caught.value.blameless
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(partial(pool.ask, abs), [-2, -3, -4, -5])) == [2, 3, 4, 5]


def test_a_process_killed_once_costs_nothing(pool, tmp_path):
    assert pool.ask(killed_the_first_time, tmp_path / "note") == "second"


@pytest.mark.parametrize("argument", [b"", bytes(1 << 20)], ids=["", "larger than a pipe"])
def test_a_stopped_or_hung_process_is_killed_in_time(tmp_path, monkeypatch, argument):
    monkeypatch.setattr(workers, "SECONDS_TO_ANSWER", 0.3)
    pool = Workers(multiprocessing.get_context("fork"), answers)
    stopped = pool.ask(own_id, None) if argument else None
    if stopped:
        os.kill(stopped, signal.SIGSTOP)
        assert pool.ask(len, argument) == len(argument)  # the second process answers
        assert gone(stopped)
    else:
        with pytest.raises(LostAnswer, match=r"^took longer than 0\.3 s$"):
            pool.ask(partial(signal_self, signal.SIGSTOP), tmp_path / "note")
        assert all(gone(process) for process in noted(tmp_path / "note"))
        with pytest.raises(LostAnswer, match=r"^took longer than 0\.3 s$"):
            pool.ask(time.sleep, 60)
    pool.close()


def test_closing_ends_stopped_busy_and_idle_processes_at_once(pool, tmp_path):
    idle, note = pool.ask(own_id, None), tmp_path / "note"
    with ThreadPoolExecutor(2) as threads:
        busy = threads.submit(pool.ask, time.sleep, 600)
        stopped = threads.submit(pool.ask, partial(signal_self, signal.SIGSTOP), note)
        while not note.exists():
            time.sleep(0.01)
        pool.close()
        for future in (busy, stopped):
            with pytest.raises(LostAnswer):
                future.result()
    assert gone(idle)
    assert all(gone(process) for process in noted(note))


def test_a_stopped_fork_server_hangs_neither_a_question_nor_the_end(monkeypatch):
    monkeypatch.setattr(workers, "SECONDS_TO_ANSWER", 20.0)
    pool = Workers(context_of_processes(MODULES_TO_PREPARE_ITEMS), answers)
    server = pool.ask(parent_id, None)
    assert server != os.getpid()
    with ThreadPoolExecutor(2) as threads:
        sleeping = threads.submit(pool.ask, time.sleep, 1)
        os.kill(server, signal.SIGSTOP)
        assert threads.submit(pool.ask, abs, -1).result(timeout=30) == 1  # by a second process, which it forks
        assert sleeping.result(timeout=30) is None
    os.kill(server, signal.SIGSTOP)
    pool.close()
    assert state_of(server) != "T"


def parent_id(_argument):
    return os.getppid()


def state_of(process):
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


KILLED_RUN = """
import multiprocessing, os, signal
from agiqa.workers import Workers

def answers():
    return lambda function, argument: function(argument)

if __name__ == "__main__":
    worker = Workers(multiprocessing.get_context("forkserver"), answers).ask(eval, "__import__('os').getpid()")
    os.kill(worker, signal.SIGSTOP)
    print(worker, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_stopped_worker_of_a_killed_run_ends(tmp_path):
    (tmp_path / "run.py").write_text(KILLED_RUN)
    run = subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    until = time.monotonic() + 20
    while not gone(worker) and time.monotonic() < until:
        time.sleep(0.01)
    run.stdout.close()
    assert run.wait() == -signal.SIGKILL
    assert gone(worker)


def fails_to_begin():
    message = "no such model"
    raise ModelError(message)


def test_what_fails_at_the_start_is_told_as_that():
    pool = Workers(multiprocessing.get_context("fork"), fails_to_begin)
    with pytest.raises(ModelError, match="no such model"):
        pool.ask(abs, -1)
    pool.close()
    pool = Workers(multiprocessing.get_context("fork"), partial(os._exit, 3))
    with pytest.raises(WorkerError, match=r"A worker process ended with exit code 3 before it had begun\. Run"):
        pool.ask(abs, -1)
    pool.close()


class CrashingImage(ImageFile.ImageFile):
    """A format whose decoder crashes, as faulty C code does."""

    format = "CRASH"

    def _open(self):
        self._size, self._mode = (4, 4), "RGB"

    def load(self):
        end_self(signal.SIGSEGV)


@pytest.fixture
def crashing_format():
    Image.init()
    Image.register_open("CRASH", CrashingImage, lambda prefix: prefix.startswith(b"CRASH"))
    yield b"CRASH and more"
    Image.ID.remove("CRASH")
    del Image.OPEN["CRASH"]


def test_an_image_that_crashes_its_decoder_is_a_bad_item(tmp_path, crashing_format):
    folder = write_set(tmp_path / "set", 5, images=True)
    write_talks(folder)
    for name in ("001.png", "003.png"):
        (folder / "images" / name).write_bytes(crashing_format)
    with pytest.raises(DataError, match="2 problems") as caught:
        load_data_set(folder, images=True)
    assert "001.png (data.csv, line 3): " in str(caught.value)
    assert "003.png: the process that decoded it was ended by SIGSEGV, twice; replace the file" in str(caught.value)
    found = load_data_set(folder, images=True, on_bad_item="skip")
    assert [item.name for item in found.items] == ["000.png", "002.png", "004.png"]
    assert ["SIGSEGV" in line for line in found.skipped] == [True, True]
    fine, crashing = folder / "images" / "000.png", folder / "images" / "003.png"
    items, problems = items_of_images([fine, crashing], prompt="a cat", table=None)
    assert [item.image for item in items] == [fine]
    assert "003.png: the process that decoded it was ended by SIGSEGV" in problems[str(crashing)]


class OpensCrashing:
    """Opens a backbone whose `prepare` and `outline` crash on conversations with a certain word."""

    def __init__(self, checkpoint, word, number):
        self._checkpoint, self._word, self._number = checkpoint, word, number

    def __call__(self, *, device):
        backbone = open_backbone(str(self._checkpoint), device=device)
        backbone.prepare = self._crashing(backbone.prepare)
        backbone.outline = self._crashing(backbone.outline)
        return backbone

    def _crashing(self, method):
        def crashing(conversation, image, **options):
            if any(self._word in message.content for message in conversation):
                end_self(self._number)
            return method(conversation, image, **options)

        return crashing


def preparation_of(backbone, checkpoint, number):
    return Preparation(backbone, workers=2, opener=OpensCrashing(checkpoint, "CRASHES", number))


def unchecked_inputs(folder, checkpoint):
    """As `inputs`, with images that no process has decoded, so that only workers prepare them."""
    data_set, backbone = inputs(folder, checkpoint)
    items = tuple(replace(item, image_sha256=None, image_size=None) for item in data_set.items)
    return replace(data_set, items=items), backbone


def test_an_item_that_crashes_workers_is_skipped_in_a_plan_and_named_in_a_fill(tiny_vision_checkpoint, tmp_path):
    folder, path, rule = write_set(tmp_path / "set", 6, images=True), tmp_path / "s.agiqa", LengthRule()
    write_talks(folder)
    talks = folder / "talks.json"
    talks.write_text(talks.read_text().replace("Rate it.", "Rate this CRASHES.", 1))
    data_set, backbone = unchecked_inputs(folder, tiny_vision_checkpoint)
    reason = "000.png: the process that prepared it was ended by SIGSEGV, twice; leave it out"
    with preparation_of(backbone, tiny_vision_checkpoint, signal.SIGSEGV) as preparation:
        kept = tokenise(data_set, backbone, LengthRule(on_bad_item="skip"), preparation=preparation)
        assert [item.name for item in kept.items] == [f"{number:03d}.png" for number in range(1, 6)]
        assert len(kept.skipped) == 1
        assert reason in kept.skipped[0]
        with pytest.raises(DataError, match="1 problem") as caught:
            tokenise(data_set, backbone, rule, preparation=preparation)
        assert reason in str(caught.value)
        tokenised, target = tokenise(data_set, backbone, rule), Target(encoding="hidden")
        wording = {"variant": "id", "aspect": "quality"}
        plan = store_plan(data_set, backbone, tokenised, rule=rule, conversation=wording, target=target)
        store = create_store(path, plan)
        engine = Here(backbone=backbone, preparation=preparation, batch_size=1)
        with pytest.raises(
            WorkerError, match=r"item '000\.png' \(\d+ tokens\): the process that prepared it was ended by SIGSEGV"
        ):
            engine.fill(store, tokenised.planned, target, part=(1, 1), advance=lambda _items: None)
    assert verify(extract(folder, tiny_vision_checkpoint, path).store, "numeric").sound


def test_items_of_workers_killed_from_outside_are_named_and_never_skipped(tiny_vision_checkpoint, tmp_path):
    folder = write_set(tmp_path / "set", 3, images=True)
    write_talks(folder)
    talks = folder / "talks.json"
    talks.write_text(talks.read_text().replace("Rate it.", "Rate this CRASHES.", 1))
    data_set, backbone = unchecked_inputs(folder, tiny_vision_checkpoint)
    rule = LengthRule(on_bad_item="skip")
    with (
        preparation_of(backbone, tiny_vision_checkpoint, signal.SIGKILL) as preparation,
        pytest.raises(
            WorkerError,
            match=r"item '000\.png': the process that prepared it was ended by SIGKILL.* fewer --prepare-workers",
        ),
    ):
        tokenise(data_set, backbone, rule, preparation=preparation)


def stop_at_once(connection, *_):
    """The main function of a process that stops before it sends anything."""
    os.kill(os.getpid(), signal.SIGSTOP)
    connection.close()


def test_a_stopped_device_process_is_killed_and_told(tiny_text_checkpoint, tmp_path, monkeypatch, capsys):
    folder = write_set(tmp_path / "set", 3)
    write_talks(folder)
    monkeypatch.setattr(crew, "_begin", stop_at_once)
    monkeypatch.setattr(crew, "_SECONDS_BETWEEN_SIGNS", 0.01)
    with pytest.raises(WorkerError, match=r"process 0 on cpu was killed by signal 9.* units are left"):
        # without views, which would be tried on the model before the store is filled
        extract(folder, tiny_text_checkpoint, tmp_path / "s.agiqa", devices=2, variant="no_id")
    assert "process 1 on cpu gave no sign of life for 0.6 s: it is killed" in capsys.readouterr().err
