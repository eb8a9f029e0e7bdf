"""The questions are constants of the protocol: exactly those of the paper and of the released data."""

import json
from pathlib import Path

import pytest
import yaml

from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.data.templates import fill, template_of, templates

SHARED = Path(__file__).resolve().parents[4] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared folder with prompts and data is absent")


@needs_shared
def test_the_wording_is_the_papers():
    source = yaml.safe_load((SHARED / "prompts.yaml").read_text(encoding="utf-8"))
    assert set(templates()) == set(source["two_round"])
    for aspect, wording in templates().items():
        assert wording.describe == source["two_round"][aspect]["describe"]
        assert wording.rate == source["two_round"][aspect]["rate"]
        assert wording.one_round == source["one_round"].get(aspect, source["one_round"]["quality"])


def contents_differ(item, wording):
    return item.conversation[0].content != fill(wording.describe, item.prompt)


@needs_shared
@pytest.mark.parametrize(
    ("name", "aspect", "sizes"),
    [("agiqa-3k", "agiqa3k_quality_v0", (2385, 597)), ("aigciqa2023", "quality", (1800, 600))],
)
def test_published_data_sets_load_whole_and_use_these_words(name, aspect, sizes):
    folder = SHARED / "data" / name
    files = [folder / "quality_train.json", folder / "quality_test_res.json"]
    data = load_data_set(folder, conversations=[str(path) for path in files], images=False)
    assert [sum(item.split == split for item in data.items) for split in ("train", "test")] == list(sizes)
    assert (data.skipped, data.notes) == ((), ())
    wording = template_of(aspect)
    others = {item.prompt for item in data.items if contents_differ(item, wording)}
    assert len(others) <= 3  # AIGCIQA2023's table and conversations spell three prompts in two ways
    assert {item.conversation[2].content for item in data.items} == {wording.rate}
    answers = {Path(entry["image"]).name: entry["response_0"] for entry in json.loads(files[1].read_text())}
    for item in data.items:
        assert item.split == "train" or item.description == answers[item.name]


def test_every_template_takes_the_prompt_and_nothing_else():
    for aspect, wording in templates().items():
        assert wording.describe.count("{prompt}") == 1
        assert "{" not in wording.rate
        assert wording.one_round.count("{prompt}") == (0 if aspect == "authenticity" else 1)


def test_braces_in_prompts_survive():
    assert fill("<{prompt}>", "{prompt} {0} {{x}} %s \\1") == "<{prompt} {0} {{x}} %s \\1>"
