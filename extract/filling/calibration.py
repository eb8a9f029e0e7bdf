"""The basis of a sketch and the scale of `int8`, calibrated on training items before a store is planned."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from agiqa.errors import ConfigError
from agiqa.extract.filling.device_algebra import eigh_on_device, gram_on_device, moments_on_device
from agiqa.extract.filling.model_arrays import lm_head_of
from agiqa.extract.filling.plan import PlannedItem, TokenisedItems, prepare_planned
from agiqa.extract.filling.targets import Target
from agiqa.extract.filling.transfers import Transfers
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.batches import BatchRunner, first_batch_size
from agiqa.extract.models.preparing import Preparation
from agiqa.store import Moments, Scale, is_planned, make_basis, moments_of, open_store, to_float32

CALIBRATION_ITEMS = 256


def stored_constants(path: Path, tokenised: TokenisedItems, *, rank: int | None) -> Target | None:
    """The target of the store at `path`, if its basis or scale is the one that `calibrated` would make anew."""
    if not is_planned(path):
        return None
    store = open_store(path, allow_partial=True)
    asked = calibration_id(tokenised)
    if not store.layout.model_commit.exists():
        return None
    if rank is None:
        scale = store.scale if store.encoding == "int8" else None
        return None if scale is None or scale.calibration != asked else Target(encoding="int8", scale=scale)
    basis = store.basis() if store.encoding == "sketch" else None
    same = basis is not None and (basis.rank, basis.calibration) == (rank, asked)
    return Target(encoding="sketch", basis=basis) if same else None


def calibration_id(tokenised: TokenisedItems) -> str:
    """What a calibration on these items is taken over: a hash of the chosen items, and their number."""
    chosen = calibration_positions([item.split for item in tokenised.items])
    keys = b"".join(tokenised.keys[position] for position in chosen)
    return f"{hashlib.sha256(keys).hexdigest()}:{len(chosen)} items"


def calibrated(
    backbone: Backbone,
    tokenised: TokenisedItems,
    *,
    rank: int | None,
    batch_size: int | None = None,
    advance: Callable[[int], None] = lambda _items: None,
    preparation: Preparation | None = None,
) -> Target:
    """A rank-`rank` sketch, or `int8` where there is no rank, by the moments of up to 256 training items.

    All items count as training items if there are no splits. Raises ConfigError for a rank outside 1..D, and for
    splits without a training part.
    """
    if rank is not None:
        check_rank(rank, backbone)
    chosen = calibration_positions([item.split for item in tokenised.items])
    items = [
        PlannedItem(item=tokenised.items[position], length=len(tokenised.token_ids[position])) for position in chosen
    ]
    weight = backbone.lm_head()  # first: a model whose logits are not linear is refused before any work
    preparation = preparation or Preparation(backbone)

    def blocks() -> Iterator[torch.Tensor]:
        transfers = Transfers(backbone.device)
        runner = BatchRunner(batch_size or first_batch_size(backbone, max(item.length for item in items)))
        groups = [items[first : first + runner.size] for first in range(0, len(items), runner.size)]
        for planned, prepared in preparation.groups(prepare_planned, zip(groups, groups, strict=True)):
            found: list[torch.Tensor] = []

            def compute(batch: Sequence[tuple[PlannedItem, Prepared]], found: list[torch.Tensor] = found) -> None:
                found.extend(backbone.hidden_states(transfers.upload([item for _, item in batch])))

            with transfers.on_device():
                runner.run(compute, list(zip(planned, prepared, strict=True)), name=lambda pair: str(pair[0]))
            yield from found
            advance(len(prepared))

    moments, calibration = _moments(blocks(), backbone), calibration_id(tokenised)
    if rank is None:
        return Target(encoding="int8", scale=Scale.of(moments, calibration=calibration))
    head, on_gpu = lm_head_of(backbone), backbone.device.type == "cuda"
    basis = make_basis(
        to_float32(head.bits, head.dtype),
        moments,
        rank=rank,
        lm_head_sha256=head.sha256,
        calibration=calibration,
        gram=gram_on_device(weight) if on_gpu else None,
        eigh=partial(eigh_on_device, device=backbone.device) if on_gpu else np.linalg.eigh,
    )
    return Target(encoding="sketch", basis=basis)


def _moments(blocks: Iterable[torch.Tensor], backbone: Backbone) -> Moments:
    """Of hidden states (tokens, D), where they are: NumPy's sums on a CPU."""
    if backbone.device.type == "cuda":
        return moments_on_device(blocks, backbone.hidden_size, backbone.device)
    return moments_of((rows.float().cpu().numpy() for rows in blocks), backbone.hidden_size)


def check_rank(rank: int, backbone: Backbone) -> None:
    """Raise ConfigError for a rank outside 1..D."""
    if not 1 <= rank <= backbone.hidden_size:
        message = (
            f"Sketch rank {rank} is outside 1..{backbone.hidden_size}, the model's hidden size. Give another --rank."
        )
        raise ConfigError(message)


def calibration_positions(splits: Sequence[str | None]) -> list[int]:
    """Up to 256 positions spread over the training split, or over all items when none has a split."""
    training = [position for position, split in enumerate(splits) if split == "train" or not any(splits)]
    if not training:
        message = (
            "The data set has splits but no item in 'train', and sketch and int8 are never calibrated on test items. "
            "Mark training items, or give no splits to calibrate on any."
        )
        raise ConfigError(message)
    count = min(CALIBRATION_ITEMS, len(training))
    return [training[place] for place in np.linspace(0, len(training) - 1, count).astype(int).tolist()]
