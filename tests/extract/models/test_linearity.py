"""What models do to their logits after the output embedding: found, folded, kept as raw logits, or refused by name."""

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from agiqa.errors import ModelError
from agiqa.extract.data.items import Message
from agiqa.extract.models import open_backbone
from agiqa.extract.models.checks import LogitMap, find_logit_map
from agiqa.extract.models.loading import quiet_transformers
from tests.extract import tiny_models
from tests.extract.jobs import extract
from tests.extract.small_sets import write_set

ASKED = (Message(role="user", content="rate"), Message(role="assistant", content="fair dog"))
IDS = torch.tensor([[5, 6, 7, 300]])


def write_scaled(folder, model_class, config_class, dtype=torch.float32, **settings):
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = tiny_models.TEXT_TEMPLATE
    config = config_class(**tiny_models.widths(len(tokenizer)), tie_word_embeddings=False, **settings)
    return tiny_models.save(folder, model_class, config, tokenizer, dtype=dtype)


def llama(checkpoint):
    with quiet_transformers():
        return LlamaForCausalLM.from_pretrained(checkpoint).eval()


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
