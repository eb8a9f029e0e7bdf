"""Public names of a package that are imported when they are first used, so that `--help` imports no torch."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def lazy_names(
    room: str, modules: Mapping[str, Sequence[str]], *, packages: Sequence[str] = ()
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of the package `room` (PEP 562).

    `modules` maps module paths below the room to the public names that they define; `packages` are names of packages
    below it. The package also imports these names under TYPE_CHECKING, for checkers and editors.
    """
    module_of = {name: f"{room}.{module}" for module, names in modules.items() for name in names}

    def get(name: str) -> object:
        if name in packages:
            return import_module(f"{room}.{name}")
        if name not in module_of:
            message = f"module {room!r} has no attribute {name!r}"
            raise AttributeError(message)
        found: object = getattr(import_module(module_of[name]), name)
        setattr(sys.modules[room], name, found)
        return found

    public = sorted([*module_of, *packages])
    return get, lambda: public, public
