"""Provenance of two models compared: what must be the same for a head, what is a warning, and what does not count."""

import pytest

from agiqa.errors import HeadError
from agiqa.extract.models.provenance import check_model

RECORDED = {
    "name": "base+tuned",
    "revision": None,
    "files": {"model.safetensors": "a" * 64, "tokenizer.json": "b" * 64, "config.json": "c" * 64},
    "adapter": {"name": "tuned", "files": {"adapter_config.json": "d" * 64, "adapter_model.safetensors": "e" * 64}},
    "chat_template": {"sha256": "f" * 64},
    "image": {"slices": 9, "resolution": 448},
    "dtype": "bfloat16",
    "attention": "sdpa",
    "versions": {"torch": "2.13"},
}


def changed(**parts):
    return {**RECORDED, **parts}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (changed(files={**RECORDED["files"], "model.safetensors": "0" * 64}), ("model base (weights aaaa", "00000")),
        (changed(files={**RECORDED["files"], "tokenizer.json": "0" * 64}), ("tokenizer of base+tuned (bbbb", "00000")),
        (changed(adapter=None), ("the adapter tuned (", "you gave no adapter")),
        (changed(adapter={**RECORDED["adapter"], "files": {"adapter_config.json": "0"}}), ("adapter tuned (",)),
        (changed(chat_template={"sha256": "0" * 64}), ("chat template of base+tuned (ffff", "00000")),
        (changed(image={"slices": 4, "resolution": 448}), ("at most 9 slices", "at most 4 slices")),
        (changed(image=None), ("at most 9 slices", "you gave no image slices")),
        (changed(dtype="float32"), ("bfloat16 (--dtype)", "float32 (--dtype)")),
    ],
    ids=["weights", "tokenizer", "adapter", "config", "template", "slices", "uncut", "dtype"],
)
def test_another_model_is_refused_by_both_names(found, words):
    with pytest.raises(HeadError) as caught:
        check_model(RECORDED, found, head="The head h")
    assert str(caught.value).startswith("The head h was trained with ")
    for word in words:
        assert word in str(caught.value)


def test_an_adapter_on_what_had_none_is_refused():
    plain = changed(adapter=None)
    with pytest.raises(HeadError, match=r"trained with no adapter; you gave the adapter tuned \("):
        check_model(plain, RECORDED, head="The head h")


def test_names_places_and_versions_do_not_matter():
    moved = changed(
        name="elsewhere+mine",
        revision="abc",
        files={**RECORDED["files"], "model.safetensors.index.json": "0" * 64},
        adapter={**RECORDED["adapter"], "name": "mine"},
        versions={"torch": "3.0"},
    )
    assert check_model(RECORDED, moved, head="The head h") == []


def test_settings_and_attention_are_told():
    other = changed(files={**RECORDED["files"], "config.json": "0" * 64}, attention="eager")
    assert check_model(RECORDED, other, head="The head h") == [
        "The head h was trained with another config.json of base+tuned",
        "The head h was trained with sdpa attention, and this is eager",
    ]


def test_what_a_store_does_not_state_is_not_compared():
    assert check_model({"name": "made by hand"}, RECORDED, head="The head h") == []
