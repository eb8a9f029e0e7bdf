"""The basis of a sketch and the scale of `int8`, calibrated on training items before a store is planned."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import ConfigError
from agiqa.extract.filling.plan import PlannedItem, TokenisedItems, prepared_groups
from agiqa.extract.filling.staging import Transfers
from agiqa.extract.filling.targets import Target, lm_head_of, rows_of
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.batches import BatchRunner, first_batch_size
from agiqa.extract.models.preparing import Preparation
from agiqa.progress import say
from agiqa.store import (
    Basis,
    Moments,
    Scale,
    is_planned,
    make_basis,
    make_states_basis,
    open_store,
    to_float32,
)
from agiqa.store.format.artefacts import Eigh
from agiqa.store.format.layers import LAST

CALIBRATION_ITEMS = 256
_BLOCK_ROWS = 8192


def stored_target(
    path: Path, tokenised: TokenisedItems, wanted: Target, *, rank: int | None, finished: bool = False
) -> Target | None:
    """The target of the store at `path`, if `calibrated` would make its bases or scales from the same items.

    `wanted` has the layers and poolings of the store, and no constants. Splits may have changed since, by `agiqa store
    labels`. A `finished` store of `int8` with these items keeps its scale then. A sketch may have the basis of another
    store, so the user has to name it: announces how.
    """
    if not is_planned(path):
        return None
    store = open_store(path, allow_partial=True)
    asked = calibration_id(tokenised)
    if not store.layout.model_commit.exists():
        return None
    if rank is None:
        scale = store.scale if store.encoding == "int8" else None
        if scale is None or not (finished or scale.calibration == asked):
            return None
        scales = {layer: store.layer_scale(layer) for layer in wanted.layers[:-1]}
        return replace(wanted, scale=scale, scales=scales)
    basis = store.basis() if store.encoding == "sketch" else None
    if basis is not None and (basis.rank, basis.calibration) == (rank, asked):
        return replace(wanted, basis=basis, bases=store.layer_bases())
    if finished and basis is not None and basis.rank == rank:
        say(
            f"{path} was calibrated on other items than those of the split train now. If only the splits were changed "
            f"since, give --basis {path} in place of --rank {rank}: it keeps its basis"
        )
    return None


def calibration_id(tokenised: TokenisedItems) -> str:
    """A hash of the items that a calibration uses, and their number."""
    chosen = calibration_positions([item.split for item in tokenised.items])
    keys = b"".join(tokenised.tokenised[position].key for position in chosen)
    return f"{hashlib.sha256(keys).hexdigest()}:{len(chosen)} items"


def calibration_record(tokenised: TokenisedItems, *, rank: int | None) -> dict[str, Any]:
    """The `Target.provenance` of what `calibrated` would make of these items, without making it."""
    calibration = calibration_id(tokenised)
    return (
        {"int8": {"calibration": calibration}}
        if rank is None
        else {"sketch": {"rank": rank, "calibration": calibration}}
    )


def calibrated(
    backbone: Backbone,
    tokenised: TokenisedItems,
    wanted: Target,
    *,
    rank: int | None,
    batch_size: int | None = None,
    advance: Callable[[int], None] = lambda _items: None,
    preparation: Preparation[Backbone] | None = None,
) -> Target:
    """`wanted` with a basis of `rank`, or without a rank with a scale of `int8`, for each of its layers.

    They are made of the moments of what up to CALIBRATION_ITEMS training items store. Without splits, all items count
    as training items. Raises ConfigError for a rank outside 1..D, and for splits without a training part.
    """
    if rank is not None:
        check_rank(rank, backbone, wanted.layers)
    chosen = [
        tokenised.tokenised[position] for position in calibration_positions([item.split for item in tokenised.items])
    ]
    items, calibration = [one.planned for one in chosen], calibration_id(tokenised)
    weight = backbone.lm_head() if wanted.has_lm_head else None  # first: it refuses logits that are not linear
    sums = {layer: _Sums(backbone.layer_width(layer), backbone.device) for layer in wanted.layers}
    for rows in _stored_states(backbone, items, wanted, batch_size, advance, preparation or Preparation(backbone)):
        for layer, states in rows.items():
            sums[layer].add(states)
    moments = {layer: found.moments() for layer, found in sums.items()}
    *others, last = wanted.layers
    if rank is None:
        scales = {layer: Scale.of(found, calibration=calibration) for layer, found in moments.items()}
        return replace(wanted, scale=scales[last], scales={layer: scales[layer] for layer in others})
    eigh = np.linalg.eigh if backbone.device.type == "cpu" else partial(_eigh_on_device, device=backbone.device)
    of_states = partial(make_states_basis, rank=rank, calibration=calibration, eigh=eigh)
    bases = {layer: of_states(moments[layer]) for layer in (others if weight is not None else wanted.layers)}
    if weight is not None:
        bases[last] = _logit_basis(backbone, weight, moments[last], rank=rank, calibration=calibration, eigh=eigh)
    return replace(wanted, basis=bases[last], bases={layer: bases[layer] for layer in others})


def _logit_basis(
    backbone: Backbone, weight: torch.Tensor, moments: Moments, *, rank: int, calibration: str, eigh: Eigh
) -> Basis:
    """The basis of logits by `weight`, which is W_lm on the device."""
    head, on_gpu = lm_head_of(backbone), backbone.device.type == "cuda"
    return make_basis(
        to_float32(head.bits, head.dtype),
        moments,
        rank=rank,
        lm_head_sha256=head.sha256,
        calibration=calibration,
        gram=_gram_on_device(weight) if on_gpu else None,
        eigh=eigh,
    )


def _stored_states(
    backbone: Backbone,
    items: Sequence[PlannedItem],
    wanted: Target,
    batch_size: int | None,
    advance: Callable[[int], None],
    preparation: Preparation[Backbone],
) -> Iterator[dict[str, torch.Tensor]]:
    """What each item stores, (rows, D) on the device by layer."""
    transfers = Transfers(backbone.device)
    first = first_batch_size(backbone, max(item.length for item in items), layers=len(wanted.layers))
    runner = BatchRunner(batch_size or first)
    groups = [items[first : first + runner.size] for first in range(0, len(items), runner.size)]
    images = any(item.item.image is not None for item in items)
    for planned, prepared in prepared_groups(preparation, zip(groups, groups, strict=True), images=images):
        found: list[dict[str, torch.Tensor]] = []

        def compute(
            batch: Sequence[tuple[PlannedItem, Prepared]], found: list[dict[str, torch.Tensor]] = found
        ) -> None:
            found.extend(list(rows_of(backbone, wanted, transfers.upload([item for _, item in batch]))))

        with transfers.on_device():
            runner.run(compute, list(zip(planned, prepared, strict=True)), name=lambda pair: str(pair[0]))
        yield from found
        advance(len(prepared))


def check_rank(rank: int, backbone: Backbone, layers: Sequence[str] = (LAST,)) -> None:
    """Raise ConfigError for a rank outside 1..D, where D is the width of the narrowest of `layers`."""
    width = min(backbone.layer_width(layer) for layer in layers)
    if not 1 <= rank <= width:
        message = f"Sketch rank {rank} is outside 1..{width}, the model's hidden size. Give another --rank."
        raise ConfigError(message)


def calibration_positions(splits: Sequence[str | None]) -> list[int]:
    """Up to CALIBRATION_ITEMS positions, evenly spread over the training split, or over all items without splits."""
    training = [position for position, split in enumerate(splits) if split == "train" or not any(splits)]
    if not training:
        message = (
            "The data set has splits but no item in 'train', and sketch and int8 are never calibrated on test items. "
            "Mark training items, or give no splits to calibrate on any."
        )
        raise ConfigError(message)
    count = min(CALIBRATION_ITEMS, len(training))
    return [training[index] for index in np.linspace(0, len(training) - 1, count).astype(int).tolist()]


class _Sums:
    """Sums over rows of hidden states: by NumPy, or in float64 on a GPU."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._second = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._first = torch.zeros(width, dtype=torch.float64, device=device)
        self._rows = 0

    def add(self, states: torch.Tensor) -> None:
        """Add `states` (rows, D)."""
        wide = states.double()
        if self._on_gpu:
            self._second.addmm_(wide.T, wide)
        else:  # half the time, and the rounding of `moments_of`
            single = states.float()
            self._second += single.T @ single
        self._first += wide.sum(dim=0)
        self._rows += len(states)

    def moments(self) -> Moments:
        """Raises ConfigError without any row."""
        return Moments.of_sums(self._rows, self._second.cpu().numpy(), self._first.cpu().numpy())


def _gram_on_device(weight: torch.Tensor) -> NDArray[np.float64]:
    """W^T W (D, D) of `weight` (V, D), computed in float64 on its device."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in weight.split(_BLOCK_ROWS):
        wide = block.double()
        total.addmm_(wide.T, wide)
    gram: NDArray[np.float64] = total.cpu().numpy()
    return gram


def _eigh_on_device(
    matrix: NDArray[np.float64], device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`numpy.linalg.eigh`, computed on `device`."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix).to(device))
    return values.cpu().numpy(), vectors.cpu().numpy()
