"""Configuration, tokenizer, processor and model from a checkpoint, by transformers without remote code.

Nothing is printed, weights must be complete, and failures name the checkpoint.
"""

import re
import threading
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_torchvision_available

from agiqa.errors import ModelError, first_line, listed
from agiqa.extract.models.batches import is_out_of_memory
from agiqa.extract.models.checkpoints import Checkpoint, tensor_shapes
from agiqa.extract.models.gguf_files import forget_parsed, parsed_once

_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
_TO_INSTALL = re.compile(r"pip install (?:-\S+ )*(?P<package>[\w-]+)")
_REQUIRED = re.compile(r"requires the (?P<package>[\w-]+) library")
_DERIVED = ("rotary_emb.inv_freq", "position_ids")
"""Endings of tensors in older checkpoints that models compute by themselves."""


class _Quiet:
    """How many blocks of all threads want silence, and what was switched on before the first."""

    lock = threading.Lock()
    blocks = 0
    level = 0
    bars = False


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence transformers' warnings and progress bars within the block, for all threads: one may load a model."""
    with _Quiet.lock:
        _Quiet.blocks += 1
        if _Quiet.blocks == 1:
            _Quiet.level = transformers_logging.get_verbosity()
            _Quiet.bars = transformers_logging.is_progress_bar_enabled()
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.blocks -= 1
            if not _Quiet.blocks:
                transformers_logging.set_verbosity(_Quiet.level)
                if _Quiet.bars:
                    transformers_logging.enable_progress_bar()


@contextmanager
def failures_of(checkpoint: Checkpoint, task: str) -> Generator[None]:
    """Silence transformers, and turn failures within the block into a ModelError that names checkpoint and task."""
    try:
        with quiet_transformers():
            yield
    except ModelError:
        raise
    except _FAILURES as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        package = _missing_package(error)
        if package is not None:
            message = (
                f"{checkpoint.name}: cannot {task}: that needs the Python package {package}, which is not installed: "
                f"pip install {package}"
            )
            raise ModelError(message) from error
        message = f"{checkpoint.name}: cannot {task} with what is in {checkpoint.folder} ({first_line(error)})"
        raise ModelError(message) from error


def _missing_package(error: Exception) -> str | None:
    """The package that is not installed, if `error`, of transformers or of an import, is about one."""
    text = " ".join(str(error).split())
    imports = isinstance(error, ImportError)
    words = _TO_INSTALL.search(text) or (_REQUIRED.search(text) if imports else None)
    name = (error.name if isinstance(error, ImportError) else None) or (words["package"].lower() if words else None)
    return None if name is None or find_spec(name.partition(".")[0].replace("-", "_")) else name.partition(".")[0]


def load_config(checkpoint: Checkpoint) -> Any:
    """The model's configuration. Raises ModelError for a model that exists only as remote code."""
    raw = checkpoint.raw_config
    if checkpoint.gguf is None and raw.get("model_type") not in CONFIG_MAPPING:
        kind = raw.get("model_type")
        message = f"{checkpoint.name}: transformers {transformers.__version__} knows no model of type {kind!r}."
        if "auto_map" in raw:
            message = (
                f"{checkpoint.name}: this checkpoint (model type {kind!r}) needs its own Python code, "
                "trust_remote_code, which agiqa never does; use a model that transformers itself implements."
            )
        raise ModelError(message)
    with failures_of(checkpoint, "load the configuration"), parsed_once(checkpoint.gguf_file):
        return transformers.AutoConfig.from_pretrained(**checkpoint.source)


def load_tokenizer(checkpoint: Checkpoint, loader: Any = transformers.AutoTokenizer) -> Any:
    """The fast tokenizer, by `loader`, a class of transformers. Raises ModelError if there is none."""
    try:
        with failures_of(checkpoint, "load the tokenizer"), parsed_once(checkpoint.gguf_file):
            tokenizer = loader.from_pretrained(**checkpoint.source)
    except ModelError as error:
        if checkpoint.gguf is None and not (checkpoint.folder / "tokenizer.json").is_file():
            message = f"{checkpoint.name}: there is no tokenizer.json in {checkpoint.folder}, nor another tokenizer."
            raise ModelError(message) from error
        raise
    return require_fast(checkpoint, tokenizer)


def require_fast(checkpoint: Checkpoint, tokenizer: Any) -> Any:
    """`tokenizer`. Raises ModelError unless it is a fast one, which gives the character offsets that roles need."""
    if not getattr(tokenizer, "is_fast", False):
        message = (
            f"{checkpoint.name}: {type(tokenizer).__name__} gives no character offsets, which token roles need; "
            "add the tokenizer.json of the fast tokenizer."
        )
        raise ModelError(message)
    return tokenizer


def load_processor(checkpoint: Checkpoint, config: Any) -> Any:
    """The processor (tokenizer and image processor in one).

    Without torchvision, transformers chooses image processors that run on Pillow but has no video processors; a
    processor that wants one is then built without it.
    """
    with failures_of(checkpoint, "load the processor"):
        images_only = None if is_torchvision_available() else _without_video(config)
        processor = (images_only or transformers.AutoProcessor).from_pretrained(**checkpoint.source)
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        message = f"{checkpoint.name}: its {type(processor).__name__} does not prepare both text and images."
        raise ModelError(message)
    require_fast(checkpoint, processor.tokenizer)
    return processor


def _without_video(config: Any) -> Any:
    """The processor class of `config` with its image processor in place of the video processor; None if it has none.

    Only images are prepared, and the image processor has all that constructors read from a video processor.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if type(config) not in PROCESSOR_MAPPING:
        return None
    parent: Any = PROCESSOR_MAPPING[type(config)]
    names = parent.get_attributes()
    if "video_processor" not in names:
        return None
    kept = [name for name in names if name != "video_processor"]
    loader: Any = type(parent.__name__, (parent,), {"get_attributes": classmethod(lambda _cls: kept)})

    def arguments(_cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        parts = dict(zip(kept, loader._get_arguments_from_pretrained(*args, **kwargs), strict=True))
        return [parts.get(name, parts["image_processor"]) for name in names]

    def check(self: Any, name: str, part: Any) -> Any:
        return type(part) if name == "video_processor" else parent.check_argument_for_proper_class(self, name, part)

    members = {"_get_arguments_from_pretrained": classmethod(arguments), "check_argument_for_proper_class": check}
    return type(parent.__name__, (parent,), members)


def load_model(
    checkpoint: Checkpoint, auto_class: Any, dtype: torch.dtype, attention: str, *, to_merge: bool = False
) -> Any:
    """The model on the CPU, in `dtype`, for inference only; `to_merge`: an adapter will be merged into its weights.

    GGUF weights are unpacked: transformers releases with a GgufConfig keep the blocks packed unless asked, older ones
    unpack them. FP8 weights are unpacked only for a merge, since GPUs compute with them. Raises ModelError if a tensor
    is missing, has another shape, has no place in the model, or is still not floating-point.
    """
    checkpoint.weight_files()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # so that they are reported by name, and refused below
    packing = getattr(transformers, "GgufConfig", None)
    if checkpoint.gguf is not None and packing is not None:
        options["quantization_config"] = packing(dequantize=True)
    if to_merge and (checkpoint.raw_config.get("quantization_config") or {}).get("quant_method") == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    with failures_of(checkpoint, "load the weights"), parsed_once(checkpoint.gguf_file):
        model, report = auto_class.from_pretrained(**checkpoint.source, **options)
    forget_parsed()
    _refuse_misfits(checkpoint, report)
    packed = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    if packed:
        message = f"{checkpoint.name}: the weights stayed quantised ({packed[0]}); give an unquantised checkpoint."
        raise ModelError(message)
    return model.eval().requires_grad_(requires_grad=False)


def check_vocabulary_rows(checkpoint: Checkpoint, model: Any) -> None:
    """Compare the shapes of embeddings and lm_head in the headers of the weight files with those of `model`.

    `model` may be without weights. Raises ModelError if weights are missing or a shape differs. Quantised weights, GGUF
    and torch's own format are only compared on loading.
    """
    if checkpoint.raw_config.get("quantization_config"):
        return
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = {id(layer.weight) for layer in layers if getattr(layer, "weight", None) is not None}
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters() if id(weight) in wanted}
    place = name_in_model(model, model.state_dict())
    mismatched = []
    with failures_of(checkpoint, "read the weights"):
        for path in checkpoint.weight_files():
            shapes = tensor_shapes(path) if path.suffix == ".safetensors" else {}
            stored = ((place(name), shape) for name, shape in shapes.items() if name.endswith(".weight"))
            mismatched += [
                (name, shape, expected[name]) for name, shape in stored if shape != expected.get(name, shape)
            ]
    _refuse_misfits(checkpoint, {"mismatched_keys": mismatched})


def _refuse_misfits(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """Raise ModelError naming the tensors that transformers did not find, fit or use."""
    extra = {key for key in map(str, report.get("unexpected_keys") or ()) if not key.endswith(_DERIVED)}
    mismatched = [_both_shapes(entry) for entry in report.get("mismatched_keys") or ()]
    found = {
        "missing": (sorted(map(str, report.get("missing_keys") or ())), "the model needs them"),
        "mismatched": (sorted(mismatched), "config.json is of another model"),
        "unexpected": (sorted(extra), "the model that config.json describes has no place for them"),
    }
    for problem, (names, why) in found.items():
        if names:
            noun = "weight" if len(names) == 1 else "weights"
            where = f"{problem} {noun} in {checkpoint.folder} ({why})"
            message = f"{checkpoint.name}: {len(names)} {where}: {listed(names)}."
            raise ModelError(message)


def _both_shapes(entry: Any) -> str:
    """The name of a mismatched tensor, with its shapes in file and model if the report has them."""
    if isinstance(entry, tuple) and len(entry) == 3:
        name, stored, expected = entry
        return f"{name} is {tuple(stored)} in the file and {tuple(expected)} in the model"
    return str(entry)


def name_in_model(model: torch.nn.Module, weights: Collection[str]) -> Callable[[str], str]:
    """A function from a tensor's name in a checkpoint or adapter to its name in `model`, one of `weights`.

    transformers has moved modules between releases. It renames the tensors of older checkpoints on loading, but not
    those of older adapters.
    """
    from transformers import PreTrainedModel

    renamings: list[Any] = []
    if isinstance(model, PreTrainedModel):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]

    def find(name: str) -> str:
        if name in weights or not renamings:
            return name
        from transformers.core_model_loading import rename_source_key

        renamed: str = rename_source_key(name, renamings, [])[0]
        return renamed if renamed in weights else name

    return find
