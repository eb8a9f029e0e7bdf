"""What the teacher is asked: words, scores, images as they are sent, and what cannot be asked."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.extract import Item, load_data_set
from agiqa.extract.data.images import open_image, read_image_file
from agiqa.extract.teaching.answers import ASPECTS, KEYS, Explained, read_answer
from agiqa.extract.teaching.apis import api_of
from agiqa.extract.teaching.chats import Picture
from agiqa.extract.teaching.pictures import LONGEST_SIDE, MOST_BYTES, picture_of
from agiqa.extract.teaching.questions import QuestionSettings, input_tokens, questions
from agiqa.extract.teaching.wording_and_prices import PriceTable, Wording, read_yaml, shipped_prices, shipped_wording
from tests.extract.small_sets import write_set

MOS = {"quality": 3.456, "correspondence": 0.5, "authenticity": 5.0}


def item_of(name="1.png", prompt="a {fox} with {id}", labels=MOS, **others):
    return Item(name=name, prompt=prompt, conversation=(), image=None, labels=labels, image_sha256="0" * 64, **others)


def ask(item, **settings):
    return questions((item,), QuestionSettings(**settings))[0]


def test_the_question_holds_prompt_scores_scale_and_an_example_of_the_answer():
    question = ask(item_of())
    text = question.text
    assert "a {fox} with {id}\n" in text  # braces of a prompt have no meaning
    assert "from 0 (worst) to 5 (best)" in text
    assert re.findall(r"- ([a-z ]+): (\d\.\d\d)\n", text) == [
        ("quality", "3.46"),
        ("correspondence with the prompt", "0.50"),
        ("authenticity", "5.00"),
    ]
    example = json.loads(text[text.index("{\n") :])
    assert list(example) == ["id", *KEYS.values()]
    assert example["id"] == question.id
    assert re.fullmatch("[0-9a-f]{16}", question.id)
    assert isinstance(read_answer(json.dumps(example), ASPECTS), Explained)
    schema = question.request().schema
    assert schema["required"] == list(example)


def test_a_blind_question_shows_no_score_and_no_scale():
    blind = ask(item_of(), blind=True, mos_range=(0.0, 7.5)).text
    assert "a {fox} with {id}\n" in blind
    assert not re.search(r"3\.4|0\.5|5\.0|7\.5|worst|panel|opinion", blind)
    assert blind == ask(item_of(labels={}), blind=True, mos_range=(0.0, 7.5)).text


def test_only_the_aspects_asked_for_are_in_the_question():
    text = ask(item_of(), aspects=("correspondence",)).text
    assert "alignment_explanation" in text
    assert "quality_explanation" not in text
    assert "authenticity" not in text


def test_scales_and_their_precision():
    text = ask(item_of(labels={"quality": 0.12345}), aspects=("quality",), mos_range=(0.0, 1.0)).text
    assert "quality: 0.123\n" in text
    assert "from 0 (worst) to 1 (best)" in text
    assert "quality: 87.00\n" in ask(item_of(labels={"quality": 87}), aspects=("quality",), mos_range=(0, 100)).text


def test_key_and_id_follow_what_the_answer_depends_on():
    first, keys = ask(item_of()), set()
    others = [
        item_of(prompt="a dog"),
        item_of(labels=MOS | {"quality": 3.0}),
        replace(item_of(), image_sha256="1" * 64),
    ]
    for other in others:
        keys.add(ask(other).key)
    keys.add(ask(item_of(), blind=True).key)
    assert len(keys - {first.key}) == 4
    twin = ask(item_of(name="2.png"))
    assert twin.key == first.key
    assert twin.id != first.id  # batches join by it
    assert ask(item_of()).id == first.id


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("Sharp, worth 3.46 I would say.", True),
        ("Sharp, worth 3.5.", True),
        ("Its mean opinion score is high.", True),
        ("The MOS is high.", True),
        ("About 13.46 metres, or 3.465.", False),
        ("Three boats, 3 of them red.", False),
        ("Like a photograph at f/2.8.", False),
    ],
)
def test_an_explanation_that_gives_the_score_away_is_found(text, leaks):
    explanations = dict.fromkeys(ASPECTS, "Nothing.") | {"quality": text}
    assert (ask(item_of()).fault_of(explanations) is not None) == leaks
    assert ask(item_of(), blind=True).fault_of(explanations) is None
    prompted = ask(item_of(prompt="a door with the numbers 3.46 and 3.5"))
    assert (prompted.fault_of(explanations) is not None) == (leaks and "3." not in text)


@pytest.mark.parametrize(
    ("mos", "high", "text", "leaks"),
    [
        (3.5, 5, "worth 3.5", True),
        (4.0, 5, "4.0 of 5", True),
        (4.0, 5, "4 boats", False),
        (87.0, 100, "worth 87", True),
        (87.0, 100, "worth 88", False),
        (0.123, 1, "worth 0.12", True),
    ],
)
def test_scores_are_found_in_the_forms_that_people_write(mos, high, text, leaks):
    question = ask(item_of(labels={"quality": mos}), aspects=("quality",), mos_range=(0.0, high))
    assert (question.fault_of({"quality": text}) is not None) == leaks


def test_the_example_is_no_explanation():
    """Weak models copy it."""
    example = shipped_wording().example["quality"]
    assert "of the example" in ask(item_of(), blind=True).fault_of({"quality": example})


def test_items_without_a_mos_are_listed():
    items = item_of("a.png"), item_of("b.png", labels={"quality": 1.0}), item_of("c.png", labels={})
    with pytest.raises(DataError, match="2 problems") as caught:
        questions(items, QuestionSettings(aspects=("quality", "authenticity")))
    assert "b.png: no MOS of authenticity" in str(caught.value)
    assert "c.png: no MOS of quality and authenticity" in str(caught.value)
    assert re.findall(r"--\w+", caught.value.__notes__[0]) == ["--aspect", "--blind"]
    assert len(questions(items, QuestionSettings(aspects=("quality", "authenticity"), blind=True))) == 3


def test_aspects_are_checked():
    with pytest.raises(UnknownName, match="Did you mean 'quality'"):
        QuestionSettings(aspects=("qualty",))
    with pytest.raises(ConfigError, match="name each one once"):
        QuestionSettings(aspects=("quality", "quality"))


EXPLAINED = Explained(id="1", explanations={"quality": "Sharp."})


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"id": "1", "quality_explanation": "Sharp."}\n```',
        '<think>Like {"id"?</think> {"id": "1", "quality_explanation": " Sharp. "}',
        '{"id": "1", "quality_explanation": "Sharp.", "more": 3}\nI used {braces}.',
    ],
    ids=["fence", "thoughts", "words behind"],
)
def test_an_answer_is_found_among_other_text(text):
    assert read_answer(text, ["quality"]) == EXPLAINED


@pytest.mark.parametrize(
    "text", ["", "}{", "{", "{" * 9999 + "}", '{"id": "1", "quality_explanation": "\\ud83d"}', "{1}"]
)
def test_what_is_no_answer_has_a_reason(text):
    assert isinstance(read_answer(text, ["quality"]), str)


def saved(path, image, **options):
    image.save(path, **options)
    return read_image_file(path)


def noise(mode, size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(pixels, "RGBA")


@pytest.mark.parametrize(("name", "mime"), [("a.png", "png"), ("a.jpg", "jpeg"), ("a.webp", "webp")])
def test_common_files_are_sent_unchanged(tmp_path, name, mime):
    file = saved(tmp_path / name, noise("RGB"))
    assert picture_of(file) == Picture(content=file.content, mime=f"image/{mime}", size=(40, 30))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.bmp", "RGB", {}),
        ("a.tif", "RGB", {}),
        ("a.png", "RGBA", {}),
        ("a.jpg", "CMYK", {}),
        ("a.jpg", "RGB", turned()),
    ],
)
def test_other_files_are_sent_as_the_pixels_that_agiqa_sees(tmp_path, name, mode, options):
    file = saved(tmp_path / name, noise(mode), **options)
    sent = picture_of(file)
    assert sent.mime == "image/png"
    with Image.open(io.BytesIO(sent.content)) as seen:
        assert np.array_equal(np.asarray(seen), np.asarray(open_image(file)))
        assert sent.size == seen.size


def test_large_images_shrink(tmp_path):
    wide = picture_of(saved(tmp_path / "wide.png", noise("RGB", (2 * LONGEST_SIDE, 30))))
    assert wide.size == (LONGEST_SIDE, 15)
    heavy = saved(tmp_path / "heavy.png", noise("RGB", (2000, 2000)))
    assert len(heavy.content) > MOST_BYTES
    sent = picture_of(heavy)
    assert (sent.mime, sent.size) == ("image/jpeg", (2000, 2000))
    assert len(sent.content) <= MOST_BYTES


def test_an_image_that_changes_during_the_run_is_not_sent(tmp_path):
    data_set = load_data_set(write_set(tmp_path, 2, images=True), variant="no_id", images=True)
    first, second = questions(data_set.items, QuestionSettings(aspects=("quality",)))
    noise("RGB").save(tmp_path / "images" / "000.png")
    with pytest.raises(DataError, match="was replaced or changed"):
        first.request()
    assert second.request().turns[0].picture.size == (40, 32)


@pytest.mark.parametrize(("size", "tokens"), [((512, 512), 255), ((1024, 1024), 765), ((2048, 4096), 1105)])
def test_estimated_tokens_of_a_picture_are_those_that_the_provider_publishes(size, tokens):
    """The examples of OpenAI's documentation: 255 for one tile, 765 for 1024 x 1024, 1105 for 2048 x 4096."""
    picture = Picture(content=b"", mime="image/png", size=size)
    assert api_of("openai").picture_tokens("gpt-4o", picture) == tokens
    small = api_of("openai").picture_tokens("gpt-4o-mini-2024-07-18", picture)
    assert small == 2833 + 5667 * (tokens - 85) // 170


def test_estimated_tokens_are_near_what_the_method_reports():
    """About 1,570 tokens sent per image of AGIQA-3k."""
    prompt = "a saint noble high priestess pray for god in church, elevation view, HDR lighting"
    request = ask(item_of(prompt=prompt), aspects=("quality", "correspondence")).request()
    picture = Picture(content=b"", mime="image/png", size=(512, 512))
    request = replace(request, turns=(replace(request.turns[0], picture=picture),))
    assert 1300 < input_tokens(request, api_of("gemini"), "gemini-3") < 2000


def test_shipped_files_are_valid_and_found():
    assert set(shipped_wording().tasks) == set(ASPECTS)
    assert shipped_prices().price("https://api.openai.com/v1", "gpt-4o").model_dump() == {"input": 2.5, "output": 10.0}
    assert shipped_prices().price("https://api.openai.com/v1", "gpt-4o", batch=True).output == 5.0
    assert (
        shipped_prices().price("https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.5-pro").input
        == 1.25
    )
    assert shipped_prices().price("http://localhost:8000/v1", "gpt-4o") is None  # somebody else's model of that name
    assert shipped_prices().price("https://api.openai.com.example/v1", "gpt-4o") is None


def test_the_longest_url_that_fits_gives_the_price(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text(
        'servers: [{url: "", models: {m: {input: 1, output: 2}}},'
        ' {url: "http://here/", batch: 0.25, models: {m: {input: 4, output: 8}}}]'
    )
    table = read_yaml(path, PriceTable)
    assert table.price("http://there", "models/m").input == 1
    assert table.price("http://here/v1", "m", batch=True).model_dump() == {"input": 1.0, "output": 2.0}
    assert table.price("http://here/v1", "m").cost(1_000_000, 500_000) == 8.0


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (Wording, lambda text: text.replace("{scores}", ""), "known: .*lacks {scores}"),
        (Wording, lambda text: text.replace("Write no scores.", "From {low}."), "blind: .*must not have {low}"),
        (Wording, lambda text: text.replace("  authenticity:", "  truth:"), "tasks: .*expected the aspects quality"),
        (Wording, lambda text: text + "more: x\n", "more: Extra inputs"),
        (Wording, lambda _: "[1", "not YAML"),
        (PriceTable, lambda _: "servers: [{url: x, models: {m: {input: -1, output: 2}}}]", "servers.0.models.m.input"),
        (PriceTable, lambda _: "m: 3", "servers: Field required"),
    ],
)
def test_files_of_users_are_checked(tmp_path, kind, change, said):
    path = tmp_path / "own.yaml"
    shipped = Path(__file__).parents[3] / "extract" / "teaching" / "wording.yaml"
    path.write_text(change(shipped.read_text()))
    with pytest.raises(ConfigError, match=rf"own\.yaml: {said}"):
        read_yaml(path, kind)
