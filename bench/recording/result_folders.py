"""The folder that an ablation or a transfer leaves and a report reads: what it holds, and who is at work in it."""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agiqa.errors import BusyStore
from agiqa.store.disk.files import telling_disk_errors, write_text_atomically
from agiqa.store.disk.locks import exclusive_lock

ABOUT = "about.json"
"""The stores, and what was asked for."""
RESULTS = "results.jsonl"
"""A line per result, appended as it comes."""
ROWS = "rows.jsonl"
"""Means, intervals and comparisons, computed from the results at the end."""
RUNS = "runs"
"""The run folders of the heads."""
LOCK = "lock"
KEPT = "the results before are kept"
"""What a full disk leaves."""


@contextmanager
def working_in(out: Path, what: str) -> Generator[None]:
    """Hold the folder `out`, which is made, while inside; `what` is at work, such as `ablation`.

    Raises BusyStore where another process holds it. An OSError from inside is told of as `telling_disk_errors` does.
    """
    with telling_disk_errors(f"working in {out}", KEPT), _locked(out) as held:
        if not held:
            message = f"Another {what} is at work in {out} and holds {out / LOCK}. Wait for it, or choose another OUT."
            raise BusyStore(message)
        yield


@contextmanager
def _locked(out: Path) -> Generator[bool]:
    """Make the folder, and hold its lock while inside; whether it could be had."""
    (out / RUNS).mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out / LOCK) as held:
        yield held


def write_whole(path: Path, text: str) -> None:
    """Write a file of such a folder in one step. An OSError is told of as `telling_disk_errors` does."""
    with telling_disk_errors(f"writing {path}", KEPT):
        write_text_atomically(path, text)


def write_about(out: Path, about: Mapping[str, Any]) -> None:
    """Write about.json in one step."""
    write_whole(out / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
