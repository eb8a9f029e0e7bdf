"""The basis of a sketch and the scale of `int8`, calibrated on training items before a store is planned."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import ConfigError
from agiqa.extract.filling.plan import PlannedItem, TokenisedItems, prepared_groups
from agiqa.extract.filling.staging import Transfers
from agiqa.extract.filling.targets import Target, lm_head_of
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.batches import BatchRunner, first_batch_size
from agiqa.extract.models.preparing import Preparation
from agiqa.progress import say
from agiqa.store import Moments, Scale, is_planned, make_basis, moments_of, open_store, to_float32

CALIBRATION_ITEMS = 256
_BLOCK_ROWS = 8192


def stored_target(path: Path, tokenised: TokenisedItems, *, rank: int | None, finished: bool = False) -> Target | None:
    """The target of the store at `path`, if `calibrated` would make its basis or scale from the same items.

    Splits may have changed since, by `agiqa store labels`. A `finished` store of `int8` with these items keeps its
    scale then. A sketch may have the basis of another store, so the user has to name it: announces how.
    """
    if not is_planned(path):
        return None
    store = open_store(path, allow_partial=True)
    wanted = calibration_id(tokenised)
    if not store.layout.model_commit.exists():
        return None
    if rank is None:
        scale = store.scale if store.encoding == "int8" else None
        known = scale is not None and (finished or scale.calibration == wanted)
        return Target(encoding="int8", scale=scale) if known else None
    basis = store.basis() if store.encoding == "sketch" else None
    same = basis is not None and (basis.rank, basis.calibration) == (rank, wanted)
    if finished and not same and basis is not None and basis.rank == rank:
        say(
            f"{path} was calibrated on other items than those of the split train now. If only the splits were changed "
            f"since, give --basis {path} in place of --rank {rank}: it keeps its basis"
        )
    return Target(encoding="sketch", basis=basis) if same else None


def calibration_id(tokenised: TokenisedItems) -> str:
    """A hash of the items that a calibration uses, and their number."""
    chosen = calibration_positions([item.split for item in tokenised.items])
    keys = b"".join(tokenised.tokenised[position].key for position in chosen)
    return f"{hashlib.sha256(keys).hexdigest()}:{len(chosen)} items"


def calibrated(
    backbone: Backbone,
    tokenised: TokenisedItems,
    *,
    rank: int | None,
    batch_size: int | None = None,
    advance: Callable[[int], None] = lambda _items: None,
    preparation: Preparation[Backbone] | None = None,
) -> Target:
    """A sketch of `rank`, or `int8` without a rank, by the moments of up to CALIBRATION_ITEMS training items.

    Without splits, all items count as training items. Raises ConfigError for a rank outside 1..D, and for splits
    without a training part.
    """
    if rank is not None:
        check_rank(rank, backbone)
    chosen = [
        tokenised.tokenised[position] for position in calibration_positions([item.split for item in tokenised.items])
    ]
    items = [one.planned for one in chosen]
    weight = backbone.lm_head()  # first: a model whose logits are not linear is refused before any work
    blocks = _hidden_states(backbone, items, batch_size, advance, preparation or Preparation(backbone))
    moments, calibration = _moments(blocks, backbone), calibration_id(tokenised)
    if rank is None:
        return Target(encoding="int8", scale=Scale.of(moments, calibration=calibration))
    head, on_gpu = lm_head_of(backbone), backbone.device.type == "cuda"
    basis = make_basis(
        to_float32(head.bits, head.dtype),
        moments,
        rank=rank,
        lm_head_sha256=head.sha256,
        calibration=calibration,
        gram=_gram_on_device(weight) if on_gpu else None,
        eigh=partial(_eigh_on_device, device=backbone.device) if on_gpu else np.linalg.eigh,
    )
    return Target(encoding="sketch", basis=basis)


def _hidden_states(
    backbone: Backbone,
    items: Sequence[PlannedItem],
    batch_size: int | None,
    advance: Callable[[int], None],
    preparation: Preparation[Backbone],
) -> Iterator[torch.Tensor]:
    """Hidden states (tokens, D) of each item, on the device."""
    transfers = Transfers(backbone.device)
    runner = BatchRunner(batch_size or first_batch_size(backbone, max(item.length for item in items)))
    groups = [items[first : first + runner.size] for first in range(0, len(items), runner.size)]
    for planned, prepared in prepared_groups(preparation, zip(groups, groups, strict=True)):
        found: list[torch.Tensor] = []

        def compute(batch: Sequence[tuple[PlannedItem, Prepared]], found: list[torch.Tensor] = found) -> None:
            found.extend(backbone.hidden_states(transfers.upload([item for _, item in batch])))

        with transfers.on_device():
            runner.run(compute, list(zip(planned, prepared, strict=True)), name=lambda pair: str(pair[0]))
        yield from found
        advance(len(prepared))


def check_rank(rank: int, backbone: Backbone) -> None:
    """Raise ConfigError for a rank outside 1..D."""
    if not 1 <= rank <= backbone.hidden_size:
        message = (
            f"Sketch rank {rank} is outside 1..{backbone.hidden_size}, the model's hidden size. Give another --rank."
        )
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


def _moments(blocks: Iterable[torch.Tensor], backbone: Backbone) -> Moments:
    """`moments_of` hidden states (tokens, D): by NumPy, or in float64 on a GPU. Raises ConfigError without any."""
    width, device = backbone.hidden_size, backbone.device
    if device.type != "cuda":
        return moments_of((rows.float().cpu().numpy() for rows in blocks), width)
    second = torch.zeros(width, width, dtype=torch.float64, device=device)
    first, tokens = torch.zeros(width, dtype=torch.float64, device=device), 0
    for block in blocks:
        wide = block.double()
        second.addmm_(wide.T, wide)
        first += wide.sum(dim=0)
        tokens += len(block)
    return Moments.of_sums(tokens, second.cpu().numpy(), first.cpu().numpy())


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
