"""A tokenizer of other weights is refused before any work; unused special tokens without embedding are allowed."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from agiqa.errors import DataError, ModelError
from agiqa.extract import Message, open_backbone
from tests.extract.tiny_minicpm import write_minicpm_checkpoint


def grown(checkpoint, folder, *words, special=False):
    """A copy of the checkpoint with `words` added to its tokenizer only; and the first new id."""
    shutil.copytree(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(list(words), special_tokens=special)
    tokenizer.save_pretrained(folder)
    return folder, size


def test_words_beyond_the_embedding_are_refused_as_the_model_is_opened(tiny_text_checkpoint, tmp_path):
    folder, size = grown(tiny_text_checkpoint, tmp_path / "m", "overall", "sharpness")
    with pytest.raises(ModelError) as caught:
        open_backbone(str(folder), device="cpu")
    told = f"the tokenizer has ids up to {size + 1}, and the model's vocabulary is {size} (overall, sharpness have no"
    assert told in str(caught.value)


def test_an_image_model_too(tiny_vision_checkpoint, tmp_path):
    folder, size = grown(tiny_vision_checkpoint, tmp_path / "m", "overall")
    with pytest.raises(ModelError, match=rf"the tokenizer has ids up to {size}, and the model's vocabulary is {size}"):
        open_backbone(str(folder), device="cpu")


def test_special_tokens_beyond_it_matter_only_in_a_text(tiny_text_checkpoint, tmp_path):
    """As Gemma 3 1B keeps the image mark of its larger siblings."""
    folder, size = grown(tiny_text_checkpoint, tmp_path / "m", "<image_mark>", special=True)
    backbone = open_backbone(str(folder), device="cpu")
    backbone.hidden_states([backbone.prepare([Message(role="user", content="rate")], None)])
    with pytest.raises(DataError, match=rf"holds the token '<image_mark>' \(id {size}\), and the vocabulary of"):
        backbone.prepare([Message(role="user", content="rate <image_mark>")], None)


def test_a_minicpm_with_a_smaller_vocabulary(tmp_path):
    folder = write_minicpm_checkpoint(tmp_path / "m")
    text = (folder / "config.json").read_text()
    assert '"vocab_size": 350' in text
    (folder / "config.json").write_text(text.replace('"vocab_size": 350', '"vocab_size": 300'))
    with pytest.raises(ModelError, match="the tokenizer has ids up to 349, and the model's vocabulary is 300"):
        open_backbone(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_weights_of_another_vocabulary_are_refused_before_they_are_read(tiny_text_checkpoint, tmp_path, name):
    folder = tmp_path / "m"
    shutil.copytree(tiny_text_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    rows = len(tensors[name])
    tensors[name] = tensors[name][: rows - 3].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    backbone = open_backbone(str(folder), device="cpu")
    told = rf"1 mismatched weight in .*{name} is \({rows - 3}, 32\) in the file and \({rows}, 32\) in the model"
    with pytest.raises(ModelError, match=told):
        backbone.check_tensors()
