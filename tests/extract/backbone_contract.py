"""The laws of every backbone. Name the checkpoint, inherit the tests."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agiqa.errors import DataError, ModelError
from agiqa.extract.data.images import open_image
from agiqa.extract.data.items import Message
from agiqa.extract.filling.plan import fit
from agiqa.extract.models import Backbone, Prepared, open_backbone
from agiqa.extract.models.loading import quiet_transformers
from agiqa.store import TOKEN_ROLES

CONVERSATION = (
    Message(role="user", content="describe the image {braces} of 'a dög'?"),
    Message(role="assistant", content="a blurry dog"),
    Message(role="user", content="rate the quality: [bad, poor]"),
)
SHORT = (Message(role="user", content="rate"),)
OTHERS = (
    (Message(role="user", content="  rate"),),
    (Message(role="user", content="7 dogs\n"), Message(role="assistant", content="yes")),
    (Message(role="user", content="ümlaut?"), *CONVERSATION[1:]),
)


def tokens_of(backbone: Backbone, item: Prepared, role: str) -> str:
    return backbone.renderer.tokenizer.decode(item.token_ids[item.roles == TOKEN_ROLES[role]].tolist())


class BackboneContract:
    """Laws of any checkpoint."""

    tolerance = 1e-5
    image_tokens = 0

    @classmethod
    def write(cls, folder: Path) -> Path:
        """Write the checkpoint into `folder`."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory):
        return cls.write(tmp_path_factory.mktemp("tiny"))

    @pytest.fixture(scope="class")
    @classmethod
    def pictures(cls, tmp_path_factory):
        """Three images of different shapes: 50 x 64, 30 x 20 and 64 x 64 pixels."""
        folder = tmp_path_factory.mktemp("pictures")
        noise = np.random.default_rng(0)
        paths = []
        for index, shape in enumerate([(50, 64, 3), (30, 20, 3), (64, 64, 3)]):
            paths.append(folder / f"{index}.png")
            Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(paths[-1])
        return paths

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls, checkpoint):
        return open_backbone(str(checkpoint), device="cpu")

    @pytest.fixture(scope="class")
    @classmethod
    def batch(cls, backbone, pictures):
        """Items of different lengths, with different images if the backbone reads them."""
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

    def test_the_last_layer_is_that_of_the_hidden_states(self, backbone, batch, together):
        layers = ("1", "last")
        for item, states, found in zip(batch, together, backbone.layer_states(batch, layers), strict=True):
            assert torch.equal(found["last"], states)
            assert found["1"].shape == (len(item.token_ids), backbone.layer_width("1"))
            assert found["1"].dtype == states.dtype

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

    def test_it_is_known_without_weights_where_each_belongs(self, backbone):
        """What adapters are checked against, before anything is loaded."""
        empty, whole = backbone.empty_model().state_dict(), backbone._loaded().state_dict()
        assert all(value.is_meta for value in empty.values())
        assert {name: value.shape for name, value in empty.items()} == {
            name: value.shape for name, value in whole.items()
        }

    def test_bos_comes_at_most_once_and_first(self, backbone, batch):
        bos = backbone.renderer.tokenizer.bos_token_id
        for item in batch:
            assert item.token_ids[0] == bos


class LocalContract(BackboneContract):
    """Laws of checkpoints that the tests wrote and may take apart."""

    def test_bos_comes_once(self, backbone, batch):
        for item in batch:
            assert int((item.token_ids == backbone.renderer.tokenizer.bos_token_id).sum()) == 1

    @pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 3e-2), ("float16", 4e-3)])
    def test_half_precision_is_near_the_full_one(self, checkpoint, batch, alone, dtype, tolerance):
        half = open_backbone(str(checkpoint), dtype=dtype, device="cpu")
        for states, expected in zip(half.hidden_states(batch), alone, strict=True):
            error = (states.double() - expected.double()).norm() / expected.double().norm()
            assert states.dtype == getattr(torch, dtype)
            assert error <= tolerance

    def test_an_outline_has_the_tokens_of_the_whole(self, backbone, pictures):
        for turns in (CONVERSATION, SHORT, *OTHERS):
            for picture in (*pictures, None):
                whole = backbone.prepare(turns, picture)
                sizes = [None] if picture is None else [None, open_image(picture).size]
                for size in [*sizes, *sizes]:
                    outline = backbone.outline(turns, picture, size=size)
                    np.testing.assert_array_equal(outline.token_ids, whole.token_ids)
                    np.testing.assert_array_equal(outline.roles, whole.roles)
                    assert not outline.inputs

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


class VisionContract(LocalContract):
    """Laws of checkpoints that see."""

    image_word = "<image>"

    def test_it_is_what_the_library_computes(self, backbone, batch, pictures):
        """transformers' own chat template, processor and model, on one item."""
        with quiet_transformers():
            model = backbone.model_class.from_pretrained(backbone.checkpoint.folder).eval()
        template = backbone.processor.chat_template or backbone.processor.tokenizer.chat_template
        for turns, picture, item in zip((CONVERSATION, SHORT), pictures, batch, strict=False):
            messages = [{"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in turns]
            messages[0]["content"].insert(0, {"type": "image"})
            text = backbone.processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
            with Image.open(picture) as image:
                inputs = backbone.processor(
                    images=[image], text=[text], return_tensors="pt", add_special_tokens=not text.startswith("<s>")
                )
            assert inputs["input_ids"][0].tolist() == item.token_ids.tolist()
            with torch.inference_mode():
                output = model(**inputs, output_hidden_states=True)
            assert self.close(backbone.hidden_states([item])[0], output.hidden_states[-1][0])
            layers = [*map(str, range(backbone.layer_count)), "last"]
            found = backbone.layer_states([item], layers)[0]
            for layer, expected in zip(layers, output.hidden_states, strict=True):
                assert self.close(found[layer], expected[0])
            assert self.close(backbone.logits(item), output.logits[0])

    def test_the_image_is_seen(self, backbone, pictures, tmp_path):
        with Image.open(pictures[0]) as image:
            image.point(lambda value: 255 - value).save(tmp_path / "negative.png")
        first, second = (backbone.prepare(CONVERSATION, path) for path in (pictures[0], tmp_path / "negative.png"))
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
        one, other = (states[-5:] for states in backbone.hidden_states([first, second]))
        assert (one - other).norm() / one.norm() > 1e-3

    def test_the_third_outline_of_a_size_needs_no_processor(self, backbone, pictures, monkeypatch):
        size = open_image(pictures[0]).size
        for turns in (CONVERSATION, CONVERSATION[:1]):
            backbone.outline(turns, pictures[0], size=size)
        monkeypatch.setattr(backbone, "_processed", None)
        talk = (*CONVERSATION[:1], Message(role="assistant", content="quite another text"))
        for turns in (CONVERSATION, talk):
            outline = backbone.outline(turns, pictures[0], size=size)
            monkeypatch.undo()
            whole = backbone.prepare(turns, pictures[0])
            np.testing.assert_array_equal(outline.token_ids, whole.token_ids)
            np.testing.assert_array_equal(outline.roles, whole.roles)
            monkeypatch.setattr(backbone, "_processed", None)

    def test_the_image_word_in_a_text_is_refused(self, backbone, pictures):
        with pytest.raises(DataError, match=re.escape(repr(self.image_word))):
            backbone.prepare([Message(role="user", content=f"what is {self.image_word}?")], pictures[0])

    def test_image_tokens_are_marked_and_nothing_else_is(self, backbone, batch):
        for item in batch:
            seen = item.roles == TOKEN_ROLES["image"]
            np.testing.assert_array_equal(seen, item.token_ids == backbone.image_token_id)

    def test_a_cut_item_is_the_beginning_of_the_whole(self, backbone, batch, alone):
        cut = fit(batch[0], len(batch[0].token_ids) - 5, truncate=True)
        for companions in ([], [batch[0]], [batch[2]]):
            states = backbone.hidden_states([cut, *companions])[0]
            assert self.close(states, alone[0][:-5])

    def test_without_an_image_the_text_is_read_alone(self, backbone, batch):
        item = backbone.prepare(CONVERSATION, None)
        assert not item.inputs
        assert TOKEN_ROLES["image"] not in item.roles
        mixed = backbone.hidden_states([item, batch[0]])
        assert self.close(mixed[0], backbone.hidden_states([item])[0])
