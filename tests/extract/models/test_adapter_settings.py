"""Every setting of peft's LoRA: merged exactly as peft applies it, or refused by its name and value."""

import json
import warnings
from functools import partial

import peft
import pytest
import torch
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import GPT2Config, GPT2LMHeadModel

from agiqa.errors import ModelError
from agiqa.extract.models.adapters import MERGED_SETTINGS, apply_adapter, resolve_adapter
from tests.extract.models.test_adapters import IDS, PLAIN, llama, random_adapter, rewrite

PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3}}
USED = {
    "alora_invocation_tokens": [5, 6],
    "arrow_config": {"top_k": 2},
    "ensure_weight_tying": True,
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
    "megatron_config": {"hidden_size": 32},
    "monteclora_config": {"num_samples": 8},
    "target_parameters": ["mlp.experts.down_proj"],
    "trainable_token_indices": [3, 4],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"num_groups": 64},
}
"""Settings that are off by default, turned on."""


@pytest.fixture
def make(tiny_text_checkpoint):
    """Makes the base model anew."""
    return partial(llama, tiny_text_checkpoint)


def settle(model, options):
    """The configuration, after the passes over the model that some starts need before peft changes it."""
    start = options["init_lora_weights"]
    config = peft.LoraConfig(**options)

    def run():
        with torch.no_grad():
            model(IDS)

    if start == "corda":
        config.corda_config = peft.tuners.lora.config.CordaConfig(corda_method="kpm")
        preprocess_corda(model, config, run_model=run)
    elif start == "lora_ga":
        config.lora_ga_config = peft.tuners.lora.config.LoraGAConfig()
        preprocess_loraga(model, config, lambda: model(IDS, labels=IDS).loss.backward())
    return config


def trained(make, folder, start=True, *, convert=False, **more):  # noqa: FBT002 - one of many values
    """An adapter that begins with `start`, trained a little and saved; peft's own model, which applies it unmerged."""
    options = {**PLAIN, "init_lora_weights": start, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = make()
        adapted = peft.get_peft_model(base, settle(base, options))
        if start == "eva":
            batches = [{"input_ids": torch.randint(4, 300, (4, 9))} for _ in range(4)]
            peft.initialize_lora_eva_weights(adapted, dataloader=batches, show_progress_bar=False)
        beginning = str(folder.parent / "beginning")
        if convert:
            adapted.peft_config["default"].init_lora_weights = True
            adapted.save_pretrained(beginning)
            adapted.peft_config["default"].init_lora_weights = start
        draw = torch.Generator().manual_seed(7)
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.data += torch.randn(weight.shape, generator=draw) * 0.3
        adapted.save_pretrained(folder, **({"path_initial_model_for_weight_conversion": beginning} if convert else {}))
    return adapted.eval()


def error_of(make, oracle, folder):
    """Relative difference of logits between peft's model and ours, merged."""
    merged = apply_adapter(make(), resolve_adapter(str(folder)), name="tiny")
    with torch.inference_mode():
        expected = oracle(IDS).logits
        return float((merged(IDS).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("start", [True, False, "gaussian", "Gaussian", "orthogonal", "mica", "eva"])
def test_starts_that_leave_the_base_alone_are_merged(make, tmp_path, start):
    torch.manual_seed(0)
    oracle = trained(make, tmp_path / "a", start)
    assert error_of(make, oracle, tmp_path / "a") < 1e-5


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "corda", "lora_ga"])
def test_starts_that_change_the_base_are_refused_by_name(make, tmp_path, start):
    torch.manual_seed(0)
    oracle = trained(make, tmp_path / "a", start)
    with pytest.raises(ModelError, match=f"uses init_lora_weights = '{start}', which agiqa cannot merge"):
        resolve_adapter(str(tmp_path / "a"))
    rewrite(tmp_path / "a", init_lora_weights=True)  # a merge all the same would be wrong, and not by rounding
    assert error_of(make, oracle, tmp_path / "a") > 0.01


def test_loftq_is_refused_by_name(make, tmp_path):
    """peft would quantise the base, on a GPU; here only the configuration is written."""
    random_adapter(make(), tmp_path / "a", **PLAIN)
    rewrite(tmp_path / "a", init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    with pytest.raises(ModelError, match="uses init_lora_weights = 'loftq', which agiqa cannot merge"):
        resolve_adapter(str(tmp_path / "a"))


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "lora_ga"])
def test_adapters_that_peft_converted_back_are_merged(make, tmp_path, start):
    torch.manual_seed(0)
    oracle = trained(make, tmp_path / "a", start, convert=True)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert error_of(make, oracle, tmp_path / "a") < 1e-5


@pytest.mark.parametrize("name", sorted(peft.LoraConfig().to_dict().keys() - MERGED_SETTINGS - {"init_lora_weights"}))
def test_every_other_setting_is_refused_by_name_and_value(make, tmp_path, name):
    """The names are those of the peft that is installed: a newer one with another setting fails here."""
    random_adapter(make(), tmp_path / "a", **PLAIN)
    resolve_adapter(str(tmp_path / "a"))
    rewrite(tmp_path / "a", **{name: USED[name]})
    with pytest.raises(ModelError) as caught:
        resolve_adapter(str(tmp_path / "a"))
    assert f"uses {name} = {USED[name]!r}, which agiqa cannot merge" in str(caught.value)


def test_settings_of_other_releases_do_not_matter_while_they_are_off(make, tmp_path):
    oracle = random_adapter(make(), tmp_path / "a", **PLAIN)
    rewrite(tmp_path / "a", enable_lora=None, merge_weights=False, newer_switch=False, newer_list=[])
    assert error_of(make, oracle, tmp_path / "a") < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, **PATTERNS},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"exclude_modules": r".*layers\.1.*"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"lora_dropout": 0.5},
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
    ],
    ids=["rslora-patterns", "exclude", "exclude-regex", "all-linear", "chosen", "dropout", "embedding", "fan"],
)
def test_what_settings_mean_is_what_peft_does(make, tmp_path, options):
    oracle = trained(make, tmp_path / "a", **options)
    assert error_of(make, oracle, tmp_path / "a") < 1e-5


@pytest.mark.parametrize("fan", [True, False])
def test_weights_that_lie_the_other_way_round(tmp_path, fan):
    """GPT-2 keeps (in, out), which peft knows by itself."""

    def make():
        torch.manual_seed(3)
        return GPT2LMHeadModel(GPT2Config(vocab_size=340, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()

    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": fan}
    oracle = trained(make, tmp_path / "a", **options)
    assert error_of(make, oracle, tmp_path / "a") < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
)
@pytest.mark.parametrize("save_embedding_layers", [True, False])
def test_tied_embeddings(tiny_text_checkpoint, tmp_path, options, save_embedding_layers):
    def make():
        model = llama(tiny_text_checkpoint)
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    oracle = trained(make, tmp_path / "a", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.save_pretrained(tmp_path / "a", save_embedding_layers=save_embedding_layers)
        again = peft.PeftModel.from_pretrained(make(), tmp_path / "a").eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(IDS).logits, oracle(IDS).logits)
    assert error_of(make, oracle, tmp_path / "a") < 1e-5
