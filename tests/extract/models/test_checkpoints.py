"""Names of checkpoints: what resolves, what is hashed, and what each refusal says."""

import hashlib
import json
import shutil
import sys

import pytest

from agiqa.errors import ModelError
from agiqa.extract.models import checkpoints
from agiqa.extract.models.checkpoints import hashed_ahead, resolve_checkpoint
from agiqa.extract.models.loading import failures_of


def test_a_folder_and_its_hashes(tiny_text_checkpoint):
    checkpoint = resolve_checkpoint(str(tiny_text_checkpoint))
    hashes = checkpoint.hashes()
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"} <= hashes.keys()
    for name, digest in hashes.items():
        assert digest == hashlib.sha256((tiny_text_checkpoint / name).read_bytes()).hexdigest()
    assert checkpoint.stored_dtype() == "float32"


def test_hashes_begun_ahead_are_those_of_the_checkpoint(tiny_text_checkpoint, monkeypatch):
    expected = resolve_checkpoint(str(tiny_text_checkpoint)).hashes()
    with hashed_ahead(str(tiny_text_checkpoint)):
        assert resolve_checkpoint(str(tiny_text_checkpoint)).hashes() == expected
        monkeypatch.setattr(checkpoints, "sha256_of_file", None)  # nothing is hashed again
        assert resolve_checkpoint(str(tiny_text_checkpoint)).hashes() == expected
    with pytest.raises(TypeError):
        resolve_checkpoint(str(tiny_text_checkpoint)).hashes()


def test_what_cannot_be_hashed_ahead_is_told_by_those_who_ask(tiny_text_checkpoint, tmp_path):
    with hashed_ahead(str(tmp_path / "absent")), hashed_ahead("pkg:absent"), hashed_ahead("owner/name"):
        pass
    folder = tmp_path / "unweighted"
    shutil.copytree(tiny_text_checkpoint, folder)
    (folder / "model.safetensors").unlink()
    with hashed_ahead(str(folder)), pytest.raises(ModelError, match="no weights in"):
        resolve_checkpoint(str(folder)).hashes()


def test_shards_are_all_needed(tiny_text_checkpoint, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_text_checkpoint, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing: model-00002-of-00002\.safetensors"):
        resolve_checkpoint(str(folder)).weight_files()
    (folder / "model-00002-of-00002.safetensors").touch()
    assert len(resolve_checkpoint(str(folder)).weight_files()) == 3
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="not a weight index"):
        resolve_checkpoint(str(folder)).weight_files()


def test_gguf_files_by_path_folder_and_package(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    (package / "tiny.gguf").write_bytes(b"GGUF rest")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in (str(package / "tiny.gguf"), str(package), "pkg:carrier", "pkg:carrier/tiny.gguf"):
        checkpoint = resolve_checkpoint(name)
        assert checkpoint.name == name
        assert checkpoint.weight_files() == [package / "tiny.gguf"]
        assert list(checkpoint.hashes()) == ["tiny.gguf"]
    (package / "other.gguf").write_bytes(b"GGUF rest")
    with pytest.raises(ModelError, match=r"2 GGUF files in the folder; name one: other\.gguf, tiny\.gguf"):
        resolve_checkpoint("pkg:carrier")
    with pytest.raises(ModelError, match=r"has no 'absent\.gguf'"):
        resolve_checkpoint("pkg:carrier/absent.gguf")


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"no model in .*; expected config\.json"):
        resolve_checkpoint(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"notes\.txt is not a GGUF file"):
        resolve_checkpoint(str(tmp_path / "notes.txt"))
    with pytest.raises(ModelError, match="no Python package called 'no_such_package_here'"):
        resolve_checkpoint("pkg:no_such_package_here")
    with pytest.raises(ModelError, match="no such file or folder"):
        resolve_checkpoint("./models/absent/deeper")
    with pytest.raises(ModelError, match="no such file or folder"):
        resolve_checkpoint("absent.gguf")
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
        _ = resolve_checkpoint(str(tmp_path)).raw_config


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (ImportError("\nAProcessor requires the Nosuchvision library but it was not found\nCheck the"), "nosuchvision"),
        (ValueError("AoConfig requires nosuchao to be installed. Install with `pip install -U nosuchao`"), "nosuchao"),
        (ModuleNotFoundError("No module named 'nosuchao.x'", name="nosuchao.x"), "nosuchao"),
    ],
)
def test_a_package_that_is_missing_is_named(tiny_text_checkpoint, error, package):
    """Libraries word it differently, and the first line may end within a sentence."""
    checkpoint = resolve_checkpoint(str(tiny_text_checkpoint))
    with pytest.raises(ModelError) as caught, failures_of(checkpoint, "load the processor"):
        raise error
    assert str(caught.value).endswith(
        f"cannot load the processor: that needs the Python package {package}, which is not installed: "
        f"pip install {package}"
    )


def test_other_failures_are_not_taken_for_missing_packages(tiny_text_checkpoint):
    checkpoint = resolve_checkpoint(str(tiny_text_checkpoint))
    lacking = AttributeError("GemmaTokenizer has no attribute boi_token_id", name="boi_token_id")
    for error in (ImportError("cannot import name x"), ValueError("pip install torch"), KeyError("a"), lacking):
        with pytest.raises(ModelError, match="with what is in"), failures_of(checkpoint, "load the processor"):
            raise error


def test_an_unreachable_hub_is_a_clear_error(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no folder of that name here, and the Hugging Face hub did not provide it"):
        resolve_checkpoint("nobody/no-such-model")
