"""What torch.compile leaves out, that its import waits until something is compiled, and what Triton kernels need."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from agiqa import cuda
from agiqa.heads.model.encoders import mamba2, mlstm
from agiqa.heads.model.encoders.kernels import dispatch
from tests.command_line import REPOSITORY

WITHOUT_COMPILER = """
import sys
from agiqa.heads import evaluate, load_run, predict
from tests.heads import golden_heads

for name in golden_heads.HEADS:
    run, items = load_run(golden_heads.FOLDER / name), golden_heads.rated_items()
    predict(run, items, device="cpu")
    evaluate(run, items, "test", device="cpu")
    assert "torch._dynamo" not in sys.modules, name
"""
EXCLUDED = """
import torch
from agiqa.heads.model.encoders.kernels.dispatch import exclude_from_compiling, uncompiled

@uncompiled
def excluded(tokens):
    for _ in range(1):
        tokens = torch.sin(tokens)
    return within(tokens)

def within(tokens):
    return torch.tan(tokens)

def step(tokens):
    return torch.cos(excluded(torch.exp(tokens)))

compiled = set()

def backend(graph, _):
    compiled.update(node.target for node in graph.graph.nodes if node.op == "call_function")
    return graph.forward

exclude_from_compiling()
exclude_from_compiling()
tokens = torch.rand(3)
torch.testing.assert_close(torch.compile(step, backend=backend)(tokens), tokens.exp().sin().tan().cos())
assert compiled == {torch.exp, torch.cos}, compiled
"""


@pytest.mark.parametrize("code", [WITHOUT_COMPILER, EXCLUDED], ids=["without the compiler", "excluded"])
def test_in_a_process_of_its_own(code):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_kernels_need_triton_and_a_c_compiler(tmp_path, monkeypatch):
    packages, programs = tmp_path / "packages", tmp_path / "programs"
    for folder in (packages / "triton", packages / "other", programs):
        folder.mkdir(parents=True)
    for package in ("triton", "other"):
        (packages / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CC", raising=False)

    def reason(*needed):
        cuda._is_installed.cache_clear()
        cuda._has_c_compiler.cache_clear()
        return cuda.kernels_missing(torch.device("cuda"), needed)

    try:
        assert "need CUDA, not cpu" in str(cuda.kernels_missing(torch.device("cpu"), ("triton",)))
        assert reason("triton", "absent") == "not installed: absent"
        assert "need a C compiler" in str(reason("triton", "other"))
        (programs / "gcc").touch(mode=0o755)
        assert reason("triton", "other") is None
        monkeypatch.setenv("PATH", os.devnull)
        monkeypatch.setenv("CC", "tcc")
        assert reason("triton") is None
    finally:
        monkeypatch.undo()
        reason("triton")


@pytest.mark.parametrize(("kilobytes", "most"), [(227, 256), (163, 256), (99, 128), (64, 0)])
def test_gpus_with_little_shared_memory_compute_wide_heads_by_other_means(kilobytes, most, monkeypatch):
    """The four sizes are those of H100, A100, A10 and T4."""
    properties = SimpleNamespace(shared_memory_per_block=48 << 10, shared_memory_per_block_optin=kilobytes << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for module in (mamba2, mlstm):
        monkeypatch.setattr(module, "kernels_missing", lambda _, packages: "absent" if len(packages) > 1 else None)
    device = torch.device("cuda")
    dispatch.widest_rows.cache_clear()
    try:
        for dim in (64, 128, 256):
            assert (mlstm.mlstm_torch_reason(device, dim) is None) == (dim <= most)
            assert (mamba2.ssd_torch_reason(device, dim, 16) is None) == (dim <= most)
        assert mlstm.mlstm_torch_reason(device, 48 if most else 512) is not None
    finally:
        dispatch.widest_rows.cache_clear()
