"""How to extract, and which settings contradict each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.filling.plan import LengthRule
from agiqa.extract.filling.pooling import Pooling, lacking, parse_poolings
from agiqa.extract.filling.targets import Target
from agiqa.extract.models import Backbone
from agiqa.extract.models.layers import parse_layers
from agiqa.store import ENCODINGS
from agiqa.store.format.layers import LAST


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How to extract; the defaults are those of the command line, except `workers`, whose default there is None."""

    variant: str = "id"
    aspect: str = "quality"
    encoding: str = "hidden"
    rank: int | None = None
    """Sketch rank; needed for `sketch` without `basis`."""
    basis: str | Path | None = None
    """A sketch store whose basis is used."""
    keep_logits: bool = False
    """Keep the raw logits beside hidden states."""
    layers: str | Sequence[str | int] = LAST
    """Whose hidden states are stored, as `parse_layers` reads them: `8,16,last`, `every 8`, `all`, `[-1, -8]`."""
    pool_tokens: str | Sequence[str] = ()
    """Rows of every item in place of those of its tokens, as `parse_poolings` reads them: `mean@image,last`."""
    length: LengthRule = field(default_factory=LengthRule)
    batch_size: int | None = None
    """Most items per forward pass; None lets the device's memory decide."""
    compile: str = "auto"
    """One of COMPILING: whether the model's layers are compiled, see `agiqa.extract.filling.compiled`."""
    workers: int | None = 0
    """Processes that prepare items for one device: 0 prepares them in the process itself, None chooses."""
    devices: int | None = None
    """Processes with a device of this host each, None for this process alone; with `ray`, actors, None for all GPUs."""
    device: str = "auto"
    """What Ray actors run on: a GPU each if the cluster has any, or cpu."""
    ray: str | None = None
    """Address of a Ray cluster; "auto" for that of this machine, which is started if there is none."""
    part: tuple[int, int] = (1, 1)
    """Share (K, N) of the units that this run fills."""
    plan_only: bool = False

    @property
    def elsewhere(self) -> bool:
        """Whether the model runs in other processes."""
        return self.ray is not None or (self.devices or 1) > 1

    def target(self, backbone: Backbone) -> Target:
        """What is stored, without the constants of its encoding.

        Raises ConfigError or UnknownName for layers that the model does not have, and for poolings; and ConfigError
        for layers without `last` where only that one will do.
        """
        layers = parse_layers(self.layers, backbone.layer_count, model="the model", first=backbone.first_layer)
        poolings = parse_poolings(self.pool_tokens)
        _check_rows(backbone, layers, poolings)
        wanted = "--encoding logits" if self.encoding == "logits" else "--keep-logits" if self.keep_logits else None
        if wanted is not None and backbone.tap is not None:
            message = f"{wanted} stores logits, and states of {backbone.tap!r} have none. Store hidden states."
            raise ConfigError(message)
        if wanted is not None and LAST not in layers:
            message = f"{wanted} stores logits, which the model makes of its last layer: add `last` to --layers."
            raise ConfigError(message)
        return Target(
            encoding=self.encoding, keep_logits=self.keep_logits, layers=layers, poolings=poolings, tap=backbone.tap
        )

    def check_encoding(self) -> None:
        """Raise UnknownName for the encoding, and ConfigError for options that do not belong to it."""
        if self.encoding not in ENCODINGS:
            raise UnknownName.of(kind="encoding", name=self.encoding, known=ENCODINGS)
        given = [option for option in (self.rank, self.basis) if option is not None]
        if self.encoding != "sketch" and given:
            message = f"--rank and --basis belong to --encoding sketch, not to {self.encoding}."
            raise ConfigError(message)
        if self.encoding == "sketch" and len(given) != 1:
            message = "--encoding sketch needs either --rank R, or --basis STORE to use the basis of another sketch."
            raise ConfigError(message)
        if self.keep_logits and self.encoding != "hidden":
            message = f"--keep-logits keeps raw logits beside hidden states, not beside {self.encoding}."
            raise ConfigError(message)
        if self.keep_logits and parse_poolings(self.pool_tokens):
            message = "--keep-logits keeps the raw logits of every token, and --pool-tokens stores none. Leave one out."
            raise ConfigError(message)
        if self.plan_only and (self.rank is not None or self.encoding == "int8"):
            message = (
                f"--plan-only computes nothing, and {self.encoding} needs a calibration by the model: plan with "
                "--encoding hidden, or a sketch with --basis STORE."
            )
            raise ConfigError(message)


def _check_rows(backbone: Backbone, layers: Sequence[str], poolings: Sequence[Pooling]) -> None:
    """Raise ConfigError for layers whose rows one store cannot hold together, and for poolings of rows that lack."""
    fixed = {layer: roles for layer in layers if (roles := backbone.fixed_roles(layer)) is not None}
    for layer, roles in fixed.items():
        if (reason := lacking(poolings, roles)) is not None:
            message = f"layer {layer}: {reason}"
            raise ConfigError(message)
    if not poolings and len({roles.tobytes() for roles in fixed.values()}) > 1:
        counts = ", ".join(f"layer {layer} has {len(roles)}" for layer, roles in fixed.items())
        message = (
            f"The layers have different numbers of positions ({counts}), and a store has the same rows for all its "
            "layers. Give --pool-tokens, such as mean, or store each layer by itself."
        )
        raise ConfigError(message)
