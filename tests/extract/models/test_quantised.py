"""Quantised checkpoints: FP8 is unpacked if an adapter is merged into it, others are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from agiqa.errors import ModelError
from agiqa.extract import Message, open_backbone
from agiqa.extract.models.adapters import apply_adapter, resolve_adapter
from tests.extract import tiny_models
from tests.extract.models.test_adapters import PLAIN, llama, random_adapter

ASKED = (Message(role="user", content="rate"),)


def write_fp8_checkpoint(folder, plain):
    """`plain` with the weights of its layers in FP8, one scale per block of 16 x 16, and the same weights unpacked."""
    tensors, unpacked = {}, {}
    for name, value in load_file(plain / "model.safetensors").items():
        tensors[name], unpacked[name] = value, value
        if value.ndim == 2 and ".layers." in name:
            rows, columns = value.shape[0] // 16, value.shape[1] // 16
            blocks = value.float().reshape(rows, 16, columns, 16)
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            tensors[name] = packed.reshape(value.shape)
            tensors[f"{name}_scale_inv"] = scale
            unpacked[name] = (packed.float() * scale[:, None, :, None]).reshape(value.shape).to(value.dtype)
    for path in plain.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": fp8}))
    return unpacked


def merged_unpacked(folder):
    """The model of an FP8 checkpoint in `fp8` and an adapter in `a`, unpacked and merged."""
    plain = tiny_models.write_text_checkpoint(folder / "plain", dtype=torch.bfloat16)
    (folder / "fp8").mkdir()
    unpacked = write_fp8_checkpoint(folder / "fp8", plain)
    random_adapter(llama(plain, torch.bfloat16), folder / "a", **PLAIN)
    expected = llama(plain, torch.bfloat16)
    expected.load_state_dict(unpacked)
    apply_adapter(expected, resolve_adapter(str(folder / "a")), name="plain")
    return expected


def states_of(model, item):
    with torch.inference_mode():
        return model.model(torch.from_numpy(item.token_ids).long()[None]).last_hidden_state[0]


def test_an_adapter_on_fp8_weights_is_merged_into_what_they_stand_for(tmp_path, monkeypatch):
    """As on a machine with a GPU that computes in FP8, where transformers keeps such weights packed."""
    expected = merged_unpacked(tmp_path)
    backbone = open_backbone(str(tmp_path / "fp8"), adapter=str(tmp_path / "a"), device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    backbone.load()
    monkeypatch.undo()
    item = backbone.prepare(ASKED, None)
    states = states_of(expected, item)
    torch.testing.assert_close(backbone.hidden_states([item])[0], states, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_an_adapter_on_fp8_weights_is_merged_on_a_gpu(tmp_path):
    expected = merged_unpacked(tmp_path)
    backbone = open_backbone(str(tmp_path / "fp8"), adapter=str(tmp_path / "a"), device="cuda")
    item = backbone.prepare(ASKED, None)
    states = states_of(expected, item)
    torch.testing.assert_close(backbone.hidden_states([item])[0].cpu(), states, rtol=5e-2, atol=5e-2)


def test_weights_that_stay_quantised_take_no_adapter(tiny_text_checkpoint, tmp_path):
    random_adapter(llama(tiny_text_checkpoint), tmp_path / "a", **PLAIN)
    model = llama(tiny_text_checkpoint)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.weight \(float8_e4m3fn\).*unquantised"):
        apply_adapter(model, resolve_adapter(str(tmp_path / "a")), name="m")
