"""Parts of your own: the modules that register them, and where a registered part comes from.

`--import MODULE` and `import_parts` import a module at once. The modules of the environment variable AGIQA_IMPORT
(separated by commas) and of the entry points `agiqa.parts` of installed packages are imported when a registry is first
asked for a name. Processes that agiqa starts import the same modules.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from agiqa.errors import AgiqaError, ConfigError

VARIABLE, GROUP = "AGIQA_IMPORT", "agiqa.parts"
_SCRIPTS = ("__main__", "__mp_main__")
"""Names of the module that Python runs, in this process and in those that it spawns."""


class _Imports:
    """The modules with parts of one's own that this process has imported, or is about to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """Module names, and absolute paths of files."""
        self.of_environment = False
        """Whether AGIQA_IMPORT and the entry points have been imported."""
        self.importing = False
        """A module may look up other parts while it is imported."""
        self.lock = threading.RLock()


_imports = _Imports()


def import_parts(*modules: str | Path) -> None:
    """Import modules that register parts: names, or paths of .py files.

    Names are looked up in the current folder too. The folder of a file joins `sys.path`, so that it can import its
    neighbours. Raises ConfigError for a module that does not exist or fails.
    """
    for module in modules:
        wanted = _absolute(str(module))
        _import(wanted, f"--import {module}")
        if wanted not in _imports.asked:
            _imports.asked.append(wanted)


def load_parts() -> None:
    """Import the modules of AGIQA_IMPORT and of the entry points, unless that is done. Raises as `import_parts`."""
    with _imports.lock:
        if _imports.of_environment or _imports.importing:
            return
        _imports.importing = True
        try:
            for module in (*_imports.asked, *_of_variable()):
                _import(module, f"{VARIABLE}={module}")
            for point in sorted(entry_points(group=GROUP)):
                package = "" if point.dist is None else f" of the package {point.dist.name}"
                _import(point.module, f"the entry point {point.name}{package}")
            _imports.of_environment = True
        finally:
            _imports.importing = False


def modules_to_import() -> tuple[str, ...]:
    """The modules that a process started by this one shall import: names, and absolute paths of files."""
    return tuple(dict.fromkeys([*_imports.asked, *_of_variable()]))


def expect_parts(modules: Sequence[str]) -> None:
    """In a new process: import `modules`, of `modules_to_import`, when a registry is first asked for a name."""
    _imports.asked = list(modules)


def with_parts(modules: Sequence[str], function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call `function` in a new process, with `expect_parts`."""
    expect_parts(modules)
    return function(*arguments)


def _of_variable() -> list[str]:
    return [_absolute(module.strip()) for module in os.environ.get(VARIABLE, "").split(",") if module.strip()]


def _absolute(module: str) -> str:
    """A file by its absolute path; a module by its name."""
    return str(Path(module).expanduser().absolute()) if _is_file(module) else module


def _is_file(module: str) -> bool:
    return module.endswith(".py") or os.sep in module


def _import(module: str, said: str) -> None:
    """Import a module or a file. `said` is what named it, for messages."""
    folder = Path(module).parent if _is_file(module) else Path.cwd()
    name = Path(module).stem if _is_file(module) else module
    if _is_file(module) and not Path(module).is_file():
        message = f"{said}: there is no file {module}."
        raise ConfigError(message)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    try:
        with redirect_stdout(sys.stderr):  # the output stream is for results
            if _is_file(module):
                _import_file(Path(module), name, said)
            else:
                importlib.import_module(name)
    except AgiqaError as error:
        error.add_note(f"while importing {module} ({said})")
        raise
    except SystemExit as error:
        message = (
            f"{said} cannot be imported: it ends the program (exit code {error.code}). Import a module that registers "
            "parts, not a script."
        )
        raise ConfigError(message) from error
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(_reason(name, said, folder, error)) from error


def _import_file(file: Path, name: str, said: str) -> None:
    """Import `file` as the module `name`, whatever the folders of `sys.path` hold under this name.

    Raises ConfigError for the name of a module that other code may import.
    """
    loaded = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    there = getattr(loaded, "__file__", None) or (None if spec is None else spec.origin)
    is_it = there is not None and Path(there).exists() and Path(there).samefile(file)
    in_the_way = loaded is not None or (there is not None and Path(there).parent != Path.cwd())
    if in_the_way and not is_it:
        message = f"{said}: another module is called {name} ({there or 'built into Python'}). Rename the file."
        raise ConfigError(message)
    if loaded is not None:
        return
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        message = f"{said}: {file} is no Python file."
        raise ConfigError(message)
    sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise


def _reason(name: str, said: str, folder: Path, error: Exception) -> str:
    """Why a module cannot be imported, and what to do."""
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and (name == error.name or name.startswith(f"{error.name}."))
    ):
        return (
            f"{said}: there is no module {name}, neither in the folder {folder} nor among the installed packages. Give "
            f"the path of its file, such as folder/{name.rpartition('.')[2]}.py."
        )
    lines = traceback.extract_tb(error.__traceback__)
    where = f" ({lines[-1].filename}, line {lines[-1].lineno})" if lines else ""
    return f"{said} cannot be imported: {type(error).__name__}: {error}{where}"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The code of a registered part."""

    module: str
    """The module; `__main__` for a script or a notebook."""
    name: str
    """The qualified name there, of a class or function."""
    summary: str
    """What the part says in its `summary`, else the first line of its docstring."""

    @classmethod
    def of(cls, part: object) -> "Origin":
        """The origin of a class, a function, or an object that wraps one (`__wrapped__`, or `func` of a partial)."""
        stated, inner = getattr(part, "summary", None), part
        while True:
            wrapped = inner.func if isinstance(inner, partial) else getattr(inner, "__wrapped__", None)
            if wrapped is None:
                break
            inner = wrapped
        named = inner if hasattr(inner, "__qualname__") else type(inner)
        module = str(getattr(named, "__module__", ""))
        lines = inspect.cleandoc(named.__doc__ or "").splitlines()
        return cls(
            module=_SCRIPTS[0] if module in _SCRIPTS else module,
            name=str(getattr(named, "__qualname__", "")),
            summary=stated if isinstance(stated, str) else lines[0] if lines else "",
        )

    @property
    def is_built_in(self) -> bool:
        """Whether the part belongs to agiqa."""
        return self.module.partition(".")[0] == "agiqa"

    @property
    def file(self) -> Path | None:
        """The file of the module; None in a notebook."""
        file = getattr(sys.modules.get(self.module), "__file__", None)
        return Path(file).absolute() if file else None


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """The record of a part that agiqa does not have itself."""

    kind: str
    name: str
    module: str
    file: str | None
    """The name of the module's file, without its folder."""
    sha256: str | None
    """Hash of that file, in hex."""

    @classmethod
    def of(cls, kind: str, name: str, part: object) -> "OwnPart | None":
        """The record of a registered part; None for one of agiqa."""
        origin = Origin.of(part)
        if origin.is_built_in:
            return None
        file = origin.file
        digest = None if file is None or not file.is_file() else _sha256(file, file.stat().st_mtime_ns)
        return cls(kind=kind, name=name, module=origin.module, file=None if file is None else file.name, sha256=digest)

    @property
    def remedy(self) -> str:
        """Where the part comes from, and how to import it."""
        part = f"The {self.kind} {self.name!r}"
        if self.module in _SCRIPTS:
            where = "a notebook" if self.file is None else f"the script {self.file}"
            return (
                f"{part} was registered in {where}. Move it into a module of its own, such as my_parts.py, and add "
                "--import my_parts.py (in Python: agiqa.import_parts)."
            )
        file = "" if self.file is None else f" (file {self.file})"
        return (
            f"{part} is registered by the module {self.module}{file}: add --import {self.module}, or the path of the "
            f"file (in Python: agiqa.import_parts; for all commands: {VARIABLE})."
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


@cache
def _sha256(file: Path, _changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
