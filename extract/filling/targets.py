"""What an extraction stores of the model: the encoding of its hidden states, W_lm, constants, and a few raw logits."""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from agiqa.errors import HeadError
from agiqa.extract.filling.pooling import Pooling, pooled, pooled_roles
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.ahead import Ahead
from agiqa.extract.models.batches import BatchRunner
from agiqa.store import (
    SCALED_DTYPE,
    Basis,
    Scale,
    Store,
    UnitWriter,
    create_whole_array,
    open_store,
    save_basis,
    save_scale,
)
from agiqa.store.deriving.calibrating import bases_of
from agiqa.store.format.layers import LAST, probe_array
from agiqa.store.format.layout import PROBE_LOGITS, PROBE_ROWS

_PROBE_ITEMS = 2
_PROBE_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Target:
    """The encoding of a store to be filled, with the constants that it needs."""

    encoding: str
    basis: Basis | None = None
    """Of a sketch."""
    scale: Scale | None = None
    """Of `int8`."""
    keep_logits: bool = False
    """Whether raw logits are kept beside hidden states."""
    layers: tuple[str, ...] = (LAST,)
    """Names, ascending; the last of them is that of the array `features`, and of `basis` and `scale`."""
    bases: Mapping[str, Basis] = field(default_factory=dict[str, Basis])
    """Of a sketch, those of the other layers."""
    scales: Mapping[str, Scale] = field(default_factory=dict[str, Scale])
    """Of `int8`, those of the other layers."""
    poolings: tuple[Pooling, ...] = ()
    """The rows of an item; none where it has a row per token."""
    tap: str | None = None
    """Where in the model the states come from, see `Backbone.tap`."""

    @property
    def has_lm_head(self) -> bool:
        """Whether `features` are states before W_lm."""
        return self.tap is None and self.layers[-1] == LAST

    def of(self, layer: str) -> "Target":
        """What is stored of one of the layers. Only `last` has logits: of the others, hidden states are stored."""
        if layer == self.layers[-1]:
            return replace(self, layers=(layer,))
        encoding = "hidden" if self.encoding == "logits" else self.encoding
        basis, scale = self.bases.get(layer), self.scales.get(layer)
        return Target(
            encoding=encoding, basis=basis, scale=scale, layers=(layer,), poolings=self.poolings, tap=self.tap
        )

    def with_bases_of(self, store: Store) -> "Target":
        """This target with the bases of its layers from the sketch `store`. Raises as `bases_of`."""
        *others, last = self.layers
        bases = bases_of(store, self.layers, tap=self.tap)
        return replace(self, basis=bases[last], bases={layer: bases[layer] for layer in others})

    def with_constants_of(self, store: Store) -> "Target":
        """This target with the bases or scales of `store`, which has its layers."""
        others = self.layers[:-1]
        return replace(
            self,
            basis=None if self.basis is None else store.layer_basis(self.layers[-1]),
            scale=None if self.scale is None else store.layer_scale(self.layers[-1]),
            bases={layer: store.layer_basis(layer) for layer in others if layer in self.bases},
            scales={layer: store.layer_scale(layer) for layer in others if layer in self.scales},
        )

    def logical_dtype(self, backbone: Backbone) -> str:
        """Dtype of the rows of `features` when they are read."""
        if self.basis is not None:
            return self.basis.logical_dtype
        return SCALED_DTYPE if self.scale is not None else backbone.logical_dtype

    def width(self, backbone: Backbone) -> int:
        """Values per row of `features`."""
        if self.basis is not None:
            return self.basis.rank
        return backbone.vocab_size if self.encoding == "logits" else backbone.layer_width(self.layers[-1])

    def provenance(self) -> dict[str, Any]:
        """The constants in the store's provenance: not their bits, which differ between machines."""
        if self.basis is not None:
            return {"sketch": {"rank": self.basis.rank, "calibration": self.basis.calibration}}
        return {"int8": {"calibration": self.scale.calibration}} if self.scale is not None else {}


def roles_by_layer(
    backbone: Backbone, layers: Sequence[str], tokens: NDArray[np.uint8]
) -> dict[str, NDArray[np.uint8]]:
    """The roles (n,) of the rows of each layer, of an item whose `tokens` have these roles."""
    fixed = {layer: backbone.fixed_roles(layer) for layer in layers}
    return {layer: tokens if roles is None else roles for layer, roles in fixed.items()}


def stored_roles(backbone: Backbone, target: Target, tokens: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The role of each row (rows,) that is stored of an item whose `tokens` have these roles (n,)."""
    roles = roles_by_layer(backbone, target.layers[-1:], tokens)[target.layers[-1]]
    return pooled_roles(target.poolings, roles) if target.poolings else roles


def tensor_bits(tensor: torch.Tensor) -> tuple[NDArray[Any], str]:
    """The values of `tensor` in their own bits (uint16 for bfloat16), and the name of its dtype."""
    values = tensor.detach().contiguous().cpu()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return values.numpy(), str(values.dtype).removeprefix("torch.")


def tensor_of(bits: NDArray[Any], logical_dtype: str) -> torch.Tensor:
    """The tensor with these `tensor_bits`."""
    if logical_dtype == "bfloat16":
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(bits)


@dataclass(frozen=True, kw_only=True)
class LmHead:
    """W_lm on the host."""

    bits: NDArray[Any]
    """(V, D), see `tensor_bits`."""
    dtype: str
    """Of its values."""

    @cached_property
    def sha256(self) -> str:
        """Of its bits, in hex; identifies the model to bases and heads. The first call hashes them."""
        return hashlib.sha256(self.bits.data).hexdigest()


def lm_head_of(backbone: Backbone, *, bent: bool = False) -> LmHead:
    """W_lm of `backbone`, which is loaded for it; `bent` and errors as in `Backbone.lm_head`."""
    backbone.load()
    bits, dtype = tensor_bits(backbone.lm_head(bent=bent))
    return LmHead(bits=bits, dtype=dtype)


def check_basis(basis: Basis, head: LmHead) -> None:
    """Raise HeadError unless `basis` was made for `head`."""
    if basis.lm_head_sha256 != head.sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to the language-model head {basis.lm_head_sha256[:12]}, this model "
            f"has {head.sha256[:12]}. Use a basis made from this model."
        )
        raise HeadError(message)


def check_bases(target: Target, backbone: Backbone) -> None:
    """Raise HeadError unless the bases of `target` were made for `backbone`, as far as they tell; loads it.

    The basis of logits names W_lm, and a basis of states has the width of its layer.
    """
    if target.basis is not None and target.has_lm_head:
        check_basis(target.basis, lm_head_of(backbone))
    for layer in target.layers:
        basis = target.of(layer).basis
        if basis is not None and basis.map.shape[1] != backbone.layer_width(layer):
            message = (
                f"The basis {basis.id[:12]} of layer {layer} is of states of width {basis.map.shape[1]}, and the "
                f"model's are {backbone.layer_width(layer)} wide. Use a basis made from this model."
            )
            raise HeadError(message)


@contextmanager
def model_arrays_written(
    writer: UnitWriter, backbone: Backbone, target: Target, prepare: Callable[[int], Prepared]
) -> Generator[Target]:
    """Store what `target` needs of the model, once per store, while the block computes rows.

    Yields the target with the constants stored there. The rows depend on a basis or scale, so those are stored first.
    Otherwise a thread hashes and writes W_lm, and the end of the block waits for it. `prepare` prepares the item at a
    position of the store. The device computes nothing for this after the beginning of the block. Raises HeadError for a
    basis of another model.
    """
    arrays = partial(_Arrays.of, writer, backbone, target, prepare)
    if target.basis is not None or target.scale is not None:
        yield _write_with_constants(writer, target, arrays, lm_head_of(backbone) if target.has_lm_head else None)
    elif writer.writes_model_arrays():  # another run
        yield target
        writer.write_model_arrays(lambda group: arrays().write(group))  # if the other was killed
    elif writer.store.layout.model_commit.exists():
        yield target
    else:
        with Ahead(partial(writer.write_model_arrays, arrays().write), finishes=True) as writing:
            yield target
            writing.result()


def _write_with_constants(
    writer: UnitWriter, target: Target, arrays: Callable[..., "_Arrays"], head: LmHead | None
) -> Target:
    """Store the arrays; the target with the constants that are stored, perhaps by another run in its own rounding."""
    if target.basis is not None and head is not None:
        check_basis(target.basis, head)
    writer.write_model_arrays(lambda group: arrays(head=head).write(group))
    return target.with_constants_of(open_store(writer.store.path, allow_partial=True))


@dataclass(frozen=True, kw_only=True)
class _Arrays:
    """What a store keeps of the model, on the host."""

    target: Target
    head: LmHead | None
    """None where `features` are not states before W_lm."""
    probe: "_Probe"

    @classmethod
    def of(
        cls,
        writer: UnitWriter,
        backbone: Backbone,
        target: Target,
        prepare: Callable[[int], Prepared],
        *,
        head: LmHead | None = None,
    ) -> "_Arrays":
        """Copied from the device, and computed there; `head` is W_lm if it was copied before."""
        if head is None and target.has_lm_head:
            head = lm_head_of(backbone, bent=target.encoding == "logits")
        return cls(target=target, head=head, probe=_Probe.of(writer.store, backbone, target, prepare))

    def write(self, group: zarr.Group) -> None:
        """Hash and write."""
        head, target = self.head, self.target
        if target.basis is not None:
            save_basis(group, target.basis)
        if target.scale is not None:
            save_scale(group, target.scale)
        for layer, basis in target.bases.items():
            save_basis(group, basis, layer=layer)
        for layer, scale in target.scales.items():
            save_scale(group, scale, layer=layer)
        if head is not None and target.encoding in ("hidden", "int8"):
            attributes = {"logical_dtype": head.dtype, "lm_head_sha256": head.sha256}
            create_whole_array(group, "lm_head/weight", head.bits, attributes=attributes)
        self.probe.write(group, head)


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """What the model gives for a few rows of the store, each item alone."""

    rows: NDArray[np.int64]
    """(n,), spread over the store."""
    logits: torch.Tensor | None
    """(n, V), the model's own; None where `features` are not states before W_lm."""
    states: Mapping[str, torch.Tensor]
    """(n, D), of the layers that have no logits."""

    @classmethod
    def of(cls, store: Store, backbone: Backbone, target: Target, prepare: Callable[[int], Prepared]) -> "_Probe":
        """Computed on the device."""
        with_tokens = np.flatnonzero(store.n_tokens > 0)
        positions = np.unique(with_tokens[np.linspace(0, len(with_tokens) - 1, _PROBE_ITEMS).astype(int)])
        rows: list[int] = []
        logits: list[torch.Tensor] = []
        layers = target.layers[:-1] if target.has_lm_head else target.layers
        states: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}

        def compute(alone: Sequence[int]) -> None:
            (position,) = alone
            item = prepare(position)
            chosen = np.unique(np.linspace(0, int(store.n_tokens[position]) - 1, _PROBE_ROWS).astype(int))
            found = next(iter(rows_of(backbone, replace(target, layers=layers), [item]))) if layers else {}
            own = _own_logits(backbone, target, item)[chosen] if target.has_lm_head else None
            for layer in layers:
                states[layer].append(found[layer][chosen].cpu())
            logits.extend([] if own is None else [own.cpu()])
            rows.extend((store.row_starts[position] + chosen).tolist())

        names, what = store.items.names, "logits" if target.has_lm_head else "states"
        BatchRunner(1).run(compute, positions.tolist(), name=lambda position: f"the {what} of item {names[position]!r}")
        return cls(
            rows=np.array(rows, np.int64),
            logits=torch.cat(logits) if logits else None,
            states={layer: torch.cat(blocks) for layer, blocks in states.items()},
        )

    def write(self, group: zarr.Group, head: LmHead | None) -> None:
        """Write the arrays `probe/...`."""
        create_whole_array(group, PROBE_ROWS, self.rows)
        if self.logits is not None and head is not None:
            bits, dtype = tensor_bits(self.logits)
            attributes = {"logical_dtype": dtype, "lm_head_sha256": head.sha256}
            create_whole_array(group, PROBE_LOGITS, bits, attributes=attributes)
        for layer, states in self.states.items():
            bits, dtype = tensor_bits(states)
            create_whole_array(group, probe_array(layer), bits, attributes={"logical_dtype": dtype})


def rows_of(backbone: Backbone, target: Target, batch: Sequence[Prepared]) -> Iterator[dict[str, torch.Tensor]]:
    """What each item of `batch` stores, (rows, D) on the device by layer: the states of its tokens, or pooled ones."""
    for item, states in zip(batch, backbone.layer_states(batch, target.layers), strict=True):
        yield stored_of(backbone, target, states, item.roles)


def stored_of(
    backbone: Backbone, target: Target, states: dict[str, torch.Tensor], roles: NDArray[np.uint8]
) -> dict[str, torch.Tensor]:
    """What an item stores, (rows, D) by layer, whose tokens have these `roles` (n,) and hidden `states` (n, D)."""
    if not target.poolings:
        return states
    return pooled(target.poolings, states, roles_by_layer(backbone, target.layers, roles))


def _own_logits(backbone: Backbone, target: Target, item: Prepared) -> torch.Tensor:
    """The model's own logits (rows, V) of `item` alone; of its pooled states where rows are pooled."""
    if not target.poolings:
        return backbone.logits(item)
    (rows,) = rows_of(backbone, replace(target, layers=(LAST,)), [item])
    return backbone.project(rows[LAST])
