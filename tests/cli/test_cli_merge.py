"""`agiqa merge` as a user calls it, and what a kill leaves."""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.refusals import misuse, refuse
from tests.command_line import in_time
from tests.extract.models.test_merging import minicpm_adapter
from tests.extract.tiny_minicpm import write_minicpm_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A MiniCPM with a file for each tensor: killed after the first, a merge has many to write."""
    folder = write_minicpm_checkpoint(tmp_path_factory.mktemp("base") / "minicpm")
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    files = {name: f"model-{number:05}-of-{len(tensors):05}.safetensors" for number, name in enumerate(tensors, 1)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return minicpm_adapter(base, tmp_path_factory.mktemp("adapter"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_leaves_no_folder_and_the_next_run_begins_anew(agiqa, base, adapter, tmp_path):
    out, partial = tmp_path / "merged", tmp_path / ".merged.merging"
    arguments = ("merge", base, adapter, out, "--json")
    killed = in_time(lambda: agiqa.killed(*arguments, when=lambda: any(partial.glob("*.safetensors"))), out)
    assert killed.code == -9, killed.err
    assert not out.exists()
    assert any(partial.iterdir())
    (partial / "left.txt").write_text("of the killed run")

    printed = agiqa(*arguments).json
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert "left.txt" not in contents(out)
    assert (printed["out"], printed["untied"]) == (str(out), [])
    assert printed["bytes"] == sum(map(len, contents(out).values()))
    stored = [name for path in out.glob("*.safetensors") for name in load_file(path)]
    assert printed["tensors"] == len(stored)
    before = contents(out)
    refuse(agiqa(*arguments), "merged exists already")
    assert contents(out) == before

    second = tmp_path / ".second.merging"
    into = tmp_path / "second"
    arguments = ("merge", base, adapter, into)
    stopped = in_time(lambda: agiqa.interrupted(*arguments, when=lambda: any(second.glob("*.safetensors"))), into)
    assert stopped.code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_what_is_wrong_usage(agiqa, base, tmp_path):
    misuse(agiqa("merge", base, tmp_path / "out"), "Missing argument 'OUT'")
    refuse(agiqa("merge", base, base, tmp_path / "out"), "no adapter_config.json", "give it as the model")
    assert list(tmp_path.iterdir()) == []
