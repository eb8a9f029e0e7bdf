"""A registry: a dict from names to parts, a decorator that adds to it, and one error for an unknown name.

Parts of your own are registered by modules that `agiqa.parts` imports before the first look-up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar, cast

from agiqa.errors import ConfigError, UnknownName
from agiqa.parts import Origin, load_parts

Part = TypeVar("Part")
Member = TypeVar("Member")


class Registry(Generic[Part]):
    """Parts of one kind by name. Each name is unique."""

    def __init__(self, kind: str, *, beside: Sequence[str] = ()) -> None:
        """`kind` is the noun of error messages, such as `encoder`. No part may have a name of `beside`.

        Those names mean something else in the same setting, and messages list them too.
        """
        self.kind = kind
        self._beside = tuple(beside)
        self._parts: dict[str, Part] = {}

    def add(self, name: str, part: Part) -> None:
        """Register `part` under `name`.

        The same class or function replaces its earlier self, so that a notebook cell can run again and a module can be
        reloaded. Raises ConfigError if another one has the name.
        """
        taken = self._parts.get(name)
        if name in self._beside:
            message = f"The {self.kind} {name!r} is built in; choose another name."
            raise ConfigError(message)
        if taken is not None:
            there, here = Origin.of(taken), Origin.of(part)
            if (there.module, there.name) != (here.module, here.name):
                message = (
                    f"The {self.kind} {name!r} is registered already, by {there.module}.{there.name}; choose another "
                    "name."
                )
                raise ConfigError(message)
        self._parts[name] = part

    def register(self, name: str) -> Callable[[Member], Member]:
        """Decorator: register the class or function below it under `name`."""

        def join(part: Member) -> Member:
            self.add(name, cast("Part", part))
            return part

        return join

    def get(self, name: str) -> Part:
        """The part called `name`. Raises UnknownName, with the nearest known name."""
        parts = self._loaded()
        try:
            return parts[name]
        except KeyError:
            unknown = UnknownName.of(self.kind, name, [*parts, *self._beside])
            message = f"{unknown} A module of your own that registers it: --import MODULE."
            raise UnknownName(message) from None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._loaded())

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, sorted."""
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        """Whether a part has this name."""
        return name in self._loaded()

    def __repr__(self) -> str:
        """The kind and the names that are registered so far."""
        return f"<{self.kind} registry: {', '.join(sorted(self._parts))}>"

    def _loaded(self) -> Mapping[str, Part]:
        load_parts()
        return self._parts
