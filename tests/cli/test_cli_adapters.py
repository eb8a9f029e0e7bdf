"""`agiqa extract` with adapters and with descriptions of several aspects, as a user calls it."""

import json

import pytest
from transformers import LlamaForCausalLM

from agiqa.extract.models.loading import quiet_transformers
from tests.cli.refusals import extract, refuse
from tests.extract.models.test_adapters import PLAIN, edit, random_adapter
from tests.extract.small_sets import write_set, write_talks


@pytest.fixture
def texts(tmp_path):
    return write_set(tmp_path / "texts", 6)


@pytest.fixture
def adapter(tiny_text_checkpoint, tmp_path):
    with quiet_transformers():
        model = LlamaForCausalLM.from_pretrained(tiny_text_checkpoint)
    random_adapter(model, tmp_path / "adapter", **PLAIN)
    return tmp_path / "adapter"


def test_an_adapter_makes_another_store_and_is_named_in_it(agiqa, texts, tiny_text_checkpoint, adapter, tmp_path):
    plain = extract(agiqa, texts, tmp_path / "plain.zarr", tiny_text_checkpoint).json
    adapted = extract(agiqa, texts, tmp_path / "adapted.zarr", tiny_text_checkpoint, "--adapter", adapter).json
    assert plain["id"] != adapted["id"]
    stated = agiqa("store", "info", tmp_path / "adapted.zarr", "--json").json["provenance"]["model"]
    assert stated["name"] == f"{tiny_text_checkpoint.name}+adapter"
    assert len(stated["adapter"]["files"]["adapter_model.safetensors"]) == 64
    outcome = extract(agiqa, texts, tmp_path / "plain.zarr", tiny_text_checkpoint, "--adapter", adapter)
    refuse(outcome, "plain.zarr", "adapter")


def test_adapters_that_are_missing_or_of_another_base(agiqa, texts, tiny_text_checkpoint, adapter, tmp_path):
    def refused(folder, *mentions):
        outcome = extract(agiqa, texts, tmp_path / "new.zarr", tiny_text_checkpoint, "--adapter", folder)
        refuse(outcome, folder, *mentions)
        assert "plan" not in outcome.err
        assert not (tmp_path / "new.zarr").exists()
        out = tmp_path / "out.jsonl"
        given = ("--model", tiny_text_checkpoint, "--adapter", folder, "--device", "cpu")
        refuse(agiqa("describe", texts, out, *given), folder, *mentions)
        assert not out.exists()

    (texts / "data.csv").write_text("no table")  # is not even looked at
    refused(tmp_path / "absent", "no such folder")
    refused(texts, "no adapter_config.json")
    edit(adapter, lambda tensors: tensors.update({"base_model.model.vpm.weight": tensors.popitem()[1]}))
    refused(adapter, "vpm.weight has no place in it", "the adapter lacks")


def test_descriptions_of_two_aspects(agiqa, texts, tiny_text_checkpoint, tmp_path):
    files = [write_talks(texts, name=f"{aspect}.json") for aspect in ("quality", "correspondence")]
    options = ["--variant", "id:quality+correspondence", "--conversations", f"quality:{files[0]}"]
    both = [*options, "--conversations", files[1]]
    one = extract(agiqa, texts, tmp_path / "one.zarr", tiny_text_checkpoint, "--conversations", files[0]).json
    two = extract(agiqa, texts, tmp_path / "two.zarr", tiny_text_checkpoint, *both).json
    assert two["tokens"] > one["tokens"]
    conversation = agiqa("store", "info", tmp_path / "two.zarr", "--json").json["provenance"]["conversation"]
    assert conversation == {"variant": "id:quality+correspondence", "aspect": "quality"}
    talks = json.loads(files[1].read_text())
    files[1].write_text(json.dumps(talks[:-1]))
    refuse(
        extract(agiqa, texts, tmp_path / "less.zarr", tiny_text_checkpoint, *both),
        f"{talks[-1]['id']} (data.csv, line 7): no description of correspondence",
    )
    refuse(extract(agiqa, texts, tmp_path / "no.zarr", tiny_text_checkpoint, *options), "No descriptions of corresp")
