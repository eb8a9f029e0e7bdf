"""The native MiniCPM-Llama3-V-2.5: the laws of backbones, a second implementation, and the published oracle."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import layer_norm, unfold
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from agiqa.errors import DataError, ModelError
from agiqa.extract import Message, open_backbone
from agiqa.extract.models.contract import GenerationSettings
from agiqa.extract.models.minicpm.model import MiniCPMConfig, MiniCPMV, line_positions
from agiqa.extract.models.minicpm.slicing import cut, slicing_of
from agiqa.store import TOKEN_ROLES
from tests.extract.backbone_contract import CONVERSATION, LocalContract
from tests.extract.tiny_minicpm import QUERIES, RESOLUTION, SLICES, shapes, write_minicpm_checkpoint

MODELS = Path(__file__).resolve().parents[4] / "shared" / "models"
needs_oracle = pytest.mark.skipif(not MODELS.is_dir(), reason="the shared folder with the published oracle is absent")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_minicpm_checkpoint(tmp_path_factory.mktemp("minicpm") / "tiny")


def picture(path, width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


class TestMiniCPMBackbone(LocalContract):
    image_tokens = QUERIES * 3  # 64 x 50 pixels: an overview and two slices

    write = staticmethod(write_minicpm_checkpoint)


def published_positions(count, per_side=70):
    """Positions (count,) of one row of patches, by the lines of transformers 4.44 with torch on the CPU."""
    boundaries = torch.arange(1 / per_side, 1.0, 1 / per_side)
    fractional_coords = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(count))
    return torch.bucketize(fractional_coords, boundaries, right=True)


def published_tower(weights, pixels):
    """The tower on slices that are one row of patches each, (slices, 3, 14, 14 n): newer releases round otherwise."""
    vision = {"image_size": 980, "patch_size": 14, "hidden_size": 48, "intermediate_size": 64}
    tower = Idefics2VisionTransformer(Idefics2VisionConfig(**vision, num_attention_heads=4, num_hidden_layers=2)).eval()
    tower.load_state_dict({name[4:]: value for name, value in weights.items() if name.startswith("vpm.")})
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    embedded = patches + tower.embeddings.position_embedding(published_positions(patches.shape[1]))
    return tower.post_layernorm(tower.encoder(inputs_embeds=embedded).last_hidden_state)


def published_image_tokens(weights, image, resolution):
    """The tokens of an image as published code computes them, slice by slice; the resampler in float64."""
    slicing = slicing_of(image.size, most=SLICES, resolution=resolution, patch=14)
    flat, sizes = [], []
    for piece in cut(image, slicing):
        values = (torch.from_numpy(np.array(piece)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
        columns = unfold(values[None], 14, stride=14)[0]  # (3 * 14 * 14, patches)
        flat.append(columns.reshape(3, 14, 14, -1).permute(0, 1, 3, 2).reshape(3, 14, -1))
        sizes.append((piece.height // 14, piece.width // 14))
    longest = max(part.shape[2] for part in flat)
    pixels = torch.stack([torch.nn.functional.pad(part, (0, longest - part.shape[2])) for part in flat])
    with torch.no_grad():
        states = published_tower(weights, pixels).double()
    weights = {name[10:]: value.double() for name, value in weights.items() if name.startswith("resampler.")}
    return torch.cat([read_by_queries(weights, one[: h * w], h, w) for one, (h, w) in zip(states, sizes, strict=True)])


def read_by_queries(weights, patches, rows, columns):
    def norm(name, values):
        return layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    width = weights["proj"].shape[0]
    rates = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    place = [(column, row) for row in range(rows) for column in range(columns)]
    angles = [torch.outer(torch.tensor([float(pair[axis]) for pair in place]).double(), rates) for axis in (0, 1)]
    positions = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    values = norm("ln_kv", patches @ weights["kv_proj.weight"].T)
    parts = weights["attn.in_proj_weight"].chunk(3), weights["attn.in_proj_bias"].chunk(3)
    inputs = norm("ln_q", weights["query"]), values + positions, values
    q, k, v = (given @ weight.T + bias for given, weight, bias in zip(inputs, *parts, strict=True))
    read = torch.softmax(q @ k.T / width**0.5, dim=-1) @ v  # heads of 128 channels: one at this width
    out = read @ weights["attn.out_proj.weight"].T + weights["attn.out_proj.bias"]
    return norm("ln_post", out) @ weights["proj"]


def published_hidden(folder, item, image, resolution=RESOLUTION):
    """Hidden states of one item, its Llama transformers' own with eager attention."""
    weights = {}
    for part in folder.glob("*.safetensors"):
        weights |= load_file(part)
    raw = json.loads((folder / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    config = transformers.LlamaConfig(
        **{name: raw[name] for name in names}, vocab_size=raw["vocab_size"], rms_norm_eps=1e-5, rope_theta=500000.0
    )
    config._attn_implementation = "eager"
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict({name[4:]: value for name, value in weights.items() if name.startswith("llm.")})
    embedded = llama.model.embed_tokens(torch.from_numpy(item.token_ids).long()).detach()
    embedded[torch.from_numpy(item.roles == TOKEN_ROLES["image"])] = published_image_tokens(
        weights, image, resolution
    ).float()
    with torch.no_grad():
        return llama.model(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("size", [(64, 50), (56, 56), (150, 90), (20, 200), (300, 280), (1, 1)])
def test_hidden_states_are_those_of_the_published_route(tiny, tmp_path, size):
    backbone = open_backbone(str(tiny), device="cpu")
    path = picture(tmp_path / "a.png", *size)
    item = backbone.prepare(CONVERSATION, path)
    expected = published_hidden(tiny, item, Image.open(path))
    found = backbone.hidden_states([item])[0]
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("size", [(1024, 768), (800, 600), (512, 768)])
def test_hidden_states_of_images_in_the_published_resolution(tiny, tmp_path, size):
    """Their slices are rows of 1,000 patches and more, for which the rounding of positions matters."""
    folder = tmp_path / "fine"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "scale_resolution": 448}))
    backbone = open_backbone(str(folder), device="cpu")
    path = picture(tmp_path / "a.png", *size)
    item = backbone.prepare(CONVERSATION, path)
    expected = published_hidden(folder, item, Image.open(path), 448)
    found = backbone.hidden_states([item])[0]
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_every_number_of_patches_has_the_positions_that_torch_gives_it():
    for count in range(1, 70**2 + 1):
        np.testing.assert_array_equal(line_positions(count, 70), published_positions(count).numpy(), str(count))


def test_a_store_says_whose_positions_it_has(tiny):
    """Stores of releases that rounded differently have another id, so that none is resumed with other numbers."""
    assert open_backbone(str(tiny), device="cpu").provenance()["image"]["positions"] == "torch"


def test_positions_do_not_depend_on_the_defaults_of_torch():
    expected = published_positions(1036).numpy()
    line_positions.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            np.testing.assert_array_equal(line_positions(1036, 70), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        line_positions.cache_clear()


def test_images_of_a_batch_do_not_feel_each_other(tiny, tmp_path):
    backbone = open_backbone(str(tiny), device="cpu")
    sizes = [(64, 50), (300, 20), (1, 1), (150, 160)]
    batch = [
        backbone.prepare(CONVERSATION[:1], picture(tmp_path / f"{n}.png", *size, n)) for n, size in enumerate(sizes)
    ]
    batch.append(backbone.prepare(CONVERSATION, None))
    for found, item in zip(backbone.hidden_states(batch), batch, strict=True):
        alone = backbone.hidden_states([item])[0]
        assert float((found - alone).norm() / alone.norm()) < 1e-5


def test_the_place_of_an_image_is_laid_out_line_by_line(tiny, tmp_path):
    backbone = open_backbone(str(tiny), device="cpu")
    item = backbone.prepare(CONVERSATION, picture(tmp_path / "a.png", 100, 160))
    text = backbone.renderer.tokenizer.decode(item.token_ids.tolist(), skip_special_tokens=False)
    text = text.replace("<unk>" * QUERIES, "*")
    columns, rows = slicing_of((100, 160), most=SLICES, resolution=RESOLUTION, patch=14).grid
    assert rows > 1
    one = "<image>*</image>"
    slices = "\n".join([one * columns] * rows)
    head = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    assert text.startswith(f"{head}{one}<slice>{slices}</slice>\n{CONVERSATION[0].content}<|eot_id|>")
    assert text.endswith(f"{CONVERSATION[2].content}<|eot_id|>")


def test_answers_are_those_of_a_loop_over_the_likeliest_token(tiny, tmp_path):
    backbone = open_backbone(str(tiny), device="cpu")
    turns = [(CONVERSATION[:1], (64, 50)), (CONVERSATION, (300, 20)), (CONVERSATION[:1], (30, 30))]
    batch = [
        backbone.prepare(conversation, picture(tmp_path / f"{n}.png", *size, n), answer=True)
        for n, (conversation, size) in enumerate(turns)
    ]
    tokenizer = backbone.renderer.tokenizer
    asked = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert all(tokenizer.decode(item.token_ids.tolist()).endswith(asked) for item in batch)
    stops = {tokenizer.convert_tokens_to_ids(word) for word in ("<|end_of_text|>", "<|eot_id|>")}
    expected = []
    for item in batch:
        grown, answer = item, []
        for _ in range(12):
            token = int(backbone.logits(grown)[-1].argmax())
            if token in stops:
                break
            answer.append(token)
            ids = np.append(grown.token_ids, np.int32(token))
            grown = replace(grown, token_ids=ids, roles=np.append(grown.roles, np.uint8(TOKEN_ROLES["answer"])))
        expected.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    assert [str(text) for text in backbone.generate(batch, GenerationSettings(max_new_tokens=12))] == expected


def test_images_of_a_batch_are_answered_in_one_pass(tiny, tmp_path, monkeypatch):
    backbone = open_backbone(str(tiny), device="cpu")
    batch = [
        backbone.prepare(CONVERSATION[:1], picture(tmp_path / f"{n}.png", *size, n), answer=True)
        for n, size in enumerate([(64, 50), (300, 20), (30, 30)])
    ]
    alone = [backbone.generate([item], GenerationSettings(max_new_tokens=4))[0] for item in batch]
    llm, sizes = backbone._language_model(), []
    answer = llm.generate

    def counted(**inputs):
        sizes.append(len(inputs["attention_mask"]))
        return answer(**inputs)

    monkeypatch.setattr(llm, "generate", counted)
    assert backbone.generate(batch, GenerationSettings(max_new_tokens=4)) == alone
    assert sizes == [3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_near_thirty_two(tiny, tmp_path, dtype):
    path = picture(tmp_path / "a.png", 90, 60)
    found = []
    for one in (dtype, "float32"):
        backbone = open_backbone(str(tiny), device="cpu", dtype=one)
        found.append(backbone.hidden_states([backbone.prepare(CONVERSATION, path)])[0].double())
    assert 0 < float((found[0] - found[1]).norm() / found[1].norm()) < {"bfloat16": 0.03, "float16": 0.004}[dtype]


def test_the_full_model_has_the_published_names():
    """Spelled out for 32 + 27 layers; no weights are made."""
    vision = {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_attention_heads": 16}
    config = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    }  # fmt: skip
    vision |= {"num_hidden_layers": 27, "patch_size": 14}
    full = MiniCPMConfig(
        language=config, vision=vision, queries=96, slices=9, resolution=448, patch=14,
        mean=(0.5,) * 3, std=(0.5,) * 3, marks={}, dtype="float16",
    )  # fmt: skip
    with torch.device("meta"):
        found = MiniCPMV(full).state_dict()
    assert set(found) == set(shapes(layers=32, vision_layers=27))
    assert len(found) == 741
    assert found["resampler.query"].shape == (96, 4096)
    if MODELS.is_dir():
        index = json.loads((MODELS / "minicpm-llama3-v-2_5" / "model.safetensors.index.json").read_text())
        assert set(found) == set(index["weight_map"])


@needs_oracle
@pytest.mark.parametrize(("name", "adapter"), [("small", ""), ("square512", ""), ("square512", "+adapter")])
def test_the_published_oracle_is_met(name, adapter):
    tuned = str(MODELS / "minicpm-tiny-adapter") if adapter else None
    backbone = open_backbone(str(MODELS / "minicpm-tiny"), adapter=tuned, device="cpu")
    golden = np.load(MODELS / "golden" / f"{name}{adapter}.npz")
    turns = [Message(**turn) for turn in json.loads((MODELS / "golden" / f"{name}.json").read_text())]
    item = backbone.prepare(turns, MODELS / "golden" / f"{name}.png")
    np.testing.assert_array_equal(item.token_ids, golden["input_ids"])
    seen = np.zeros(len(item.roles), bool)
    for start, stop in golden["image_bound"]:
        seen[start:stop] = True
    np.testing.assert_array_equal(item.roles == TOKEN_ROLES["image"], seen)
    np.testing.assert_array_equal(item.layout, golden["tgt_sizes"])
    found = backbone.hidden_states([item])[0].numpy()
    assert np.linalg.norm(found - golden["hidden"]) <= 1e-4 * np.linalg.norm(golden["hidden"])
    last = backbone.logits(item)[-1].numpy()
    assert np.linalg.norm(last - golden["logits_last"]) <= 1e-4 * np.linalg.norm(golden["logits_last"])


def broken(tiny, tmp_path, change):
    copy = tmp_path / "broken"
    shutil.copytree(tiny, copy)
    shard = copy / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)
    return copy


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("llm.model.embed_tokens.weight", None) or t.popitem(), r"1 missing tensors in .*broken: "),
        (lambda t: t.update({"llm.extra": torch.zeros(2)}), r"1 unknown tensors in .*broken: llm\.extra\."),
        (lambda t: t.update({"vpm.zzz": torch.zeros(2)}), r"1 unknown tensors in .*broken: vpm\.zzz\."),
        (lambda t: t.update({sorted(t)[0]: torch.zeros(2, 3)}), r"has shape \(2, 3\) in .*broken, and "),
        (lambda t: t.update({"resampler.query": torch.zeros(2, 3)}), r"1 repeated tensors in .*: resampler\.query\."),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_any_is_read(tiny, tmp_path, change, told):
    backbone = open_backbone(str(broken(tiny, tmp_path, change)), device="cpu")
    with pytest.raises(ModelError, match=told):
        backbone.check_tensors()
    with pytest.raises(ModelError, match=told):
        backbone.load()


def test_it_can_be_asked_for_by_its_kind_and_serves_as_no_other(tiny):
    assert open_backbone(str(tiny), kind="minicpm", device="cpu").kind == "minicpm"
    with pytest.raises(ModelError, match="'minicpmv' cannot serve as the backbone 'vision'"):
        open_backbone(str(tiny), kind="vision", device="cpu")


def test_other_versions_are_refused(tiny, tmp_path):
    copy = tmp_path / "newer"
    shutil.copytree(tiny, copy)
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**raw, "version": "2.6"}))
    with pytest.raises(ModelError, match=r"MiniCPM-V of version 2\.6; .* 2\.5 only"):
        open_backbone(str(copy))


def test_a_missing_tokenizer_is_named(tiny, tmp_path):
    copy = tmp_path / "lacking"
    shutil.copytree(tiny, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"there is no tokenizer\.json in .*lacking"):
        open_backbone(str(copy), device="cpu")


def test_files_that_lack_an_entry_are_named(tiny, tmp_path):
    copy = tmp_path / "lacking"
    shutil.copytree(tiny, copy)
    (copy / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json in .*lacking lacks 'max_slice_nums'"):
        open_backbone(str(copy))


@pytest.mark.parametrize("mark", ["<image>", "</slice>", "<unk>"])
def test_words_that_stand_for_the_image_are_refused(tiny, tmp_path, mark):
    backbone = open_backbone(str(tiny), device="cpu")
    with pytest.raises(DataError, match=re.escape(repr(mark))):
        backbone.prepare([Message(role="user", content=f"a {mark} b")], picture(tmp_path / "a.png", 9, 9))
