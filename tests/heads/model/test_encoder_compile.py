"""Encoders under torch.compile, in a process of its own: the shape checks of the tests cannot be traced."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]

_COMPILE = """
import torch
from agiqa.heads.settings.config import HeadConfig
from agiqa.heads.model.encoders import ENCODERS

for name in ("mamba2", "transformer"):
    encoder = ENCODERS.get(name)(HeadConfig(width=12, layers=2))
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for length in (20, 70):
        tokens = torch.randn(2, length, 12)
        mask = torch.arange(length) < torch.tensor([[length], [9]])
        torch.testing.assert_close(compiled(tokens, mask), encoder(tokens, mask))
    print(name)
"""


def test_mamba2_and_the_transformer_compile_as_one_graph():
    command = [sys.executable, "-W", "error", "-c", _COMPILE]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mamba2", "transformer"]
