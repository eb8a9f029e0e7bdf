"""A sample of the families in extract/FAMILIES.md, against what that page says of them; all: `python -m tests.extract.families`."""

import importlib.util
from pathlib import Path

import pytest

from tests.extract.families.sweep import KINDS, try_family
from tests.extract.families.writing import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # PaliGemma's own way with text
PAGE = Path(__file__).parents[3] / "extract" / "FAMILIES.md"
SAMPLE = {
    "vision": ["aya_vision", "florence2", "gemma3", "gemma4", "idefics2", "llava_onevision", "ovis2", "paligemma"],
    "text": ["gpt2", "jamba", "llama", "mamba", "qwen3_moe"],
}


@pytest.mark.parametrize(("kind", "family"), [(kind, name) for kind, names in SAMPLE.items() for name in names])
def test_the_page_says_what_happens(kind, family, tmp_path):
    if FAMILIES[family].torchvision if kind == "vision" else False:
        pytest.importorskip("torchvision")
    assert try_family(kind, family, tmp_path / "model").row in PAGE.read_text().splitlines()


def test_the_page_has_every_family_once():
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    expected = [name for names, _ in KINDS.values() for name in ["family", *sorted(names)]]
    assert rows == expected


# llama4 keeps its rotary angles as complex numbers, and `save` in tiny_models casts all buffers
@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if family.torchvision))
def test_families_that_need_torchvision(family, tmp_path):
    assert try_family("vision", family, tmp_path / "model").row in PAGE.read_text().splitlines()
