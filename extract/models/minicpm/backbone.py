"""The backbone `minicpm`: MiniCPM-Llama3-V-2.5 in its published layout, and its weights from safetensors."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

from agiqa.cuda import kernels_missing
from agiqa.errors import ModelError, listed
from agiqa.extract.data.images import ImageSource, open_image
from agiqa.extract.data.items import Message
from agiqa.extract.models.batches import uploaded
from agiqa.extract.models.checkpoints import Checkpoint, tensor_shapes
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.devices import DTYPES
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.loading import failures_of, load_tokenizer
from agiqa.extract.models.minicpm.model import MiniCPMConfig, MiniCPMV
from agiqa.extract.models.minicpm.packed import PackedMiniCPM
from agiqa.extract.models.minicpm.slicing import Slicing, cut, patches_of, slicing_of
from agiqa.extract.models.rendering import Renderer, main_template, refuse_marks
from agiqa.extract.models.tapping import states_of_layers
from agiqa.store import TOKEN_ROLES

_ANSWER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
"""The end of the published chat template: an unconditional generation prompt."""
_READ_AT_ONCE = 4
"""Files: one thread copies about 3 GB/s to a GPU."""
_POSITIONS = "torch"
"""How positions of patches are rounded (`line_positions`); stores without this entry have some other ones."""


class MiniCPMBackbone(HuggingFaceBackbone):
    """An image as an overview and up to nine slices of 96 tokens each, before the first question."""

    kind = "minicpm"
    reads_images = True
    classes: Any = {MiniCPMConfig: MiniCPMV}  # noqa: RUF012 - as transformers' mappings in the other backbones
    packages = (*HuggingFaceBackbone.packages, "pillow")

    config: MiniCPMConfig
    _packed: PackedMiniCPM | None = None
    _in_training = False

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`; without an image the model reads the text alone."""
        picture = None if image is None else open_image(image)
        outline = self._outline(conversation, None if picture is None else picture.size, answer=answer)
        if picture is None:
            return outline
        cuts = cut(picture, self._slicing(picture.size))
        pieces, sizes = zip(*(patches_of(piece, self.config.patch) for piece in cuts), strict=True)
        patches = torch.from_numpy(np.concatenate(pieces))
        return replace(outline, inputs={"patches": patches}, layout=np.array(sizes, np.int64))

    def outline(
        self,
        conversation: Sequence[Message],
        image: ImageSource | None,
        *,
        size: tuple[int, int] | None = None,
        answer: bool = False,
    ) -> Prepared:
        """See `Backbone.outline`: the slices follow from the image's size."""
        if image is not None and size is None:
            size = open_image(image).size
        return self._outline(conversation, None if image is None else size, answer=answer)

    def _outline(self, conversation: Sequence[Message], size: tuple[int, int] | None, *, answer: bool) -> Prepared:
        """Token ids and roles of a conversation with an image of `size`, or without one."""
        refuse_marks(conversation, self.config.marks.values())
        rendered = self.renderer.render(conversation, image=size is not None, answer=answer)
        ids, roles = self.renderer.tokenize(rendered)
        self._refuse_unknown_tokens(ids)
        if size is None:
            return Prepared(token_ids=ids, roles=roles)
        stand_in = self._stand_in(self._slicing(size).grid)
        place = int(np.flatnonzero(ids == self._ids["im_start"])[0])
        seen = np.where(stand_in == self._ids["unk"], TOKEN_ROLES["image"], TOKEN_ROLES["special"]).astype(np.uint8)
        return Prepared(
            token_ids=np.concatenate([ids[:place], stand_in, ids[place + 1 :]]),
            roles=np.concatenate([roles[:place], seen, roles[place + 1 :]]),
        )

    def _slicing(self, size: tuple[int, int]) -> Slicing:
        settings = self.config
        return slicing_of(size, most=settings.slices, resolution=settings.resolution, patch=settings.patch)

    def provenance(self) -> dict[str, Any]:
        """See `Backbone.provenance`."""
        seen = {"slices": self.config.slices, "resolution": self.config.resolution, "positions": _POSITIONS}
        return {**super().provenance(), "image": seen}

    def empty_model(self) -> MiniCPMV:
        """See `HuggingFaceBackbone.empty_model`."""
        with torch.device("meta"):
            return MiniCPMV(self.config)

    def _compare_weights(self, model: MiniCPMV) -> None:
        check_weights(self.checkpoint, model)

    def _load_model(self) -> MiniCPMV:
        self.check_tensors()
        return load_weights(self.checkpoint, self.empty_model(), dtype=DTYPES[self.logical_dtype], device=self.device)

    def language_model_of(self, model: MiniCPMV) -> Any:
        return model.llm

    def _states_of(self, batch: Sequence[Prepared], layers: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """See `HuggingFaceBackbone._states_of`. Padding is on the right, where no token of a causal model sees it."""
        llm = self._language_model()
        found = states_of_layers(llm, {"inputs_embeds": self._embedded(batch)}, llm.model.layers, layers)
        return [
            {layer: states[row, : len(item.token_ids)] for layer, states in found.items()}
            for row, item in enumerate(batch)
        ]

    def layer_states(self, batch: Sequence[Prepared], layers: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """See `Backbone.layer_states`."""
        if self._in_training:
            return super().layer_states(batch, layers)
        packed = self._packed_model()
        lengths = np.array([len(item.token_ids) for item in batch])
        ids = np.concatenate([item.token_ids for item in batch]).astype(np.int64)
        seen = np.concatenate([item.roles for item in batch]) == TOKEN_ROLES["image"]
        with torch.inference_mode(), self._compiling():
            images = self._image_tokens(batch, packed.image_tokens)
            found = packed.states(self._loaded().embed(ids, seen, images), lengths, layers)
            apart = {layer: states.split(lengths.tolist()) for layer, states in found.items()}
        return [{layer: states[row] for layer, states in apart.items()} for row in range(len(batch))]

    def loaded(self) -> Any:
        """See `HuggingFaceBackbone.loaded`. Later hidden states come from its own layers, which a training changes."""
        self._packed, self._in_training = None, True
        return super().loaded()

    @property
    def saved_by_compiling(self) -> float:
        """See `Backbone.saved_by_compiling`: nothing where this model's own kernels run."""
        return 0.0 if kernels_missing(self.device, ("triton",)) is None else super().saved_by_compiling

    def _packed_model(self) -> PackedMiniCPM:
        if self._packed is None:
            self._packed = PackedMiniCPM(self._loaded())
        return self._packed

    def _compile(self) -> None:
        self._packed_model().compile()

    def _collate(self, items: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            embedded = self._embedded(items)
        lengths = torch.tensor([len(item.token_ids) for item in items], device=self.device)
        mask = torch.arange(embedded.shape[1], device=self.device) < lengths[:, None]
        return {"inputs_embeds": embedded, "attention_mask": mask.long()}

    def _embedded(self, batch: Sequence[Prepared]) -> torch.Tensor:
        """(batch, longest, D). The slices of all items pass through the vision tower together."""
        model: MiniCPMV = self._loaded()
        longest = max(len(item.token_ids) for item in batch)
        ids, seen = np.zeros((len(batch), longest), np.int64), np.zeros((len(batch), longest), bool)
        for row, item in enumerate(batch):
            ids[row, : len(item.token_ids)] = item.token_ids
            seen[row, : len(item.token_ids)] = item.roles == TOKEN_ROLES["image"]
        return model.embed(ids, seen, self._image_tokens(batch, model.image_tokens))

    def _image_tokens(
        self,
        batch: Sequence[Prepared],
        compute: Callable[[torch.Tensor, NDArray[np.int64], NDArray[np.int64]], torch.Tensor],
    ) -> torch.Tensor | None:
        """What `compute` (as `MiniCPMV.image_tokens`) makes of the slices of all items; None without images."""
        seeing = [item for item in batch if item.layout is not None]
        return compute(*self._slices(seeing)) if seeing else None

    def tower_states(self, batch: Sequence[Prepared], layers: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Each item's states (patches, C) of the vision tower's `layers` by name, slice by slice. All have images."""
        with torch.inference_mode():
            patches, sizes, attended = self._slices(batch)
            found = self._packed_model().tower_states(patches, sizes, attended, layers)
        counts = [len(item.inputs["patches"]) for item in batch]
        apart = {layer: states.split(counts) for layer, states in found.items()}
        return [{layer: states[row] for layer, states in apart.items()} for row in range(len(batch))]

    def _slices(self, batch: Sequence[Prepared]) -> tuple[torch.Tensor, NDArray[np.int64], NDArray[np.int64]]:
        """The patches, sizes and attended patches of all slices, as `MiniCPMV.image_tokens` takes them."""
        patches = torch.cat([uploaded(item.inputs["patches"], self.device) for item in batch])
        sizes = [item.layout for item in batch if item.layout is not None]
        attended = [np.full(len(one), one.prod(axis=1).max()) for one in sizes]
        return patches, np.concatenate(sizes), np.concatenate(attended)

    def _stand_in(self, grid: tuple[int, int] | None) -> NDArray[np.int32]:
        """The tokens that replace the image's mark: the overview, and a line for each row of slices."""
        ids = self._ids
        one = [ids["im_start"], *[ids["unk"]] * self.config.queries, ids["im_end"]]
        tokens = list(one)
        if grid is not None:
            columns, rows = grid
            tokens.append(ids["slice_start"])
            for row in range(rows):
                tokens += [ids["line"]] * (row > 0) + one * columns
            tokens.append(ids["slice_end"])
        return np.array(tokens, np.int32)

    def _make_renderer(self) -> Renderer:
        marks = self.config.marks
        tokenizer = load_tokenizer(self.checkpoint, transformers.PreTrainedTokenizerFast)
        self._ids: dict[str, int] = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
        self._ids["line"] = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
        name = self.checkpoint.name
        template = main_template(name, tokenizer.chat_template)
        if template is not None and template.endswith(_ANSWER):
            kept = template.removesuffix(_ANSWER)
            template = f"{kept}{{% if add_generation_prompt %}}{_ANSWER}{{% endif %}}"
        return Renderer(name=name, tokenizer=tokenizer, template=template, image_token=marks["im_start"])


def check_weights(checkpoint: Checkpoint, model: MiniCPMV) -> None:
    """Compare the headers of the weight files with `model`, which has no weights.

    Raises ModelError naming tensors that are unknown to the model, missing, of another shape, or in two files.
    """
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found: dict[str, tuple[int, ...]] = {}
    twice: list[str] = []
    with failures_of(checkpoint, "read the weights"):
        for path in _files(checkpoint):
            shapes = tensor_shapes(path)
            twice += [name for name in shapes if name in found]
            found |= shapes
    _refuse(checkpoint, "unknown", [name for name in found if name not in expected])
    _refuse(checkpoint, "missing", [name for name in expected if name not in found])
    _refuse(checkpoint, "repeated", twice)
    for name, shape in expected.items():
        if found[name] != shape:
            message = (
                f"{checkpoint.name}: the tensor {name} has shape {found[name]} in {checkpoint.folder}, and {shape} by "
                "its configuration."
            )
            raise ModelError(message)


def load_weights(checkpoint: Checkpoint, model: MiniCPMV, *, dtype: torch.dtype, device: torch.device) -> MiniCPMV:
    """`model`, built without weights, with those of `checkpoint` as `dtype` on `device`, for inference.

    `check_weights` must have passed. Raises ModelError for files that cannot be read.
    """
    fits = getattr(torch, checkpoint.stored_dtype() or "", None) is dtype  # else each file is there in both dtypes
    reading = ThreadPoolExecutor(_READ_AT_ONCE if fits else 1, thread_name_prefix="agiqa-load")
    with failures_of(checkpoint, "load the weights"), reading:
        for tensors in reading.map(partial(load_file, device=str(device)), _files(checkpoint)):
            model.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, strict=False, assign=True)
    model.restore_frequencies(device)
    return model.eval().requires_grad_(requires_grad=False)


def _files(checkpoint: Checkpoint) -> list[Path]:
    """The weight files without their index."""
    return [path for path in checkpoint.weight_files() if path.suffix != ".json"]


def _refuse(checkpoint: Checkpoint, kind: str, names: list[str]) -> None:
    if names:
        message = f"{checkpoint.name}: {len(names)} {kind} tensors in {checkpoint.folder}: {listed(sorted(names))}."
        raise ModelError(message)
