"""A vision-language model tapped before its language model: states of the vision tower, or the projector's output.

`vision` is the output of the tower, `vision:12` that of its block 12, and `projector` what the language model reads at
the image's tokens. Of an image in slices, rows are those of all slices in the order in which the language model reads
them. The language model does not run, and the conversation plays no part.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agiqa.errors import ConfigError, DataError, ModelError, UnknownName
from agiqa.extract.data.images import ImageSource
from agiqa.extract.data.items import Message
from agiqa.extract.models.batches import image_groups, uploaded
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.image_features import ImageFeatures, roles_of
from agiqa.extract.models.minicpm.backbone import MiniCPMBackbone
from agiqa.extract.models.minicpm.model import MiniCPMV
from agiqa.store import TOKEN_ROLES
from agiqa.store.format.layers import LAST

PROJECTOR, VISION = "projector", "vision"
_ASKED = (Message(role="user", content="?"),)
"""The conversation behind the image, which no state of an image encoder depends on."""
_WINDOWED = "permute_input_for_window_attn"
"""The method by which Qwen2.5-VL's tower puts patches into the order of its windows."""
_CLASS_TOKENS = ("class_embedding", "cls_token", "class_token")
"""Endings of the parameter that a tower puts before its patches."""


@dataclass(frozen=True, kw_only=True)
class TappedItem(Prepared):
    """The rows of a tap, and the inputs of the whole model, which reads them beside `whole`."""

    whole: Prepared
    """The item as the whole model reads it, without its inputs."""

    def read(self) -> Prepared:
        """The item as the whole model reads it."""
        return replace(self.whole, inputs=self.inputs)


class TappedBackbone(ImageFeatures):
    """A `Backbone` over the image part of another one."""

    first_layer: int = 1

    def __init__(self, whole: HuggingFaceBackbone, tap: str) -> None:
        """`tap` is `vision`, `vision:BLOCK` or `projector`.

        Raises UnknownName for another one, ConfigError for a model that reads no images or a block that it lacks, and
        ModelError for a model whose tower or projector cannot be tapped.
        """
        self._whole = whole
        self.kind = whole.kind
        self.tap: str | None = tap
        self.name = whole.checkpoint.name
        self.device, self.logical_dtype = whole.device, whole.logical_dtype
        self.checkpoint = whole.checkpoint
        if not whole.reads_images:
            message = f"--tap {tap}: {self.name} reads no images, so it has no vision tower and no projector."
            raise ConfigError(message)
        part, _, block = tap.partition(":")
        if part not in (VISION, PROJECTOR) or (part == PROJECTOR and block):
            raise UnknownName.of(kind="tap", name=tap, known=[VISION, f"{VISION}:BLOCK", PROJECTOR])
        self._block: str | None = None
        self.layer_count, self.hidden_size = 1, whole.hidden_size
        if part == VISION:
            self._begin_tower(block)

    def _begin_tower(self, block: str) -> None:
        blocks = len(self._empty_tower.blocks)
        if block:
            if not block.isdecimal() or not 1 <= int(block) <= blocks:
                message = f"--tap {self.tap}: the vision tower of {self.name} has the blocks 1 to {blocks}."
                raise ConfigError(message)
            self._block = str(int(block))
        else:
            self.layer_count = blocks + 1
        self.hidden_size = self._empty_tower.width

    @cached_property
    def _empty_tower(self) -> "_Tower":
        return _Tower.of(self._whole.empty_model(), self.name)

    def layer_width(self, layer: str) -> int:
        """See `Backbone.layer_width`."""
        del layer
        return self.hidden_size

    def fixed_roles(self, layer: str) -> NDArray[np.uint8] | None:
        """See `Backbone.fixed_roles`: images of other shapes have other numbers of patches."""
        del layer
        return None

    def provenance(self) -> dict[str, Any]:
        """See `Backbone.provenance`: that of the whole model. The store records the tap."""
        return self._whole.provenance()

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`. Raises DataError without an image."""
        del conversation, answer
        self._require(image)
        return self._item(self._whole.prepare(_ASKED, image))

    def outline(
        self,
        conversation: Sequence[Message],
        image: ImageSource | None,
        *,
        size: tuple[int, int] | None = None,
        answer: bool = False,
    ) -> Prepared:
        """See `Backbone.outline`. The patches of the tower are counted in what the processor makes of the image."""
        del conversation, answer
        self._require(image)
        if self._is_projector:
            return self._item(self._whole.outline(_ASKED, image, size=size))
        item = self._item(self._whole.prepare(_ASKED, image))
        return Prepared(token_ids=item.token_ids, roles=item.roles)

    def _require(self, image: ImageSource | None) -> None:
        if image is None:
            message = f"it has no image, and the tap {self.tap} of {self.name} reads nothing else."
            raise DataError(message)

    @property
    def _is_projector(self) -> bool:
        return self.tap == PROJECTOR

    def _item(self, whole: Prepared) -> TappedItem:
        if "cross_attention_mask" in whole.inputs:
            message = (
                f"{self.name}: its language model reads images by cross-attention, not as tokens, so the order of "
                f"rows is unknown. --tap {self.tap} is for models that read image tokens."
            )
            raise ModelError(message)
        seen = int((whole.roles == TOKEN_ROLES["image"]).sum())
        roles = roles_of((0, seen, 0)) if self._is_projector else self._empty_tower.roles_in(whole)
        bare = replace(whole, inputs={})
        return TappedItem(token_ids=np.zeros(len(roles), np.int32), roles=roles, inputs=whole.inputs, whole=bare)

    def check_tensors(self) -> None:
        """See `Backbone.check_tensors`."""
        self._whole.check_tensors()

    def load(self) -> None:
        """See `Backbone.load`: the whole model is loaded."""
        self._whole.load()

    def layer_states(self, batch: Sequence[Prepared], layers: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """See `Backbone.layer_states`. Images that are `alike` pass through the tower together."""
        items: list[Prepared] = []
        for item in batch:
            assert isinstance(item, TappedItem)  # made by `prepare`
            items.append(item.read())
        found: dict[int, dict[str, torch.Tensor]] = {}
        with torch.inference_mode():
            for group in image_groups(items):
                together = [items[position] for position in group]
                counts = [len(batch[position].roles) for position in group]
                states = self._projected(together) if self._is_projector else self._towered(together, counts, layers)
                found |= dict(zip(group, states, strict=True))
        return [found[position] for position in range(len(batch))]

    def _projected(self, items: Sequence[Prepared]) -> list[dict[str, torch.Tensor]]:
        """What the language model reads at the image's tokens of each item."""
        read = [states["0"] for states in self._whole.layer_states(items, ("0",))]
        seen = [uploaded(item.roles == TOKEN_ROLES["image"], self.device) for item in items]
        return [{LAST: states[places]} for states, places in zip(read, seen, strict=True)]

    def _towered(
        self, items: Sequence[Prepared], counts: Sequence[int], layers: Sequence[str]
    ) -> list[dict[str, torch.Tensor]]:
        """The states (rows, C) of the tower's `layers`; `counts` are the rows of each item."""
        names = [self._block or layer for layer in layers]
        if isinstance(self._whole, MiniCPMBackbone):
            found = self._whole.tower_states(items, names)
            return [{layer: one[name] for layer, name in zip(layers, names, strict=True)} for one in found]
        tower = _Tower.of(self._whole.loaded(), self.name)
        with tower.kept(names) as kept:
            self._whole.layer_states(items, ("0",))
        apart = [self._apart(tower.in_reading_order(kept[name]), counts) for name in names]
        return [dict(zip(layers, rows, strict=True)) for rows in zip(*apart, strict=True)]

    def _apart(self, states: torch.Tensor, counts: Sequence[int]) -> Sequence[torch.Tensor]:
        """`states` of all items, by item. Raises ModelError for another number of rows, or another width."""
        if states.shape != (sum(counts), self.hidden_size):
            message = (
                f"{self.name}: its vision tower made states {tuple(states.shape)} of {len(counts)} images, and "
                f"{(sum(counts), self.hidden_size)} were expected. Use --tap {PROJECTOR} for this model."
            )
            raise ModelError(message)
        apart: Sequence[torch.Tensor] = states.to(getattr(torch, self.logical_dtype)).split(list(counts))
        return apart


@dataclass(frozen=True, kw_only=True)
class _Tower:
    """The vision tower of a model."""

    blocks: nn.ModuleList
    width: int
    class_tokens: int
    patch: tuple[int, int]
    module: Any
    """All of it."""
    windows: list[torch.Tensor]
    """Of a tower that groups patches by windows (Qwen2.5-VL): the order of its groups in the last pass."""

    @classmethod
    def of(cls, model: Any, name: str) -> "_Tower":
        """Raises ModelError for a model whose tower is not known."""
        module: Any = model.vpm if isinstance(model, MiniCPMV) else model.get_encoder(modality="image")
        lists = [found for found in module.modules() if isinstance(found, nn.ModuleList)]
        if module is model or not lists:
            message = f"{name}: no vision tower with a list of blocks was found in {type(model).__name__}."
            raise ModelError(message)
        blocks = max(lists, key=len)
        norms = [value for key, value in blocks[-1].named_parameters() if "norm" in key and value.dim() == 1]
        size: Any = module.config.patch_size
        return cls(
            blocks=blocks,
            width=len(norms[0]),
            class_tokens=sum(key.endswith(_CLASS_TOKENS) for key, _ in module.named_parameters()),
            patch=(size, size) if isinstance(size, int) else tuple(size),
            module=module,
            windows=[],
        )

    def roles_in(self, whole: Prepared) -> NDArray[np.uint8]:
        """The roles of the rows of an image, by the inputs that the processor made of it. Raises ModelError."""
        if whole.layout is not None:
            return roles_of((0, int(whole.layout.prod(axis=1).sum()), 0))
        pixels = whole.inputs["pixel_values"]
        if pixels.dim() == 2:
            return roles_of((0, len(pixels), 0))
        if "target_sizes" in whole.inputs or pixels.dim() < 4:
            message = (
                f"the vision tower's rows are unknown for inputs of the shape {tuple(pixels.shape)}; tap projector."
            )
            raise ModelError(message)
        tiles = int(np.prod(pixels.shape[:-3]))
        patches = (pixels.shape[-2] // self.patch[0]) * (pixels.shape[-1] // self.patch[1])
        return np.tile(roles_of((self.class_tokens, patches, 0)), tiles)

    @contextmanager
    def kept(self, layers: Sequence[str]) -> Generator[dict[str, list[torch.Tensor]]]:
        """Within the block, the states of `layers` that each pass of the tower makes, (rows, C)."""
        found: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
        handles = []
        permute = getattr(self.module, _WINDOWED, None)
        if permute is not None:

            def record(values: torch.Tensor, window_index: torch.Tensor, *, seq_len: int) -> torch.Tensor:
                self.windows[:] = [window_index]
                ordered: torch.Tensor = permute(values, window_index, seq_len=seq_len)
                return ordered

            setattr(self.module, _WINDOWED, record)
        for layer in layers:
            module = self.module if layer == LAST else self.blocks[int(layer) - 1]

            def keep(_module: nn.Module, _inputs: Any, output: Any, layer: str = layer) -> None:
                states = getattr(output, "last_hidden_state", output)
                states = states[0] if isinstance(states, tuple) else states
                found[layer].append(states.reshape(-1, states.shape[-1]))

            handles.append(module.register_forward_hook(keep))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
            if permute is not None:
                delattr(self.module, _WINDOWED)  # the method of its class is left

    def in_reading_order(self, passes: Sequence[torch.Tensor]) -> torch.Tensor:
        """The states (n, C) of all passes, and not by windows."""
        states = torch.cat(list(passes))
        for order in self.windows:
            groups = states.unflatten(0, (len(order), -1))
            states = groups[torch.argsort(order)].flatten(0, 1)
        return states
