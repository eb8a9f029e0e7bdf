"""The room's public names are loaded when they are asked for."""

import subprocess
import sys

from tests.command_line import REPOSITORY

LIGHT = """
import sys
import agiqa.bench
heavy = {"torch", "transformers", "lightning", "zarr", "numpy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
from agiqa.bench import Panel, scatter
assert Panel.__name__ == "Panel"
assert callable(scatter)
assert "matplotlib" in sys.modules
assert "transformers" not in sys.modules
try:
    agiqa.bench.cake
except AttributeError as error:
    print(error)
"""


def test_the_room_opens_without_the_libraries_of_its_questions():
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "module 'agiqa.bench' has no attribute 'cake'"), done.stderr
