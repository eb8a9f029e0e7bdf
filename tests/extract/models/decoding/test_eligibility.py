"""Which families answer in slots: tiny models of a sample, and what extract/FAMILIES.md says of all of them."""

import re
from pathlib import Path

import pytest

from tests.extract.families.sweep import KINDS, why_not_in_slots
from tests.extract.tiny_minicpm import write_minicpm_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # PaliGemma's own way with text
PAGE = Path(__file__).parents[4] / "extract" / "FAMILIES.md"
SLIDING, LINEAR = "DynamicSlidingWindowLayer", "LinearAttention"
SAMPLE = {
    ("vision", "llava"): "",
    ("vision", "llava_onevision"): "",
    ("vision", "qwen2_5_vl"): "",
    ("vision", "glm4v"): "",
    ("vision", "internvl"): "",
    ("vision", "idefics2"): "",
    ("vision", "gemma3"): SLIDING,
    ("vision", "mllama"): "does not hold every token",
    ("vision", "paligemma"): "its logits differ from those of whole passes",
    ("text", "llama"): "",
    ("text", "qwen3_moe"): "",
    ("text", "mistral"): SLIDING,
    ("text", "gemma2"): "its attention is 'eager'",
    ("text", "jamba"): LINEAR,
    ("text", "mamba"): "its attention is 'eager'",
}
"""Why a family does not fit slots; nothing for one that does."""


@pytest.mark.parametrize(("kind", "family"), SAMPLE)
def test_families(kind, family, tmp_path):
    KINDS[kind][1](tmp_path / "model", family)
    reason = why_not_in_slots(tmp_path / "model")
    assert SAMPLE[kind, family] in reason
    assert bool(reason) == bool(SAMPLE[kind, family])
    assert (family in in_slots_by_the_page()[kind]) == (not reason)


def test_minicpm(tmp_path):
    assert why_not_in_slots(write_minicpm_checkpoint(tmp_path / "model")) == ""


def in_slots_by_the_page():
    """kind -> the families that the page lists as answering in slots."""
    section = PAGE.read_text().partition("## Answers in slots\n")[2]
    lists = dict(re.findall(r"^- (Models that read images|Models of text): (.+)$", section, re.MULTILINE))
    return {
        kind: set(lists[title].rstrip(".").split(", "))
        for kind, title in (("vision", "Models that read images"), ("text", "Models of text"))
    }


def test_the_page_lists_families_that_work():
    works = set(re.findall(r"^\| ([^ ]+) \| works ", PAGE.read_text(), re.MULTILINE))
    for kind, families in in_slots_by_the_page().items():
        assert families <= works
        assert families <= set(KINDS[kind][0])
