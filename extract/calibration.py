"""A basis for `extract --encoding sketch`: from another store, or calibrated on training items of this one."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError
from agiqa.extract.backbones import Backbone, Prepared
from agiqa.extract.fill import CALIBRATION_ITEMS, tensor_bits
from agiqa.extract.plan import TokenisedItems, fit
from agiqa.store import Basis, is_planned, make_basis, moments_of, open_store, to_float32


def stored_basis(path: Path, tokenised: TokenisedItems, *, rank: int) -> Basis | None:
    """The basis of the sketch store at `path`, if it is the one that `calibrate` would make anew."""
    if not is_planned(path):
        return None
    store = open_store(path, allow_partial=True)
    if store.encoding != "sketch" or not store.layout.model_commit.exists():
        return None
    basis = store.basis()
    asked = (rank, calibration_id(tokenised))
    return basis if (basis.rank, basis.calibration) == asked else None


def calibration_id(tokenised: TokenisedItems) -> str:
    """What a calibration on these items is taken over: a hash of the chosen items, and their number."""
    chosen = calibration_positions([item.split for item in tokenised.items])
    keys = b"".join(tokenised.keys[position] for position in chosen)
    return f"{hashlib.sha256(keys).hexdigest()}:{len(chosen)} items"


def calibrate(
    backbone: Backbone,
    tokenised: TokenisedItems,
    *,
    rank: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _items: None,
) -> Basis:
    """The rank-`rank` basis of the logits over up to 256 training items (all items if there are no splits).

    Raises ConfigError for a rank outside 1..D, and for splits without a training part.
    """
    if not 1 <= rank <= backbone.hidden_size:
        message = (
            f"Sketch rank {rank} is outside 1..{backbone.hidden_size}, the model's hidden size. Give another --rank."
        )
        raise ConfigError(message)
    chosen = calibration_positions([item.split for item in tokenised.items])
    backbone.load()
    bits, dtype = tensor_bits(backbone.lm_head())

    def blocks() -> Iterator[NDArray[np.float32]]:
        for first in range(0, len(chosen), batch_size):
            prepared = [_prepare(backbone, tokenised, position) for position in chosen[first : first + batch_size]]
            for states in backbone.hidden_states(prepared):
                yield states.float().cpu().numpy()
            advance(len(prepared))

    return make_basis(
        to_float32(bits, dtype),
        moments_of(blocks(), backbone.hidden_size),
        rank=rank,
        lm_head_sha256=hashlib.sha256(bits.tobytes()).hexdigest(),
        calibration=calibration_id(tokenised),
    )


def _prepare(backbone: Backbone, tokenised: TokenisedItems, position: int) -> Prepared:
    """The item as it will be stored: cut to the length that the plan gave it."""
    item = tokenised.items[position]
    return fit(backbone.prepare(item.conversation, item.image), len(tokenised.token_ids[position]), truncate=True)


def calibration_positions(splits: Sequence[str | None]) -> list[int]:
    """Up to 256 positions spread over the training split, or over all items when none has a split."""
    training = [position for position, split in enumerate(splits) if split == "train" or not any(splits)]
    if not training:
        message = "The data set has splits but no item in 'train'; a basis is never calibrated on test items."
        raise ConfigError(message)
    count = min(CALIBRATION_ITEMS, len(training))
    return [training[place] for place in np.linspace(0, len(training) - 1, count).astype(int).tolist()]
