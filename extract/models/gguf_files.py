"""GGUF files: transformers parses the whole header for the configuration, the tokenizer and the weights; here once.

It also makes gguf's table of tensor names anew for every module of the model, which takes longer than unpacking the
weights of a small one.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

_PARSED: dict[tuple[Any, ...], Any] = {}
"""The reader of the last file by its identity; its arrays are views of the file."""


@contextmanager
def parsed_once(path: Path | None) -> Generator[None]:
    """Within the block, transformers gets the GGUF file at `path` as it was parsed before, and draws no progress bar.

    The bar goes to the error stream whatever transformers' own switch says. Does nothing without a `path`.
    """
    if path is None:
        yield
        return
    gguf: Any = import_module("gguf")
    utilities: Any = import_module("transformers.modeling_gguf_pytorch_utils")

    def reader(file: Any, *arguments: Any, **options: Any) -> Any:
        key = _identity(Path(file)), arguments, tuple(sorted(options.items()))
        if key not in _PARSED:
            _PARSED.clear()
            _PARSED[key] = _reader_class(usual)(file, *arguments, **options)
        return _PARSED[key]

    usual, names, bar = gguf.GGUFReader, gguf.get_tensor_name_map, utilities.tqdm
    gguf.GGUFReader, gguf.get_tensor_name_map, utilities.tqdm = reader, cache(names), _no_bar
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, utilities.tqdm = usual, names, bar


def forget_parsed() -> None:
    """Free the memory of the last file."""
    _PARSED.clear()


def _reader_class(usual: Any) -> Any:
    """gguf's reader over a plain array: slices of `np.memmap`, a third of a million of them, take thrice the time."""

    class Reader(usual):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

    return Reader


def _identity(path: Path) -> tuple[Any, ...]:
    """What differs once another file lies at `path`."""
    status = path.stat()
    return str(path.resolve()), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _no_bar(steps: Iterable[Any], *_arguments: Any, **_options: Any) -> Iterable[Any]:
    return steps
