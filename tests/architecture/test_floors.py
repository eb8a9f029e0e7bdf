"""The rooms keep to their floors, and what is packaged is what is on disk."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORDER = {
    "store": ("disk", "format", "reading", "writing", "deriving", "sharing", "care", "hdf5"),
    "heads": ("settings", "data", "model", "closed", "evaluation", "training", "sweeps", "searching"),
    "extract": ("data", "models", "teaching", "tuning", "describing", "filling"),
    "bench": (
        "recording",
        "baselines",
        "ablation",
        "networks",
        "transfer",
        "report",
        "reproducing",
        "demo",
        "measurements",
    ),
}
"""By room its sub-rooms from the ground up: a module imports from its own sub-room and from those before it."""
ROOMS = tuple(ORDER)
MAY_IMPORT = {
    "store": {"store"},
    "heads": {"store", "heads"},
    "extract": {"store", "extract"},
    "bench": {"store", "extract", "heads", "bench"},
}
GROUND = {
    "agiqa",
    *(
        f"agiqa.{name}"
        for name in (
            "cuda",
            "errors",
            "lazy",
            "notebooks",
            "parts",
            "progress",
            "registry",
            "version",
            "workers",
        )
    ),
}


MAP = (ROOT / "ARCHITECTURE.md").read_text()


def modules(room):
    return sorted((ROOT / room).rglob("*.py"))


def place(path):
    """The sub-room of a module; None for the room's own `__init__.py`."""
    parts = path.relative_to(ROOT).parts
    return parts[1] if len(parts) > 2 else None


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


@pytest.mark.parametrize("room", ROOMS)
def test_a_sub_room_imports_only_from_those_below_it(room):
    level = {name: number for number, name in enumerate(ORDER[room])}
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules(room)
        for name in imports_of(path)
        if (here := place(path)) is not None
        and name.split(".")[:2] == ["agiqa", room]
        and level.get((*name.split("."), "")[2], len(level)) > level[here]
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_of_a_room_is_in_a_sub_room(room):
    assert {place(path) for path in modules(room)} == {None, *ORDER[room]}
    assert [path.name for path in (ROOT / room).glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_tests_mirror_the_sub_rooms(room):
    folders = {path.parent.relative_to(ROOT / "tests" / room) for path in (ROOT / "tests" / room).rglob("test_*.py")}
    assert {folder.parts[0] if folder.parts else "." for folder in folders} <= set(ORDER[room])


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


@pytest.mark.parametrize("room", ROOMS)
def test_architecture_draws_the_sub_rooms_in_their_order(room):
    assert f"{room}/ " in MAP
    assert " → ".join(ORDER[room]) in MAP


def test_architecture_names_files_and_definitions_that_are_there():
    named = set(re.findall(r"`([\w./]+/[\w./]*)`", MAP))
    assert [name for name in named if not (ROOT / name).exists()] == []
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \|$", MAP.split("## Where to add")[0], re.MULTILINE)
    steps = [
        ("".join((ROOT / path).read_text() for path in re.findall(r"`([^`]+\.py)`", paths)), name)
        for paths, names in rows
        for name in re.findall(r"`([^`]+)`", names)
    ]
    assert len(steps) > 20
    assert [name for text, name in steps if not defines(text, name)] == []


def defines(text, name):
    return all(re.search(rf"^ *(def|class) {part}\b", text, re.MULTILINE) for part in name.split("."))
