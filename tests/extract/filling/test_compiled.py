"""Stores that are filled with compiled layers: the choice, its record, and the rows."""

from functools import partial

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor

from agiqa.bench.measurements.random_models import SHAPES
from agiqa.cuda import kernels_missing
from agiqa.errors import CompilerError, UnknownName
from agiqa.extract import open_backbone
from agiqa.extract.filling.compiled import compiles, pays
from agiqa.extract.models.compiling import check_compiler
from agiqa.store import open_store
from tests.extract.jobs import extract
from tests.extract.small_sets import write_set, write_talks

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler warns of its own code


@pytest.fixture
def texts(tmp_path):
    folder = write_set(tmp_path / "set", 5)
    write_talks(folder)
    return folder


@pytest.fixture
def traced(monkeypatch):
    """Layers are traced for the compiler, but run by torch's own operations: code for a CPU takes long to make."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def broken():
    message = "torch cannot compile the layers of tiny (no C++ compiler)"
    raise CompilerError(message)


def test_a_store_of_compiled_layers_says_so_and_has_the_rows_of_plain_ones(
    texts, tiny_text_checkpoint, tmp_path, capsys, traced
):
    """Its plan decides, whatever later runs ask for."""
    plain = extract(texts, tiny_text_checkpoint, tmp_path / "plain.agiqa").store
    path = tmp_path / "compiled.agiqa"
    planned = extract(texts, tiny_text_checkpoint, path, compile="always", plan_only=True)
    assert planned.store.provenance["compiled"] is True
    assert "compiled" not in plain.provenance
    filled = extract(texts, tiny_text_checkpoint, path, compile="never")
    assert "was begun with compiled layers" in capsys.readouterr().err
    assert filled.store.is_sealed
    assert filled.store.id == planned.store.id != plain.id
    everything = list(range(len(plain.items)))
    found, expected = (store.read(everything).float32() for store in (filled.store, plain))
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_store_without_compiled_layers_goes_on_without(texts, tiny_text_checkpoint, tmp_path, capsys):
    path = tmp_path / "s.agiqa"
    extract(texts, tiny_text_checkpoint, path, plan_only=True)
    again = extract(texts, tiny_text_checkpoint, path, compile="always")
    assert "was begun without compiled layers" in capsys.readouterr().err
    assert "compiled" not in again.store.provenance
    assert not extract(texts, tiny_text_checkpoint, path, compile="auto").store.provenance.get("compiled")


def test_a_compiler_that_does_not_work_is_noticed_before_the_plan(texts, tiny_text_checkpoint, tmp_path, monkeypatch):
    """With a C++ compiler that is not there, and none of the code that earlier runs left behind."""
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with pytest.raises(CompilerError, match=r"torch cannot compile the layers of .*tiny-text.*compiler") as caught:
        extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", compile="always")
    assert "Give --compile never" in caught.value.__notes__[0]
    assert not (tmp_path / "s.agiqa").exists()
    with pytest.raises(CompilerError, match=r"torch cannot compile the layers of any model .*compiler"):
        check_compiler(torch.device("cpu"))


def test_the_choice_falls_back_aloud_where_nobody_insists(tmp_path, capsys):
    path = tmp_path / "s.agiqa"
    assert not compiles("auto", path, worth=True, try_out=broken)
    assert "(no C++ compiler): going on without compiled layers" in capsys.readouterr().err
    assert not compiles("auto", path, worth=False, try_out=broken)
    assert not compiles("never", path, worth=True, try_out=broken)
    tried = []
    assert compiles("auto", path, worth=True, try_out=lambda: tried.append(1))
    assert compiles("always", path, worth=False, try_out=lambda: tried.append(1))
    assert tried == [1, 1]


def test_an_unknown_choice_is_refused_before_anything_is_read(texts, tiny_text_checkpoint, tmp_path):
    with pytest.raises(UnknownName, match=r"'alway'.*Did you mean 'always'"):
        extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", compile="alway")


def test_long_jobs_on_a_gpu_are_worth_compiling(tiny_text_checkpoint, tmp_path):
    backbone = open_backbone(str(tiny_text_checkpoint), device="cpu")
    backbone.layer_count, backbone.hidden_size = 32, 4096
    assert not pays(backbone, 10**9)
    backbone.device = torch.device("cuda")
    assert not pays(backbone, 3_000 * 479)
    assert pays(backbone, 10_000 * 479)


def test_kernels_leave_nothing_to_save(tmp_path):
    backbone = SHAPES["minicpm-8b"](tmp_path / "model", device="cpu")
    backbone.device = torch.device("cuda")
    assert pays(backbone, 10_000 * 479) is (kernels_missing(backbone.device, ("triton",)) is not None)


def test_a_resumed_store_is_opened_for_its_choice(texts, tiny_text_checkpoint, tmp_path, traced):
    path = tmp_path / "s.agiqa"
    extract(texts, tiny_text_checkpoint, path, compile="always", plan_only=True)
    assert open_store(path, allow_partial=True).provenance["compiled"] is True
    assert compiles("never", path, worth=False, try_out=broken)
