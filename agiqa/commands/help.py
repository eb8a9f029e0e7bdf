"""Help texts in sections: the options that matter first, then the rest by subject."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from agiqa.commands.options import OWN_MODULES


class SectionedCommand(click.Command):
    """A command whose help lists its options by section."""

    def __init__(self, *arguments: Any, sections: Mapping[str, Sequence[str]], **settings: Any) -> None:
        """`sections` are parameter names by section title, in the order of the help; the other options come last."""
        super().__init__(*arguments, **settings)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        options = {
            parameter.name: parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)
        }
        named = {name for names in self.sections.values() for name in names}
        rest = [name for name in options if name not in named and name != OWN_MODULES]
        own = [name for name in (OWN_MODULES,) if name in options]
        for title, names in (*self.sections.items(), ("Your own parts", own), ("Output", rest)):
            records = [options[name].get_help_record(ctx) for name in names]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])


def write_commands(formatter: click.HelpFormatter, sections: Mapping[str, Mapping[str, str]]) -> None:
    """Write the commands of a group by section, each with its whole summary."""
    for title, summaries in sections.items():
        with formatter.section(title):
            formatter.write_dl(list(summaries.items()))
