"""The backbone `timm`: patch or stage features of an image encoder of timm. It reads no conversation.

Layer k is the k-th output of timm's `forward_intermediates`: of a transformer the output of block k, of a convolutional
network that of its k-th stage as `feature_info` lists them. With the tap `blocks` it is the output of the k-th block of
a convolutional network, kept by forward hooks: those of timm know the modules of `feature_info` alone. `last` is the
output of `forward_features`, after the final norm or convolution. Rows are positions, line by line; class tokens and
registers come before them, with the role special. Layers of a convolutional network have different numbers of rows and
values per row.
"""

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import AgiqaError, ConfigError, DataError, ModelError, UnknownName, first_line
from agiqa.extract.data.images import ImageSource, open_image
from agiqa.extract.data.items import Message
from agiqa.extract.models.batches import image_groups, room_for_weights
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.devices import DTYPES, checked_dtype, device_named
from agiqa.extract.models.image_features import ImageFeatures, Shape, joined, roles_of
from agiqa.extract.models.provenance import versions_of
from agiqa.extract.models.tapping import kept_states
from agiqa.extract.models.timm_blocks import blocks_of
from agiqa.extract.models.timm_models import TIMM, TimmModel
from agiqa.store.format.layers import LAST

BLOCKS, TAPPED_BLOCKS = "blocks", "timm:blocks"
"""The tap by which users ask for the blocks of a convolutional network, and its name in stores."""


class TimmBackbone(ImageFeatures):
    """A `Backbone` over an image encoder of timm."""

    kind = "timm"
    first_layer: int = 1

    def __init__(self, encoder: TimmModel, *, dtype: str, device: str, tap: str | None = None) -> None:
        """`dtype` is auto (float32) or one of DTYPES, `device` auto or a torch device, `tap` BLOCKS or None.

        Raises UnknownName for another tap, and ConfigError for `blocks` of an encoder without stages of blocks.
        """
        self.encoder = encoder
        self.name = f"{TIMM}{encoder.name}"
        self.tap: str | None = "timm"
        if tap is not None:
            if tap != BLOCKS:
                raise UnknownName.of(kind=f"tap of {self.name}", name=tap, known=[BLOCKS])
            self.tap = TAPPED_BLOCKS
            if not self._modules:
                self._refuse_blocks("stages that are sequences of blocks")
        self.device = device_named(device)
        self.logical_dtype = "float32" if dtype == "auto" else checked_dtype(dtype)
        self._model: Any = None
        self.layer_count = len(self._shapes)
        self.hidden_size = self.layer_width(LAST)

    @cached_property
    def _transform(self) -> Any:
        return self.encoder.transform()

    @cached_property
    def _empty(self) -> Any:
        return self.encoder.empty()

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        """By layer, `last` at the end; found by a pass without weights and pixels."""
        model = self._empty
        pixels = torch.zeros(1, *self.encoder.data_settings["input_size"], device="meta")
        inner = [str(number) for number, _ in enumerate(self._modules, start=1)]
        with torch.inference_mode(), self._refusals():
            found = self._pass(model, pixels, [*inner, LAST])
        before = getattr(model, "num_prefix_tokens", 0)
        splits = _splits(model) and self.tap != TAPPED_BLOCKS
        prefix = {layer: before if layer == LAST or splits else 0 for layer in found}
        return {layer: (prefix[layer], rows.shape[1] - prefix[layer], rows.shape[2]) for layer, rows in found.items()}

    @cached_property
    def _modules(self) -> list[str]:
        """The names of the modules whose outputs are the layers 1, 2, ...; none where timm gives only the last."""
        model = self._empty
        if self.tap == TAPPED_BLOCKS:
            return blocks_of(model)
        return [str(info["module"]) for info in model.feature_info] if hasattr(model, "forward_intermediates") else []

    def _refuse_blocks(self, lacking: str) -> NoReturn:
        message = (
            f"--tap {BLOCKS}: {self.name} has no {lacking}. Leave --tap out: --layers then names its stages, or the "
            "blocks of a transformer."
        )
        raise ConfigError(message)

    @contextmanager
    def _refusals(self) -> Generator[None]:
        """Turn what timm raises for a size of images that the encoder does not take into a ConfigError."""
        try:
            yield
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, AgiqaError):
                raise
            size = self.encoder.data_settings["input_size"][-1]
            message = (
                f"{self.name} does not take images of {size} x {size} pixels ({first_line(error)}). Give another "
                "--image-size, or leave it out."
            )
            raise ConfigError(message) from error

    def layer_width(self, layer: str) -> int:
        """See `Backbone.layer_width`."""
        return self._shapes[layer][2]

    def fixed_roles(self, layer: str) -> NDArray[np.uint8] | None:
        """See `Backbone.fixed_roles`."""
        return roles_of(self._shapes[layer])

    def provenance(self) -> dict[str, Any]:
        """See `Backbone.provenance`. The first call hashes the weights, which are downloaded for it."""
        settings = self.encoder.data_settings
        kept = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        return {
            "name": self.name,
            "kind": self.kind,
            "architecture": type(self._empty).__name__,
            "files": self._hashes,
            "dtype": self.logical_dtype,
            "image": {name: _plain(settings[name]) for name in kept if name in settings},
            "layers": {str(number): module for number, module in enumerate(self._modules, start=1)},
            "versions": versions_of(("torch", "timm", "torchvision", "pillow")),
        }

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return self.encoder.hashes()

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`. Raises DataError without an image."""
        outline = self.outline(conversation, image, answer=answer)
        assert image is not None  # outline refuses
        pixels: torch.Tensor = self._transform(open_image(image))
        return Prepared(token_ids=outline.token_ids, roles=outline.roles, inputs={"pixel_values": pixels[None]})

    def outline(
        self,
        conversation: Sequence[Message],
        image: ImageSource | None,
        *,
        size: tuple[int, int] | None = None,
        answer: bool = False,
    ) -> Prepared:
        """See `Backbone.outline`: every image has the rows of `last`."""
        del conversation, answer
        if image is None:
            message = f"it has no image, and {self.name} reads nothing else."
            raise DataError(message)
        if size is None:
            open_image(image)
        roles = roles_of(self._shapes[LAST])
        return Prepared(token_ids=np.zeros(len(roles), np.int32), roles=roles)

    def check_tensors(self) -> None:
        """See `Backbone.check_tensors`: loads the encoder on the CPU, as timm renames tensors of older files."""
        if self._model is None:
            self._model = self.encoder.loaded().to(DTYPES[self.logical_dtype])

    def load(self) -> None:
        """See `Backbone.load`."""
        self.check_tensors()
        if next(self._model.parameters()).device != self.device:
            with room_for_weights(self.name, self.device):
                self._model.to(self.device)

    def layer_states(self, batch: Sequence[Prepared], layers: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """See `Backbone.layer_states`."""
        self.load()
        found: dict[int, dict[str, torch.Tensor]] = {}
        for group in image_groups(batch):
            pixels = joined([batch[position] for position in group], self.device, DTYPES[self.logical_dtype])
            with torch.inference_mode():
                states = self._pass(self._model, pixels["pixel_values"], layers)
            for row, position in enumerate(group):
                found[position] = {layer: rows[row] for layer, rows in states.items()}
        return [found[position] for position in range(len(batch))]

    def _pass(self, model: Any, pixels: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """The rows (batch, n, C) of `layers`."""
        if tuple(layers) == (LAST,):
            return {LAST: self._last(model, pixels)}
        if self.tap == TAPPED_BLOCKS:
            return self._pass_of_blocks(model, pixels, layers)
        asked: dict[str, Any] = {"indices": [int(layer) - 1 for layer in layers if layer != LAST]}
        if _splits(model):
            asked["return_prefix_tokens"] = True
        ends = LAST not in layers
        found = model.forward_intermediates(pixels, stop_early=ends, intermediates_only=ends, **asked)
        final, inner = (None, found) if ends else found
        states = dict(zip([layer for layer in layers if layer != LAST], map(_rows, inner), strict=True))
        return states if ends else {**states, LAST: self._final(model, final)}

    def _pass_of_blocks(self, model: Any, pixels: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """As `_pass`, of the outputs of `_modules`."""
        blocks, inner = [model.get_submodule(name) for name in self._modules], [one for one in layers if one != LAST]
        maps: dict[str, Any] = {}
        with kept_states(blocks, inner, maps, stops=LAST not in layers):
            final = model.forward_features(pixels)
            maps |= {LAST: final} if LAST in layers else {}
        if any(maps[layer].dim() != 4 for layer in inner):
            self._refuse_blocks("blocks that return maps of positions")
        if pixels.is_meta and any(_is_turned(maps[layer], channels_last=_channels_last(model)) for layer in inner):
            self._refuse_blocks("blocks with the axes of its stages")
        return {layer: self._final(model, maps[layer]) for layer in layers}

    def _last(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        return self._final(model, model.forward_features(pixels))

    def _final(self, model: Any, final: Any) -> torch.Tensor:
        """`final` (batch, n, C), of a map (batch, C, height, width) or (batch, height, width, C)."""
        if not isinstance(final, torch.Tensor) or final.dim() not in (2, 3, 4):
            message = f"{self.name}: forward_features of {type(model).__name__} gives no map and no tokens."
            raise ModelError(message)
        if final.dim() == 2:
            return final[:, None]
        if final.dim() == 3:
            return final
        return final.flatten(1, 2) if _channels_last(model) else final.flatten(2).transpose(1, 2)


def _rows(found: Any) -> torch.Tensor:
    """(batch, n, C) of a map (batch, C, height, width), or of one and the tokens before it (batch, prefix, C)."""
    map_, prefix = found if isinstance(found, tuple) else (found, None)
    rows: torch.Tensor = map_.flatten(2).transpose(1, 2) if map_.dim() == 4 else map_
    return rows if prefix is None else torch.cat([prefix, rows], dim=1)


def _channels_last(model: Any) -> bool:
    """Whether the maps of `model` are (batch, height, width, C)."""
    return str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")


def _is_turned(found: torch.Tensor, *, channels_last: bool) -> bool:
    """Whether a map of a square image has its channels on the other side than `channels_last` says.

    Some networks (TinyViT, VOLO) turn maps for the blocks of a stage, and back after them.
    """
    _, first, middle, last = found.shape
    return middle == last != first if channels_last else first == middle != last


def _splits(model: Any) -> bool:
    """Whether `forward_intermediates` can give class tokens and registers apart from the patches."""
    return "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
