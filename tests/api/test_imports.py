"""`import agiqa` is cheap, its names are imported when they are used, and checkers see them."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import agiqa
from tests.command_line import REPOSITORY

CHEAP = """
import sys
before = set(sys.modules)
import agiqa
added = set(sys.modules) - before
heavy = {"torch", "transformers", "lightning", "zarr", "numpy", "pyarrow", "pandas", "pydantic", "rich", "click", "IPython"}
assert not heavy & added, heavy & added
of_agiqa = sorted(name for name in added if name.startswith("agiqa."))
assert of_agiqa == ["agiqa.errors", "agiqa.lazy", "agiqa.version"], of_agiqa
assert len(added) < 150, len(added)
assert {"train", "score", "extract", "Encoder"} <= set(dir(agiqa))
agiqa.import_parts
assert "torch" not in sys.modules
try:
    agiqa.cake
except AttributeError as error:
    print(error)
"""


def test_importing_agiqa_imports_three_modules_of_its_own_and_no_library():
    done = subprocess.run([sys.executable, "-c", CHEAP], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "module 'agiqa' has no attribute 'cake'"), done.stderr


@pytest.mark.parametrize("package", ["agiqa", *(f"agiqa.{room}" for room in ("bench", "extract", "heads", "store"))])
def test_checkers_see_the_names_that_are_imported_lazily(package):
    """Each is imported under TYPE_CHECKING too, from a module that has it."""
    module = import_module(package)
    (block,) = [
        node
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    rooms = {"bench", "extract", "heads", "store"} if package == "agiqa" else set()
    assert set(seen) - rooms == set(module.__all__) - rooms
    for name, place in seen.items():
        found = getattr(import_module(place), name)
        assert getattr(module, name) is found or (package, name) == ("agiqa", "extract")


def test_packages_and_names_are_there():
    assert agiqa.heads.load_run is agiqa.load_run
    assert agiqa.store.open_store is agiqa.open_store
    assert agiqa.extract.Item.__name__ == "Item"
    assert callable(agiqa.extract)
