"""Real stores with layers and pooled rows, written through the public protocol, whose MOS is in the states of a layer."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agiqa.store import Items, Prefixes, Store, StorePlan, UnitWriter, create_store, create_whole_array, seal
from agiqa.store.format.layout import TOKEN_ROLES

Rows = list[NDArray[np.float32]]
LENGTHS = (5, 7, 4, 6)
WIDTH, VOCABULARY = 4, 12
LAYERS = ("8", "16", "last")


def made_items(count: int = 60) -> Items:
    """Items of three per prompt, every fifth prompt in the test part, without MOS."""
    return Items(
        names=[f"{k:03d}.png" for k in range(count)],
        prompts=[f"prompt {k // 3}" for k in range(count)],
        splits=["test" if k // 3 % 5 == 0 else "train" for k in range(count)],
        generators=[("one", "two")[k % 2] for k in range(count)],
        descriptions=[f"description {k}" for k in range(count)],
        labels={"quality": np.zeros(count)},
    )


def made_states(count: int = 60, *, layers: Sequence[str] = LAYERS, width: int = WIDTH) -> dict[str, Rows]:
    """Random states of every layer, each on a scale of its own."""
    return {
        layer: [
            (10.0**depth * np.random.default_rng([depth, k]).normal(size=(LENGTHS[k % 4], width))).astype(np.float32)
            for k in range(count)
        ]
        for depth, layer in enumerate(layers)
    }


def made_roles(count: int = 60) -> list[NDArray[np.uint8]]:
    """A special token, question tokens, and two of an answer at the end."""
    return [
        np.array([0, *[TOKEN_ROLES["question"]] * (LENGTHS[k % 4] - 3), *[TOKEN_ROLES["answer"]] * 2], dtype=np.uint8)
        for k in range(count)
    ]


def made_ids(count: int = 60) -> list[NDArray[np.int32]]:
    """Random ids of few words."""
    return [np.random.default_rng(k).integers(1, 9, LENGTHS[k % 4]).astype(np.int32) for k in range(count)]


def mos_of(states: Rows) -> NDArray[np.float64]:
    """A MOS that is linear in the mean state of the answer."""
    means = np.stack([rows[-2:].astype(np.float64).mean(0) for rows in states])
    return 2.5 + (means[:, 0] - 0.5 * means[:, 1]) / np.abs(means).max()


def pooled_states(states: Mapping[str, Rows], pooled: Sequence[str]) -> dict[str, Rows]:
    """The rows of a store of pooled rows, by numpy alone."""
    roles = made_roles(len(next(iter(states.values()))))

    def row(tokens: NDArray[np.float32], of: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
        kind, _, role = name.partition("@")
        chosen = tokens if not role else tokens[of == TOKEN_ROLES[role]]
        return {"mean": chosen.mean(0), "max": chosen.max(0), "first": chosen[0], "last": chosen[-1]}[kind]

    return {
        layer: [np.stack([row(tokens, of, name) for name in pooled]) for tokens, of in zip(rows, roles, strict=True)]
        for layer, rows in states.items()
    }


def write_store(
    path: Path,
    states: Mapping[str, Rows],
    mos: NDArray[np.float64],
    *,
    pooled: Sequence[str] = (),
    tap: str | None = None,
    model: str = "made up",
    widths: Mapping[str, int] | None = None,
    variant: str | None = None,
    prefixes: Prefixes | None = None,
    roles: Sequence[NDArray[np.uint8]] | None = None,
    ids: Sequence[NDArray[np.int32]] | None = None,
    authors: Sequence[str | None] = (),
) -> Store:
    """A sealed store of float32 hidden states: `states` by layer, ascending, (tokens or pooled rows, width) per item."""
    last = list(states)[-1]
    count = len(states[last])
    items = made_items(count)
    items.labels["quality"] = mos
    items.text_authors.extend(authors)
    roles = made_roles(count) if roles is None else roles
    conversation = {} if variant is None else {"conversation": {"variant": variant, "aspect": "quality"}}
    if pooled:
        of_row = [TOKEN_ROLES[name.partition("@")[2] or ("answer" if name == "last" else "special")] for name in pooled]
        roles = [np.array(of_row, dtype=np.uint8)] * count
    plan = StorePlan(
        encoding="hidden",
        logical_dtype="float32",
        width=states[last][0].shape[1],
        provenance={"model": {"name": model}, **conversation},
        items=items,
        token_ids=[np.zeros(len(rows), np.int32) for rows in states[last]] if ids is None else list(ids),
        roles=roles,
        item_keys=[hashlib.sha256(name.encode()).digest() for name in items.names],
        truncated=[False] * count,
        layers=tuple(states),
        layer_widths=widths or {},
        pooled=tuple(pooled),
        tap=tap,
        prefixes=prefixes,
    )
    store = create_store(path, plan)
    writer = UnitWriter(store)
    if last == "last" and tap is None:
        _write_model(writer, states[last])
    else:
        writer.write_model_arrays(lambda _group: None)
    for unit in writer.pending():
        with writer.claim(unit):
            rows = {layer: np.concatenate([of[item] for item in store.items_of(unit)]) for layer, of in states.items()}
            writer.write_unit(unit, rows.pop(last), seconds=0.0, layers=rows)
    return seal(store)


def _write_model(writer: UnitWriter, states: Rows) -> None:
    weights = np.random.default_rng(9).normal(size=(VOCABULARY, states[0].shape[1])).astype(np.float32)
    attributes = {"logical_dtype": "float32", "lm_head_sha256": hashlib.sha256(weights.tobytes()).hexdigest()}

    def write(group: object) -> None:
        create_whole_array(group, "lm_head/weight", weights, attributes=attributes)
        create_whole_array(group, "probe/rows", writer.store.row_starts[[0]])
        probe = {"logical_dtype": "float32"}
        create_whole_array(group, "probe/logits", states[0][:1] @ weights.T, attributes=probe)

    writer.write_model_arrays(write)
