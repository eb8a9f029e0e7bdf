"""What a store holds: the data card that a sealed store carries, and a summary in numbers."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agiqa.store.disk.files import files_below, read_json
from agiqa.store.format.items import Items, count_authors
from agiqa.store.format.labels import range_text
from agiqa.store.format.layers import LAST
from agiqa.store.format.layout import FORMAT, PROBE_LOGITS
from agiqa.store.format.prefixes import PREFIXES
from agiqa.store.reading.store import Store

_TRAINING = {
    "hidden": "`agiqa train {name} RUN` trains a head.",
    "int8": "`agiqa train {name} RUN` trains a head, on hidden states rounded to eight bits.",
    "sketch": "`agiqa train {name} RUN --projection sketch` trains a head.",
    "logits": '`agiqa.store.view(store, "logits")` gives an item\'s logits; heads are trained from hidden states.',
}


def data_card(store: Store) -> str:
    """The README.md of `store` as markdown."""
    items = store.items
    aspects = ", ".join(sorted(items.labels)) or "none"
    authors = ", ".join(f"{author} ({count})" for author, count in count_authors(items.text_authors).items())
    scales = [f"{aspect} {range_text(items.mos_ranges.get(aspect))}" for aspect in sorted(items.labels)]
    return f"""# {store.path.name}

{_opening(store)}

| | |
|---|---|
| format | {FORMAT} v{store.attributes["version"]} (Zarr v3) |
| store id | `{store.id}` |
| encoding | {store.encoding}, {store.logical_dtype}, {store.width} values per {"row" if store.pooled else "token"} |
{_content_lines(store)}| MOS | {aspects} |
| authors of the texts | {authors or "unknown"} |
| scale of the MOS | {", ".join(scales) or "none"} |

## Load

```python
from agiqa.store import open_store
store = open_store("{store.path.name}")
rows = store.read([0, 1])  # rows.float32() (tokens, {store.width}), rows.offsets, rows.roles
{_loading_layers(store)}```

{_training(store)}
`agiqa store verify {store.path.name} --level full` checks every byte.

## How it was made

```json
{json.dumps(store.provenance, indent=2, ensure_ascii=False, sort_keys=True)}
```
"""


def _opening(store: Store) -> str:
    """What is stored, and what made it."""
    parts = {"vision": "the vision tower of a multimodal language model", "timm": "an image encoder"}
    if store.tap is None:
        held, maker = " and their conversations", "a language model"
    else:
        kind = store.tap.partition(":")[0]
        held, maker = "", parts.get(kind, f"the part {store.tap!r} of a multimodal language model")
    rows = f"{int(store.n_tokens.sum())} {'tokens' if store.tap is None and not store.pooled else 'rows'}"
    return (
        f"Features of {len(store.items)} AI-generated images{held}, {rows}, made once by\n"
        f"{maker} so that quality-assessment heads can be trained without it."
    )


def _content_lines(store: Store) -> str:
    """The rows of the table that only some stores have."""
    lines = {
        "layers": ", ".join(store.layers) if store.layers != (LAST,) else "",
        "rows of an item": ", ".join(store.pooled),
        "tap": store.tap or "",
    }
    return "".join(f"| {name} | {value} |\n" for name, value in lines.items() if value)


def _loading_layers(store: Store) -> str:
    if len(store.layers) == 1:
        return ""
    name, width = store.layers[0], store.layer_shape(store.layers[0])[0]
    return f'rows = store.layer("{name}").read([0, 1])  # (tokens, {width}); of {", ".join(store.layers)}\n'


def _training(store: Store) -> str:
    """How a head is trained from the store."""
    name = store.path.name
    if store.encoding == "hidden" and not store.content_of_rows.has_lm_head:
        return f"`agiqa train {name} RUN --projection hidden` trains a head."
    return _TRAINING[store.encoding].format(name=name)


def store_summary(store: Store) -> dict[str, Any]:
    """State, encoding, items, tokens, bytes, labels, splits, authors of texts and provenance of `store`, JSON-able.

    - `mos_ranges`: the scale of each label, None if unknown.
    - `deviations`: number of items that have the standard deviation of their ratings, by label.
    - `counts`: number of items that have counts of their ratings by level, by label.
    - `views`: the shorter conversations as which the store can be read, the shortest first; omitted without any.
    - `layers`, `pooled`, `tap`: omitted where rows are tokens of the layer `last` of the language model.
    - `bytes_features`, `bytes_raw_features`: all layers of the finished units, as files and decoded.
    - `bytes_raw_logits`: their logits as float16, omitted while the size of the vocabulary is unknown.
    - `seconds_of_work`: the sum over the records of the finished units; None if some are missing, as in a pulled store.
    - `text_authors`: number of items by split and author; None if all authors are unknown.
    """
    items, done = store.items, store.committed_units()
    records = [read_json(path) for unit in done if (path := store.layout.commit(unit)).exists()]
    rows = sum(store.rows_used(unit) for unit in done)
    summary: dict[str, Any] = {
        "path": store.location,
        "id": store.id,
        "state": _state(store, len(done)),
        "encoding": store.encoding,
        "logical_dtype": store.logical_dtype,
        "width": store.width,
        "items": len(items),
        "tokens": int(store.n_tokens.sum()),
        "longest_item": int(store.n_tokens.max(initial=0)),
        "units": store.geometry.units,
        "unit_rows": store.geometry.unit_rows,
        "bytes_on_disk": sum(path.stat().st_size for path in files_below(store.path)),
        "bytes_features": _bytes_of_features(store, done),
        "bytes_raw_features": rows * _row_bytes(store),
        "seconds_of_work": _seconds(records) if len(records) == len(done) else None,
        "labels": {aspect: int(np.isfinite(mos).sum()) for aspect, mos in items.labels.items()},
        "mos_ranges": {aspect: items.mos_ranges.get(aspect) for aspect in items.labels},
        "deviations": {aspect: int(np.isfinite(values).sum()) for aspect, values in items.deviations.items()},
        "counts": {
            name.removesuffix("_1"): int(np.isfinite(values).sum())
            for name, values in items.counts.items()
            if name.endswith("_1")
        },
        "splits": dict(Counter(split or "none" for split in items.splits)),
        "text_authors": _text_authors(items) or None,
        "provenance": store.provenance,
    }
    summary |= _content_entries(store)
    if (store.is_sealed or store.layout.model_commit.exists()) and PROBE_LOGITS in store.probe_arrays:
        vocabulary = int(store.array(PROBE_LOGITS).shape[1])
        summary["bytes_raw_logits"] = rows * vocabulary * 2
    return summary


def _content_entries(store: Store) -> dict[str, Any]:
    """The entries that only some stores have."""
    entries = {
        "views": list(store.provenance.get(PREFIXES, ())),
        "layers": list(store.layers) if store.layers != (LAST,) else [],
        "pooled": list(store.pooled),
        "tap": store.tap,
    }
    return {name: value for name, value in entries.items() if value}


def _row_bytes(store: Store) -> int:
    """Bytes of a row in all layers, as they are stored."""
    arrays = [store.array(store.array_of_layer(layer)) for layer in store.layers]
    return sum(int(array.shape[1]) * array.dtype.itemsize for array in arrays)


def _text_authors(items: Items) -> dict[str, dict[str, int]]:
    by_split: dict[str, list[str | None]] = {}
    for split, author in zip(items.splits, items.text_authors, strict=False):
        by_split.setdefault(split or "none", []).append(author)
    return {split: count_authors(authors) for split, authors in by_split.items()}


def _seconds(records: Sequence[Mapping[str, Any]]) -> float:
    return round(sum(float(record["seconds"]) for record in records), 1)


def _bytes_of_features(store: Store, done: Sequence[int]) -> int:
    arrays = [store.array_of_layer(layer) for layer in store.layers]
    shards = [store.layout.object_of(array, unit, dimensions=2) for array in arrays for unit in done]
    if store.is_sealed:  # a store at a URL has only some of them on this disk
        listed = {entry["path"]: int(entry["bytes"]) for entry in store.manifest["objects"]}
        return sum(listed.get(path.relative_to(store.path).as_posix(), 0) for path in shards)
    return sum(path.stat().st_size for path in shards if path.exists())


def _state(store: Store, done: int) -> str:
    return store.state if store.state == "complete" else f"{store.state}, {done} of {store.geometry.units} units"
