"""From hidden states on the device to the rows of a store: copies beside the model's work, and encoding on the host."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.extract.filling.targets import Target
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.batches import is_out_of_memory, uploaded
from agiqa.store import from_float32, to_float32

LOGIT_ROWS = 512
"""Rows of raw logits on the device at the same time: 131 MB with a vocabulary of 128,256."""
_SENT_AHEAD = 1
"""Groups of inputs on the device beside those that it computes on."""

_Tag = TypeVar("_Tag")

Bounds = Sequence[tuple[int, int]]
"""First row and one past the last of each item within its unit."""
Finish = Callable[[NDArray[Any], Bounds], tuple[NDArray[Any], NDArray[np.float32] | None]]
"""From the copied bits to rows of the store, and for `int8` the scale of each token; other threads call it."""


class Transfers:
    """The copies of one process to and from its device; on a CPU they are plain copies."""

    def __init__(self, device: torch.device) -> None:
        """On a GPU, each direction has its own stream."""
        self.device = device
        self.pinned = device.type == "cuda"
        self._up = torch.cuda.Stream(device) if self.pinned else None
        self._down = torch.cuda.Stream(device) if self.pinned else None

    def on_device(self) -> AbstractContextManager[Any]:
        """Make the device the current one of this thread."""
        return torch.cuda.device(self.device) if self.pinned else nullcontext()

    def buffer(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory (rows, width) for `download`; pinned memory comes from torch's cache."""
        return torch.empty((rows, width), dtype=dtype, pin_memory=self.pinned)

    def upload(self, items: list[Prepared]) -> list[Prepared]:
        """`items` with inputs on the device, for work that is queued from now on."""
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
        """`groups`, while a thread copies the inputs of the next one to the device; each still needs `upload`.

        Inputs for which the device, or the pinned memory of the host, has no room yet stay on the host.
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
            return items  # BatchRunner computes them in smaller batches

    def _send(self, items: list[Prepared]) -> list[Prepared]:
        """`items` with inputs that are on the device once the upload stream has reached this point."""
        with torch.cuda.stream(self._up):
            return [
                replace(item, inputs={name: uploaded(value, self.device) for name, value in item.inputs.items()})
                for item in items
            ]

    def download(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Copy `values` into `out`, rows of a `buffer`, once they are computed; see `mark`."""
        if self._down is None:
            out.copy_(values)
            return
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            out.copy_(values, non_blocking=True)
        values.record_stream(self._down)

    def mark(self) -> "torch.cuda.Event | None":
        """An event after all downloads so far, whose `synchronize` waits for them; None on a CPU."""
        if self._down is None:
            return None
        event = torch.cuda.Event()
        event.record(self._down)
        return event


@dataclass(frozen=True, kw_only=True)
class Staging:
    """The way of one encoding from the device to the store."""

    dtype: torch.dtype
    """Of the copied values."""
    width: int
    """Copied values per token."""
    put: Callable[[torch.Tensor, torch.Tensor], None]
    """`put(states, out)`: hidden states (n, D) on the device into rows (n, width) of a host buffer, without waiting."""
    finish: Finish
    copies: bool = False
    """Whether `put` copies the states as they are."""


def staging_of(target: Target, backbone: Backbone, transfers: Transfers) -> Staging:
    """How the states of one layer of `backbone`, which is loaded, become the `features` of `target`, see `Target.of`.

    The device computes the coordinates of a sketch: a GPU by `coordinates_on_device`, so that only coordinates are
    copied; a CPU with the rounding of `Basis.coordinates`, item by item.
    """
    dtype: torch.dtype = getattr(torch, backbone.logical_dtype)
    if target.encoding == "logits":
        dtype = backbone.lm_head(bent=True).dtype

        def put_logits(states: torch.Tensor, out: torch.Tensor) -> None:
            for start in range(0, len(states), LOGIT_ROWS):
                rows = slice(start, start + LOGIT_ROWS)
                transfers.download(backbone.project(states[rows]), out[rows])

        return Staging(dtype=dtype, width=backbone.vocab_size, put=put_logits, finish=_as_they_are)
    if target.basis is not None and backbone.device.type != "cpu":
        wanted: torch.dtype = getattr(torch, target.basis.logical_dtype)
        to_coordinates = torch.from_numpy(target.basis.map).to(backbone.device)

        def put_coordinates(states: torch.Tensor, out: torch.Tensor) -> None:
            transfers.download(coordinates_on_device(states, to_coordinates).to(wanted), out)

        return Staging(dtype=wanted, width=target.basis.rank, put=put_coordinates, finish=_as_they_are)
    finish = _as_they_are if target.basis is None and target.scale is None else _encoder(target, backbone.logical_dtype)
    width = backbone.layer_width(target.layers[-1])
    return Staging(dtype=dtype, width=width, put=transfers.download, finish=finish, copies=True)


def stagings_of(target: Target, backbone: Backbone, transfers: Transfers) -> dict[str, Staging]:
    """`staging_of` each layer of `target`, by name."""
    return {layer: staging_of(target.of(layer), backbone, transfers) for layer in target.layers}


def coordinates_on_device(states: torch.Tensor, to_coordinates: torch.Tensor) -> torch.Tensor:
    """`Basis.coordinates` of states (n, D) in float32, (n, r), on the tensors' device, without TF32.

    Sums run in another order than NumPy's: coordinates differ by about 1e-6 of their largest.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode():
            return torch.nn.functional.linear(states.float(), to_coordinates)
    finally:
        torch.set_float32_matmul_precision(precision)


def _as_they_are(staged: NDArray[Any], _bounds: Bounds) -> tuple[NDArray[Any], None]:
    return staged, None


def _encoder(target: Target, logical_dtype: str) -> Finish:
    """Encodes hidden states on the host, item by item, so that the bits are the same in every process."""

    def finish(staged: NDArray[Any], bounds: Bounds) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        if target.scale is not None:
            encoded = [target.scale.encode(to_float32(staged[start:stop], logical_dtype)) for start, stop in bounds]
            return np.concatenate([rows for rows, _ in encoded]), np.concatenate([scale for _, scale in encoded])
        assert target.basis is not None  # staging_of chose
        basis = target.basis
        items = [basis.coordinates(to_float32(staged[start:stop], logical_dtype)) for start, stop in bounds]
        return np.concatenate([from_float32(rows, basis.logical_dtype) for rows in items]), None

    return finish
