"""What all commands share: `--json`, `-v`, `--config`, and how a result is printed."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from agiqa.errors import ConfigError, HeadError, UnknownName

Command = TypeVar("Command", bound=Callable[..., Any])


def output_options(command: Command) -> Command:
    """Add `--json` and `-v/--verbose` to a command; it receives `as_json`."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    verbose = click.option("-v", "--verbose", is_flag=True, expose_value=False, help="Show where an error was raised.")
    return as_json(verbose(command))


def shared_options(command: Command) -> Command:
    """Add `--config`, a YAML file of option values, to what `output_options` adds."""
    config = click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        help="YAML file with option values; options given here beat it.",
    )
    return config(output_options(command))


def _load_config(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"{path}: cannot be read as YAML ({error})."
        raise ConfigError(message) from error
    if not isinstance(values, dict):
        message = f"{path}: expected `option: value` lines, found a {type(values).__name__}."
        raise ConfigError(message)
    known = {
        _spelling(parameter): parameter.name for parameter in ctx.command.params if isinstance(parameter, click.Option)
    }
    repeated = {option.name for option in ctx.command.params if isinstance(option, click.Option) and option.multiple}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = known.get(str(key).replace("_", "-"))
        if name is None:
            unknown = UnknownName.of(kind="option", name=str(key), known=known)
            unknown.add_note(f"in {path}")
            raise unknown
        if value is None:  # nothing after the colon: as if the line were not there
            continue
        defaults[name] = [value] if name in repeated and not isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _spelling(option: click.Option) -> str:
    longest = max(option.opts, key=len)
    return longest.removeprefix("--")


class Share(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """A share `K/N` of the work, as the tuple (K, N)."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse `K/N` with 1 <= K <= N."""
        if isinstance(value, tuple):
            return value  # pyright: ignore[reportUnknownVariableType]
        share, _, shares = str(value).partition("/")
        if not (share.isdigit() and shares.isdigit() and 1 <= int(share) <= int(shares)):
            self.fail(f"{value!r} is not a share such as 1/4.", param, ctx)
        return int(share), int(shares)


class Automatic(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """A number, or `auto`, which is None."""

    name = "auto|N"

    def __init__(self, *, lowest: int) -> None:
        """Numbers below `lowest` are refused."""
        self._lowest = lowest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """A number from the lowest, or None."""
        if value == "auto":
            return None
        if not str(value).isdigit() or int(value) < self._lowest:
            self.fail(f"{value!r} is neither auto nor a number from {self._lowest}.", param, ctx)
        return int(value)


class Name(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """A name out of a list that only the library holds, looked up when a value is given: help imports nothing."""

    def __init__(self, of: str, look_up: Callable[[str], object]) -> None:
        """`of` is what is named, such as `aspect`; `look_up` raises UnknownName or ConfigError for other names."""
        self.name = of
        self._look_up = look_up

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is given; one that is not known is wrong usage, with the nearest known name."""
        try:
            self._look_up(str(value))
        except (ConfigError, UnknownName) as error:
            self.fail(str(error), param, ctx)
        return str(value)


def one_of(kind: str, names: Sequence[str]) -> Name:
    """The type of an option whose value is one of `names`, each a `kind`."""

    def look_up(name: str) -> None:
        if name not in names:
            raise UnknownName.of(kind, name, names)

    return Name(kind, look_up)


class LocalStore(click.Path):
    """A store to be worked on: the path of a folder that exists."""

    def __init__(self) -> None:
        """As `click.Path`, of what exists."""
        super().__init__(exists=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A Path; a URL is refused with what to do instead."""
        if "://" in str(value):
            self.fail(f"{value} is a URL. `agiqa store pull` it first, and give the folder that it is pulled to.")
        return super().convert(value, param, ctx)


class StoreLocation(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]
    """A store to be read: the path of a folder that exists, or a URL."""

    name = "PATH|URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """A URL as text; a path as a Path, refused where nothing is."""
        if "://" in str(value):
            return str(value)
        path: Path = click.Path(path_type=Path, exists=True).convert(value, param, ctx)
        return path


def print_result(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result of a command to the output stream: `text`, or `result` as one JSON object."""
    click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else text)


def failures(failed: Mapping[str, str]) -> str:
    """The first line of each error and the names that failed by it, by name; many with one error are one line."""
    names_of: dict[str, list[str]] = {}
    for name, error in failed.items():
        names_of.setdefault(error.splitlines()[0] if error else "no reason was told", []).append(name)
    return "\n".join(
        f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {error}"
        for error, names in names_of.items()
    )


def fail_if_any(failed: Mapping[str, str], *, total: int, what: str) -> None:
    """Raise HeadError, which ends the command with exit code 1, where any of the `total` runs or results failed."""
    if failed:
        message = f"{len(failed)} of {total} {what} failed; the same command tries them again:\n{failures(failed)}"
        raise HeadError(message)


def table(rows: Mapping[str, Any]) -> str:
    """Lines `name  value` with the values aligned."""
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
