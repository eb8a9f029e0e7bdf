"""Tasks in worker processes: what they tell and ask, which environment they have, and tasks that come one by one."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from agiqa.errors import HeadError
from agiqa.heads.data.keeping import PackedFeatures, SharedFeatures
from agiqa.heads.data.reopening import SourceAddress
from agiqa.heads.sweeps.processes import Orders, Setup, run_tasks
from tests.heads.layered_stores import made_states, mos_of, write_store

AT_WORK = """
import sys, time
from dataclasses import dataclass
from agiqa.heads.data.keeping import PackedFeatures, SharedFeatures
from agiqa.heads.data.reopening import SourceAddress
from agiqa.heads.sweeps.processes import Orders, Setup, run_tasks
from agiqa.store import open_store

@dataclass(frozen=True)
class Wait:
    number: int

    def run(self, source, shared, channel, /):
        source.read([0])
        channel.tell("at work")
        time.sleep(600)

    def lost(self, reason, /):
        return reason

    def spoils(self, answer, /):
        return False

if __name__ == "__main__":
    left = [Wait(0), Wait(1)]
    orders = Orders(
        next_task=lambda: left.pop() if left else None,
        on_message=lambda task, message: print(message, flush=True),
        on_question=lambda task, question: None,
    )
    features, store = [PackedFeatures.of(SharedFeatures())], SourceAddress.of(open_store(sys.argv[1]))
    list(run_tasks(Setup(source=store, features=features, threads=1, on_gpu=False), orders, workers=2))
"""
"""A script whose two workers have read from a store, and wait."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tells its number, asks for a word, and returns both with its GPU and its process."""

    number: int

    def run(self, source, shared, channel, /):
        channel.tell(("number", self.number))
        return {
            "word": channel.ask(self.number),
            "gpu": os.environ["CUDA_VISIBLE_DEVICES"],
            "process": os.getpid(),
            "items": len(source.items.names),
        }

    def lost(self, reason, /):
        return {"lost": reason}

    def spoils(self, answer, /):
        return answer["word"] == "spoilt"


def setup_of(store, *, gpus=("0",)) -> Setup:
    return Setup(
        source=SourceAddress.of(store, np.arange(3)),
        features=[PackedFeatures.of(SharedFeatures())],
        threads=torch.get_num_threads(),
        on_gpu=False,
        environments=tuple({"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus),
    )


def test_workers_have_a_gpu_each_and_ask_the_main_process(make_store):
    """The second task comes once the first is under way, so both workers have one at the same time."""
    told, left = [], [Report(number=k) for k in range(2)]
    orders = Orders[Report](
        next_task=lambda: left.pop(0) if left else None,
        on_message=lambda task, message: told.append((task.number, message)),
        on_question=lambda task, question: f"word {task.number} {question}",
    )
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    running = run_tasks(setup_of(make_store(5), gpus=("4", "7")), orders, workers=2)
    found = {task.number: answer for task, answer in running}
    assert [found[k]["word"] for k in range(2)] == ["word 0 0", "word 1 1"]
    assert sorted(told) == [(0, ("number", 0)), (1, ("number", 1))]
    assert {one["gpu"] for one in found.values()} <= {"4", "7"}
    by_process = {one["process"]: one["gpu"] for one in found.values()}
    assert len(set(by_process.values())) == len(by_process)
    assert all(one["items"] == 5 for one in found.values())
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_a_spoilt_process_gets_no_other_task(make_store):
    left = [Report(number=k) for k in range(3)]
    orders = Orders[Report](
        next_task=lambda: left.pop(0) if left else None,
        on_message=lambda _task, _message: None,
        on_question=lambda _task, question: "spoilt" if question == 1 else "sound",
    )
    found = [answer for _, answer in run_tasks(setup_of(make_store(5)), orders, workers=1)]
    assert found[0]["process"] == found[1]["process"] != found[2]["process"]


def test_a_store_that_was_replaced_starts_no_worker(make_store, tmp_path):
    setup = setup_of(make_store(5))
    other = Setup(
        **{**vars(setup), "source": SourceAddress(items=np.arange(3), identity="", reopen=setup.source.reopen)}
    )
    orders = Orders[Report](
        next_task=iter([Report(number=0)]).__next__, on_message=lambda *_: None, on_question=lambda *_: None
    )
    with pytest.raises(HeadError, match=r"cannot be started: .* it was replaced meanwhile"):
        list(run_tasks(other, orders, workers=1))


def test_workers_that_ctrl_c_ends_leave_no_semaphore(tmp_path):
    """Python's resource tracker reports what is left; numcodecs makes a semaphore when a store is read."""
    states = made_states()
    store, script = write_store(tmp_path / "s.agiqa", states, mos_of(states["8"])), tmp_path / "at_work.py"
    script.write_text(AT_WORK)
    run = subprocess.Popen(
        [sys.executable, script, store.path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert run.stdout is not None
    assert [run.stdout.readline().strip() for _ in range(2)] == ["at work"] * 2
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=120)
    assert "KeyboardInterrupt" in error
    assert "leaked" not in error
