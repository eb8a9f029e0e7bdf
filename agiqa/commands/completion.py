"""`agiqa completion`: complete commands, options and names in a shell."""

import click
from click.shell_completion import get_completion_class

from agiqa.commands.options import output_options
from agiqa.commands.output import print_result

_FILES = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/completions/agiqa.fish"}


@click.command("completion")
@click.argument("shell", type=click.Choice(list(_FILES)))
@output_options
def command(shell: str, *, as_json: bool) -> None:
    """Print the script that makes SHELL complete agiqa's commands, options and names.

    \b
    bash   agiqa completion bash >> ~/.bashrc
    zsh    agiqa completion zsh >> ~/.zshrc
    fish   agiqa completion fish > ~/.config/fish/completions/agiqa.fish

    It works in shells that are started afterwards.
    """
    from agiqa.cli import cli

    found = get_completion_class(shell)
    assert found is not None  # click has these three
    script = found(cli, {}, "agiqa", "_AGIQA_COMPLETE").source()
    print_result({"shell": shell, "file": _FILES[shell], "script": script}, script, as_json=as_json)
