"""Checks of a loaded model: what it does to its logits, and whether its states depend on the batch."""

import re

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    CpmAntConfig,
    CpmAntForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from agiqa.errors import ModelError
from agiqa.extract.data.items import Message
from agiqa.extract.models import open_backbone
from agiqa.extract.models.checks import TOKENS_NEEDED, LogitMap, find_logit_map, refuse_batch_dependence
from tests.extract import tiny_models
from tests.extract.jobs import extract
from tests.extract.models.test_adapters import llama
from tests.extract.small_sets import write_set

ASKED = (Message(role="user", content="rate"), Message(role="assistant", content="fair dog"))
IDS = torch.tensor([[5, 6, 7, 300]])


def write_scaled(folder, model_class, config_class, dtype=torch.float32, **settings):
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = tiny_models.TEXT_TEMPLATE
    config = config_class(**tiny_models.widths(len(tokenizer)), tie_word_embeddings=False, **settings)
    return tiny_models.save(folder, model_class, config, tokenizer, dtype=dtype)


def assert_reconstructs(backbone):
    """Stored hidden states times the stored head are the model's own logits."""
    item = backbone.prepare(ASKED, None)
    states = backbone.hidden_states([item])[0]
    own = backbone.logits(item).float()
    for found in (states.float() @ backbone.lm_head().float().T, backbone.project(states).float()):
        assert (found - own).norm() / own.norm() < (1e-5 if backbone.logical_dtype == "float32" else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_class", "config_class", "settings"),
    [
        (CohereForCausalLM, CohereConfig, {"logit_scale": 0.0625}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
    ],
)
def test_scales_that_are_powers_of_two_go_into_the_head(tmp_path, model_class, config_class, settings, dtype):
    backbone = open_backbone(str(write_scaled(tmp_path, model_class, config_class, dtype, **settings)), device="cpu")
    assert_reconstructs(backbone)
    scale = settings.get("logit_scale") or 1 / settings["logits_scaling"]
    assert torch.equal(backbone.lm_head(), backbone.lm_head(bent=True) * scale)


def test_other_scales_are_refused_by_name_and_their_logits_are_kept(tmp_path):
    folder = write_scaled(tmp_path, CohereForCausalLM, CohereConfig, logit_scale=0.3)
    backbone = open_backbone(str(folder), device="cpu")
    backbone.load()
    with pytest.raises(ModelError, match=r"logit_scale = 0\.3 is no power of two.*Use --encoding logits"):
        backbone.lm_head()
    item = backbone.prepare(ASKED, None)
    torch.testing.assert_close(backbone.project(backbone.hidden_states([item])[0]), backbone.logits(item))


def test_a_scale_of_nearly_one_does_not_pass_for_rounding(tmp_path):
    folder = write_scaled(tmp_path, CohereForCausalLM, CohereConfig, torch.bfloat16, logit_scale=1.01)
    with pytest.raises(ModelError, match=r"logit_scale = 1\.01"):
        open_backbone(str(folder), device="cpu").lm_head()


def test_a_power_of_two_that_half_precision_cannot_hold_is_refused():
    weight = torch.tensor([[1.0, 3e-5]], dtype=torch.float16)
    with pytest.raises(ModelError, match="cannot take it up exactly"):
        LogitMap(factor=2**-10, named=("logit_scale = 0.0009765625",)).fold("m", weight)


def test_soft_caps_are_refused_by_name_where_only_hidden_states_would_be_kept(tmp_path):
    backbone = open_backbone(str(tiny_models.write_softcapped_checkpoint(tmp_path)), device="cpu")
    with pytest.raises(ModelError, match=r"final_logit_softcapping = 30\.0.*without that setting"):
        backbone.lm_head()
    large = torch.randn(5, 32) * 100
    item = backbone.prepare(ASKED, None)
    torch.testing.assert_close(backbone.project(backbone.hidden_states([item])[0]), backbone.logits(item))
    assert backbone.project(large).abs().max() <= 30
    expected = 30 * torch.tanh(large @ backbone.lm_head(bent=True).T / 30)
    torch.testing.assert_close(backbone.project(large), expected)


@pytest.mark.parametrize(
    ("model_class", "config_class", "setting"),
    [
        (RecurrentGemmaForCausalLM, RecurrentGemmaConfig, {"logits_soft_cap": 20.0}),
        (xLSTMForCausalLM, xLSTMConfig, {"output_logit_soft_cap": 25.0}),
    ],
    ids=["recurrent-gemma", "xlstm"],
)
def test_soft_caps_by_other_names(tmp_path, model_class, config_class, setting):
    more = {"lru_width": 32, "num_hidden_layers": 3, "num_heads": 2, "head_dim": 16, "attention_window_size": 64}
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = tiny_models.TEXT_TEMPLATE
    config = config_class(**{**tiny_models.widths(len(tokenizer)), **more, **setting})
    folder = tiny_models.save(tmp_path, model_class, config, tokenizer)
    backbone = open_backbone(str(folder), device="cpu")
    name, cap = next(iter(setting.items()))
    with pytest.raises(ModelError, match=rf"{name} = {cap}.*Use --encoding logits"):
        backbone.lm_head()
    item = backbone.prepare(ASKED, None)
    torch.testing.assert_close(backbone.project(backbone.hidden_states([item])[0]), backbone.logits(item))
    assert backbone.project(torch.randn(5, 32) * 100).abs().max() <= cap


def test_raw_logits_of_a_bent_model_are_stored_as_it_made_them(tmp_path):
    folder = write_set(tmp_path / "set", count=6)
    checkpoint = tiny_models.write_softcapped_checkpoint(tmp_path / "model")
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        extract(folder, checkpoint, tmp_path / "hidden.zarr")
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        extract(folder, checkpoint, tmp_path / "sketch.zarr", encoding="sketch", rank=8)
    store = extract(folder, checkpoint, tmp_path / "logits.zarr", encoding="logits").store
    backbone = open_backbone(str(checkpoint), device="cpu")
    from tests.extract.jobs import inputs

    data_set, _ = inputs(folder, checkpoint)
    expected = [backbone.logits(backbone.prepare(item.conversation, None)).numpy() for item in data_set.items]
    found = store.array("features")[:]
    start = 0
    for position, rows in enumerate(expected):
        start = int(store.row_starts[position])
        np.testing.assert_allclose(found[start : start + len(rows)], rows, rtol=1e-3, atol=1e-3)
    assert start > 0


def test_biases_and_strangers(tiny_text_checkpoint):
    model = llama(tiny_text_checkpoint)
    assert find_logit_map("plain", model, IDS) == LogitMap()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features))
    found = find_logit_map("biased", model, IDS)
    assert found == LogitMap(bias=True)
    with pytest.raises(ModelError, match=r"biased: .*lm_head has a bias"):
        found.fold("biased", model.lm_head.weight)
    handle = model.register_forward_hook(lambda _m, _i, out: setattr(out, "logits", out.logits.relu()))
    with pytest.raises(ModelError, match="cannot make its logits from its hidden states: its logits are not those"):
        find_logit_map("strange", model, IDS)
    handle.remove()
    model.lm_head.register_forward_pre_hook(lambda _m, given: (given[0] * 2,))
    with pytest.raises(ModelError, match="does not read what the final norm gives"):
        find_logit_map("strange", model, IDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_reads_its_padding_is_refused_with_what_was_measured(tmp_path, dtype):
    """CPM-Ant attends to all later tokens, and reads its padding as text."""
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = tiny_models.TEXT_TEMPLATE
    config = CpmAntConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2, dim_head=16, dim_ff=64, num_hidden_layers=2,
        prompt_length=4, position_bias_num_buckets=32,
    )  # fmt: skip
    folder = tiny_models.save(tmp_path, CpmAntForCausalLM, config, tokenizer)
    backbone = open_backbone(str(folder), device="cpu", dtype=dtype)
    with pytest.raises(ModelError, match=r"its hidden states depend on the batch") as caught:
        backbone.load()
    told = re.search(rf"change by ([\d.]+) of their norm .* rounding in {dtype} explains", str(caught.value))
    assert float(told[1]) > 0.3
    with pytest.raises(ModelError, match="depend on the batch"):  # it is not taken for loaded
        backbone.lm_head()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model_class", "config_class", "settings"),
    [
        (
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig,
            {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        ),
        (GraniteMoeForCausalLM, GraniteMoeConfig, {"num_local_experts": 8, "num_experts_per_tok": 2}),
        (MambaForCausalLM, MambaConfig, {}),
    ],
    ids=["qwen3-moe", "granite-moe", "mamba"],
)
def test_experts_and_recurrences_are_taken_for_what_they_are(tmp_path, model_class, config_class, settings, dtype):
    folder = write_scaled(tmp_path, model_class, config_class, **settings)
    open_backbone(str(folder), device="cpu", dtype=dtype).load()


@pytest.mark.parametrize("fault", ["companion", "length"])
def test_rows_that_feel_each_other_or_the_padded_length(tiny_text_checkpoint, fault):
    model = llama(tiny_text_checkpoint)
    tokens = list(range(10, 10 + TOKENS_NEEDED))
    refuse_batch_dependence("sound", model, tokens, pad_id=3, dtype=torch.float32)

    def spoil(_module, _inputs, output):
        states = output.last_hidden_state
        if fault == "companion":
            output.last_hidden_state = states + 0.05 * states.mean(dim=(0, 1))
        else:
            output.last_hidden_state = states * (1 + 0.01 * states.shape[1])

    model.base_model.register_forward_hook(spoil)
    with pytest.raises(ModelError, match="spoilt: its hidden states depend on the batch"):
        refuse_batch_dependence("spoilt", model, tokens, pad_id=3, dtype=torch.float32)


def test_states_that_are_not_finite_are_told_with_their_dtype(tiny_text_checkpoint):
    model = llama(tiny_text_checkpoint, torch.float16)
    model.model.norm.weight.data.fill_(60000.0)
    with pytest.raises(ModelError, match="not finite in float16; choose another --dtype"):
        refuse_batch_dependence("m", model, list(range(10, 10 + TOKENS_NEEDED)), pad_id=3, dtype=torch.float16)
