"""The first token of each rating word, in the chat template of a model."""

from transformers import AutoTokenizer

from agiqa.extract import open_backbone
from agiqa.extract.models.rating_tokens import rating_tokens
from agiqa.store.format.labels import RATING_WORDS


def test_they_are_where_the_template_of_transformers_tells_answers_apart(tiny_text_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_text_checkpoint)
    rendered = {
        word: tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": word}], tokenize=False
        )
        for word in RATING_WORDS
    }
    ids = {word: tokenizer(text, add_special_tokens=False)["input_ids"] for word, text in rendered.items()}
    place = next(k for k, column in enumerate(zip(*ids.values(), strict=False)) if len(set(column)) > 1)
    backbone = open_backbone(str(tiny_text_checkpoint), device="cpu")
    assert rating_tokens(backbone) == {word: one[place] for word, one in ids.items()}


def test_models_of_images_have_them_too(tiny_vision_checkpoint):
    found = rating_tokens(open_backbone(str(tiny_vision_checkpoint), device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_vision_checkpoint)
    assert found == {word: tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in RATING_WORDS}


def test_a_backbone_without_a_template_has_none():
    assert rating_tokens(object()) is None
