"""The data card that a sealed store carries: what it is, how it was made, how to load it."""

import json

from agiqa.store.format.layout import FORMAT, VERSION
from agiqa.store.format.scales import spelled
from agiqa.store.format.text_authors import count_authors
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
    scales = ", ".join(f"{aspect} {spelled(items.mos_ranges.get(aspect))}" for aspect in sorted(items.labels)) or "none"
    return f"""# {store.path.name}

Features of {len(items)} AI-generated images and their conversations, {int(store.n_tokens.sum())} tokens, made once by a
multimodal language model so that quality-assessment heads can be trained without it.

| | |
|---|---|
| format | {FORMAT} v{VERSION} (Zarr v3) |
| store id | `{store.id}` |
| encoding | {store.encoding}, {store.logical_dtype}, {store.width} values per token |
| MOS | {aspects} |
| authors of the texts | {authors or "unknown"} |
| scale of the MOS | {scales} |

## Load

```python
from agiqa.store import open_store
store = open_store("{store.path.name}")
rows = store.read([0, 1])  # rows.float32() (tokens, {store.width}), rows.offsets, rows.roles
```

{_TRAINING[store.encoding].format(name=store.path.name)}
`agiqa store verify {store.path.name} --level full` checks every byte.

## How it was made

```json
{json.dumps(store.provenance, indent=2, ensure_ascii=False, sort_keys=True)}
```
"""
