"""Conversations matched with rows: file names alone match too much, so prompts are compared too."""

import json
from pathlib import Path

import pytest

from agiqa.errors import DataError
from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.data.templates import fill, template_of
from tests.extract.small_sets import write_table

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
PROMPTS = ["a red bird on a wall", "a dog", "a dog on a boat", "thing 1", "thing 17"]
NAMES = [f"{k}.png" for k in range(len(PROMPTS))]


def write_talks(folder, questions, *, name="train.json", **more):
    roles = ("user", "assistant", "user", "assistant")
    entries = [
        {
            "id": str(k),
            "image": f"set/images/{k}.png",
            "conversations": [
                {"role": role, "content": text}
                for role, text in zip(roles, (f"<image>\n{question}", "It is dull.", "Rate?", "fair"), strict=True)
            ],
            **{key: values[k] for key, values in more.items()},
        }
        for k, question in enumerate(questions)
    ]
    (folder / name).write_text(json.dumps(entries), encoding="utf-8")
    return str(folder / name)


@pytest.fixture
def folder(tmp_path):
    rows = [[name, prompt, 3.0] for name, prompt in zip(NAMES, PROMPTS, strict=True)]
    return write_table(tmp_path, rows, ["name", "prompt", "mos_quality"])


def load(folder, *files, **options):
    return load_data_set(folder, conversations=files, images=False, **options)


def refused(folder, *files, **options):
    with pytest.raises(DataError) as caught:
        load(folder, *files, **options)
    return str(caught.value)


def words(wording, prompts=PROMPTS):
    return [fill(wording, prompt) for prompt in prompts]


TEMPLATE = template_of("quality").describe
WORDINGS = [TEMPLATE, template_of("authenticity").describe, "Describe {prompt}.", "{prompt}"]


@pytest.mark.parametrize("wording", WORDINGS)
def test_each_swapped_prompt_is_named_with_both_prompts_and_the_file(folder, wording):
    swapped = [PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[4], PROMPTS[3]]
    message = refused(folder, write_talks(folder, words(wording, swapped)))
    assert "4 problems" in message
    for own, other in ((1, 2), (2, 1), (3, 4), (4, 3)):
        assert (
            f"train.json, id '{own}': {own}.png has the prompt {PROMPTS[own]!r} (data.csv, line {own + 2}), "
            f"and the conversation is about {PROMPTS[other]!r}"
        ) in message
    kept = load(folder, write_talks(folder, words(wording, swapped)), on_bad_item="skip")
    assert [item.name for item in kept.items] == ["0.png"]


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_file_about_other_prompts_is_refused_whole(folder, wording):
    others = [f"an object of kind {k}" for k in range(len(PROMPTS))]
    path = write_talks(folder, words(wording, others))
    message = refused(folder, path)
    assert "5 problems" in message
    assert "0.png has the prompt 'a red bird on a wall' (data.csv, line 2)" in message
    assert "5 problems" in refused(folder, path, on_bad_item="skip")
    assert "an object of kind 0" in refused(folder, path, variant="no_id")


@pytest.mark.parametrize("wording", WORDINGS)
def test_the_right_prompts_are_accepted_whatever_their_spaces(folder, wording):
    spaced = [f" {prompt.replace(' ', '  ')} " for prompt in PROMPTS]
    assert len(load(folder, write_talks(folder, words(wording, spaced))).items) == len(PROMPTS)


def test_one_letter_in_two_forms_of_unicode_is_one_letter(tmp_path):
    folder = write_table(tmp_path, [["0.png", "a caf\u00e9", 3.0], ["1.png", "x", 3.0]], ["name", "prompt", "mos"])
    assert len(load(folder, write_talks(folder, words(TEMPLATE, ["a cafe\u0301", "x"]))).items) == 2


def test_prompts_in_two_wordings_of_one_file(folder):
    questions = words("Describe {prompt}.")[:2] + words("Describe {prompt} in detail.")[2:]
    assert len(load(folder, write_talks(folder, questions)).items) == len(PROMPTS)


def test_a_question_that_is_the_same_for_all_names_no_prompt(folder):
    assert len(load(folder, write_talks(folder, ["What do you see?"] * len(PROMPTS))).items) == len(PROMPTS)
    message = refused(folder, write_talks(folder, ["What?", "Who?", "What?", "How?", "Who?"]))
    assert "1.png has the prompt 'a dog' (data.csv, line 3), and its question does not name it: 'Who?'" in message


def test_a_stated_prompt_stands_in_for_the_question(folder):
    questions = ["What?", "Who?", "What?", "How?", "Who?"]
    assert len(load(folder, write_talks(folder, questions, prompt=PROMPTS)).items) == len(PROMPTS)
    message = refused(folder, write_talks(folder, questions, prompt=[*PROMPTS[:4], "thing 2"]))
    assert "4.png has the prompt 'thing 17' (data.csv, line 6), and the conversation is about 'thing 2'" in message
    assert "`prompt` is empty" in refused(folder, write_talks(folder, questions, prompt=[*PROMPTS[:4], " "]))


def test_a_word_in_ten_may_be_another_and_no_more(tmp_path):
    prompt = 'a cartoon of a dog saying "I see How you did there"'
    folder = write_table(tmp_path, [["0.png", prompt, 3.0], ["1.png", "x", 3.0]], ["name", "prompt", "mos"])
    once, twice = prompt.replace("How", "what"), prompt.replace("How", "what").replace("dog", "cat")
    assert len(load(folder, write_talks(folder, words(TEMPLATE, [once, "x"]))).items) == 2
    assert "0.png has the prompt" in refused(folder, write_talks(folder, words(TEMPLATE, [twice, "x"])))
    write_table(folder, [["0.png", prompt, 3.0], ["1.png", once, 3.0]], ["name", "prompt", "mos"])
    assert "0.png has the prompt" in refused(folder, write_talks(folder, words(TEMPLATE, [once, once])))


def test_each_aspect_is_compared(folder):
    quality = write_talks(folder, words(TEMPLATE), name="quality.json")
    wrong = [*PROMPTS[:4], "a house"]
    other = write_talks(folder, words(template_of("correspondence").describe, wrong), name="correspondence.json")
    message = refused(folder, quality, other, variant="id:quality+correspondence")
    assert "correspondence: correspondence.json, id '4': 4.png has the prompt 'thing 17'" in message


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published data sets are not in {SHARED}")
@pytest.mark.parametrize(("table", "file"), [("agiqa-3k", "aigciqa2023"), ("aigciqa2023", "agiqa-3k")])
def test_published_conversations_of_one_data_set_are_refused_with_the_images_of_another(tmp_path, table, file):
    """`0.png` occurs in many data sets: here, one set's conversations have the image names of another."""
    names = [line.split(",")[0] for line in (SHARED / table / "data.csv").read_text("utf-8").splitlines()[1:101]]
    entries = json.loads((SHARED / file / "quality_train.json").read_text("utf-8"))[:100]
    for entry, name in zip(entries, names, strict=True):
        entry["image"] = f"data/images/{name}"
    (tmp_path / "quality_train.json").write_text(json.dumps(entries), "utf-8")
    message = refused(SHARED / table, str(tmp_path / "quality_train.json"))
    assert "100 problems" in message
