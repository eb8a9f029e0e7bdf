"""Conversation files in the forms of LLaVA and of OpenAI, which say the same as M3-AGIQA's own."""

import json

import pytest

from agiqa.errors import DataError
from agiqa.extract.data.datasets import load_data_set

ROLES = ("user", "assistant", "user", "assistant")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.csv").write_text("name,prompt,mos\na.png,a cat,1\n")
    return tmp_path


def write_json(path, talks):
    path.write_text(json.dumps(talks), encoding="utf-8")
    return path


def answers_of(record, folder):
    """What the model reads of a conversation file with one record."""
    path = write_json(folder / "talks.json", [record])
    item = load_data_set(folder, conversations=[str(path)], images=False, variant="full").items[0]
    return item.name, [(turn.role, turn.content) for turn in item.conversation]


def test_conversations_in_the_forms_of_llava_and_openai(folder):
    texts = ("Look?", "It is dull.", "Rate?", "fair")
    expected = ("a.png", list(zip(ROLES, texts, strict=True)))
    speakers = ("human", "gpt", "human", "gpt")
    marked = ("Look?\n<image>", *texts[1:])
    llava = [{"from": who, "value": text} for who, text in zip(speakers, marked, strict=True)]
    assert answers_of({"id": 1, "image": "x/a.png", "conversations": llava}, folder) == expected
    plain = [{"role": role, "content": text} for role, text in zip(ROLES, texts, strict=True)]
    system = {"role": "system", "content": "Be brief."}
    assert answers_of({"image": {"bytes": None, "path": "a.png"}, "messages": [system, *plain]}, folder) == expected
    assert answers_of({"images": ["a.png"], "messages": plain}, folder) == expected
    picture = {"type": "image_url", "image_url": {"url": "file:///data/a.png"}}
    parts = [{"role": "user", "content": [picture, {"type": "text", "text": "Look?"}]}, *plain[1:]]
    assert answers_of({"messages": parts}, folder) == expected


def test_conversations_with_several_images_have_no_image(folder):
    turns = [{"role": role, "content": "x"} for role in ROLES]
    record = {"image": ["a.png", "b.png"], "conversations": turns}
    path = write_json(folder / "t.json", [record])
    with pytest.raises(DataError, match="has no `image`"):
        load_data_set(folder, conversations=[str(path)], images=False)
