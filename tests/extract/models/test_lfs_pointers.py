"""Git LFS pointers instead of weights, tokenizer, adapter, table, conversations or images are refused by name."""

import shutil

import pytest

from agiqa.errors import DataError, ModelError
from agiqa.extract import load_data_set, open_backbone
from agiqa.extract.data.images import open_image
from agiqa.store.format.tables import read_table
from tests.extract.models.test_adapters import PLAIN, llama, random_adapter
from tests.extract.small_sets import write_set

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def told(path):
    return rf"{path.name} is a Git LFS pointer, not the file: run `git lfs pull`"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_files_of_a_model_before_any_is_read(tiny_text_checkpoint, tmp_path, name):
    folder = tmp_path / "m"
    shutil.copytree(tiny_text_checkpoint, folder)
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=told(folder / name)):
        open_backbone(str(folder), device="cpu")


def test_a_gguf_file(tmp_path):
    (tmp_path / "a.gguf").write_text(POINTER)
    with pytest.raises(ModelError, match=told(tmp_path / "a.gguf")):
        open_backbone(str(tmp_path / "a.gguf"), device="cpu")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_of_an_adapter(tiny_text_checkpoint, tmp_path, name):
    random_adapter(llama(tiny_text_checkpoint), tmp_path / "a", **PLAIN)
    (tmp_path / "a" / name).write_text(POINTER)
    with pytest.raises(ModelError, match=told(tmp_path / "a" / name)):
        open_backbone(str(tiny_text_checkpoint), adapter=str(tmp_path / "a"), device="cpu")


def test_an_image(tmp_path):
    (tmp_path / "a.png").write_text(POINTER)
    with pytest.raises(DataError, match=told(tmp_path / "a.png")):
        open_image(tmp_path / "a.png")


def test_tables_and_conversations(tmp_path):
    folder = write_set(tmp_path / "set", count=3)
    talk = folder / "train.json"
    talk.write_text(POINTER)
    with pytest.raises(DataError, match=told(talk)):
        load_data_set(folder, variant="id", conversations=[str(talk)], images=False)
    (folder / "data.csv").write_text(POINTER)
    with pytest.raises(DataError, match=told(folder / "data.csv")):
        load_data_set(folder, variant="no_id", images=False)
    with pytest.raises(DataError, match=told(folder / "data.csv")):
        read_table(folder / "data.csv")
