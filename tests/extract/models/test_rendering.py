"""Chat templates that trim, date, lack or spoil: the text, its tokens and their roles."""

import json

import numpy as np
import pytest

from agiqa.errors import ModelError
from agiqa.extract import open_backbone
from agiqa.extract.data.items import Message
from agiqa.extract.models.expansions import expand_roles
from agiqa.extract.models.rendering import Renderer, roles_of
from agiqa.store import TOKEN_ROLES
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import (
    PARTS_TEMPLATE,
    TEXT_TEMPLATE,
    make_tokenizer,
    write_text_checkpoint,
    write_vision_checkpoint,
)

SPECIAL, IMAGE, QUESTION, ANSWER = (TOKEN_ROLES[role] for role in ("special", "image", "question", "answer"))


def turns(*contents):
    roles = ("user", "assistant")
    return [Message(role=roles[index % 2], content=content) for index, content in enumerate(contents)]


def renderer(template, image_token=None, *extra):
    return Renderer(name="m", tokenizer=make_tokenizer(*extra), template=template, image_token=image_token)


def contents_of(rendered):
    return [rendered.text[start:stop] for start, stop, _ in rendered.spans]


@pytest.mark.parametrize(
    "contents",
    [
        ("  padded \n", "fair", "rate"),
        ("You rate images.", "user", "assistant"),
        ("{{ bos_token }} {% raw %}", "{prompt}", "\ue000"),
        ("same", "same", "same", "same"),
    ],
)
def test_contents_are_found_even_where_the_template_uses_the_same_words(contents):
    rendered = renderer(TEXT_TEMPLATE).render(turns(*contents))
    assert contents_of(rendered) == [content.strip() for content in contents]
    assert [role for _, _, role in rendered.spans] == [QUESTION, ANSWER, QUESTION, ANSWER][: len(contents)]


def test_a_model_without_template_gets_the_plain_one():
    plain = renderer(None)
    assert plain.plain
    rendered = plain.render(turns("rate", "fair"))
    assert rendered.text == "User: rate\nAssistant: fair\n"
    ids, roles = plain.tokenize(rendered)
    assert (ids == plain.tokenizer.bos_token_id).sum() == 1
    assert plain.tokenizer.decode(ids[roles == ANSWER].tolist()).strip() == "fair"


def with_named_templates(checkpoint, *names):
    """The checkpoint, its own chat template under the first of `names` and a useless one under the others."""
    path, own = checkpoint / "tokenizer_config.json", checkpoint / "chat_template.jinja"
    settings = json.loads(path.read_text())
    template = own.read_text() if own.exists() else settings["chat_template"]
    own.unlink(missing_ok=True)
    templates = dict.fromkeys(names, "{{ 'useless' }}") | {names[0]: template}
    settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    path.write_text(json.dumps(settings))
    return str(checkpoint)


@pytest.mark.parametrize("write", [write_text_checkpoint, write_vision_checkpoint, write_minicpm_checkpoint])
def test_of_several_chat_templates_the_default_one_counts(write, tmp_path):
    talk = turns("rate", "fair", "why?")
    alone = open_backbone(str(write(tmp_path / "alone")), device="cpu").prepare(talk, None, answer=True)
    several = open_backbone(with_named_templates(write(tmp_path / "several"), "default", "tool_use"), device="cpu")
    assert several.prepare(talk, None, answer=True).token_ids.tolist() == alone.token_ids.tolist()
    nameless = with_named_templates(write(tmp_path / "nameless"), "rag", "tool_use")
    with pytest.raises(ModelError, match=r"nameless: its chat templates are called rag, tool_use; call the one"):
        open_backbone(nameless, device="cpu")


def test_a_template_without_bos_stays_without_it():
    quiet = renderer("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    ids, _ = quiet.tokenize(quiet.render(turns("rate")))
    assert quiet.tokenizer.decode(ids.tolist()) == "[rate]"


def test_templates_that_print_the_date_print_one_and_the_same():
    dated = renderer(
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}{% for m in messages %}|{{ m.content }}{% endfor %}"
    )
    assert dated.render(turns("rate")).text == "26 Jul 2024|rate"


def test_a_template_that_rewrites_contents_is_refused():
    loud = renderer("{% for m in messages %}{{ m.content | replace('a', 'A') }}{% endfor %}")
    assert loud.render(turns("no such letter"[:5])).text == "no su"
    with pytest.raises(ModelError, match="rewrites the contents"):
        loud.render(turns("a b"))


def test_a_template_that_shows_nothing_is_refused():
    with pytest.raises(ModelError, match="does not show the messages"):
        renderer("hello")
    with pytest.raises(ModelError, match="one image"):
        renderer(PARTS_TEMPLATE.replace("IMAGE", ""), "<image>", "<image>")
    with pytest.raises(ModelError, match="only one user"):
        renderer("{{ raise_exception('only one user') }}")


def test_the_image_stands_once_before_the_first_question():
    for template in (PARTS_TEMPLATE.replace("IMAGE", "<image>"), TEXT_TEMPLATE, None):
        rendered = renderer(template, "<image>", "<image>").render(turns("rate", "fair", "why"), image=True)
        assert rendered.text.count("<image>") == 1
        assert rendered.text.index("<image>") < rendered.text.index("rate</s>" if template else "rate\n")
        assert contents_of(rendered)[1:] == ["fair", "why"]


def test_a_processor_may_write_more_than_the_image():
    """PaliGemma: BOS behind the image and an end of line; Idefics 2: a space before a word that touches the image."""

    def ids(*values):
        return np.asarray(values, dtype=np.int32)

    def decode(tokens):
        return "".join({5: "rate", 6: " it", 8: " rate"}.get(token, "?") for token in tokens)

    roles = np.asarray([SPECIAL, SPECIAL, QUESTION, QUESTION, ANSWER], dtype=np.uint8)
    more = expand_roles("m", ids(1, 9, 5, 6, 5), roles, ids(7, 9, 9, 1, 5, 6, 5, 4), 9, decode=decode)
    assert more.tolist() == [SPECIAL, IMAGE, IMAGE, SPECIAL, QUESTION, QUESTION, ANSWER, SPECIAL]
    spaced = expand_roles("m", ids(1, 9, 5, 6, 5), roles, ids(1, 7, 9, 9, 7, 8, 6, 5), 9, decode=decode)
    assert spaced.tolist() == [SPECIAL, SPECIAL, IMAGE, IMAGE, SPECIAL, QUESTION, QUESTION, ANSWER]


def test_expansion_keeps_roles_around_the_image():
    def ids(*values):
        return np.asarray(values, dtype=np.int32)

    roles = np.asarray([SPECIAL, SPECIAL, QUESTION, QUESTION], dtype=np.uint8)
    expanded = expand_roles("m", ids(1, 9, 5, 9), roles, ids(1, 7, 9, 9, 8, 9, 9, 7, 5, 9), 9)
    assert expanded.tolist() == [SPECIAL, SPECIAL, IMAGE, IMAGE, SPECIAL, IMAGE, IMAGE, SPECIAL, QUESTION, IMAGE]
    same = expand_roles("m", ids(1, 9, 5, 6), roles, ids(1, 9, 5, 6), 9)
    assert same.tolist() == [SPECIAL, IMAGE, QUESTION, QUESTION]
    with pytest.raises(ModelError, match="changes words"):
        expand_roles("m", ids(1, 9, 5, 6), roles, ids(1, 9, 9, 4, 6), 9)
    with pytest.raises(ModelError, match="changes words"):
        expand_roles("m", ids(1, 9, 5, 6), roles, ids(1, 9, 9, 4, 6), 9, decode=str)
    with pytest.raises(ModelError, match="no image token"):
        expand_roles("m", ids(1, 8, 5, 6), roles, ids(1, 8, 5, 6), 9)


def test_a_token_has_the_highest_role_of_its_characters():
    random = np.random.default_rng(0)
    for _ in range(200):
        length = int(random.integers(0, 30))
        cuts = np.sort(random.integers(0, length + 1, 6)).tolist()
        spans = [(cuts[k], cuts[k + 1], int(random.integers(1, 4))) for k in (0, 2, 4)]
        offsets = np.sort(random.integers(0, length + 1, (12, 2)), axis=1)
        characters = np.zeros(length, np.uint8)
        for start, stop, role in spans:
            characters[start:stop] = role
        slow = [int(characters[start:stop].max(initial=0)) for start, stop in offsets]
        assert roles_of(offsets, spans, length=length).tolist() == slow
