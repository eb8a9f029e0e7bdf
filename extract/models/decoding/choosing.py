"""The next token of each row: the likeliest, or drawn with a seed of the row's own.

A draw depends on the row's seed and on the number of its token, not on its batch: both are hashed to a number in
[0, 1), by integer operations that are the same on every device.
"""

from dataclasses import dataclass

import torch

from agiqa.extract.models.contract import GenerationSettings

TIES = 28
"""Beyond `top_k`, this many tokens are looked at for logits equal to that of the last."""
_MASK_34, _MASK_37, _MASK_33 = (1 << 34) - 1, (1 << 37) - 1, (1 << 33) - 1


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How tokens are chosen: GenerationSettings without limit and seed."""

    sample: bool
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float

    @classmethod
    def of(cls, settings: GenerationSettings) -> "Policy":
        """That of `settings`; greedy ones differ in the penalty alone."""
        if not settings.sample:
            penalty = settings.repetition_penalty
            return cls(sample=False, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=penalty)
        return cls(
            sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            repetition_penalty=settings.repetition_penalty,
        )


def choose(
    logits: torch.Tensor, policy: Policy, *, said: torch.Tensor | None, seeds: torch.Tensor, numbers: torch.Tensor
) -> torch.Tensor:
    """(n,) token ids from `logits` (n, V) in float32.

    `said` (n, V) tells which tokens are in the answer so far; None if nothing is penalised. `seeds` and `numbers` (n,)
    int64 are each row's seed and the number of this token in its answer.
    """
    if policy.repetition_penalty != 1.0:
        assert said is not None  # kept for a policy with a penalty
        worse = torch.where(logits < 0, logits * policy.repetition_penalty, logits / policy.repetition_penalty)
        logits = torch.where(said, worse, logits)
    if not policy.sample:
        return logits.argmax(-1)
    kept, ids = likeliest(logits / policy.temperature, policy)
    shares = kept.softmax(-1).cumsum(-1)
    part = uniform(seeds, numbers).to(shares.dtype).clamp_(max=1 - 2.0**-23)  # less than 1 after rounding, too
    place = (shares <= (part * shares[:, -1])[:, None]).sum(-1, keepdim=True).clamp_(max=shares.shape[1] - 1)
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1)


def likeliest(logits: torch.Tensor, policy: Policy) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (n, k) that may be drawn, in falling order, minus infinity for others; and their token ids (n, k).

    Without `top_k` and `top_p` all logits in the order of their ids, and None.
    """
    if policy.top_k == 0 and policy.top_p == 1.0:
        return logits, None
    if policy.top_k == 0 or policy.top_k + TIES >= logits.shape[1]:
        kept, ids = logits.sort(dim=-1, descending=True, stable=True)
    else:
        kept, ids = logits.topk(policy.top_k + TIES, dim=-1)
    if policy.top_k:
        least = kept[:, min(policy.top_k, kept.shape[1]) - 1, None]
        kept = kept.masked_fill(kept < least, float("-inf"))
    if policy.top_p < 1.0:
        shares = kept.softmax(-1)
        before = shares.cumsum(-1) - shares
        kept = kept.masked_fill(before >= policy.top_p, float("-inf"))
    return kept, ids


def uniform(seeds: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """(n,) float64 in [0, 1) from two int64 numbers: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = seeds + (numbers + 1) * -7046029254386353131  # the golden ratio in 64 bits
    mixed = (mixed ^ ((mixed >> 30) & _MASK_34)) * -4658895280553007687
    mixed = (mixed ^ ((mixed >> 27) & _MASK_37)) * -7723592293110705685
    mixed = mixed ^ ((mixed >> 31) & _MASK_33)
    return ((mixed >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53
