"""How to extract, and which settings contradict each other."""

from dataclasses import dataclass, field
from pathlib import Path

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.filling.plan import LengthRule
from agiqa.store import ENCODINGS


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
        if self.plan_only and (self.rank is not None or self.encoding == "int8"):
            message = (
                f"--plan-only computes nothing, and {self.encoding} needs a calibration by the model: plan with "
                "--encoding hidden, or a sketch with --basis STORE."
            )
            raise ConfigError(message)
