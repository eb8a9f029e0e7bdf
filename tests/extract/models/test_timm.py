"""Image encoders of timm as backbones: their layers, compared with forward hooks on timm's own modules."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from agiqa.errors import ConfigError, DataError, ModelError, UnknownName, ViewRefused
from agiqa.extract.data.items import Message
from agiqa.extract.models import batches, open_backbone
from agiqa.extract.models.contract import GenerationSettings
from agiqa.store import TOKEN_ROLES
from tests.extract.tiny_timm import needs_timm, random_encoder, write_pictures, write_weights

pytestmark = needs_timm
SIDES = {"test_vit": None, "resnet10t": 64, "efficientnet_lite0": 64, "test_convnext": 64, "cait_xxs24_224": 32}
"""Image sizes by encoder: one with a class token, three convolutional networks, one with a token at the end only."""
BUILT = {"cait_xxs24_224": {"img_size": 32}}
"""Options with which timm builds an encoder for a size."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("timm")


@pytest.fixture(scope="module")
def pictures(folder):
    return write_pictures(folder)


@pytest.fixture(scope="module")
def weights(folder):
    return write_weights(folder, "test_vit")


def opened(folder, name):
    weights = write_weights(folder, name, **BUILT.get(name, {}))
    return open_backbone(f"timm:{name}", weights=weights, image_size=SIDES[name], device="cpu")


def hooked(model, pixels):
    """The output of each module of `feature_info`, and that of `forward_features`, of one image, as (n, C)."""
    found, handles = {}, []
    for number, info in enumerate(model.feature_info, start=1):

        def keep(_module, _inputs, output, layer=str(number)):
            found[layer] = output[0].flatten(1).T if output.dim() == 4 else output[0]

        handles.append(model.get_submodule(info["module"]).register_forward_hook(keep))
    with torch.inference_mode():
        last = model.forward_features(pixels)[0]
    for handle in handles:
        handle.remove()
    return {**found, "last": last.flatten(1).T if last.dim() == 3 else last}


@pytest.mark.parametrize("name", SIDES)
def test_layers_are_the_outputs_of_timm_s_modules(folder, pictures, name):
    backbone = opened(folder, name)
    batch = [backbone.prepare((), picture) for picture in pictures]
    layers = [*map(str, range(1, backbone.layer_count)), "last"]
    model = random_encoder(name, **BUILT.get(name, {}))
    expected = [hooked(model, item.inputs["pixel_values"]) for item in batch]
    for states, wanted in zip(backbone.layer_states(batch, layers), expected, strict=True):
        assert list(states) == list(wanted) == layers
        for layer, rows in states.items():
            assert rows.shape == (len(backbone.fixed_roles(layer)), backbone.layer_width(layer))
            torch.testing.assert_close(rows, wanted[layer], rtol=1e-4, atol=1e-5)
    for layer in (layers[1], "last"):
        (alone,) = backbone.layer_states(batch[1:2], [layer])
        torch.testing.assert_close(alone[layer], expected[1][layer], rtol=1e-4, atol=1e-5)


def by_hand(model, pixels):
    """The output of each block of one image, as (n, C): the stem and the blocks are called one after the other."""
    if hasattr(model, "conv_stem"):
        states = model.bn1(model.conv_stem(pixels))
        stages = [(None, stage) for stage in model.blocks]
    elif hasattr(model, "layer1"):
        states = model.maxpool(model.act1(model.bn1(model.conv1(pixels))))
        stages = [(None, stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    else:
        states, stages = model.stem(pixels), [(stage.downsample, stage.blocks) for stage in model.stages]
    found = []
    for downsample, blocks in stages:
        states = states if downsample is None else downsample(states)
        for block in blocks:
            states = block(states)
            found.append(states[0].flatten(1).T.clone())
    return found


@pytest.mark.parametrize(("name", "blocks"), [("efficientnet_lite0", 16), ("resnet10t", 4), ("test_convnext", 9)])
def test_blocks_of_convolutional_networks_are_layers_too(folder, pictures, name, blocks):
    weights = write_weights(folder, name)
    options = {"weights": weights, "image_size": SIDES[name], "device": "cpu"}
    backbone = open_backbone(f"timm:{name}", tap="blocks", **options)
    assert (backbone.layer_count, backbone.tap) == (blocks + 1, "timm:blocks")
    batch = [backbone.prepare((), picture) for picture in pictures]
    model, numbers = random_encoder(name), range(1, blocks + 1)
    with torch.inference_mode():
        expected = [by_hand(model, item.inputs["pixel_values"]) for item in batch]
    stages = open_backbone(f"timm:{name}", **options).hidden_states(batch)
    for layers in ([*map(str, numbers), "last"], ["1", "3"], ["last"]):
        for found, wanted, last in zip(backbone.layer_states(batch, layers), expected, stages, strict=True):
            assert list(found) == layers
            for layer, states in found.items():
                assert states.shape == (len(backbone.fixed_roles(layer)), backbone.layer_width(layer))
                own = last if layer == "last" else wanted[int(layer) - 1]
                torch.testing.assert_close(states, own, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in backbone._model.modules())


def test_block_6_of_efficientnet_lite0_is_within_a_stage(folder):
    weights = write_weights(folder, "efficientnet_lite0")
    backbone = open_backbone("timm:efficientnet_lite0", tap="blocks", weights=weights, device="cpu")
    modules = backbone.provenance()["layers"]
    assert [modules[number] for number in ("1", "3", "6", "11", "16")] == [
        *("blocks.0.0", "blocks.1.1", "blocks.3.0", "blocks.4.2", "blocks.6.0"),
    ]


@pytest.mark.parametrize(
    ("name", "tap", "error", "message"),
    [
        ("test_vit", "blocks", ConfigError, "--tap blocks: timm:test_vit has no stages that are sequences of blocks"),
        ("vgg11", "blocks", ConfigError, "has no stages that are sequences of blocks. Leave --tap out"),
        ("pit_ti_224", "blocks", ConfigError, "^--tap blocks: timm:pit_ti_224 has no blocks that return maps of posi"),
        ("tiny_vit_5m_224", "blocks", ConfigError, "^--tap blocks: timm:tiny_vit_5m_224 has no blocks with the axes"),
        ("volo_d1_224", "blocks", ConfigError, "^--tap blocks: timm:volo_d1_224 has no blocks with the axes of its"),
        ("resnet10t", "block", UnknownName, "No tap of timm:resnet10t is called 'block'. Did you mean 'blocks'"),
        ("resnet10t", "vision", UnknownName, "No tap of timm:resnet10t is called 'vision'"),
    ],
)
def test_encoders_without_such_blocks_and_other_taps_are_refused(name, tap, error, message):
    with pytest.raises(error, match=message):
        open_backbone(f"timm:{name}", tap=tap, device="cpu")


def test_a_batch_is_cut_where_its_patches_are_too_many(folder, pictures, monkeypatch):
    """Images of 64 x 64 pixels have 16 patches of 16 x 16 each: three pass two by two."""
    backbone = opened(folder, "resnet10t")
    batch = [backbone.prepare((), picture) for picture in pictures]
    expected = backbone.layer_states(batch, ("2", "last"))
    passes = []
    backbone._model.conv1.register_forward_pre_hook(lambda _module, given: passes.append(len(given[0])))
    monkeypatch.setattr(batches, "PATCHES_AT_ONCE", 2 * 16)
    for found, wanted in zip(backbone.layer_states(batch, ("2", "last")), expected, strict=True):
        for layer, states in wanted.items():
            torch.testing.assert_close(found[layer], states, rtol=1e-4, atol=1e-5)
    assert passes == [2, 1]


def test_class_tokens_are_special_and_patches_image(weights, pictures):
    backbone = open_backbone("timm:test_vit", weights=weights, device="cpu")
    item = backbone.prepare((), pictures[0])
    assert item.roles.tolist() == [TOKEN_ROLES["special"]] + [TOKEN_ROLES["image"]] * 100
    assert np.array_equal(item.roles, backbone.fixed_roles("last"))
    assert np.array_equal(item.roles, backbone.fixed_roles("1"))


def test_pixels_are_those_of_timm_s_transform_of_the_upright_rgb_image(weights, pictures):
    from timm.data import create_transform

    backbone = open_backbone("timm:test_vit", weights=weights, device="cpu")
    transform = create_transform(
        input_size=(3, 160, 160), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.95
    )
    expected = transform(Image.open(pictures[1]))[None]
    assert torch.equal(backbone.prepare((), pictures[1]).inputs["pixel_values"], expected)


def test_the_conversation_is_not_read_and_an_image_is_needed(weights, pictures):
    backbone = open_backbone("timm:test_vit", weights=weights, device="cpu")
    asked = backbone.prepare([Message(role="user", content="how good?")], pictures[0])
    assert not backbone.reads_conversations
    assert torch.equal(asked.inputs["pixel_values"], backbone.prepare((), pictures[0]).inputs["pixel_values"])
    with pytest.raises(DataError, match="has no image, and timm:test_vit reads nothing else"):
        backbone.prepare([Message(role="user", content="how good?")], None)


def test_weights_are_read_from_safetensors_and_from_checkpoints_of_a_training(folder, weights, pictures):
    state = torch.load(weights, weights_only=True)
    save_file(state, folder / "w.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "c.pth")
    headless = {name: value for name, value in state.items() if not name.startswith("head.")}
    torch.save(headless, folder / "headless.pth")
    states = []
    for path in (weights, folder / "w.safetensors", folder / "c.pth", folder / "headless.pth"):
        backbone = open_backbone("timm:test_vit", weights=path, device="cpu")
        backbone.check_tensors()
        states.append(backbone.hidden_states([backbone.prepare((), pictures[0])])[0])
        assert backbone.provenance()["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert all(torch.equal(found, states[0]) for found in states)


def test_half_precision_is_near_the_full_one(weights, pictures):
    full = open_backbone("timm:test_vit", weights=weights, device="cpu")
    half = open_backbone("timm:test_vit", weights=weights, device="cpu", dtype="bfloat16")
    item = full.prepare((), pictures[0])
    (expected,), (found,) = full.hidden_states([item]), half.hidden_states([item])
    assert (full.logical_dtype, half.logical_dtype, found.dtype) == ("float32", "bfloat16", torch.bfloat16)
    assert 0 < (found.float() - expected).norm() / expected.norm() < 0.05


def test_the_provenance_says_how_images_are_prepared(weights):
    provenance = open_backbone("timm:test_vit", weights=weights, device="cpu", image_size=96).provenance()
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["image"]["input_size"] == [3, 96, 96]
    assert provenance["image"]["mean"] == [0.5, 0.5, 0.5]
    assert provenance["layers"]["6"] == "blocks.5"
    assert provenance["versions"]["timm"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet5", UnknownName, r"no encoder called 'resnet5'\. Did you mean 'resnet50'"),
        ("resnet50.a1_in2k", UnknownName, r"no set of weights of resnet50 called 'a1_in2k'\. Did you mean 'a1_in1k'"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_nearest(name, error, message):
    with pytest.raises(error, match=message):
        open_backbone(f"timm:{name}", device="cpu")


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'agiqa\[vision\]'"):
        open_backbone("timm:test_vit", device="cpu")


def test_weights_of_other_shapes_are_named_with_both(folder):
    other = write_weights(folder, "test_vit2")
    state = torch.load(other, weights_only=True)
    state["patch_embed.proj.weight"] = torch.zeros(48, 3, 16, 16)
    torch.save(state, other)
    backbone = open_backbone("timm:test_vit2", weights=other, device="cpu")
    said = r"test_vit2\.pth do not fit \(1 other shapes\): patch_embed.proj.weight is \(48, 3, 16, 16\) in the file and"
    with pytest.raises(ModelError, match=said):
        backbone.check_tensors()


def test_weights_of_another_encoder_and_incomplete_ones_are_refused(folder, weights):
    with pytest.raises(ModelError, match=r"do not fit \(\d+ missing\): conv1.0.weight"):
        open_backbone("timm:resnet10t", weights=weights, device="cpu").check_tensors()
    state = torch.load(weights, weights_only=True)
    del state["blocks.3.norm1.weight"]
    torch.save(state, folder / "less.pth")
    with pytest.raises(ModelError, match=r"do not fit \(1 missing\): blocks.3.norm1.weight"):
        open_backbone("timm:test_vit", weights=folder / "less.pth", device="cpu").check_tensors()


def test_files_that_hold_no_weights_are_refused(folder):
    (folder / "text.pth").write_text("no weights")
    torch.save({"epoch": 3}, folder / "empty.pth")
    for name in ("text.pth", "empty.pth"):
        with pytest.raises(ModelError, match=name):
            open_backbone("timm:test_vit", weights=folder / name, device="cpu").check_tensors()
    (folder / "text.csv").write_text("no weights")
    with pytest.raises(ModelError, match="expected a file of tensors"):
        open_backbone("timm:test_vit", weights=folder / "text.csv", device="cpu")
    with pytest.raises(ModelError, match="there is no such file"):
        open_backbone("timm:test_vit", weights=folder / "none.pth", device="cpu")


def test_options_that_belong_to_other_models_are_refused(weights, tiny_text_checkpoint):
    with pytest.raises(
        ConfigError, match=r"timm:test_vit is an image encoder of timm: leave out --adapter and --max-slices"
    ):
        open_backbone("timm:test_vit", weights=weights, adapter="x", max_slices=3)
    with pytest.raises(ConfigError, match=r"is no image encoder timm:NAME: leave out --weights and --image-size"):
        open_backbone(str(tiny_text_checkpoint), weights=weights, image_size=96)


def test_weights_that_timm_cannot_resize_name_the_size(folder):
    weights = write_weights(folder, "cait_xxs24_224")
    backbone = open_backbone("timm:cait_xxs24_224", weights=weights, image_size=32, device="cpu")
    with pytest.raises(ModelError, match=r"pos_embed is \(1, 196, 192\) .* --image-size 32"):
        backbone.check_tensors()


def test_a_size_that_the_encoder_does_not_take_is_refused(folder):
    weights = write_weights(folder, "test_vit")
    with pytest.raises(ConfigError, match="does not take images of 8 x 8 pixels"):
        open_backbone("timm:test_vit", weights=weights, image_size=8, device="cpu")


def test_logits_and_answers_are_refused(weights, pictures):
    backbone = open_backbone("timm:test_vit", weights=weights, device="cpu")
    item = backbone.prepare((), pictures[0])
    for refuse in (backbone.lm_head, lambda: backbone.logits(item), lambda: backbone.project(torch.zeros(1, 64))):
        with pytest.raises(ViewRefused, match=r"those of an image encoder, which has no .*--projection hidden"):
            refuse()
    with pytest.raises(ModelError, match="writes no text"):
        backbone.generate([item], GenerationSettings())
