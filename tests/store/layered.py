"""Small stores with layers, pooled rows or a tap, written through the public protocol, and what went into them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.store import Items, Store, StorePlan, UnitWriter, create_store, create_whole_array, from_float32, seal

WIDTH, VOCABULARY = 8, 12


@dataclass(frozen=True, kw_only=True)
class Layered:
    """What goes into a store: the states of every layer per item, and how the store is planned."""

    states: Mapping[str, Sequence[np.ndarray]]
    """By layer, per item (rows, width) float32, rounded to the dtype of the store."""
    roles: Sequence[np.ndarray]
    logical_dtype: str = "float32"
    pooled: Sequence[str] = ()
    tap: str | None = None
    layer_count: int | None = None
    splits: Sequence[str | None] | None = None
    provenance: Mapping[str, Any] | None = None
    probes_states: bool = True

    @property
    def names(self) -> list[str]:
        return [f"image_{item}.png" for item in range(len(self.roles))]

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.states)

    @property
    def has_lm_head(self) -> bool:
        return self.tap is None and self.layers[-1] == "last"

    @property
    def probed_layers(self) -> tuple[str, ...]:
        """The layers whose states the probe has; none in a store of version 1."""
        plain = self.layers == ("last",) and not self.pooled and self.tap is None
        return self.layers if self.probes_states and not plain else ()

    def plan(self) -> StorePlan:
        *others, last = self.layers
        count = len(self.roles)
        splits = self.splits or ["train" if item % 4 else "test" for item in range(count)]
        return StorePlan(
            encoding="hidden",
            logical_dtype=self.logical_dtype,
            width=self.states[last][0].shape[1],
            layers=self.layers,
            layer_widths={layer: self.states[layer][0].shape[1] for layer in others},
            layer_count=self.layer_count,
            pooled=self.pooled,
            tap=self.tap,
            provenance={"model": {"name": "made up"}, **(self.provenance or {})},
            items=Items(
                names=self.names,
                prompts=[f"prompt {item}" for item in range(count)],
                splits=list(splits),
                generators=[None] * count,
                descriptions=[None] * count,
                labels={"quality": 1 + np.arange(count) % 9 / 2},
            ),
            token_ids=[np.arange(len(roles), dtype=np.int32) * (not self.pooled) for roles in self.roles],
            roles=self.roles,
            item_keys=[hashlib.sha256(name.encode()).digest() for name in self.names],
            truncated=[False] * count,
        )

    def first(self, count: int) -> "Layered":
        """The same of the first items only."""
        states = {layer: rows[:count] for layer, rows in self.states.items()}
        splits = self.plan().items.splits[:count]
        return Layered(**{**vars(self), "states": states, "roles": self.roles[:count], "splits": splits})


def make_layered(
    lengths: Sequence[int],
    *,
    layers: Sequence[str] = ("0", "3", "last"),
    widths: Mapping[str, int] | None = None,
    seed: int = 0,
    logical_dtype: str = "float32",
    **settings: Any,
) -> Layered:
    """Random states of `layers`, each of its own scale; `widths` of those that are not WIDTH wide."""
    rng = np.random.default_rng(seed)
    pooled = settings.get("pooled", ())
    counts = [len(pooled)] * len(lengths) if pooled else list(lengths)

    def states(layer: str) -> list[np.ndarray]:
        width = (widths or {}).get(layer, WIDTH)
        scale = np.linspace(4.0, 0.1, width) * (len(layers) - list(layers).index(layer))
        return [rounded(rng.normal(size=(count, width)) * scale, logical_dtype) for count in counts]

    return Layered(
        states={layer: states(layer) for layer in layers},
        roles=[rng.integers(0, 4, count).astype(np.uint8) for count in counts],
        logical_dtype=logical_dtype,
        **settings,
    )


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that `dtype` holds exactly."""
    bits = from_float32(values.astype(np.float32), dtype)
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits.astype(np.float32)


def lm_head() -> np.ndarray:
    """(VOCABULARY, WIDTH) float32."""
    return np.random.default_rng(5).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)


def begin(path: Path, content: Layered) -> UnitWriter:
    """The plan and the model's arrays; the probe is the first row of two items."""
    return begin_in(create_store(path, content.plan()), content)


def begin_in(store: Store, content: Layered) -> UnitWriter:
    """The model's arrays of a planned store."""
    writer, probed = UnitWriter(store), [item for item, roles in enumerate(content.roles) if len(roles)][:2]

    def write_model(group):
        if content.has_lm_head:
            sha256 = hashlib.sha256(lm_head().tobytes()).hexdigest()
            attributes = {"logical_dtype": "float32", "lm_head_sha256": sha256}
            create_whole_array(group, "lm_head/weight", lm_head(), attributes=attributes)
            states = np.reshape([content.states["last"][item][0] for item in probed], (-1, WIDTH))
            logits = states.astype(np.float32) @ lm_head().T
            create_whole_array(group, "probe/logits", logits, attributes={"logical_dtype": "float32"})
        if content.has_lm_head or content.probed_layers:
            create_whole_array(group, "probe/rows", store.row_starts[probed])
        for layer in content.probed_layers:
            width = content.states[layer][0].shape[1]
            states = np.reshape([content.states[layer][item][0] for item in probed], (-1, width)).astype(np.float32)
            create_whole_array(group, f"probe/layers/{layer}", states, attributes={"logical_dtype": "float32"})

    writer.write_model_arrays(write_model)
    return writer


def fill(writer: UnitWriter, content: Layered, units: Sequence[int] | None = None) -> None:
    *others, last = content.layers
    for unit in writer.pending() if units is None else units:
        with writer.claim(unit) as mine:
            if mine:
                rows = {
                    layer: from_float32(
                        np.concatenate([content.states[layer][item] for item in writer.store.items_of(unit)]),
                        content.logical_dtype,
                    )
                    for layer in content.layers
                }
                writer.write_unit(unit, rows[last], layers={layer: rows[layer] for layer in others}, seconds=0.0)


def make_store(path: Path, content: Layered) -> Store:
    writer = begin(path, content)
    fill(writer, content)
    return seal(writer.store)
