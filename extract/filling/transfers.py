"""Between host and device without waiting: inputs on their way up, results on their way down, both beside the model."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch

from agiqa.extract.models import Prepared
from agiqa.extract.models.batches import is_out_of_memory, uploaded

_Tag = TypeVar("_Tag")
_SENT_AHEAD = 1
"""Groups that are on the device beside the one that is computed."""


class Transfers:
    """The copies of one process to and from its device. On the CPU they are plain copies."""

    def __init__(self, device: torch.device) -> None:
        """Streams of their own for both directions where `device` is a GPU."""
        self.device = device
        self.pinned = device.type == "cuda"
        self._up = torch.cuda.Stream(device) if self.pinned else None
        self._down = torch.cuda.Stream(device) if self.pinned else None

    def on_device(self) -> AbstractContextManager[Any]:
        """Make the device the current one of this thread."""
        return torch.cuda.device(self.device) if self.pinned else nullcontext()

    def buffer(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory (rows, width) that `download` fills; pinned memory is taken from torch's cache of it."""
        return torch.empty((rows, width), dtype=dtype, pin_memory=self.pinned)

    def upload(self, items: list[Prepared]) -> list[Prepared]:
        """`items` with their inputs on the device by the time that work queued from now on reads them."""
        if self._up is None:
            return items
        current = torch.cuda.current_stream(self.device)
        moved = self._send(items)
        current.wait_stream(self._up)
        for item in moved:
            for value in item.inputs.values():
                value.record_stream(current)
        return moved

    def sent(self, groups: Iterable[tuple[_Tag, list[Prepared]]]) -> Iterator[tuple[_Tag, list[Prepared]]]:
        """`groups`, the next of which a thread sends to the device meanwhile; `upload` still has to be asked for each.

        Inputs that the device, or the pinned memory of the host, has no room for yet come as they are.
        """
        if self._up is None:
            yield from groups
            return
        with ThreadPoolExecutor(1, thread_name_prefix="agiqa-send") as pool:
            waiting: deque[tuple[_Tag, Future[list[Prepared]]]] = deque()
            for tag, items in groups:
                waiting.append((tag, pool.submit(self._send_if_room, items)))
                if len(waiting) > _SENT_AHEAD:
                    first, sending = waiting.popleft()
                    yield first, sending.result()
            for tag, sending in waiting:
                yield tag, sending.result()

    def _send_if_room(self, items: list[Prepared]) -> list[Prepared]:
        try:
            return self._send(items)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return items  # who computes them takes fewer at a time

    def _send(self, items: list[Prepared]) -> list[Prepared]:
        """`items` with inputs that are on the device once the stream for the way up has come to here."""
        with torch.cuda.stream(self._up):
            return [
                replace(item, inputs={name: uploaded(value, self.device) for name, value in item.inputs.items()})
                for item in items
            ]

    def download(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Copy `values` into `out`, rows of a `buffer`, once they are computed; `mark` tells when that is done."""
        if self._down is None:
            out.copy_(values)
            return
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            out.copy_(values, non_blocking=True)
        values.record_stream(self._down)

    def mark(self) -> "torch.cuda.Event | None":
        """An event of all downloads so far, to be waited for with `synchronize`; None on the CPU."""
        if self._down is None:
            return None
        event = torch.cuda.Event()
        event.record(self._down)
        return event
