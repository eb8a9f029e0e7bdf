"""The laws of backbones for image-text-to-text models of many families, each tiny and random in its official layout."""

import importlib.util

import pytest

from tests.extract import tiny_models, tiny_vision_models
from tests.extract.backbone_contract import VisionContract


class TestLlava(VisionContract):
    image_tokens = 16

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tiny_vision_checkpoint):
        return tiny_vision_checkpoint


class TestIdefics3(VisionContract):
    """Tiles with row and column marks, a thumbnail behind them."""

    image_tokens = 20

    write = staticmethod(tiny_models.write_tiled_checkpoint)


class TestQwen2VL(VisionContract):
    """Its processor wants a video processor, which needs torchvision; images must work without it."""

    image_tokens = 4
    image_word = "<|image_pad|>"

    write = staticmethod(tiny_models.write_grid_checkpoint)


class TestQwen25VL(VisionContract):
    image_tokens = 4
    image_word = "<|image_pad|>"

    write = staticmethod(tiny_vision_models.write_qwen25)


@pytest.mark.skipif(
    importlib.util.find_spec("num2words") is None, reason="transformers' SmolVLM needs the package num2words"
)
class TestSmolVLM(VisionContract):
    image_tokens = 20

    write = staticmethod(tiny_vision_models.write_smolvlm)


class TestInternVL(VisionContract):
    image_tokens = 4
    image_word = "<IMG_CONTEXT>"

    write = staticmethod(tiny_vision_models.write_internvl)


class TestMllama(VisionContract):
    """One image token: text attends to tiles by cross-attention, with masks that are padded like tokens."""

    image_tokens = 1
    image_word = "<|image|>"

    write = staticmethod(tiny_vision_models.write_mllama)


class TestMiniCPMV46(VisionContract):
    """All patches of all slices in one row, and a text model whose linear attention must not see padding."""

    image_tokens = 3
    image_word = "<|image_pad|>"

    write = staticmethod(tiny_vision_models.write_minicpm46)
