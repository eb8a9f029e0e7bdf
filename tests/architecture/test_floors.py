"""The rooms keep to their floors, and what is packaged is what is on disk."""

import ast
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("bench", "extract", "heads", "store")
GROUND = {"agiqa", "agiqa.errors", "agiqa.interrupts", "agiqa.progress", "agiqa.registry", "agiqa.version"}
MAY_IMPORT = {
    "store": {"store"},
    "extract": {"store", "extract"},
    "heads": {"store", "heads"},
    "bench": {"store", "extract", "heads", "bench"},
}


def modules(room):
    return sorted((ROOT / room).rglob("*.py"))


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_floor_allows(room):
    allowed = tuple(f"agiqa.{name}" for name in MAY_IMPORT[room])
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules(room)
        for name in imports_of(path)
        if name.split(".")[0] == "agiqa" and name not in GROUND and not name.startswith(allowed)
    ]
    assert wrong == []


def test_heads_need_no_model_code():
    used = {name.split(".")[0] for path in modules("heads") for name in imports_of(path)}
    assert "torch" in used
    assert "transformers" not in used


def test_nothing_imports_a_room_by_its_bare_name():
    paths = [path for room in (*ROOMS, "agiqa", "tests") for path in modules(room)]
    wrong = [f"{path}: {name}" for path in paths for name in imports_of(path) if name.split(".")[0] in ROOMS]
    assert wrong == []


def test_packages_are_those_on_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {"agiqa"}
    for folder in (*ROOMS, "agiqa/commands"):
        for path in [ROOT / folder, *(p for p in (ROOT / folder).rglob("*") if p.is_dir())]:
            if (path / "__init__.py").exists():
                name = path.relative_to(ROOT).as_posix().replace("/", ".")
                on_disk.add(name if name.startswith("agiqa") else f"agiqa.{name}")
    assert set(settings["packages"]) == on_disk
    for package, folder in settings["package-dir"].items():
        assert (ROOT / folder / "__init__.py").exists(), package


def test_files_that_are_read_at_run_time_are_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {package: ROOT / package.removeprefix("agiqa.").replace(".", "/") for package in settings["package-data"]}
    packaged = {
        path.resolve()
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in folders[package].glob(pattern)
    }
    of_a_clone_only = {*(ROOT / "bench" / "results").rglob("*"), *(ROOT / "bench").glob("*.yaml")}
    suffixes = (".yaml", ".css", ".js", ".j2", ".typed")
    files = [path for room in (*ROOMS, "agiqa") for path in (ROOT / room).rglob("*") if path.suffix in suffixes]
    assert {path.resolve() for path in files} - of_a_clone_only == packaged


@pytest.mark.parametrize("room", ROOMS)
def test_links_lead_to_the_rooms(room):
    link = ROOT / "agiqa" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room


def test_modules_and_functions_stay_readable():
    long = []
    for path in [path for room in (*ROOMS, "agiqa") for path in modules(room)]:
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(f"{path.relative_to(ROOT)} is over 400 lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
                if length > 50:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert long == []


def test_test_modules_stay_readable():
    assert [path for path in (ROOT / "tests").rglob("*.py") if path.read_text().count("\n") > 400] == []


def test_every_public_name_is_there():
    from importlib import import_module

    for name in ("agiqa", *(f"agiqa.{room}" for room in ROOMS)):
        module = import_module(name)
        assert all(hasattr(module, public) for public in module.__all__)


@pytest.mark.parametrize("room", ["agiqa", *ROOMS])
def test_the_map_of_the_readme_names_every_module(room):
    text = (ROOT / "README.md").read_text()
    described = re.search(rf"^{room}/ (.|\n)*?(?=^\w+/ |```)", text, re.MULTILINE)
    assert described is not None
    named = set(re.findall(r"[\w*]+\.py\b", described.group()))
    on_disk = {path.name for path in (ROOT / room).glob("*.py") if not path.name.startswith("__")}
    unnamed = {name for name in on_disk if not any(fnmatch(name, pattern) for pattern in named)}
    gone = {pattern for pattern in named if not any(fnmatch(name, pattern) for name in on_disk)}
    assert (unnamed, gone) == (set(), set())
