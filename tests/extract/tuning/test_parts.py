"""The parts of models that recipes name."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from agiqa.errors import ModelError
from agiqa.extract import open_backbone
from agiqa.extract.tuning.adapting import adapt
from agiqa.extract.tuning.parts import find_parts, modules_of
from agiqa.extract.tuning.recipes import recipe_of
from tests.extract.tiny_models import write_grid_checkpoint, write_tiled_checkpoint
from tests.extract.tiny_vision_models import (
    write_internvl,
    write_minicpm46,
    write_mllama,
    write_qwen25,
    write_smolvlm,
)
from tests.extract.tuning.talks import quick

SHARED = Path(__file__).resolve().parents[4] / "shared" / "models"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def parts(checkpoint, recipe):
    backbone = open_backbone(str(checkpoint), device="cpu")
    model = backbone.empty_model()
    pattern, names = find_parts(backbone, model, recipe)
    adapted = [name for name, module in model.named_modules() if re.fullmatch(pattern, name)]
    return adapted, tuple(modules_of(model, names))


def test_minicpm(minicpm):
    adapted, whole = parts(minicpm, recipe_of("published"))
    assert adapted == [f"llm.model.layers.{n}.self_attn.{name}" for n in range(2) for name in PROJECTIONS]
    assert sorted(whole) == ["llm.model.embed_tokens", "resampler", "vpm"]


@pytest.mark.skipif(not SHARED.exists(), reason="the published layout's tiny checkpoint is not in this checkout")
def test_tensor_names_are_those_of_the_published_adapters():
    backbone = open_backbone(str(SHARED / "minicpm-tiny"), device="cpu")
    trained = adapt(backbone, recipe_of("published", {"rank": 8, "alpha": 8}), seed=0)
    with safe_open(SHARED / "minicpm-tiny-adapter" / "adapter_model.safetensors", "pt") as file:
        published = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in trained.tensors().items()} == published


def test_a_vision_model_of_transformers(llava):
    adapted, whole = parts(llava, recipe_of("published"))
    layers = "model.language_model.layers"
    assert sorted(adapted) == sorted(f"{layers}.{n}.self_attn.{name}" for n in range(2) for name in PROJECTIONS)
    language = "model.language_model.embed_tokens"
    assert sorted(whole) == [language, "model.multi_modal_projector", "model.vision_tower"]


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (write_tiled_checkpoint, ["model.connector", "model.vision_model"]),
        (write_grid_checkpoint, ["model.visual"]),  # its merger is inside the tower
        (write_qwen25, ["model.visual"]),
        (write_smolvlm, ["model.connector", "model.vision_model"]),
        (write_internvl, ["model.multi_modal_projector", "model.vision_tower"]),
        (write_mllama, ["model.multi_modal_projector", "model.vision_model"]),
        (write_minicpm46, ["model.merger", "model.vision_tower"]),
    ],
)
def test_other_families(tmp_path, write, expected):
    adapted, whole = parts(write(tmp_path), recipe_of("no-embeddings"))
    assert {name.rpartition(".")[2] for name in adapted} == set(PROJECTIONS)
    assert not any("vis" in name for name in adapted)
    assert sorted(whole) == expected


def test_a_text_model_has_no_vision_tower(llama):
    adapted, whole = parts(llama, recipe_of("light"))
    assert len(adapted) == 8
    assert whole == ()
    with pytest.raises(ModelError, match=r"published trains vision, projector, which this model does not have.*light"):
        parts(llama, recipe_of("published"))


def test_modules_by_their_own_names(llama):
    adapted, whole = parts(llama, quick("light", adapts=r".*\.mlp\.down_proj", trains=[r"model\.norm"]))
    assert adapted == [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    assert whole == ("model.norm",)
    with pytest.raises(ModelError, match=r"trains model\.nrom, which"):
        parts(llama, quick("light", trains=["model.nrom"]))
    with pytest.raises(
        ModelError, match=r"trains model\.layers\.0\.self_attn\.q_proj, .* whole, and with LoRA pairs too"
    ):
        parts(llama, quick("light", trains=[r"model\.layers\.0"]))
    with pytest.raises(ModelError, match="trains no_such_proj, which"):
        parts(llama, quick("light", adapts="no_such_proj"))


@pytest.mark.parametrize("name", ["published", "no-embeddings", "light"])
def test_trainable_names_are_exactly_the_recipes(minicpm, name):
    """Every tensor of the model that the recipe names by its role, spelled out; and nothing else."""
    backbone = open_backbone(str(minicpm), device="cpu")
    backbone.load()
    known = [key for key, _ in backbone.loaded().named_parameters()]
    beginnings = {"vision": "vpm.", "projector": "resampler.", "embeddings": "llm.model.embed_tokens."}
    chosen = {"published": tuple(beginnings), "no-embeddings": ("vision", "projector"), "light": ()}[name]
    expected = {key for key in known for part in chosen if key.startswith(beginnings[part])}
    layers = [f"llm.model.layers.{n}.self_attn.{projection}" for n in range(2) for projection in PROJECTIONS]
    expected |= {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    trained = adapt(backbone, recipe_of(name), seed=0)
    assert set(trained.parameters) == expected
    assert {key for key, weight in trained.model.named_parameters() if weight.requires_grad} == expected
    assert {weight.dtype for weight in trained.parameters.values()} == {torch.float32}
