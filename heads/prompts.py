"""When two prompts count as the same: the one rule that splits, leak counts and intervals share."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def normalise_prompt(prompt: str) -> str:
    """The prompt without differences of case and white space."""
    return " ".join(prompt.casefold().split())


def prompt_groups(prompts: Sequence[str]) -> NDArray[np.int64]:
    """A group number per prompt, equal for equal normalised prompts; numbers follow the sorted prompts."""
    normal = [normalise_prompt(prompt) for prompt in prompts]
    numbers = {prompt: number for number, prompt in enumerate(sorted(set(normal)))}
    return np.array([numbers[prompt] for prompt in normal], dtype=np.int64)
