"""Writes a model merged with a LoRA adapter: a checkpoint in the base's own layout, which other software loads.

The weights are read, merged and written one file at a time. The merged folder has the base's files, by name, and in
them the base's tensors, by name, shape and dtype. All its other files (configuration, tokenizer, chat template,
licence, Python code) are copied. `merge.json` records the hashes of model and adapter.
"""

import json
import shutil
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from agiqa.errors import BusyStore, ConfigError, ModelError, listed
from agiqa.extract.models.adapters import Merge, fit_adapter
from agiqa.extract.models.checkpoints import Checkpoint, download, resolve_checkpoint
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.loading import failures_of, name_in_model
from agiqa.extract.models.opening import MERGE_RECORD, open_backbone
from agiqa.progress import track
from agiqa.store.disk.files import (
    files_below,
    safetensors_errors,
    sync_file,
    telling_disk_errors,
    write_text_atomically,
)
from agiqa.store.disk.locks import exclusive_lock
from agiqa.version import agiqa_version

FORMAT, FORMAT_VERSION = "agiqa.merge", 1

_CONFIG, _TIED = "config.json", "tie_word_embeddings"
_COPIED_FROM_HUB = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "*.txt", "*.md", "LICENSE*", "NOTICE*")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
"""Endings of weight files. Those that the base does not load are not copied: they would be weights without the
adapter."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of tensors that can be merged, as safetensors names them."""
_TEMPLATES = "additional_chat_templates"
"""The only folder of the official layout: chat templates besides the default one."""
_LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge has written."""

    out: Path
    tensors: int
    changed: int
    """Tensors that the adapter changed."""
    untied: tuple[str, ...]
    """Tensors that share their values with another one in the base, and have their own here."""
    bytes: int
    """Of the whole folder."""


def merge_adapter(model: str, adapter: str, out: Path) -> MergeResult:
    """Write `model` merged with `adapter` (names as for `open_backbone`) to the new folder `out`.

    Needs memory for the adapter and the largest weight file of the model. A kill leaves no `out`, and a run after it
    begins anew. The result gives the numbers of `open_backbone(model, adapter=adapter)` bit for bit, if its dtype is
    that of the files: sums are rounded to the dtype of each tensor. Weights that the base ties are untied if the
    adapter changes one of them, and `tie_word_embeddings` becomes false.

    Raises ConfigError for an `out` that exists, ModelError for a model that is a GGUF file, quantised, or not in
    safetensors files, and for an adapter that does not fit; BusyStore while another run writes to `out`.
    """
    _refuse_taken(out)
    checkpoint = resolve_checkpoint(model)
    _refuse_unsuitable(checkpoint)
    backbone = _open(model, adapter)
    backbone.check_tensors()
    files = _Files.of(checkpoint, backbone.empty_model())
    assert backbone.adapter is not None  # one was given
    merge = fit_adapter(files.model, backbone.adapter, name=checkpoint.name)
    untied = files.untied(merge)
    files.refuse_unmergeable(checkpoint, merge, untied)
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": {"name": checkpoint.label, "revision": checkpoint.revision, "files": backbone.file_hashes},
        "adapter": backbone.adapter.provenance(),
        "untied": sorted(untied),
        "agiqa": agiqa_version(),
    }
    with _new_folder(out) as folder:
        _copy_companions(checkpoint, folder, untied=bool(files.parted(merge)))
        _write_weights(files, merge, untied, folder)
        write_text_atomically(folder / MERGE_RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        _check_written(folder, merge)
    return MergeResult(
        out=out,
        tensors=len(files.places) + len(untied),
        changed=len(merge.changes),
        untied=tuple(sorted(untied)),
        bytes=sum(path.stat().st_size for path in files_below(out)),
    )


def _open(model: str, adapter: str | None) -> HuggingFaceBackbone:
    backbone = open_backbone(model, adapter=adapter, device="cpu")
    assert isinstance(backbone, HuggingFaceBackbone)  # an image encoder has no files of a checkpoint
    return backbone


def _refuse_taken(out: Path) -> None:
    if out.exists() or out.is_symlink():
        message = f"{out} exists already. Give the path of a new folder, or remove it."
        raise ConfigError(message)
    if not out.parent.is_dir():
        message = f"{out.parent} is no folder; make it, or write to another path."
        raise ConfigError(message)


def _refuse_unsuitable(checkpoint: Checkpoint) -> None:
    if checkpoint.gguf is not None:
        why = "is a GGUF file, whose weights are rounded to a few bits: a merge would have to round them again"
    elif checkpoint.raw_config.get("quantization_config"):
        why = "is quantised (quantization_config in config.json): a merge would have to round its weights again"
    elif any(path.suffix == ".bin" for path in checkpoint.weight_files()):
        why = "has its weights in torch's own format (.bin), and agiqa merges safetensors files"
    else:
        return
    message = f"{checkpoint.name} {why}. Give the unquantised checkpoint in the official layout, with safetensors."
    raise ModelError(message)


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The weight files of the base, by their headers, and the model without weights."""

    model: nn.Module
    shards: tuple[Path, ...]
    index: Path | None
    """The file that says which tensor is in which shard."""
    places: Mapping[str, str]
    """By the name of each tensor in the files its name in the model."""
    dtypes: Mapping[str, str]
    """By the name of each tensor in the files."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module) -> "_Files":
        """Read the headers of the weights of `checkpoint`. Raises ModelError for an unreadable file."""
        found = checkpoint.weight_files()
        shards = tuple(path for path in found if path.suffix == ".safetensors")
        dtypes: dict[str, str] = {}
        with failures_of(checkpoint, "read the weights"):
            for path in shards:
                with safe_open(path, framework="numpy") as tensors:
                    names: list[str] = tensors.keys()
                    dtypes |= {name: tensors.get_slice(name).get_dtype() for name in names}
        place = name_in_model(model, model.state_dict())
        return cls(
            model=model,
            shards=shards,
            index=next((path for path in found if path.suffix == ".json"), None),
            places={name: place(name) for name in dtypes},
            dtypes=dtypes,
        )

    def parted(self, merge: Merge) -> list[list[str]]:
        """The model's names of tensors that it ties and whose values `merge` makes different, in groups."""
        return [names for names in _ties(self.model) if not merge.changes.keys().isdisjoint(names)]

    def untied(self, merge: Merge) -> dict[str, str]:
        """By the name of each tensor that no file holds and that needs its own values now the stored one tied to it."""
        stored = {place: name for name, place in self.places.items()}
        sources = (
            (names, next((stored[name] for name in names if name in stored), None)) for names in self.parted(merge)
        )
        return {name: source for names, source in sources if source is not None for name in names if name not in stored}

    def refuse_unmergeable(self, checkpoint: Checkpoint, merge: Merge, untied: Mapping[str, str]) -> None:
        """Raise ModelError for tensors that the adapter changes and that the files have not, or not as numbers."""
        changed = merge.changes.keys()
        missing = sorted(changed - {*self.places.values(), *untied})
        if missing:
            message = (
                f"{checkpoint.name}: transformers builds {listed(missing)} from tensors of other names in the files, "
                "so that the adapter cannot be merged file by file. Use the model with --adapter."
            )
            raise ModelError(message)
        stored = [name for name, place in self.places.items() if place in changed or name in untied.values()]
        packed = [f"{name} ({self.dtypes[name]})" for name in stored if self.dtypes[name] not in _FLOATS]
        if packed:
            message = f"{checkpoint.name}: {listed(packed)}: the weights are quantised; give an unquantised checkpoint."
            raise ModelError(message)


def _ties(model: nn.Module) -> list[list[str]]:
    """The names of tensors of `model` that are one and the same, in groups."""
    groups: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(weight), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


@contextmanager
def _new_folder(out: Path) -> Generator[Path]:
    """A folder beside `out`, which gets its name at the end. Removed on failure; a killed run's is begun anew."""
    folder = out.with_name(f".{out.name}.merging")
    lock = folder / _LOCK
    with telling_disk_errors(f"writing {out}", "nothing is kept"), exclusive_lock(lock, keeps_name=False) as mine:
        if not mine:
            message = f"Another run is writing to {out}. Wait for its end, or choose another OUT."
            raise BusyStore(message)
        try:
            for left in folder.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left != lock:
                    left.unlink()
            yield folder
            for path in (*files_below(folder), folder):
                sync_file(path)
            _refuse_taken(out)
            folder.rename(out)
            (out / _LOCK).unlink()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    sync_file(out.parent)


def _copy_companions(checkpoint: Checkpoint, folder: Path, *, untied: bool) -> None:
    """Copy every file of the base but its weights; `untied`: its config must no longer tie weights."""
    if checkpoint.repository is not None:
        download(checkpoint.repository, checkpoint.revision, _COPIED_FROM_HUB)
    for path in sorted(checkpoint.folder.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and not path.name.startswith(".") and path.name != MERGE_RECORD:
            shutil.copyfile(path, folder / path.name)
    if (checkpoint.folder / _TEMPLATES).is_dir():
        shutil.copytree(checkpoint.folder / _TEMPLATES, folder / _TEMPLATES)
    if untied:
        config = _untie(checkpoint.raw_config)
        config[_TIED] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"][_TIED] = False
        write_text_atomically(folder / _CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _untie(value: Any) -> Any:
    """A configuration as `value`, in which no part ties its embeddings."""
    if isinstance(value, dict):
        return {key: False if key == _TIED else _untie(part) for key, part in value.items()}
    return [_untie(part) for part in value] if isinstance(value, list) else value


def _write_weights(files: _Files, merge: Merge, untied: Mapping[str, str], folder: Path) -> None:
    """Write each weight file of the base with its tensors merged, and the index."""
    added: dict[str, Sequence[str]] = {}
    with track("merge", len(files.shards), "files") as advance:
        for path in files.shards:
            with safe_open(path, framework="pt") as stored:
                names: list[str] = stored.keys()
                tensors = {name: merge.merged(files.places[name], stored.get_tensor(name)) for name in names}
                new = {name: source for name, source in untied.items() if source in tensors}
                for name, source in new.items():
                    tensors[name] = merge.merged(name, stored.get_tensor(source).clone())
                metadata = stored.metadata() or {"format": "pt"}
            with safetensors_errors(folder / path.name):
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / path.name, metadata)
            added[path.name] = list(new)
            del tensors  # before the next file is read
            advance(1)
    if files.index is not None:
        _write_index(files.index, folder, added)


def _write_index(index: Path, folder: Path, added: Mapping[str, Sequence[str]]) -> None:
    """Copy `index`; if there are tensors that it does not list, add them (by file) and correct its totals."""
    if not any(added.values()):
        shutil.copyfile(index, folder / index.name)
        return
    content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] |= {name: file for file, names in added.items() for name in names}
    content["metadata"] = {"total_size": sum(_bytes_of_tensors(folder / file) for file in added)}
    write_text_atomically(folder / index.name, json.dumps(content, indent=2) + "\n")


def _bytes_of_tensors(path: Path) -> int:
    """Bytes of the tensors in a safetensors file: those after the header, whose length the first 8 bytes state."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def _check_written(folder: Path, merge: Merge) -> None:
    """Raise ModelError if the merged checkpoint cannot be opened, or ties tensors that the adapter changed."""
    written = _open(str(folder), None)
    written.check_tensors()
    _refuse_still_tied(written, merge.changes)


def _refuse_still_tied(written: HuggingFaceBackbone, changed: Collection[str]) -> None:
    tied = [name for names in _ties(written.empty_model()) if not set(names).isdisjoint(changed) for name in names]
    if tied:
        message = (
            f"{written.config.model_type} models tie {listed(tied)} whatever their configuration says, so a merged "
            "checkpoint cannot hold what the adapter changed. Use the model with --adapter."
        )
        raise ModelError(message)
