"""Which commit result lines name: of real repositories, around code that they track or not, and of the environment."""

import re
import subprocess

import pytest

from agiqa.bench.recording.this_run import about_this_run
from agiqa.errors import ConfigError
from agiqa.version import commit_of

WHO = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")


@pytest.fixture
def git(tmp_path):
    def run(*arguments):
        command = ["git", "-C", str(tmp_path), *WHO, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    run("init", "--quiet")
    return run


@pytest.fixture(autouse=True)
def _not_told(monkeypatch):
    monkeypatch.delenv("AGIQA_COMMIT", raising=False)


@pytest.fixture
def code(tmp_path, git):
    """A file in a folder, in a repository whose one commit holds another file only."""
    (tmp_path / "paper.tex").write_text("text")
    git("add", "paper.tex")
    git("commit", "--quiet", "-m", "a paper")
    path = tmp_path / "venv" / "agiqa" / "code.py"
    path.parent.mkdir(parents=True)
    path.write_text("1")
    return path


def test_a_file_that_is_tracked_is_of_the_commit(git, code):
    git("add", "venv")
    git("commit", "--quiet", "-m", "code")
    git("tag", "-a", "v1", "-m", "a tag is not what is wanted")
    whole, found = git("rev-parse", "HEAD"), commit_of(code)
    assert re.fullmatch("[0-9a-f]{7,40}", found)
    assert whole.startswith(found)
    code.write_text("2")
    assert commit_of(code) == f"{found}-dirty"


@pytest.mark.parametrize("ignored", [False, True])
def test_the_repository_around_a_virtual_environment_is_not_that_of_the_code(tmp_path, code, ignored):
    if ignored:
        (tmp_path / ".gitignore").write_text("venv")
    assert commit_of(code) is None


def test_no_repository_and_no_git_are_no_commit(tmp_path, git, code, monkeypatch):
    git("add", "venv")
    git("commit", "--quiet", "-m", "code")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert commit_of(code) is None
    monkeypatch.undo()
    (tmp_path / ".git").rename(tmp_path / "moved")
    assert commit_of(code) is None


@pytest.mark.parametrize("told", ["0123abc", "0123abc-dirty", "0123456789abcdefABCD0123456789abcdef0123"])
def test_the_environment_goes_first(code, monkeypatch, told):
    monkeypatch.setenv("AGIQA_COMMIT", told)
    assert (commit_of(code), about_this_run()["commit"]) == (told, told)


def test_an_empty_variable_says_nothing(code, monkeypatch):
    monkeypatch.setenv("AGIQA_COMMIT", "")
    assert commit_of(code) is None


@pytest.mark.parametrize("told", ["main", "0123ab", "0123abc-dirt", "0123abc\n", "0" * 41, "-dirty", " 0123abc"])
def test_what_is_no_commit_is_refused(code, monkeypatch, told):
    monkeypatch.setenv("AGIQA_COMMIT", told)
    with pytest.raises(ConfigError, match=r"AGIQA_COMMIT is .* 7 to 40 hex digits"):
        commit_of(code)
