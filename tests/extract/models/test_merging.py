"""`agiqa merge`: the written checkpoint gives the numbers of model and adapter, in the layout of the base."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForCausalLM, LlamaForCausalLM, LlavaForConditionalGeneration

from agiqa.errors import BusyStore, ConfigError, ModelError
from agiqa.extract import Message, open_backbone
from agiqa.extract.models.loading import quiet_transformers
from agiqa.extract.models.merging import merge_adapter
from agiqa.store.disk.locks import exclusive_lock
from tests.extract.models.test_adapters import IDS, PLAIN, edit, random_adapter
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import write_softcapped_checkpoint, write_text_checkpoint, write_vision_checkpoint

ASKED = (Message(role="user", content="rate the image"), Message(role="assistant", content="fair dog"))
PUBLISHED = {
    "r": 4,
    "lora_alpha": 4,
    "target_modules": r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
    "modules_to_save": ["embed_tokens", "resampler", "vpm"],
}
"""The recipe of the published adapters, with a small rank."""


def load(checkpoint, model_class):
    with quiet_transformers():
        return model_class.from_pretrained(checkpoint).eval()


def minicpm_adapter(checkpoint, folder):
    """A random adapter of the published kind."""
    backbone = open_backbone(str(checkpoint), device="cpu", dtype="float32")
    backbone.load()
    random_adapter(backbone._model, folder, **PUBLISHED)
    return folder


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "noise.png"
    Image.effect_noise((64, 50), 80).save(path)
    return path


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory):
    """(base, adapter), the base with all that a repository has beside the weights."""
    folder = tmp_path_factory.mktemp("minicpm")
    base = write_minicpm_checkpoint(folder / "base")
    adapter = minicpm_adapter(base, folder / "adapter")
    (base / "modeling_minicpmv.py").write_text("raise SystemExit('never run')\n")
    (base / "LICENSE").write_text("terms\n")
    (base / "generation_config.json").write_text('{"eos_token_id": [341, 345]}')
    (base / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "chat_template.jinja").write_text(settings["chat_template"])
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (base / "consolidated.pt").write_bytes(b"the same weights once more")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_bytes(b"the same weights once more")
    return base, adapter


def layout(folder):
    """By file the names, shapes and dtypes of its tensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            found[path.name] = {
                name: (tensors.get_slice(name).get_shape(), tensors.get_slice(name).get_dtype())
                for name in tensors.keys()  # noqa: SIM118 - not a mapping
            }
    return found


def same_numbers(base, adapter, merged, image=None):
    """Hidden states and logits of the merged checkpoint are those of the base with the adapter, bit for bit."""
    expected = open_backbone(str(base), adapter=str(adapter), device="cpu")
    found = open_backbone(str(merged), device="cpu")
    item = expected.prepare(ASKED, image)
    assert torch.equal(found.hidden_states([item])[0], expected.hidden_states([item])[0])
    assert torch.equal(found.logits(item), expected.logits(item))
    assert torch.equal(found.lm_head(bent=True), expected.lm_head(bent=True))
    plain = open_backbone(str(base), device="cpu")
    assert not torch.equal(plain.hidden_states([item])[0], found.hidden_states([item])[0])
    assert found.provenance()["files"] != plain.provenance()["files"]
    assert "adapter" not in found.provenance()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_kind_of_adapter_in_the_layout_of_its_base(minicpm, noise, tmp_path, dtype):
    base, adapter = minicpm
    if dtype == torch.bfloat16:
        shutil.copytree(base, tmp_path / "base")
        base = tmp_path / "base"
        for path in base.glob("*.safetensors"):
            save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    result = merge_adapter(str(base), str(adapter), tmp_path / "merged")
    assert layout(tmp_path / "merged") == layout(base)
    whole = {name for name in load_all(base) if name.startswith(("vpm.", "resampler.", "llm.model.embed_tokens"))}
    assert (result.changed, result.untied) == (len(whole) + 8, ())
    changed = {name for name, value in load_all(tmp_path / "merged").items() if not value.equal(load_all(base)[name])}
    assert changed <= {*whole, *(name for name in load_all(base) if "self_attn" in name)}
    same_numbers(base, adapter, tmp_path / "merged", noise)


def load_all(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_all_other_files_are_copied_and_the_record_has_the_hashes(minicpm, tmp_path):
    base, adapter = minicpm
    merged = tmp_path / "merged"
    merge_adapter(str(base), str(adapter), merged)
    weights = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    kept = {path.name for path in base.iterdir() if path.is_file()}
    kept -= {".gitattributes", "consolidated.pt"}
    assert {path.name for path in merged.iterdir()} == {*kept, "additional_chat_templates", "merge.json"}
    assert (merged / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"
    for name in kept - weights:
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    record = json.loads((merged / "merge.json").read_text())
    digest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir() if path.is_file()}
    assert record["model"]["files"] == {name: digest[name] for name in record["model"]["files"]}
    assert record["model"]["files"].keys() >= weights | {"config.json", "tokenizer.json"}
    of_adapter = {
        name: hashlib.sha256((adapter / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert (record["adapter"]["files"], record["untied"]) == (of_adapter, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    again = tmp_path / "again"
    merge_adapter(str(base), str(adapter), again)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in merged.iterdir() if path.is_file())


@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_the_merged_model(tmp_path, sharded):
    base = write_text_checkpoint(tmp_path / "base")
    if sharded:
        (base / "model.safetensors").unlink()
        load_again = write_text_checkpoint(tmp_path / "whole")
        load(load_again, LlamaForCausalLM).save_pretrained(base, max_shard_size="20KB")
        assert len(list(base.glob("*.safetensors"))) > 2
    options = {**PLAIN, "modules_to_save": ["lm_head", "norm"]}
    oracle = random_adapter(load(base, LlamaForCausalLM), tmp_path / "adapter", **options)
    merge_adapter(str(base), str(tmp_path / "adapter"), tmp_path / "merged")
    assert layout(tmp_path / "merged") == layout(base)
    backbone = same_numbers(base, tmp_path / "adapter", tmp_path / "merged")
    item = backbone.prepare(ASKED, None)
    ids = torch.from_numpy(item.token_ids).long()[None]
    with torch.inference_mode():
        logits = load(tmp_path / "merged", transformers.AutoModelForCausalLM)(ids).logits[0]
        torch.testing.assert_close(logits, oracle(ids).logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, backbone.logits(item), rtol=1e-6, atol=1e-6)


def test_an_image_model_whose_files_have_the_names_of_older_releases(tmp_path, noise):
    """LLaVA's tensors were called language_model.model...; other servers expect the names of the base."""
    base = write_vision_checkpoint(tmp_path / "base")
    options = {
        "r": 4,
        "target_modules": r".*language_model.*(q|v)_proj",
        "modules_to_save": ["multi_modal_projector"],
    }
    random_adapter(load(base, LlavaForConditionalGeneration), tmp_path / "adapter", **options)

    def older(name):
        for new, old in (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ):
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    tensors = {older(name): value for name, value in load_file(base / "model.safetensors").items()}
    assert any(name.startswith("language_model.model.") for name in tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge_adapter(str(base), str(tmp_path / "adapter"), tmp_path / "merged")
    assert layout(tmp_path / "merged") == layout(base)
    same_numbers(base, tmp_path / "adapter", tmp_path / "merged", noise)


def tied(folder):
    """A Llama whose files hold the embeddings once, in several shards."""
    whole = write_text_checkpoint(folder.with_name("untied"))
    config = json.loads((whole / "config.json").read_text())
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(whole / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder, LlamaForCausalLM).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    assert "lm_head.weight" not in load_all(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [{**PLAIN, "modules_to_save": ["embed_tokens"]}, {**PLAIN, "target_modules": ["lm_head", "q_proj"]}],
    ids=["embeddings", "head"],
)
def test_tied_weights_are_untied_where_the_adapter_changes_one(tmp_path, options):
    base, merged = tied(tmp_path / "base"), tmp_path / "merged"
    oracle = random_adapter(load(base, LlamaForCausalLM), tmp_path / "adapter", **options)
    result = merge_adapter(str(base), str(tmp_path / "adapter"), merged)
    assert result.untied == ("lm_head.weight",)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    backbone = same_numbers(base, tmp_path / "adapter", merged)
    with torch.inference_mode():
        theirs = load(merged, LlamaForCausalLM)
        torch.testing.assert_close(theirs(IDS).logits, oracle(IDS).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(theirs.lm_head.weight, backbone.lm_head())
    unchanged = "lm_head.weight" if "modules_to_save" in options else "model.embed_tokens.weight"
    assert load_all(merged)[unchanged].equal(load_all(base)["model.embed_tokens.weight"])
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in layout(merged).items() for name in names}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in load_all(merged).values())


def test_tied_weights_stay_tied_where_the_adapter_changes_others(tmp_path):
    base = tied(tmp_path / "base")
    random_adapter(load(base, LlamaForCausalLM), tmp_path / "adapter", **PLAIN)
    assert merge_adapter(str(base), str(tmp_path / "adapter"), tmp_path / "merged").untied == ()
    assert layout(tmp_path / "merged") == layout(base)
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    same_numbers(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_model_that_ties_by_default(tmp_path):
    """Gemma ties its weights without saying so in config.json."""
    base = write_softcapped_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" not in load_all(base)
    options = {**PLAIN, "modules_to_save": ["embed_tokens"]}
    random_adapter(load(base, Gemma2ForCausalLM), tmp_path / "adapter", **options)
    assert merge_adapter(str(base), str(tmp_path / "adapter"), tmp_path / "merged").untied == ("lm_head.weight",)
    same_numbers(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_base_that_says_it_is_tied_and_stores_two_tensors(tmp_path):
    """transformers does not tie them on loading if they differ."""
    base = write_text_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    random_adapter(load(base, LlamaForCausalLM), tmp_path / "adapter", **{**PLAIN, "modules_to_save": ["embed_tokens"]})
    assert merge_adapter(str(base), str(tmp_path / "adapter"), tmp_path / "merged").untied == ()
    assert layout(tmp_path / "merged") == layout(base)
    same_numbers(base, tmp_path / "adapter", tmp_path / "merged")


@pytest.fixture
def base(tmp_path):
    return write_text_checkpoint(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    random_adapter(load(base, LlamaForCausalLM), tmp_path / "adapter", **PLAIN)
    return tmp_path / "adapter"


def test_a_model_of_the_hub_by_its_snapshot_in_the_cache(base, adapter, tmp_path, monkeypatch):
    """The files of a snapshot are links, and the merged folder has files."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (base / "LICENSE").write_text("terms")
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    merge_adapter("someone/tiny", str(adapter), tmp_path / "merged")
    merge_adapter(str(base), str(adapter), tmp_path / "local")
    record, local = (json.loads((tmp_path / name / "merge.json").read_text()) for name in ("merged", "local"))
    assert (record["model"]["name"], record["model"]["revision"]) == ("someone/tiny", commit)
    assert record["model"]["files"] == local["model"]["files"]
    for path in (tmp_path / "merged").iterdir():
        assert not path.is_symlink()
        assert path.name == "merge.json" or path.read_bytes() == (tmp_path / "local" / path.name).read_bytes()
    assert (tmp_path / "merged" / "LICENSE").read_text() == "terms"


def refused(base, adapter, out, error, match):
    """The merge is refused, and nothing is written."""
    before = sorted(path.name for path in base.parent.iterdir())
    with pytest.raises(error, match=match):
        merge_adapter(str(base), str(adapter), out)
    assert sorted(path.name for path in base.parent.iterdir()) == before


def test_what_is_refused_before_anything_is_written(base, adapter, tmp_path):
    out = tmp_path / "out"
    refused(base, adapter, base, ConfigError, "base exists already")
    (tmp_path / "link").symlink_to("nowhere")
    refused(base, adapter, tmp_path / "link", ConfigError, "link exists already")
    refused(base, adapter, tmp_path / "no" / "out", ConfigError, "no is no folder")
    refused(base, tmp_path / "absent", out, ModelError, "no such folder")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    refused(base, adapter, out, ModelError, "base is quantised")
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, base / "model.safetensors", metadata={"format": "pt"})
    refused(base, adapter, out, ModelError, r"q_proj.weight \(I8\): the weights are quantised")
    del tensors[name]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused(base, adapter, out, ModelError, f"builds {name} from tensors of other names")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    refused(base, adapter, out, ModelError, "own format")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", adapter, out, ModelError, "model.gguf is a GGUF file")


def test_an_adapter_counts_once(base, adapter, tmp_path):
    merge_adapter(str(base), str(adapter), tmp_path / "merged")
    with pytest.raises(ModelError, match=r"merged with the adapter .* already .*Leave the adapter out"):
        open_backbone(str(tmp_path / "merged"), adapter=str(adapter), device="cpu")
    refused(tmp_path / "merged", adapter, tmp_path / "twice", ModelError, "is merged with the adapter")
    edit(adapter, lambda tensors: tensors.update({name: 2 * value for name, value in tensors.items()}))
    assert merge_adapter(str(tmp_path / "merged"), str(adapter), tmp_path / "another").changed


def test_an_adapter_that_does_not_fit_is_named(base, adapter, tmp_path):
    edit(adapter, lambda tensors: tensors.update({"base_model.model.vpm.weight": tensors.popitem()[1]}))
    refused(base, adapter, tmp_path / "out", ModelError, "vpm.weight has no place in it")


def test_two_merges_into_one_folder(base, adapter, tmp_path):
    (tmp_path / ".out.merging").mkdir()
    with exclusive_lock(tmp_path / ".out.merging" / ".lock"):
        refused(base, adapter, tmp_path / "out", BusyStore, "Another run is writing to")
    assert merge_adapter(str(base), str(adapter), tmp_path / "out").tensors == len(load_all(base))
