"""What a store holds, in numbers that a person asks for first."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agiqa.store.disk.files import files_below, read_json
from agiqa.store.format.items import Items
from agiqa.store.format.text_authors import count_authors
from agiqa.store.reading.store import Store


def store_summary(store: Store) -> dict[str, Any]:
    """State, encoding, items, tokens, bytes, labels, splits, authors of texts and provenance of `store`, JSON-able.

    `mos_ranges` has the scale of each label, None where it is not recorded.
    `bytes_raw_features` is what the finished units take decoded; `bytes_raw_logits` what their logits would take
    as float16 (present where the size of the vocabulary is known). `seconds_of_work` is the sum of what the records of
    the finished units say; None where some of them are not here, as in a store that was pulled or is read at a URL.
    `text_authors` counts who wrote the texts, by split; None where that is known of no item.
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
        "bytes_raw_features": rows * store.width * store.array("features").dtype.itemsize,
        "seconds_of_work": _seconds(records) if len(records) == len(done) else None,
        "labels": {aspect: int(np.isfinite(mos).sum()) for aspect, mos in items.labels.items()},
        "mos_ranges": {aspect: items.mos_ranges.get(aspect) for aspect in items.labels},
        "splits": dict(Counter(split or "none" for split in items.splits)),
        "text_authors": _text_authors(items) or None,
        "provenance": store.provenance,
    }
    if store.is_complete or store.layout.model_commit.exists():
        vocabulary = int(store.array("probe/logits").shape[1])
        summary["bytes_raw_logits"] = rows * vocabulary * 2
    return summary


def _text_authors(items: Items) -> dict[str, dict[str, int]]:
    by_split: dict[str, list[str | None]] = {}
    for split, author in zip(items.splits, items.text_authors, strict=False):
        by_split.setdefault(split or "none", []).append(author)
    return {split: count_authors(authors) for split, authors in by_split.items()}


def _seconds(records: Sequence[Mapping[str, Any]]) -> float:
    return round(sum(float(record["seconds"]) for record in records), 1)


def _bytes_of_features(store: Store, done: Sequence[int]) -> int:
    shards = [store.layout.features_object(unit) for unit in done]
    if store.is_complete:  # of one at a URL they may not be here
        listed = {entry["path"]: int(entry["bytes"]) for entry in store.manifest["objects"]}
        return sum(listed.get(path.relative_to(store.path).as_posix(), 0) for path in shards)
    return sum(path.stat().st_size for path in shards if path.exists())


def _state(store: Store, done: int) -> str:
    return store.state if store.state == "complete" else f"{store.state}, {done} of {store.geometry.units} units"
