"""Which items each step trains on, and how fast: everything that follows from the seed and the number of a step."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from agiqa.extract.data.seeds import derived_seed
from agiqa.extract.tuning.recipes import Recipe


class Schedule:
    """The plan of a training on `items` items. Steps are counted from 0."""

    def __init__(self, recipe: Recipe, *, items: int, seed: int) -> None:
        """`items` is 1 or more."""
        self.recipe = recipe
        self.items = items
        self.seed = seed
        epochs = recipe.epochs or 0.0
        self.steps = recipe.steps or max(1, math.ceil(epochs * items / recipe.batch_size))

    def batch(self, step: int) -> list[int]:
        """The items of a step: the next ones of an endless row of shuffled epochs."""
        places = range(step * self.recipe.batch_size, (step + 1) * self.recipe.batch_size)
        return [int(_order(self.seed, place // self.items, self.items)[place % self.items]) for place in places]

    def micro_batches(self, step: int) -> list[list[int]]:
        """The same items in the pieces that pass through the model together; a piece is the batch by default."""
        batch, size = self.batch(step), self.recipe.micro_batch or self.recipe.batch_size
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        recipe = self.recipe
        rising = math.ceil(recipe.warmup * self.steps)
        if step < rising:
            return recipe.lr * (step + 1) / rising
        if recipe.schedule == "constant":
            return recipe.lr
        return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))

    def validates(self, done: int) -> bool:
        """Whether there is a validation after `done` steps."""
        every = max(1, math.ceil(self.steps / self.recipe.validations))
        return done == self.steps or (done > 0 and done % every == 0)

    def dropout_seed(self, step: int, micro_batch: int) -> int:
        """The seed of the dropout of one micro-batch, whatever process computes it."""
        return derived_seed(self.seed, "dropout", step, micro_batch)


def held_out(prompts: Sequence[str], *, share: float, seed: int) -> NDArray[np.bool_]:
    """Which items are validation items: those of a seeded `share` of the prompts, at least one prompt of several."""
    names = sorted(set(prompts))
    count = min(len(names) - 1, max(1, round(share * len(names)))) if share > 0 else 0
    order = np.random.default_rng(derived_seed(seed, "held out")).permutation(len(names))
    chosen = {names[place] for place in order[:count].tolist()}
    return np.array([prompt in chosen for prompt in prompts], np.bool_)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, items: int) -> NDArray[np.int64]:
    return np.random.default_rng(derived_seed(seed, "order", epoch)).permutation(items)
