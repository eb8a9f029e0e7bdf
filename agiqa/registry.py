"""A registry: a dict from names to parts, a decorator that adds to it, and one error for an unknown name."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from agiqa.errors import ConfigError, UnknownName

Part = TypeVar("Part")
Member = TypeVar("Member")


class Registry(Generic[Part]):
    """Parts of one kind by name. Each name is unique."""

    def __init__(self, kind: str) -> None:
        """`kind` is the noun of error messages, such as `encoder`."""
        self.kind = kind
        self._parts: dict[str, Part] = {}

    def add(self, name: str, part: Part) -> None:
        """Register `part` under `name`. Raises ConfigError if the name is taken."""
        if name in self._parts:
            message = f"The {self.kind} {name!r} is registered already; choose another name."
            raise ConfigError(message)
        self._parts[name] = part

    def register(self: "Registry[Callable[..., Member]]", name: str) -> Callable[[type[Member]], type[Member]]:
        """Class decorator: register the decorated class under `name`."""

        def join(part: type[Member]) -> type[Member]:
            self.add(name, part)
            return part

        return join

    def get(self, name: str) -> Part:
        """The part called `name`. Raises UnknownName, with the nearest known name."""
        try:
            return self._parts[name]
        except KeyError:
            raise UnknownName.of(self.kind, name, self._parts) from None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._parts)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, sorted."""
        return iter(self.names())
