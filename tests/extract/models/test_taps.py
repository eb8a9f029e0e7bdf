"""Vision towers and projectors of vision-language models, compared with the models' own modules called by themselves."""

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, DataError, ModelError, UnknownName, ViewRefused
from agiqa.extract.data.items import Message
from agiqa.extract.models import batches, open_backbone
from agiqa.extract.models.batches import alike
from agiqa.store import TOKEN_ROLES
from tests.extract import tiny_vision_models
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import write_vision_checkpoint
from tests.extract.tiny_timm import write_pictures

ASKED = [Message(role="user", content="how good?")]
FAMILIES = {
    "llava": write_vision_checkpoint,
    "qwen25": tiny_vision_models.write_qwen25,
    "smolvlm": tiny_vision_models.write_smolvlm,
    "internvl": tiny_vision_models.write_internvl,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return str(FAMILIES[request.param](folder) or folder)


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory):
    return str(write_minicpm_checkpoint(tmp_path_factory.mktemp("minicpm")))


def own_features(backbone, item):
    """transformers' own `get_image_features`, whose result the model puts at the image's tokens."""
    model = backbone.loaded()
    inputs = {name: value for name, value in item.inputs.items() if not name.endswith("token_type_ids")}
    with torch.inference_mode():
        return model.base_model.get_image_features(**inputs, return_dict=True, output_hidden_states=True)


def joined(features):
    return (
        torch.cat([one.flatten(0, -2) for one in features])
        if isinstance(features, tuple | list)
        else features.flatten(0, -2)
    )


def test_the_projector_is_what_the_language_model_reads(checkpoint, pictures):
    whole, tapped = open_backbone(checkpoint, device="cpu"), open_backbone(checkpoint, device="cpu", tap="projector")
    batch = [tapped.prepare(ASKED, picture) for picture in pictures]
    for picture, states, item in zip(pictures, tapped.hidden_states(batch), batch, strict=True):
        expected = joined(own_features(whole, whole.prepare(ASKED, picture)).pooler_output)
        assert states.shape == (len(item.token_ids), tapped.hidden_size)
        assert (item.roles == TOKEN_ROLES["image"]).all()
        torch.testing.assert_close(states, expected.to(states.dtype), rtol=1e-4, atol=1e-5)
        outline = tapped.outline(ASKED, picture)
        assert np.array_equal(outline.roles, item.roles)


def test_the_tower_s_blocks_and_output_are_stored(checkpoint, pictures):
    whole, tapped = open_backbone(checkpoint, device="cpu"), open_backbone(checkpoint, device="cpu", tap="vision")
    item = tapped.prepare(ASKED, pictures[1])
    seen = own_features(whole, whole.prepare(ASKED, pictures[1]))
    (states,) = tapped.layer_states([item], ["1", "2", "last"])
    assert tapped.layer_count == 3
    for rows in states.values():
        assert rows.shape == (len(item.roles), tapped.layer_width("last"))
    if hasattr(whole.loaded().get_encoder(modality="image"), "permute_input_for_window_attn"):
        return  # its own output is in the order of windows, see the next test
    last = seen.last_hidden_state.flatten(0, -2)
    torch.testing.assert_close(states["last"], last, rtol=1e-4, atol=1e-5)
    (one,) = open_backbone(checkpoint, device="cpu", tap="vision:1").hidden_states([item])
    assert torch.equal(one, states["1"])
    if (hidden := getattr(seen, "hidden_states", None)) is not None:
        torch.testing.assert_close(states["1"], hidden[1].flatten(0, -2), rtol=1e-4, atol=1e-5)


def passes_through(module):
    """A list that gets an entry at every pass through `module`."""
    found = []
    module.register_forward_hook(lambda *_passed: found.append(1))
    return found


@pytest.mark.parametrize("tap", ["vision", "projector"])
def test_images_of_one_shape_pass_through_the_tower_together(checkpoint, tap, pictures, monkeypatch):
    """Whatever the batch and its order, an image has the states that it has alone."""
    tapped = open_backbone(checkpoint, device="cpu", tap=tap)
    layers = ("1", "last") if tap == "vision" else ("last",)
    batch = [tapped.prepare(ASKED, pictures[index]) for index in (2, 0, 1, 0)]
    alone = [tapped.layer_states([item], layers)[0] for item in batch]
    passes = passes_through(tapped._whole.loaded().get_encoder(modality="image"))
    together = tapped.layer_states(batch, layers)
    assert len(passes) == len(alike([item.read() for item in batch])) < len(batch)
    passes.clear()
    monkeypatch.setattr(batches, "PATCHES_AT_ONCE", 1)
    for found in (together, tapped.layer_states(batch, layers)):
        for states, expected in zip(found, alone, strict=True):
            assert list(states) == list(layers)
            for layer in layers:
                torch.testing.assert_close(states[layer], expected[layer], rtol=1e-4, atol=1e-5)
    assert len(passes) == len(batch)


@pytest.mark.parametrize("tap", ["vision", "vision:1", "projector"])
def test_slices_of_minicpm_pass_through_its_tower_together(minicpm, tap, pictures):
    tapped = open_backbone(minicpm, device="cpu", tap=tap)
    layers = ("1", "last") if tap == "vision" else ("last",)
    batch = [tapped.prepare(ASKED, pictures[index]) for index in (2, 0, 1, 0)]
    alone = [tapped.layer_states([item], layers)[0] for item in batch]
    passes = passes_through(tapped._whole._loaded().vpm.post_layernorm)
    for states, expected in zip(tapped.layer_states(batch, layers), alone, strict=True):
        for layer in layers:
            torch.testing.assert_close(states[layer], expected[layer], rtol=1e-4, atol=1e-5)
    assert len(passes) == (tap != "vision:1")


def test_patches_of_windows_are_in_the_order_of_the_language_model(tmp_path, pictures):
    """Qwen2.5-VL's merger turns each group of patches into one token: fed with ours in order, it gives the projector's."""
    folder = tmp_path / "qwen"
    checkpoint = str(tiny_vision_models.write_qwen25(folder) or folder)
    for picture in pictures:
        tower = open_backbone(checkpoint, device="cpu", tap="vision")
        (states,) = tower.hidden_states([tower.prepare(ASKED, picture)])
        projector = open_backbone(checkpoint, device="cpu", tap="projector")
        (expected,) = projector.hidden_states([projector.prepare(ASKED, picture)])
        whole = open_backbone(checkpoint, device="cpu").loaded()
        with torch.inference_mode():
            merged = whole.get_encoder(modality="image").merger(states)
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_class_tokens_of_a_tower_are_special(tmp_path, pictures):
    tapped = open_backbone(str(write_vision_checkpoint(tmp_path)), device="cpu", tap="vision")
    assert tapped.prepare(ASKED, pictures[0]).roles.tolist() == [TOKEN_ROLES["special"]] + [TOKEN_ROLES["image"]] * 16


def test_minicpm_s_slices_follow_each_other_as_its_language_model_reads_them(minicpm, pictures):
    whole = open_backbone(minicpm, device="cpu")
    projector, tower = (open_backbone(minicpm, device="cpu", tap=tap) for tap in ("projector", "vision"))
    model = whole.loaded()
    for picture in pictures:
        read = whole.prepare(ASKED, picture)
        attended = np.full(len(read.layout), read.layout.prod(axis=1).max())
        with torch.inference_mode():
            expected = model.image_tokens(read.inputs["patches"], read.layout, attended).flatten(0, 1)
        (states,) = projector.hidden_states([projector.prepare(ASKED, picture)])
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
        item = tower.prepare(ASKED, picture)
        (patches,) = tower.layer_states([item], ["1", "last"])
        counts = read.layout.prod(axis=1)
        assert len(patches["last"]) == len(patches["1"]) == len(item.roles) == counts.sum()
        if (counts == counts.max()).all():  # the resampler then sees no blank patches
            slices = torch.stack(patches["last"].split(counts.tolist()))
            with torch.inference_mode():
                again = model.resampler(slices, read.layout).flatten(0, 1)
            torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_tapped_is_refused_by_name(tiny_text_checkpoint, minicpm, tmp_path, pictures):
    with pytest.raises(ConfigError, match="reads no images, so it has no vision tower and no projector"):
        open_backbone(str(tiny_text_checkpoint), device="cpu", tap="vision")
    with pytest.raises(UnknownName, match=r"No tap is called 'visoin'\. Did you mean 'vision'"):
        open_backbone(minicpm, device="cpu", tap="visoin")
    with pytest.raises(ConfigError, match=r"--tap vision:9: the vision tower of .* has the blocks 1 to 2"):
        open_backbone(minicpm, device="cpu", tap="vision:9")
    tapped = open_backbone(minicpm, device="cpu", tap="projector")
    with pytest.raises(DataError, match="it has no image"):
        tapped.prepare(ASKED, None)
    with pytest.raises(ViewRefused, match="no lm_head"):
        tapped.lm_head()
    folder = tmp_path / "mllama"
    mllama = open_backbone(str(tiny_vision_models.write_mllama(folder) or folder), device="cpu", tap="projector")
    with pytest.raises(ModelError, match="reads images by cross-attention"):
        mllama.prepare(ASKED, pictures[0])
