"""Options and option types that commands share."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from agiqa.errors import ConfigError, UnknownName
from agiqa.parts import import_parts

Command = TypeVar("Command", bound=Callable[..., Any])
OWN_MODULES = "own_modules"
"""The name of the parameter `--import`."""


def added(options: Sequence[Callable[[Any], Any]], command: Command) -> Command:
    """The command with `options`, in the order of the help."""
    for option in reversed(options):
        command = option(command)
    return command


def output_options(command: Command) -> Command:
    """Add `--json`, `-v/--verbose` and `--import`; the command receives `as_json`."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    verbose = click.option("-v", "--verbose", is_flag=True, expose_value=False, help="Show where an error was raised.")
    return import_option(as_json(verbose(command)))


def _import_parts(ctx: click.Context, _parameter: click.Parameter, modules: tuple[str, ...]) -> tuple[str, ...]:
    if not ctx.resilient_parsing:
        import_parts(*modules)
    return modules


import_option = click.option(
    "--import",
    OWN_MODULES,
    multiple=True,
    is_eager=True,
    expose_value=False,
    callback=_import_parts,
    metavar="MODULE",
    help="Module, or .py file, that registers parts of your own; repeatable. Also: AGIQA_IMPORT=MODULE,MODULE.",
)
"""Adds `--import`."""


def shared_options(command: Command) -> Command:
    """Add the options of `output_options`, and `--options`, a YAML file of option values."""
    file = click.option(
        "--options",
        "options_file",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_load_options,
        metavar="FILE.yaml",
        help="Values for these options, one `option: value` per line; the command line beats them.",
    )
    return file(output_options(command))


def _load_options(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
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
    options = {
        max(option.opts, key=len).removeprefix("--"): option
        for option in ctx.command.params
        if isinstance(option, click.Option)
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        option = options.get(str(key).replace("_", "-"))
        if option is None:
            unknown = UnknownName.of(kind="option", name=str(key), known=options)
            unknown.add_note(f"in {path}")
            raise unknown
        if value is not None:
            defaults[option.name] = [value] if option.multiple and not isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def prediction_options(command: Command) -> Command:
    """Add `--device` and `--batch-size`, for commands that apply a head."""
    device = click.option(
        "--device",
        type=OneOf("device", ["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Device; auto is the GPU if there is one.",
    )
    size = click.option(
        "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Items per batch."
    )
    return device(size(command))


variant_option = click.option(
    "--variant",
    metavar="VARIANT",
    help="Conversation to read stores as, with which their own must begin, such as id of full.  [default: their own]",
)
"""Adds `--variant`, for commands that read stores."""


run_variant_option = click.option(
    "--variant",
    metavar="VARIANT",
    help="Conversation to read STORE as, such as id of full.  [default: the setting of the run]",
)
"""Adds `--variant`, for commands that apply a head."""


def interval_option(command: Command) -> Command:
    """Add `--interval`, for commands that predict; the command receives `interval`, or None."""
    option = click.option(
        "--interval",
        type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
        metavar="LEVEL",
        help="Share of MOS that an interval around each prediction shall hold, such as .9.  [default: no intervals]",
    )
    return option(command)


def train_workers_option(command: Command) -> Command:
    """Add `--train-workers`; the command receives `workers`."""
    option = click.option(
        "--train-workers",
        "workers",
        type=click.IntRange(min=1),
        help="Heads to train at the same time.  [default: one per CPU core, up to 3 on a GPU]",
    )
    return option(command)


layer_option = click.option(
    "--layer",
    metavar="LAYER",
    help="Layer of the store that heads read, such as 16, or several, as in 8+16+last.  [default: the last one stored]",
)
"""Adds `--layer`, for commands that train heads; those of `agiqa train` come from its settings."""


class Share(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """A share `K/N` of the work, as the tuple (K, N)."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse `K/N` with 1 <= K <= N."""
        if isinstance(value, tuple):
            return value  # pyright: ignore[reportUnknownVariableType]
        share, _, shares = str(value).partition("/")
        if not (share.isdecimal() and shares.isdecimal() and 1 <= int(share) <= int(shares)):
            self.fail(f"{value!r} is not a share such as 1/4.", param, ctx)
        return int(share), int(shares)


class Automatic(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """A number, or `auto`, which becomes None."""

    name = "auto|N"

    def __init__(self, *, lowest: int) -> None:
        """Numbers below `lowest` are refused."""
        self._lowest = lowest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number, or None."""
        if value == "auto":
            return None
        if not str(value).isdecimal() or int(value) < self._lowest:
            self.fail(f"{value!r} is neither auto nor a number from {self._lowest}.", param, ctx)
        return int(value)


class OneOf(click.Choice):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """One of some names. Help and shell completion list them; an unknown name is answered with the nearest one."""

    def __init__(self, kind: str, names: Sequence[str], *, look_up: Callable[[str], object] | None = None) -> None:
        """`kind` is the noun of error messages, such as `aspect`.

        `look_up` accepts further names, such as those of a user's own parts, and raises UnknownName or ConfigError for
        unknown ones. It may import modules that are too slow for the help.
        """
        super().__init__(list(names))
        self._kind = kind
        self._look_up = look_up

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str | None:  # noqa: ARG002
        """The names, and dots if other names are valid too. click 8.1 gives no context."""
        return f"[{'|'.join([*self.choices, *(['...'] if self._look_up else [])])}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, unchanged. Unknown names are wrong usage."""
        name = str(value)
        if name in self.choices:
            return name
        try:
            if self._look_up is None:
                raise UnknownName.of(self._kind, name, self.choices)
            self._look_up(name)
        except (ConfigError, UnknownName) as error:
            self.fail(str(error), param, ctx)
        return name


class Columns(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """Columns of a table by meaning: `MEANING=COLUMN`, several with commas between, as a dict."""

    name = "MEANING=COLUMN,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, str]:
        """The dict. A comma belongs to a column's name unless `MEANING=` follows it."""
        if isinstance(value, dict):
            return {str(meaning): str(column) for meaning, column in value.items()}
        found: dict[str, str] = {}
        for part in re.split(r",(?=\s*\w+=)", str(value)):
            meaning, equals, column = part.partition("=")
            if not (equals and meaning.strip() and column.strip()):
                self.fail(f"{part!r} is not MEANING=COLUMN, such as name=filename,mos_quality=score.", param, ctx)
            if meaning.strip() in found:
                self.fail(f"{meaning.strip()!r} is given twice.", param, ctx)
            found[meaning.strip()] = column.strip()
        return found


columns_option = click.option(
    "--columns",
    type=Columns(),
    help="Columns of the table by meaning, such as name=filename,mos_quality=score.  [default: by their names]",
)
"""Adds `--columns`, for commands that read a table."""
prompt_option = click.option(
    "--prompt", metavar="TEXT", help="Prompt of all images, where the table has none or there is no table."
)
"""Adds `--prompt`, for commands that read a data set."""
on_bad_item_option = click.option(
    "--on-bad-item",
    type=OneOf("choice", ["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Unusable items: stop and list them, or leave them out and name them.",
)
"""Adds `--on-bad-item`."""
mos_range_option = click.option(
    "--mos-range",
    nargs=2,
    type=float,
    help="Lowest and highest MOS.  [default: those that `agiqa data import` recorded, or 0 5]",
)
"""Adds `--mos-range`, for commands that read MOS."""
labels_option = click.option(
    "--labels", type=click.Path(path_type=Path, exists=True), help="Table of the items of a conversation file."
)
"""Adds `--labels`, for commands that read no MOS."""

layers_option = click.option(
    "--layers",
    default="last",
    show_default=True,
    metavar="LIST",
    help="Layers to store: numbers (0 embeddings, -1 last), last, `every N`, all; with commas between.",
)
"""Adds `--layers`, for commands that store hidden states."""
pool_tokens_option = click.option(
    "--pool-tokens",
    metavar="LIST",
    help="Pooled rows instead of one per token: mean, max, first or last, of all or @ROLE; with commas between.",
)
"""Adds `--pool-tokens`, for commands that store hidden states; None without."""


class LocalStore(click.Path):
    """A store that the command works on: an existing folder, as a Path."""

    def __init__(self) -> None:
        """Accept existing paths only."""
        super().__init__(exists=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The Path. The error for a URL says what to do instead."""
        if "://" in str(value):
            self.fail(f"{value} is a URL. `agiqa store pull` it first, then give the folder of the copy.")
        return super().convert(value, param, ctx)


class StoreLocation(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]
    """A store that the command reads: an existing folder, as a Path, or a URL, as text."""

    name = "PATH|URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """The Path or URL. A path that does not exist is wrong usage."""
        if "://" in str(value):
            return str(value)
        path: Path = click.Path(path_type=Path, exists=True).convert(value, param, ctx)
        return path
