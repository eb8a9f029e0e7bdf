"""What people ask of a store: the features of an item by its name, all items as a table, and what the store is."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, UnknownName
from agiqa.notebooks import html_table, one_line
from agiqa.store.format.labels import range_text
from agiqa.store.format.layers import LAST

if TYPE_CHECKING:
    import pandas as pd

    from agiqa.store.reading.layers import LayerSource

    class _Readable(LayerSource, Protocol):
        """A store, several read as one, or layers of one of them."""

        @property
        def layers(self) -> tuple[str, ...]: ...


_LISTED = 20
"""Names of a message."""


class ByName:
    """Methods that a store, and several stores read as one, have in common."""

    def features(self: "_Readable", name: str) -> NDArray[np.float32]:
        """The features of the item called `name`, (tokens, width) float32.

        They are hidden states, coordinates of a sketch, or logits, as `encoding` says. Raises UnknownName, with the
        nearest names, and as `read`.
        """
        names = self.items.names
        if name not in names:
            near = get_close_matches(name, names, n=_LISTED, cutoff=0.5) or names[:_LISTED]
            raise UnknownName.of(kind="item", name=name, known=names if len(names) <= _LISTED else near)
        return self.read([names.index(name)]).float32()

    def to_pandas(self: "_Readable") -> "pd.DataFrame":
        """The items as a data frame, one row each, in the order of the store.

        The columns are `name`, `prompt`, `split`, `generator`, `description`, `text_author` if known, the MOS as
        `mos_ASPECT`, what is known of single ratings as `std_ASPECT` and `count_ASPECT_LEVEL` (NaN where missing), and
        `tokens`. Raises ConfigError without pandas.
        """
        try:
            import pandas as pd
        except ImportError as error:
            message = "to_pandas needs pandas: pip install 'agiqa[pandas]'."
            raise ConfigError(message) from error
        table, labels = self.items.table(), self.items.labels
        texts = {name: table.column(name).to_pylist() for name in table.column_names if not name.startswith("mos_")}
        marks = {f"mos_{aspect}": labels[aspect] for aspect in sorted(labels)}
        return pd.DataFrame({**texts, **marks, "tokens": self.n_tokens})

    def __repr__(self: "_Readable") -> str:
        """What the store is, in one line."""
        return one_line(f"{type(self).__name__} {self.location}", _shown(self))

    def _repr_html_(self: "_Readable") -> str:
        """What the store is, for notebooks."""
        return html_table(f"{type(self).__name__} {self.location}", _shown(self))


def _shown(store: "_Readable") -> Mapping[str, object]:
    items = store.items
    scales = {aspect: items.mos_ranges.get(aspect) for aspect in sorted(items.labels)}
    splits = {split: items.splits.count(split) for split in dict.fromkeys(items.splits)}
    row = "row" if store.pooled else "token"
    kinds = {
        "layers": ", ".join(store.layers) if store.layers != (LAST,) else None,
        "pooled": ", ".join(store.pooled),
        "tap": store.tap,
    }
    return {
        "items": len(items),
        "tokens": int(store.n_tokens.sum()),
        "features": f"{store.encoding}, {store.width} values per {row}, {store.logical_dtype}",
        **{name: value for name, value in kinds.items() if value},
        "MOS": "; ".join(f"{aspect}, {range_text(scale)}" for aspect, scale in scales.items()) or "none",
        "splits": ", ".join(f"{split or 'none'} {count}" for split, count in splits.items()),
    }
