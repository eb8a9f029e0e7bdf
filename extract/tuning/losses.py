"""The loss of examples, computed at their labels only: the logits of all positions of an 8B model would take GBs."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from agiqa.extract.models.batches import uploaded
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.tuning.examples import Example

LABELS_AT_ONCE = 256
"""Labels whose logits are in memory at the same time: 131 MB in float32 for 128,256 words."""


def summed_loss(backbone: HuggingFaceBackbone, batch: Sequence[Example]) -> Tensor:
    """The cross-entropy summed over all labels of `batch`, a scalar in float32, with gradients."""
    rows, targets = _labelled(backbone, batch)
    total = rows.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(rows.split(LABELS_AT_ONCE), targets.split(LABELS_AT_ONCE), strict=True):
        lost: Any = checkpoint(_lost, backbone, part, wanted, use_reentrant=False)
        total = total + lost
    return total


def validation_sums(backbone: HuggingFaceBackbone, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """The summed loss, and how many examples of `batch` would answer the rating word: float32 scalars.

    Greedy decoding gives the word of an example exactly if each of its tokens, the closing one included, is the
    likeliest after those before it.
    """
    with torch.no_grad():
        rows, targets = _labelled(backbone, batch)
        losses, hits = [], []
        for part, wanted in zip(rows.split(LABELS_AT_ONCE), targets.split(LABELS_AT_ONCE), strict=True):
            logits = backbone.logits_of(part).float()
            losses.append(cross_entropy(logits, wanted, reduction="sum"))
            hits.append(logits.argmax(dim=-1) == wanted)
        hit = torch.cat(hits).split([example.count for example in batch])
        right = [one[len(one) - example.rating :].all() for one, example in zip(hit, batch, strict=True)]
        return torch.stack(losses).sum(), torch.stack(right).float().sum()


def _labelled(backbone: HuggingFaceBackbone, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(labels, D) the states in front of all labels of `batch`, and (labels,) the ids of the labels."""
    parts = [part for example in batch for part in example.parts]
    states = backbone.states([part.prepared for part in parts])
    rows = [row.index_select(0, uploaded(part.labels - 1, row.device)) for row, part in zip(states, parts, strict=True)]
    targets = np.concatenate([part.targets for part in parts]).astype(np.int64)
    return torch.cat(rows), uploaded(targets, rows[0].device)


def _lost(backbone: HuggingFaceBackbone, states: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(backbone.logits_of(states).float(), targets, reduction="sum")


@contextmanager
def computing(backbone: HuggingFaceBackbone) -> Generator[None]:
    """Compute inside in the dtype of the model, although trained weights are in float32."""
    dtype = getattr(torch, backbone.logical_dtype)
    with torch.autocast(backbone.device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield
