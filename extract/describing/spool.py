"""The spool: hidden states of conversations on their way from the describing model to a store, a file each.

The store can only be planned once every description is known. Until then the rows wait here. The name of a file is a
hash of all that decides what is in it (model, image, token ids), so a file is right or is never looked up. What a kill
leaves is used by the next run, and what is missing or damaged is computed by the model again.
"""

import hashlib
import os
import uuid
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import ConfigError
from agiqa.extract.data.items import Item
from agiqa.extract.models import Backbone
from agiqa.progress import say
from agiqa.store.disk.files import canonical_json, removed_on_failure, sha256_of_file, telling_disk_errors

_WRITERS = 2
_WAITING = 32
"""States that may wait for a writer, in memory: about 130 MB of an 8B model."""
_CHECKSUM = 4
"""Bytes of the crc32 behind the rows."""
_ROWS, _PARTIAL = ".rows", ".partial"
"""Endings of the names of files, and of those that are being written."""


class Spool:
    """Final hidden states of whole conversations, in a folder beside a store."""

    def __init__(self, store: Path, backbone: Backbone, variant: str) -> None:
        """For conversations that end as those of `variant`, of which `backbone` computes the states.

        Makes no folder before there is something to keep. Use it as a context manager to keep states. Raises
        ConfigError where something else has the folder's name.
        """
        beside = Path(os.path.abspath(store))  # noqa: PTH100 - `.` gets a name, and a link keeps its own
        self.folder = beside.with_name(f"{beside.name}.spool")
        if self.folder.is_symlink() or self.folder.exists():
            self._require_folder()
        self.variant = variant
        self._backbone = backbone
        self._dtype: torch.dtype = getattr(torch, backbone.logical_dtype)
        self._pool: ThreadPoolExecutor | None = None
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the writers; after an error those that have not begun are left out. Raises what a writer raised."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        pool.shutdown(wait=True, cancel_futures=error is not None)
        running, self._running = self._running, deque()
        if error is None:
            for one in running:
                one.result()

    def keep(self, item: Item, token_ids: NDArray[np.int32], states: torch.Tensor) -> None:
        """Write the `states` (n, D) of the conversation with `token_ids` (n,) about the image of `item`.

        They are copied to the host once the device has computed them; nothing here waits for that, unless too many
        wait already. Raises the OSError of an earlier write.
        """
        on_gpu = states.device.type == "cuda"
        host = torch.empty(states.shape, dtype=self._dtype, pin_memory=on_gpu)
        host.copy_(states, non_blocking=True)
        computed = torch.cuda.Event() if on_gpu else None
        if computed is not None:
            computed.record(torch.cuda.current_stream(states.device))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="agiqa-spool")
        while len(self._running) >= _WAITING or (self._running and self._running[0].done()):
            self._running.popleft().result()
        self._running.append(self._pool.submit(self._write, self._path(item, token_ids), host, computed))

    def read(self, item: Item, token_ids: NDArray[np.int32]) -> torch.Tensor | None:
        """The states (n, D) that were kept of this conversation, on the host; None if there are none, or damaged."""
        path = self._path(item, token_ids)
        try:
            content = np.fromfile(path, np.uint8)
        except OSError:
            return None
        shape = len(token_ids), self._backbone.hidden_size
        if len(content) != shape[0] * shape[1] * self._dtype.itemsize + _CHECKSUM:
            return None
        rows, checksum = content[:-_CHECKSUM], content[-_CHECKSUM:]
        if zlib.crc32(rows.data) != int.from_bytes(checksum.tobytes(), "little"):
            return None
        return torch.from_numpy(rows).view(self._dtype).reshape(shape)

    def remove(self) -> None:
        """Remove all that is kept, once the store has it. What others put into the folder stays."""
        with suppress(OSError):
            for pattern in (f"*{_ROWS}", f"*{_ROWS}.*{_PARTIAL}"):
                for path in self.folder.glob(pattern):
                    path.unlink(missing_ok=True)
            self.folder.rmdir()
        if left := len(self):
            say(f"warning: {left} files could not be removed from {self.folder}, and nothing reads them any more")

    def __len__(self) -> int:
        """Conversations of which states are kept."""
        return sum(1 for _ in self.folder.glob(f"*{_ROWS}"))

    def _require_folder(self) -> None:
        if not self.folder.is_dir():
            message = (
                f"{self.folder} exists and is no folder. Rows wait there until the store is full: move it away, or "
                "give another STORE."
            )
            raise ConfigError(message)

    def _path(self, item: Item, token_ids: NDArray[np.int32]) -> Path:
        image = item.image_sha256
        if image is None and item.image is not None:  # an item that was not made by `load_data_set`
            image = sha256_of_file(item.image)
        parts: list[Any] = [self._model, image, token_ids.tolist()]
        return self.folder / f"{hashlib.sha256(canonical_json(parts).encode()).hexdigest()}{_ROWS}"

    @cached_property
    def _model(self) -> str:
        """A hash of all that decides what the model computes. The first use hashes its files."""
        return hashlib.sha256(canonical_json(self._backbone.provenance()).encode()).hexdigest()

    def _write(self, path: Path, states: torch.Tensor, computed: "torch.cuda.Event | None") -> None:
        if computed is not None:
            computed.synchronize()
        rows = states.view(torch.uint8).numpy().reshape(-1)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PARTIAL}")  # items may have equal conversations
        doing = f"keeping hidden states in {self.folder}"
        with telling_disk_errors(doing, "the descriptions before are kept"), removed_on_failure(temporary, of=path):
            self.folder.mkdir(parents=True, exist_ok=True)  # another run may have filled the store, and removed it
            with temporary.open("wb") as file:
                file.write(rows.data)
                file.write(zlib.crc32(rows.data).to_bytes(_CHECKSUM, "little"))
            with suppress(FileNotFoundError):  # removed by such a run: the model computes these rows again
                temporary.replace(path)
