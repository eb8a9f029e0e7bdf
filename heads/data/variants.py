"""A source of features read as a shorter conversation."""

from typing import Protocol, overload, runtime_checkable

from agiqa.errors import ConfigError
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.store import AnyStore


@runtime_checkable
class Varied(Protocol):
    """A FeatureSource that may be read as shorter conversations, as stores are."""

    def variant(self, name: str, /) -> FeatureSource: ...


@overload
def as_variant(source: AnyStore, name: str | None) -> AnyStore: ...
@overload
def as_variant(source: FeatureSource, name: str | None) -> FeatureSource: ...
def as_variant(source: FeatureSource, name: str | None) -> FeatureSource:
    """`source` read as the variant `name` of its conversations; unchanged for None.

    Raises ConfigError for a source that knows no variants, and as `Store.variant`.
    """
    if name is None:
        return source
    if not isinstance(source, Varied):
        message = f"{location_of(source)} has no conversations to read as the variant {name!r}: leave `variant` out."
        raise ConfigError(message)
    return source.variant(name)
