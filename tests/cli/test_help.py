"""The help: sections, whole summaries, short texts, completion; it answers at once and imports nothing heavy."""

import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from agiqa.cli import COMMANDS, cli
from agiqa.cli import SECTIONS as cli_sections
from agiqa.commands.help import SectionedCommand
from agiqa.commands.options import Automatic, OneOf
from agiqa.commands.store import SECTIONS as store_sections
from agiqa.commands.store import command as store_group
from tests.command_line import REPOSITORY

COLD_HELP = """
import sys, time
started = time.process_time()
from click.testing import CliRunner
from agiqa.cli import cli
outcome = CliRunner().invoke(cli, sys.argv[1:])
assert outcome.exit_code == 0, outcome.output
heavy = {"torch", "transformers", "lightning", "zarr", "numpy", "pyarrow", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
print(time.process_time() - started)
"""


def every_command():
    """(words, command) of every command and of every command of a group."""
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        inner = command.commands if isinstance(command, click.Group) else {}
        yield from ([((name, word), below) for word, below in inner.items()] or [((name,), command)])


ALL = list(every_command())
NAMES = [" ".join(words) for words, _ in ALL]


def test_names_are_listed_under_click_8_1_too():
    """It asks the type of an option for its metavar without the context."""
    option = click.Option(["--aspect"], type=OneOf("aspect", ["quality"]))
    assert option.type.get_metavar(option) == "[quality]"  # type: ignore[call-arg]


def test_a_digit_that_is_no_number_is_wrong_usage():
    with pytest.raises(click.BadParameter, match="'²' is neither auto nor a number"):
        Automatic(lowest=1).convert("²", None, None)


@pytest.mark.parametrize(
    "words", [(), ("extract",), ("store",), ("data",), ("data", "check"), ("train",), ("ablate",), ("report",)], ids=str
)
def test_help_answers_at_once_and_imports_nothing_heavy(words):
    outcome = subprocess.run(
        [sys.executable, "-c", COLD_HELP, *words, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert float(outcome.stdout) < 1.0


def test_help_lists_every_command_with_its_whole_summary(agiqa):
    for arguments, sections in (((), cli_sections), (("store",), store_sections)):
        shown = " ".join(agiqa(*arguments, "--help").out.split())
        assert "..." not in shown.split(" Options: ")[1]
        for title, summaries in sections.items():
            assert f" {title}: " in shown
            assert all(f" {name} {' '.join(summary.split())}" in shown for name, summary in summaries.items())
    context = click.Context(store_group)
    assert sorted(name for summaries in store_sections.values() for name in summaries) == store_group.list_commands(
        context
    )


@pytest.mark.parametrize(("words", "command"), ALL, ids=NAMES)
def test_sections_of_the_help_name_options_once_and_leave_out_only_the_shared_ones(words, command):
    if not isinstance(command, SectionedCommand):
        return
    named = [name for names in command.sections.values() for name in names]
    options = {option.name for option in command.params if isinstance(option, click.Option)}
    assert len(named) == len(set(named))
    assert options - set(named) <= {"as_json", "verbose", "options_file", "own_modules"}
    assert set(named) <= options


@pytest.mark.parametrize(("words", "command"), ALL, ids=NAMES)
def test_help_texts_are_short(words, command):
    options = [option for option in command.params if isinstance(option, click.Option)]
    long = [option.name for option in options if len((option.help or "").split("  [default")[0]) > 150]
    assert long == []


def test_completion_offers_commands_options_and_names():
    def offered(*words, incomplete):
        found = ShellComplete(cli, {}, "agiqa", "_AGIQA_COMPLETE").get_completions(list(words), incomplete)
        return {item.value for item in found}

    assert offered(incomplete="ex") == {"extract"}
    assert "--prepare-workers" in offered("extract", incomplete="--prep")
    assert offered("train", "--encoder", incomplete="") >= {"xlstm", "lstm", "gru", "mamba2", "transformer", "none"}
    assert offered("extract", "--aspect", incomplete="q") == {"quality"}
    assert "table-iv" in offered("ablate", "S", "O", "--grid", incomplete="table")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_one_that_the_shell_reads(agiqa, shell):
    script = agiqa("completion", shell).out
    assert "_AGIQA_COMPLETE" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_names_offered_for_settings_are_those_registered():
    from agiqa.heads import ENCODERS, LOSSES, POOLINGS, PROJECTIONS, HeadConfig, TrainConfig
    from agiqa.heads.closed.choosing import FORMS

    fields = {**HeadConfig.model_fields, **TrainConfig.model_fields}
    assert sorted(fields["encoder"].examples) == sorted([*ENCODERS, *FORMS])
    assert {*fields["init"].examples} == {*FORMS} - {"rating-words"}
    for name, registry in (
        ("pooling", POOLINGS),
        ("projection", PROJECTIONS),
        ("loss", LOSSES),
    ):
        assert sorted(fields[name].examples) == registry.names(), name


def test_the_installed_program_lists_its_commands():
    outcome = subprocess.run(
        [sys.executable, "-m", "agiqa", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert all(name in outcome.stdout for name in COMMANDS)


@pytest.mark.parametrize(("words", "command"), ALL, ids=NAMES)
def test_every_command_has_help_json_verbose_and_a_file_of_options(agiqa, words, command):
    outcome = agiqa(*words, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    for option in ("--help", "--json", "--verbose", "--import MODULE"):
        assert option in outcome.out
    # train and transfer have files of head settings, ablate has grids, completion has nothing to set
    settings = {"train": "--config", "transfer": "--config", "ablate": "--grid", "completion": "SHELL"}
    assert settings.get(words[0], "--options") in outcome.out
    assert command.help
    assert [option.name for option in command.params if isinstance(option, click.Option) and not option.help] == []


def test_train_options_cover_every_setting():
    from agiqa.heads import HeadConfig, TrainConfig

    command = dict(zip(NAMES, (command for _, command in ALL), strict=True))["train"]
    options = {parameter.name for parameter in command.params if isinstance(parameter, click.Option)}
    assert options >= {*HeadConfig.model_fields, *TrainConfig.model_fields}
