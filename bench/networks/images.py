"""The images of a data set as items with labels, from which splits are drawn as from a store."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError, UnknownName
from agiqa.extract.data.items import DataSet, Item
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.labels import MosRange

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ImageColumns:
    """The item table of a data set, as that of a store."""

    names: list[str]
    prompts: list[str]
    splits: list[str | None]
    generators: list[str | None]
    labels: Mapping[str, Array]
    """MOS by aspect; NaN for an item without one."""
    mos_ranges: Mapping[str, MosRange]


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """The checked images of a data set with their prompts and MOS."""

    data_set: DataSet
    location: str
    """The path that was given."""

    @property
    def images(self) -> Sequence[Item]:
        """The items, each with an image."""
        return self.data_set.items

    @property
    def id(self) -> str:
        """SHA-256 of names, prompts, splits, generators, MOS and images, in hex."""
        return self._id

    @property
    def items(self) -> ImageColumns:
        """The columns."""
        return self._columns

    @cached_property
    def _id(self) -> str:
        rows = [
            [one.name, one.prompt, one.split, one.generator, sorted(one.labels.items()), one.image_sha256]
            for one in self.images
        ]
        return hashlib.sha256(canonical_json(rows).encode()).hexdigest()

    @cached_property
    def _columns(self) -> ImageColumns:
        aspects = sorted({aspect for one in self.images for aspect in one.labels})
        scale = self.data_set.mos_range
        return ImageColumns(
            names=[one.name for one in self.images],
            prompts=[one.prompt for one in self.images],
            splits=[one.split for one in self.images],
            generators=[one.generator for one in self.images],
            labels={aspect: np.array([one.labels.get(aspect, np.nan) for one in self.images]) for aspect in aspects},
            mos_ranges={} if scale is None else dict.fromkeys(aspects, scale),
        )

    def mos(self, items: NDArray[np.int64], label: str) -> Array:
        """The MOS of some items. Raises UnknownName for a label that no item has, DataError for items without one."""
        labels = self.items.labels
        if label not in labels:
            kind = f"MOS of {self.location}"
            raise UnknownName.of(kind, label, labels)
        values = labels[label][items]
        missing = [self.items.names[item] for item in items[np.isnan(values)]]
        if missing:
            problems = [f"{name!r} has no {label} MOS" for name in missing]
            error = DataError.from_problems(self.location, problems)
            error.add_note(
                "Training, validation and test items need a MOS. Complete the table, or leave them out of it."
            )
            raise error
        return values
