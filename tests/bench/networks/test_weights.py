"""Pretrained weights of files and of timm: which layers they are for, published names, and shapes that do not fit."""

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from agiqa.bench.networks.architectures.dbcnn import DBCNN
from agiqa.bench.networks.architectures.encoders import timm_model
from agiqa.bench.networks.architectures.vil import ViLEncoder
from agiqa.bench.networks.building import pretrained_weights, random_network
from agiqa.bench.networks.config import network_config
from agiqa.bench.networks.weights import file_sha256, file_weights, give_weights
from agiqa.errors import ModelError
from agiqa.extract.models.timm_models import import_timm


def config(name="test_resnet", **changes):
    return network_config(name, {"image_size": 32, **changes})


def body_of(network):
    return {key: value.clone() for key, value in network.body.state_dict().items()}


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}]
)
def test_a_checkpoint_of_a_classifier_becomes_the_body(tmp_path, wrap):
    torch.manual_seed(0)
    classifier = import_timm().create_model("test_resnet")
    torch.save(wrap(classifier.state_dict()), tmp_path / "weights.pth")
    network = random_network(config())
    (weights,) = pretrained_weights(config(), [tmp_path / "weights.pth"])
    assert weights.give(network, config()) == "the body of test_resnet"
    for key, value in body_of(network).items():
        assert torch.equal(value, classifier.state_dict()[key])


def published(name):
    """The tensors of a file of timm: those of the whole classifier of 1,000 classes."""
    torch.manual_seed(4)
    state = import_timm().create_model(name, num_classes=1000).state_dict()
    return {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in state.items()}


def read_by_timm(name, path):
    """What timm's own documented way to a local file makes of it, for pictures of 32 pixels."""
    sized = {"img_size": 32} if name == "test_vit" else {}
    model = import_timm().create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=0, **sized
    )
    return model.state_dict()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"])
@pytest.mark.parametrize("layout", ["model.safetensors", "pytorch_model.bin", "checkpoint.pth"])
def test_files_as_timm_publishes_them_are_read_as_timm_reads_them(tmp_path, name, layout):
    """safetensors, and checkpoints of torch with the tensors bare or under `state_dict`."""
    state, path = published(name), tmp_path / layout
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if path.suffix == ".pth" else state, path)
    network = random_network(config(name))
    (weights,) = pretrained_weights(config(name), [path])
    assert weights.give(network, config(name)) == f"the body of {name}"
    wanted = read_by_timm(name, path)
    assert network.body.state_dict().keys() == wanted.keys()
    for key, value in network.body.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-5, msg=key)


def test_weights_by_a_name_of_timm_come_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    """timm/NAME on the hub, as a download leaves it; the network is for smaller pictures than these weights."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    file = repository / "snapshots" / commit / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(published("test_vit"), file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    settings = config("test_vit", pretrained="test_vit.r160_in1k")
    (weights,) = pretrained_weights(settings, [])
    network = random_network(settings)
    assert weights.give(network, settings) == "the body of test_vit"
    wanted = read_by_timm("test_vit", file)
    for key, value in network.body.state_dict().items():
        assert torch.equal(value, wanted[key]), key
    absent = config("test_resnet", pretrained="test_resnet.r160_in1k")
    with pytest.raises(
        ModelError, match=r"'test_resnet\.r160_in1k' of timm cannot be loaded .* Give a file by --weights"
    ):
        pretrained_weights(absent, [])


def test_weights_that_a_run_kept_are_those_of_the_whole_network(tmp_path):
    torch.manual_seed(1)
    trained, fresh = random_network(config()), random_network(config())
    save_file(dict(trained.state_dict()), tmp_path / "network.safetensors")
    where = give_weights(fresh, file_weights(tmp_path / "network.safetensors"), name="test_resnet", where="a file")
    assert where == "all of test_resnet"
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_weights_of_s_cnn_and_of_vgg16_go_to_their_parts():
    network = DBCNN()
    assert network.new_layers == [network.distortion, network.linear]
    s_cnn = {f"module.features.{key}": value + 1 for key, value in network.distortion.state_dict().items()}
    s_cnn["module.classifier.weight"] = torch.zeros(39, 256)
    vgg = {f"features.{key}": value + 2 for key, value in network.content.state_dict().items()}
    wanted = s_cnn["module.features.0.weight"], vgg["features.0.weight"]
    assert give_weights(network, s_cnn, name="dbcnn", where="scnn.pkl") == "S-CNN"
    assert give_weights(network, vgg, name="dbcnn", where="vgg16") == "VGG16"
    assert torch.equal(network.distortion[0].weight, wanted[0])
    assert torch.equal(network.content[0].weight, wanted[1])
    assert network.new_layers == [
        network.linear
    ]  # the epochs of the new layers alone leave a pretrained S-CNN as it is
    assert {id(p) for p in network.body.parameters()} == {
        id(p) for p in (*network.content.parameters(), *network.distortion.parameters())
    }


def test_published_names_of_vil_are_read():
    """A checkpoint as the authors' code writes it: pairs of blocks, norms minus 1, and a classifier."""
    torch.manual_seed(2)
    ours = ViLEncoder(192, image_size=32)
    for key, value in ours.state_dict().items():
        if "norm" in key:
            value.copy_(torch.rand_like(value) + 0.5)
    names = {
        "norm": "norm",
        "up": "layer.proj_up",
        "convolution": "layer.conv",
        "head_norm": "layer.mlstm_cell.outnorm",
        "down": "layer.proj_down",
    }
    published = {"head.weight": torch.zeros(1000, 384), "legacy_norm.weight": torch.ones(384)}
    for key, value in ours.state_dict().items():
        stored = value - 1 if key.endswith("norm.weight") else value.clone()
        if not key.startswith("blocks."):
            other = {"positions": "pos_embed.embed"}.get(key, key.replace("patches.", "patch_embed.proj."))
            published[other] = stored
            continue
        _, number, layer, *what = key.split(".")
        pair, side = divmod(int(number), 2)
        place = f"blocks.{pair}.rowwise_from_{('top_left', 'bot_right')[side]}"
        if layer == "parts":
            published |= {f"{place}.layer.{one}_proj.{what[0]}": stored[part] for part, one in enumerate("qkv")}
        elif layer == "gates":
            cell = f"{place}.layer.mlstm_cell"
            published |= {f"{cell}.igate.{what[0]}": stored[:4], f"{cell}.fgate.{what[0]}": stored[4:]}
        else:
            name = "layer.learnable_skip" if layer == "skip" else f"{names[layer]}.{what[0]}"
            published[f"{place}.{name}"] = stored
    network = random_network(config("vil_tiny"))
    assert give_weights(network, published, name="vil_tiny", where="vil2_tiny.th") == "the body of vil_tiny"
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(network.encoder.state_dict()[key], value)
    lost = published.pop("blocks.3.rowwise_from_top_left.layer.k_proj.weight")
    with pytest.raises(
        ModelError, match=r"vil2_tiny\.th lacks tensors of the body of vil_tiny: blocks\.6\.parts\.weight"
    ):
        give_weights(network, published, name="vil_tiny", where="vil2_tiny.th")
    published["blocks.3.rowwise_from_top_left.layer.k_proj.weight"] = lost[:, :2]
    with pytest.raises(ModelError, match=r"blocks\.6\.parts\.weight"):
        give_weights(network, published, name="vil_tiny", where="vil2_tiny.th")


def test_positions_are_resized_to_the_images():
    torch.manual_seed(3)
    large = timm_model("test_vit", image_size=64)
    network = random_network(config("test_vit"))
    give_weights(network, large.state_dict(), name="test_vit", where="a file")
    assert network.body.pos_embed.shape[1] < large.pos_embed.shape[1]
    torch.testing.assert_close(network.body.pos_embed[:, :1], large.pos_embed[:, :1])  # of the class token
    encoder = ViLEncoder(192, image_size=64)
    small = random_network(config("vil_tiny"))
    give_weights(small, encoder.state_dict(), name="vil_tiny", where="a file")
    assert small.encoder.positions.shape[1:3] == (2, 2)


def test_other_shapes_are_told_with_both_sides(tmp_path):
    state = import_timm().create_model("test_resnet", num_classes=0).state_dict()
    state["conv1.0.weight"] = torch.zeros(8, 3, 5, 5)
    with pytest.raises(
        ModelError, match=r"file has 'conv1\.0\.weight' of shape \(8, 3, 5, 5\), and test_resnet expects \("
    ):
        give_weights(random_network(config()), state, name="test_resnet", where="file")
    del state["conv1.0.weight"]
    with pytest.raises(ModelError, match=r"file lacks tensors of the body of test_resnet: conv1\.0\.weight"):
        give_weights(random_network(config()), state, name="test_resnet", where="file")
    with pytest.raises(ModelError, match=r"file does not fit test_resnet: it has a\.b, and the network has "):
        give_weights(random_network(config()), {"a.b": torch.zeros(1)}, name="test_resnet", where="file")


def test_files_without_weights_are_named(tmp_path):
    text = tmp_path / "weights.pth"
    text.write_text("no weights")
    with pytest.raises(ModelError, match=r"weights\.pth cannot be read as weights"):
        file_weights(text)
    torch.save({"epoch": 3}, text)
    with pytest.raises(ModelError, match=r"holds no named tensors"):
        file_weights(text)
    with pytest.raises(ModelError, match=r"gone\.pth cannot be read"):
        file_sha256(tmp_path / "gone.pth")


def test_random_weights_need_nothing_and_vil_needs_a_file():
    assert pretrained_weights(config(weights="none"), []) == []
    with pytest.raises(ModelError, match="timm has no pretrained weights of vil"):
        pretrained_weights(config("vil"), [])
    with pytest.raises(ModelError, match=r"timm has no pretrained weights 'nothing\.of_this'"):
        pretrained_weights(config(pretrained="nothing.of_this"), [])
