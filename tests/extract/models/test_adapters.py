"""Adapters: merged exactly as peft applies them or refused by name, and part of the provenance of a store."""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from agiqa.errors import ModelError
from agiqa.extract.data.items import Message
from agiqa.extract.models import open_backbone
from agiqa.extract.models.adapters import apply_adapter, resolve_adapter
from agiqa.extract.models.loading import quiet_transformers

ASKED = (Message(role="user", content="rate"), Message(role="assistant", content="fair dog"))
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])


def random_adapter(model: nn.Module, folder: Path, **options) -> nn.Module:
    """Save an adapter with random factors and changed whole modules; peft's own model, which applies it unmerged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        draw = torch.Generator().manual_seed(7)
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                scale = 0.3 if "lora" in name else 0.1
                weight.data += (torch.randn(weight.shape, generator=draw) * scale).to(weight.dtype)
        adapted.save_pretrained(folder)
    return adapted.eval()


def llama(checkpoint, dtype=torch.float32):
    with quiet_transformers():
        return LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


def rewrite(folder: Path, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def edit(folder: Path, change) -> None:
    """Save the tensors as changed by `change`."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def adapter(tiny_text_checkpoint, tmp_path):
    """The folder of a plain adapter of the tiny text model."""
    random_adapter(llama(tiny_text_checkpoint), tmp_path / "adapter", **PLAIN)
    return tmp_path / "adapter"


def refused(checkpoint, adapter) -> str:
    """The error of loading, which must be that of the check of headers too."""
    with pytest.raises(ModelError) as caught:
        open_backbone(str(checkpoint), adapter=str(adapter), device="cpu").load()
    hollow = adapter.parent / "hollow"
    shutil.copytree(checkpoint, hollow, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    with pytest.raises(ModelError) as early:
        open_backbone(str(hollow), adapter=str(adapter), device="cpu").check_tensors()
    assert str(early.value).replace(str(hollow), str(checkpoint)) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        {**PLAIN, "task_type": "CAUSAL_LM", "use_rslora": True},
        {**PLAIN, "target_modules": r"model\..*layers\.\d+\.(self_attn\.(q|o)_proj|mlp\.up_proj)"},
        {**PLAIN, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3}},
        {**PLAIN, "modules_to_save": ["embed_tokens", "norm"]},
        {**PLAIN, "target_modules": ["lm_head", "embed_tokens", "down_proj"]},
        {**PLAIN, "modules_to_save": ["lm_head"]},
        {**PLAIN, "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids=["plain", "rslora", "regex", "patterns", "whole", "vocabulary", "head", "layers"],
)
def test_merged_is_what_peft_applies(tiny_text_checkpoint, tmp_path, options):
    oracle = random_adapter(llama(tiny_text_checkpoint), tmp_path / "a", **options)
    untouched = llama(tiny_text_checkpoint)(IDS).logits
    merged = apply_adapter(llama(tiny_text_checkpoint), resolve_adapter(str(tmp_path / "a")), name="tiny")
    with torch.inference_mode():
        expected = oracle(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(untouched, expected, atol=0.1)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained_are_taken_too(tmp_path, bias):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    oracle = random_adapter(make(), tmp_path / "a", r=2, target_modules=["2"], bias=bias)
    merged = apply_adapter(make(), resolve_adapter(str(tmp_path / "a")), name="tiny")
    given = torch.randn(5, 6)
    torch.testing.assert_close(merged(given), oracle(given))


def test_any_module_with_convolutions_and_bare_parameters(tmp_path):
    """As the native MiniCPM: no transformers class, null task type, a pattern, and a resampler saved whole."""

    class Resampler(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(3, 8))
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(self.query[None].expand(len(x), -1, -1), x, x)[0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.vpm = nn.ModuleDict({"patches": nn.Conv2d(3, 8, 2, 2), "mix": nn.Conv2d(8, 8, 1)})
            self.resampler = Resampler()
            self.llm = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "other": nn.Linear(8, 8)})

        def forward(self, x):
            tokens = self.vpm["mix"](self.vpm["patches"](x)).flatten(2).transpose(1, 2)
            return self.llm["other"](self.llm["q_proj"](self.resampler(tokens)))

    def make():
        torch.manual_seed(0)
        return Model().eval()

    options = {"r": 2, "target_modules": r"llm\..*q_proj|vpm\..*", "modules_to_save": ["resampler"]}
    oracle = random_adapter(make(), tmp_path / "a", **options)
    merged = apply_adapter(make(), resolve_adapter(str(tmp_path / "a")), name="tiny")
    given = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(merged(given), oracle(given), rtol=1e-4, atol=1e-5)


def test_sixteen_bit_sums_are_rounded_once(tiny_text_checkpoint, adapter):
    merged = apply_adapter(llama(tiny_text_checkpoint, torch.bfloat16), resolve_adapter(str(adapter)), name="tiny")
    exact = apply_adapter(
        llama(tiny_text_checkpoint, torch.bfloat16).float(), resolve_adapter(str(adapter)), name="tiny"
    )
    for (name, found), expected in zip(merged.named_parameters(), exact.parameters(), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected.bfloat16()), name


def test_a_tied_head_does_not_follow_its_embedding(tiny_text_checkpoint, tmp_path):
    def make():
        model = llama(tiny_text_checkpoint)
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    oracle = random_adapter(make(), tmp_path / "a", r=4, target_modules=["lm_head"])
    merged = apply_adapter(make(), resolve_adapter(str(tmp_path / "a")), name="tiny")
    torch.testing.assert_close(merged(IDS).logits, oracle(IDS).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.model.embed_tokens.weight, make().model.embed_tokens.weight)


def test_names_of_older_releases_find_their_place(tiny_vision_checkpoint, tmp_path):
    """LLaVA's modules moved from language_model.model to model.language_model, and its adapters did not."""

    def make():
        with quiet_transformers():
            return LlavaForConditionalGeneration.from_pretrained(tiny_vision_checkpoint).eval()

    oracle = random_adapter(
        make(), tmp_path / "a", **{**PLAIN, "target_modules": r".*language_model.*(q|v)_proj"}, modules_to_save=["norm"]
    )

    def older(tensors):
        for key in list(tensors):
            tensors[key.replace("model.model.language_model.", "model.language_model.model.")] = tensors.pop(key)
        assert any("base_model.model.language_model.model.layers" in key for key in tensors)

    edit(tmp_path / "a", older)
    merged = apply_adapter(make(), resolve_adapter(str(tmp_path / "a")), name="tiny")
    torch.testing.assert_close(merged(IDS).logits, oracle(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_backbone_with_an_adapter_is_another_model(tiny_text_checkpoint, adapter, capsys):
    plain = open_backbone(str(tiny_text_checkpoint), device="cpu")
    adapted = open_backbone(str(tiny_text_checkpoint), adapter=str(adapter), device="cpu")
    item = adapted.prepare(ASKED, None)
    oracle = apply_adapter(llama(tiny_text_checkpoint), resolve_adapter(str(adapter)), name=str(tiny_text_checkpoint))
    ids = torch.from_numpy(item.token_ids).long()[None]
    with torch.inference_mode():
        expected = oracle(ids, output_hidden_states=True)
    torch.testing.assert_close(adapted.hidden_states([item])[0], expected.hidden_states[-1][0])
    torch.testing.assert_close(adapted.logits(item), expected.logits[0])
    assert not torch.allclose(plain.hidden_states([item])[0], adapted.hidden_states([item])[0], atol=0.1)
    stated = json.loads(json.dumps(adapted.provenance()))
    assert set(stated["adapter"]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert stated["name"] == f"{tiny_text_checkpoint.name}+adapter"
    assert "adapter" not in plain.provenance()
    assert capsys.readouterr().err == ""


def test_a_head_that_an_adapter_trained_is_the_stores_head(tiny_text_checkpoint, tmp_path):
    random_adapter(llama(tiny_text_checkpoint), tmp_path / "a", r=4, target_modules=["lm_head"])
    adapted = open_backbone(str(tiny_text_checkpoint), adapter=str(tmp_path / "a"), device="cpu")
    item = adapted.prepare(ASKED, None)
    assert not torch.equal(adapted.lm_head(), open_backbone(str(tiny_text_checkpoint), device="cpu").lm_head())
    torch.testing.assert_close(adapted.hidden_states([item])[0] @ adapted.lm_head().T, adapted.logits(item))


def test_files_of_torch_and_of_raw_training_loops(tiny_text_checkpoint, adapter):
    expected = open_backbone(str(tiny_text_checkpoint), adapter=str(adapter), device="cpu")
    expected.check_tensors()
    item = expected.prepare(ASKED, None)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    raw = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    torch.save(raw, adapter / "adapter_model.bin")
    found = open_backbone(str(tiny_text_checkpoint), adapter=str(adapter), device="cpu")
    found.check_tensors()
    assert torch.equal(found.hidden_states([item])[0], expected.hidden_states([item])[0])


def test_a_base_of_another_name_is_told(tiny_text_checkpoint, adapter, capsys):
    rewrite(adapter, base_model_name_or_path="someone/other-model")
    open_backbone(str(tiny_text_checkpoint), adapter=str(adapter), device="cpu").load()
    told = capsys.readouterr().err
    assert f"note: the adapter {adapter} says it was made for 'someone/other-model'; all its tensors fit" in told


def test_an_adapter_of_another_base_names_both_shapes(tiny_text_checkpoint, adapter):
    def widen(tensors):
        for key in list(tensors):
            if "q_proj.lora_A" in key:
                tensors[key] = torch.zeros(4, 48)

    edit(adapter, widen)
    rewrite(adapter, base_model_name_or_path="someone/wide-model")
    message = refused(tiny_text_checkpoint, adapter)
    assert f"{tiny_text_checkpoint}: the adapter {adapter}, made for 'someone/wide-model', does not fit" in message
    assert "model.layers.0.self_attn.q_proj.lora_A (4, 48) and lora_B (32, 4)" in message
    assert "do not multiply to the model's (32, 32)" in message


def test_what_a_saved_module_was_before_it_was_trained_is_passed_over(tiny_text_checkpoint, tmp_path):
    options = {**PLAIN, "modules_to_save": ["embed_tokens"]}
    oracle = random_adapter(llama(tiny_text_checkpoint), tmp_path / "a", **options)
    oracle.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any("original_module" in name for name in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    merged = apply_adapter(llama(tiny_text_checkpoint), resolve_adapter(str(tmp_path / "a")), name="tiny")
    torch.testing.assert_close(merged(IDS).logits, oracle(IDS).logits, rtol=1e-4, atol=1e-4)

    def orphan(tensors):
        tensors["base_model.model.model.norm.original_module.weight"] = torch.zeros(2, 2)

    edit(tmp_path / "a", orphan)
    assert "model.norm.original_module.weight has no place in it" in refused(tiny_text_checkpoint, tmp_path / "a")


def test_every_tensor_must_land_and_none_may_lack(tiny_text_checkpoint, adapter, tmp_path):
    def spoil(tensors):
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 4)
        tensors["base_model.model.resampler.query"] = torch.zeros(2, 2)
        del tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
        for side in "AB":
            del tensors[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"]

    edit(adapter, spoil)
    message = refused(tiny_text_checkpoint, adapter)
    assert "resampler.query, model.layers.9.self_attn.q_proj (LoRA) have no place in it" in message
    assert (
        "the adapter lacks model.layers.0.self_attn.v_proj.lora_B, model.layers.1.self_attn.q_proj.lora_A, lora_B"
        in message
    )
    random_adapter(llama(tiny_text_checkpoint), tmp_path / "b", **PLAIN, modules_to_save=["embed_tokens", "norm"])

    def lose(tensors):
        del tensors["base_model.model.model.norm.weight"]
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(7, 32)

    edit(tmp_path / "b", lose)
    message = refused(tiny_text_checkpoint, tmp_path / "b")
    assert "lacks model.norm.weight" in message
    assert "model.embed_tokens.weight is (7, 32) in the adapter and (" in message


def test_a_rank_that_the_configuration_does_not_state(tiny_text_checkpoint, adapter):
    rewrite(adapter, r=16)
    assert "are not of the rank 16 that the configuration states" in refused(tiny_text_checkpoint, adapter)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_dora": True}, "uses use_dora = True, which agiqa cannot merge"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"init_lora_weights": "start_of_a_newer_peft"}, "init_lora_weights = 'start_of_a_newer_peft'"),
        ({"use_newer": {"x": 1}}, f"use_newer = {{'x': 1}} (unknown to peft {peft.__version__}, which is installed)"),
        ({"peft_type": "IA3"}, "describes 'IA3', not a LoRA adapter"),
        ({"target_modules": None, "target_parameters": ["a"]}, "target_parameters"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tiny_text_checkpoint, adapter, settings, expected):
    rewrite(adapter, **settings)
    with pytest.raises(ModelError, match=r"adapter") as caught:
        open_backbone(str(tiny_text_checkpoint), adapter=str(adapter), device="cpu")
    assert expected in str(caught.value)


def test_what_is_no_adapter_says_so_before_anything_is_read(tiny_text_checkpoint, adapter, tmp_path):
    def message(name):
        with pytest.raises(ModelError) as caught:
            open_backbone(str(tiny_text_checkpoint), adapter=str(name), device="cpu")
        return str(caught.value)

    assert "no such folder; expected an adapter's folder" in message(tmp_path / "absent")
    assert "no such folder" in message(adapter / "adapter_config.json")
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json in" in message(tmp_path / "empty")
    assert "It holds a whole model: give it as the model" in message(tiny_text_checkpoint)
    assert "no Python package called 'no_such_package_here'" in message("pkg:no_such_package_here/a")
    shutil.copytree(adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no weights in" in refused(tiny_text_checkpoint, tmp_path / "bare")
    (adapter / "adapter_model.safetensors").write_bytes(b"not tensors")
    assert "cannot read" in refused(tiny_text_checkpoint, adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "cannot read" in message(adapter)


def test_a_folder_by_a_hub_like_name_that_the_hub_does_not_have(tiny_text_checkpoint, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="nobody/no-such-adapter: no folder of that name here"):
        resolve_adapter("nobody/no-such-adapter@main")


def test_an_adapter_on_an_image_model(tiny_vision_checkpoint, tmp_path):
    with quiet_transformers():
        model = LlavaForConditionalGeneration.from_pretrained(tiny_vision_checkpoint).eval()
    options = {"r": 4, "target_modules": r".*language_model.*q_proj", "modules_to_save": ["multi_modal_projector"]}
    oracle = random_adapter(model, tmp_path / "a", **options)
    Image.effect_noise((40, 50), 80).save(tmp_path / "noise.png")
    adapted = open_backbone(str(tiny_vision_checkpoint), adapter=str(tmp_path / "a"), device="cpu")
    item = adapted.prepare(ASKED, tmp_path / "noise.png")
    ids = torch.from_numpy(item.token_ids).long()[None]
    with torch.inference_mode():
        expected = oracle(input_ids=ids, **item.inputs, output_hidden_states=True)
    torch.testing.assert_close(adapted.hidden_states([item])[0], expected.hidden_states[-1][0], rtol=1e-4, atol=1e-4)
