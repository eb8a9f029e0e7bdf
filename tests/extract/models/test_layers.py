"""Hidden states of chosen layers, against transformers' own `output_hidden_states`; and the lists of layers."""

import pytest
import torch

from agiqa.errors import ConfigError, ModelError
from agiqa.extract import open_backbone
from agiqa.extract.models.checks import relative_error
from agiqa.extract.models.huggingface import TextBackbone
from agiqa.extract.models.layers import parse_layers
from agiqa.extract.models.loading import quiet_transformers
from agiqa.extract.models.opening import BACKBONES
from tests.extract.backbone_contract import CONVERSATION, SHORT
from tests.extract.families.sweep import KINDS, TALK, TOLERANCE, own_inputs, save_pictures
from tests.extract.tiny_models import DEEP_BLOCKS, write_deep_checkpoint

TEXTS = ("gemma2", "gpt2", "llama4_text", "mamba", "qwen3_moe")
SEEING = ("gemma3", "llava_onevision", "qwen3_vl")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return write_deep_checkpoint(tmp_path_factory.mktemp("deep"))


@pytest.fixture
def backbone(deep):
    return open_backbone(str(deep), device="cpu")


@pytest.fixture
def batch(backbone):
    """Items of different lengths, so that the shorter ones are padded."""
    return [backbone.prepare(turns, None) for turns in (CONVERSATION, SHORT, CONVERSATION[:1])]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("8,16,24,last", ("8", "16", "24", "last")),
        ("every 8", ("8", "16", "24", "last")),
        ("every 12", ("12", "24", "last")),
        ("every 40", ("last",)),
        ("-1", ("last",)),
        ("-1,-9,0", ("0", "24", "last")),
        ("-33", ("0",)),
        (" 24 , 8 ", ("8", "24")),
        ("32", ("last",)),
        ("last,8,8,-25", ("8", "last")),
        ("all", (*map(str, range(32)), "last")),
        ([-1, 8, "every 16"], ("8", "16", "last")),
        (8, ("8",)),
    ],
)
def test_lists_of_layers(written, expected):
    assert parse_layers(written, 32, model="the model") == expected


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "33",
            r"--layers names '33', which is no layer of tiny\. It has 32: write numbers from 0 .* to 32, or from -1",
        ),
        ("-34", "names '-34', which is no layer of tiny"),
        ("8,sixteen", "names 'sixteen', which is no layer of tiny"),
        ("every 0", "names 'every 0', which is no layer of tiny"),
        ("every", "names 'every', which is no layer of tiny"),
        ("8-16", r"takes no ranges, such as '8-16': list the layers, or write `every N`"),
        ("8:16", "takes no ranges"),
        ("0..4", "takes no ranges"),
        ("8,,16", "names '', which is no layer of tiny"),
        ("", "--layers names no layer of tiny. It has 32"),
        ([], "--layers names no layer"),
        ("8.5", "names '8.5', which is no layer of tiny"),
    ],
)
def test_what_names_no_layer_is_refused(written, message):
    with pytest.raises(ConfigError, match=message):
        parse_layers(written, 32, model="tiny")


def own_states(backbone, talk, picture):
    """Hidden states of all layers of one conversation, by transformers alone."""
    with quiet_transformers():
        model = backbone.model_class.from_pretrained(
            backbone.checkpoint.folder, dtype=torch.float32, attn_implementation=backbone.attention
        ).eval()
    inputs = own_inputs(backbone, talk, picture)
    with torch.inference_mode():
        return [states[0] for states in model(**inputs, output_hidden_states=True, use_cache=False).hidden_states]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
@pytest.mark.parametrize(("kind", "family"), [*(("text", one) for one in TEXTS), *(("vision", one) for one in SEEING)])
def test_layers_are_those_that_transformers_reports(kind, family, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    pictures = save_pictures(tmp_path) if kind == "vision" else [None, None]
    KINDS[kind][1](folder, family)
    backbone = open_backbone(str(folder), dtype="float32", device="cpu")
    layers = parse_layers("all", backbone.layer_count, model=family)
    talks = (TALK, TALK[:1])
    batch = [backbone.prepare(talk, picture) for talk, picture in zip(talks, pictures, strict=True)]
    together = backbone.layer_states(batch, layers)
    first = 1 if family == "mamba" else 0  # it reports no embeddings
    for talk, picture, found in zip(talks, pictures, together, strict=True):
        expected = own_states(backbone, talk, picture)
        assert list(found) == list(layers)
        for layer in range(first, backbone.layer_count):
            assert relative_error(found[str(layer)], expected[layer - first]) < TOLERANCE
        assert relative_error(found["last"], expected[-1]) < TOLERANCE
    for found, states in zip(together, backbone.hidden_states(batch), strict=True):
        assert torch.equal(found["last"], states)


def test_only_the_layers_asked_for_are_kept_and_blocks_above_them_do_not_run(backbone, batch):
    every = backbone.layer_states(batch, ("0", "1", "2", "3", "4", "last"))
    ran = []
    blocks = backbone.loaded().model.layers
    before = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in blocks]
    handles = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(blocks, start=1)
    ]
    for layers, highest in ((("0",), 0), (("2",), 2), (("0", "3"), 3), (("4", "last"), DEEP_BLOCKS)):
        ran.clear()
        for found, expected in zip(backbone.layer_states(batch, layers), every, strict=True):
            assert list(found) == list(layers)
            for layer, states in found.items():
                assert torch.equal(states, expected[layer])
        assert ran == list(range(1, highest + 1))
    for handle in handles:
        handle.remove()
    assert [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in blocks] == before


def test_a_failed_pass_leaves_no_hook(backbone, batch):
    backbone.layer_states(batch, ("3",))
    blocks = backbone.loaded().model.layers
    before = [len(block._forward_hooks) for block in blocks]
    blocks[1].mlp.forward = None
    with pytest.raises(TypeError, match="not callable"):
        backbone.layer_states(batch, ("3",))
    assert [len(block._forward_hooks) for block in blocks] == before


def test_states_have_the_dtype_of_the_model(deep):
    half = open_backbone(str(deep), device="cpu", dtype="bfloat16")
    found = half.layer_states([half.prepare(SHORT, None)], ("0", "2"))[0]
    assert {states.dtype for states in found.values()} == {torch.bfloat16}


@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own code
def test_compiled_layers_have_the_same_states(backbone, batch, monkeypatch):
    """Layers are traced, but run by torch's own operations: code for a CPU takes long to make."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *what, **how: compile_with(*what, backend="eager", **how))
    layers = ("0", "2", "4", "last")
    expected = backbone.layer_states(batch, layers)
    backbone.compile_layers()
    for asked in (layers, ("last",), ("2", "4"), layers):  # hooks come and go between calls
        for found, wanted in zip(backbone.layer_states(batch, asked), expected, strict=True):
            assert list(found) == list(asked)
            for layer, states in found.items():
                torch.testing.assert_close(states, wanted[layer], rtol=1e-5, atol=1e-5)


def test_a_model_whose_blocks_are_not_found_is_refused_by_name(backbone, batch):
    backbone.layer_count -= 1
    with pytest.raises(ModelError, match=r"cannot read single layers of Llama.*no list of 4 .*Leave --layers out"):
        backbone.layer_states(batch, ("1",))


def test_blocks_in_another_order_are_noticed(backbone, batch):
    """The states of the wrong modules are not those that transformers reports."""
    decoder = backbone.loaded().model
    layers = decoder.layers
    del decoder.layers
    decoder.lookalikes, decoder.layers = torch.nn.ModuleList(reversed(layers)), layers
    with pytest.raises(ModelError, match=r"the states of its blocks are not those that transformers reports"):
        backbone.layer_states(batch, ("1",))


def test_a_block_that_runs_for_images_only_is_named(tmp_path):
    """Llama 3.2 Vision leaves its cross-attention out where there is no image."""
    folder = tmp_path / "model"
    folder.mkdir()
    KINDS["vision"][1](folder, "mllama")
    backbone = open_backbone(str(folder), dtype="float32", device="cpu")
    left_out = str(backbone.config.get_text_config().cross_attention_layers[0] + 1)
    text = backbone.prepare(TALK, None)
    assert list(backbone.layer_states([text], ("1", "last"))[0]) == ["1", "last"]
    with pytest.raises(ModelError, match=rf"does not run block {left_out} for some items.*Leave layer {left_out} out"):
        backbone.layer_states([text], (left_out, "last"))


@pytest.mark.parametrize(("method", "fits"), [("hidden_states", False), ("states", False), ("layer_states", True)])
def test_a_class_of_ones_own_whose_states_would_be_passed_over_is_refused(method, fits, deep, monkeypatch):
    own = type("Own", (TextBackbone,), {"kind": "own", method: lambda _self, *_given: []})
    monkeypatch.setitem(BACKBONES._parts, "own", own)
    if fits:
        assert isinstance(open_backbone(str(deep), kind="own", device="cpu"), own)
        return
    with pytest.raises(ConfigError, match="Define `layer_states` instead"):
        open_backbone(str(deep), kind="own", device="cpu")
