import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from agiqa.bench.demo.model import (
    FILTER_KINDS,
    PATCH,
    VOCABULARY,
    WIDTH,
    build_demo_model,
    build_tokenizer,
    draw_filters,
)
from agiqa.bench.demo.scenes import SIDE
from agiqa.extract.data.templates import fill, template_of

PROMPT = "three red sailboats on a calm sea at dawn, watercolour style"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    build_demo_model(out, seed=0)
    return out


@pytest.fixture(scope="module")
def processor(checkpoint: Path):
    return AutoProcessor.from_pretrained(checkpoint, local_files_only=True)


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    return AutoModelForImageTextToText.from_pretrained(checkpoint, local_files_only=True).eval()


def inputs_of(processor, image: Image.Image, prompt: str = PROMPT):
    question = fill(template_of("quality").one_round, prompt)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message])
    return processor(images=image, text=text, return_tensors="pt")


def hidden_states(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[-1][0]


@pytest.fixture(scope="module")
def image(drawn: Path) -> Image.Image:
    return Image.open(next(iter(sorted((drawn / "images").glob("*.png"))))).convert("RGB")


def test_the_same_seed_gives_the_same_bytes_in_another_process(
    tmp_path: Path, checkpoint: Path, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    code = "import sys; from pathlib import Path; from agiqa.bench.demo.model import build_demo_model; build_demo_model(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, capture_output=True)
    assert files_of(tmp_path / "again") == files_of(checkpoint)


def test_another_seed_gives_other_weights_and_the_same_tokenizer(
    tmp_path: Path, checkpoint: Path, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    build_demo_model(tmp_path, seed=1)
    first, second = files_of(checkpoint), files_of(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == ["model.safetensors"]


def test_the_official_classes_load_it_and_its_logits_are_linear_in_its_hidden_states(model, processor, image) -> None:
    inputs = inputs_of(processor, image)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    states = outputs.hidden_states[-1][0]
    assert states.shape == (inputs["input_ids"].shape[1], WIDTH)
    assert outputs.logits.shape[-1] == VOCABULARY == len(model.lm_head.weight)
    torch.testing.assert_close(outputs.logits[0], states @ model.lm_head.weight.T)
    assert torch.equal(states, hidden_states(model, inputs))


def test_a_conversation_is_short_and_has_one_token_per_patch(model, processor, image) -> None:
    ids = inputs_of(processor, image)["input_ids"][0]
    assert int((ids == model.config.image_token_id).sum()) == (SIDE // PATCH) ** 2 == 64
    assert 60 <= len(ids) - 64 <= 110


def test_pictures_of_the_demo_reach_the_model_pixel_by_pixel(processor, image) -> None:
    pixels = inputs_of(processor, image)["pixel_values"][0]
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_pictures_of_other_sizes_fit_too(model, processor) -> None:
    states = hidden_states(model, inputs_of(processor, Image.new("RGB", (333, 100), "teal")))
    assert torch.isfinite(states).all()


def test_damage_to_the_image_is_felt_by_the_last_token_of_the_text(model, processor, image) -> None:
    clean = hidden_states(model, inputs_of(processor, image))[-1]
    small = image.resize((SIDE // 8, SIDE // 8)).resize((SIDE, SIDE))
    blurred = hidden_states(model, inputs_of(processor, small))[-1]
    assert (clean - blurred).norm() > 0.1 * clean.norm()


def test_text_is_felt_too(model, processor, image) -> None:
    one = hidden_states(model, inputs_of(processor, image))[-1]
    other = hidden_states(model, inputs_of(processor, image, PROMPT.replace("red", "blue")))[-1]
    assert not torch.equal(one, other)


def test_filters_see_no_even_grey_or_colour() -> None:
    filters = draw_filters(2 * len(FILTER_KINDS), torch.Generator().manual_seed(0))
    assert filters.shape == (2 * len(FILTER_KINDS), 3, PATCH, PATCH)
    even = torch.tensor([0.3, -0.8, 0.5])[None, :, None, None]
    assert (filters * even).sum((1, 2, 3)).abs().max() < 1e-4
    assert (filters.flatten(1).norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("text", [PROMPT, "Ein Äffchen · 猿 🙈", "a\n\n  b\t{%}", "<|im_end|", ""])
def test_the_tokenizer_writes_any_text_and_reads_it_back(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_of_the_questions_are_single_tokens() -> None:
    tokenizer = build_tokenizer()
    for word in ("bad", " poor", " fair", " good", " excellent", " quality", " image"):
        assert len(tokenizer.tokenize(word)) == 1
