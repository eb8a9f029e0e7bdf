"""What the rows of a store are: layers of a model, of tokens or of pooled tokens, from the LLM or from elsewhere.

FORMAT.md, section 11, specifies it. A store of version 1 has the layer `last`, one row per token, and W_lm.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agiqa.store.format.layout import TOKEN_ROLES

LAST = "last"
"""The name of the states after the model's final norm."""
FEATURES = "features"
"""The array of the last layer of a store."""
POOLINGS = ("mean", "max", "first", "last")
MOST_LAYERS = 1024

_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")
_POOLED = re.compile(rf"(?:{'|'.join(POOLINGS)})(?:@(?:{'|'.join(TOKEN_ROLES)}))?")
_TAP = re.compile(r"[a-z][a-z0-9_.:-]{0,99}")
RECORDED = ("layers", "layer_widths", "layer_dtypes", "layer_count", "pooled", "tap")
"""Attributes of the root group, and entries of the provenance, that a store of version 1 does not have."""


def layer_array(layer: str) -> str:
    """The row array of a layer that is not in `features`."""
    return f"layers/{layer}"


def token_scale_array(layer: str | None) -> str:
    """The array with the scale of each token of `int8`: of `features` for None, else of this other layer."""
    return "tokens/scale" if layer is None else f"tokens/layers_scale/{layer}"


def scale_group(layer: str | None) -> str:
    """The group of the scale of `int8`: of `features` for None, else of this other layer."""
    return "scale" if layer is None else f"layers_scale/{layer}"


def basis_group(layer: str | None) -> str:
    """The group of the basis of a sketch: of `features` for None, else of this other layer."""
    return "basis" if layer is None else f"layers_basis/{layer}"


def probe_array(layer: str) -> str:
    """The array with the model's own states of a layer at the probe rows."""
    return f"probe/layers/{layer}"


def layer_of_array(array: str) -> str | None:
    """The other layer whose rows the array holds; None for `features` and all other arrays."""
    head, _, layer = array.partition("/")
    return layer if head == "layers" and layer else None


@dataclass(frozen=True, kw_only=True)
class RowContent:
    """What the rows of a store are."""

    layers: tuple[str, ...] = (LAST,)
    """Ascending, `last` at the end; `features` holds the last of them."""
    layer_widths: Mapping[str, int] = field(default_factory=dict[str, int])
    """Values per row, of the other layers whose width is not that of `features`."""
    layer_dtypes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Logical dtypes, of the other layers whose dtype is not that of `features`."""
    layer_count: int | None = None
    """Number of blocks of the model, where it is recorded."""
    pooled: tuple[str, ...] = ()
    """POOLING or POOLING@ROLE of each row of an item; empty where rows are tokens."""
    tap: str | None = None
    """Where in the model the rows come from, if not from the language model."""

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> "RowContent":
        """The content that the root attributes, which `content_problem` accepts, record."""
        return cls(
            layers=tuple(attributes.get("layers", (LAST,))),
            layer_widths=dict(attributes.get("layer_widths", {})),
            layer_dtypes=dict(attributes.get("layer_dtypes", {})),
            layer_count=attributes.get("layer_count"),
            pooled=tuple(attributes.get("pooled", ())),
            tap=attributes.get("tap"),
        )

    @property
    def others(self) -> tuple[str, ...]:
        """The layers that are not in `features`, ascending."""
        return self.layers[:-1]

    @property
    def has_lm_head(self) -> bool:
        """Whether `features` are states before W_lm, so that W_lm makes logits of them."""
        return self.tap is None and self.layers[-1] == LAST

    @property
    def version(self) -> int:
        """The lowest version of the format that can hold this."""
        return 1 if self.layers == (LAST,) and not self.pooled and self.tap is None else 2

    def recorded(self) -> dict[str, Any]:
        """The entries of root attributes and provenance; none for what version 1 holds."""
        if self.version == 1:
            return {}
        entries: dict[str, Any] = {
            "layers": None if self.layers == (LAST,) else list(self.layers),
            "layer_widths": dict(self.layer_widths) or None,
            "layer_dtypes": dict(self.layer_dtypes) or None,
            "layer_count": self.layer_count,
            "pooled": list(self.pooled) or None,
            "tap": self.tap,
        }
        return {name: value for name, value in entries.items() if value is not None}

    def problem(self) -> str | None:
        """What is wrong with it; None if it is sound."""
        if problem := _layers_problem(self.layers):
            return problem
        strays = sorted({*self.layer_widths, *self.layer_dtypes} - set(self.others))
        if strays:
            return f"it states a width or dtype of {strays[0]!r}, which is none of its other layers"
        wrong = [one for one in self.pooled if not _POOLED.fullmatch(one)]
        if wrong or len(set(self.pooled)) != len(self.pooled):
            poolings, roles = ", ".join(POOLINGS), ", ".join(TOKEN_ROLES)
            what = f"{wrong[0]!r} is no pooling" if wrong else "a pooling occurs twice"
            return f"{what}; a pooling is one of {poolings}, alone or with @ROLE ({roles})"
        if self.tap is not None and not _TAP.fullmatch(self.tap):
            return f"its tap is {self.tap!r}, which is no name such as vision:12"
        return None


def _layers_problem(layers: Sequence[str]) -> str | None:
    if not 1 <= len(layers) <= MOST_LAYERS:
        return f"it has {len(layers)} layers, and a store has 1 to {MOST_LAYERS}"
    for name in layers:
        if name != LAST and not _NUMBER.fullmatch(name):
            return f"a layer is called {name!r}; a layer is a number from 0, or {LAST!r}"
    order = [MOST_LAYERS**2 if name == LAST else int(name) for name in layers]
    if order != sorted(set(order)):
        return f"its layers {', '.join(layers)} do not ascend, with {LAST!r} at the end"
    return None


def content_problem(attributes: Mapping[str, Any], provenance: Mapping[str, Any]) -> str | None:
    """What is wrong with the entries of root attributes that tell what rows are; None if they are sound."""
    for name in RECORDED:
        if attributes.get(name) != provenance.get(name):
            return f"its attribute {name} is not that of its provenance"
    layers, pooled, tap = attributes.get("layers", [LAST]), attributes.get("pooled", []), attributes.get("tap")
    widths, dtypes = attributes.get("layer_widths", {}), attributes.get("layer_dtypes", {})
    count = attributes.get("layer_count")
    if not _are_texts(layers) or not _are_texts(pooled) or not isinstance(tap, str | None):
        return "its attributes layers, pooled and tap are no lists of texts, and no text"
    if not isinstance(widths, dict) or not all(map(_is_count, widths.values())):
        return f"its attribute layer_widths is {widths!r}"
    if not isinstance(dtypes, dict) or not _are_texts(list(dtypes.values())):
        return f"its attribute layer_dtypes is {dtypes!r}"
    if count is not None and not _is_count(count):
        return f"its attribute layer_count is {count!r}"
    content = RowContent.of(attributes)
    if problem := content.problem():
        return problem
    if attributes.get("version") != content.version:
        return f"its version is {attributes.get('version')}, and what it holds is version {content.version}"
    return None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1
