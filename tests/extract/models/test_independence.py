"""Models whose features depend on the batch are refused as they are loaded, with what was measured; others are not."""

import re

import pytest
import torch
from transformers import (
    CpmAntConfig,
    CpmAntForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from agiqa.errors import ModelError
from agiqa.extract.models import open_backbone
from agiqa.extract.models.checks import TOKENS_NEEDED, refuse_batch_dependence
from tests.extract import tiny_models
from tests.extract.models.test_adapters import llama
from tests.extract.models.test_linearity import write_scaled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_reads_its_padding_is_refused_with_what_was_measured(tmp_path, dtype):
    """CPM-Ant attends to all that follows, and takes its padding for text."""
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
