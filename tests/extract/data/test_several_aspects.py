"""Descriptions of several aspects in one conversation: their order, their files, and everything that may be missing."""

import json

import pytest

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.data.templates import aspects_of, fill, template_of
from tests.extract.small_sets import write_set, write_table

BOTH = "id:quality+correspondence"


def talks_of(aspect, names):
    contents = f"<image>\nDescribe {aspect}?", f"{aspect} of NAME", f"Rate {aspect}?", "fair"
    roles = ("user", "assistant", "user", "assistant")
    return [
        {
            "id": name,
            "image": f"set/images/{name}",
            "conversations": [
                {"role": role, "content": content.replace("NAME", name)}
                for role, content in zip(roles, contents, strict=True)
            ],
        }
        for name in names
    ]


NAMES = ["000.png", "001.png", "002.png", "003.png"]


@pytest.fixture
def folder(tmp_path):
    """Four rows, and a conversation file for each of three aspects."""
    write_set(tmp_path, count=4)
    for aspect in ("quality", "correspondence", "authenticity"):
        write(tmp_path, aspect, NAMES)
    return tmp_path


def write(folder, aspect, names, *, name=None):
    path = folder / (name or f"{aspect}.json")
    path.write_text(json.dumps(talks_of(aspect, names)))
    return path


def load(folder, variant=BOTH, *files, **options):
    given = files or [folder / f"{aspect}.json" for aspect in ("quality", "correspondence")]
    return load_data_set(folder, conversations=[str(file) for file in given], variant=variant, images=False, **options)


def contents(item):
    return [message.content for message in item.conversation]


def test_descriptions_follow_each_other_and_the_first_aspect_is_rated(folder):
    item = load(folder).items[1]
    assert contents(item) == [
        "Describe quality?",
        "quality of 001.png",
        "Describe correspondence?",
        "correspondence of 001.png",
        "Rate quality?",
    ]
    assert [message.role for message in item.conversation] == ["user", "assistant"] * 2 + ["user"]
    assert item.description == "quality of 001.png"


def test_full_adds_the_rating_word_of_the_first_aspect(folder):
    word = {"id": (), "full": ("fair",)}
    for variant in ("id", "full"):
        found = contents(load(folder, f"{variant}:quality+correspondence").items[1])
        assert found == [*contents(load(folder).items[1]), *word[variant]]
    columns = ["name", "prompt", "mos_quality", "description_quality", "description_correspondence", "rating"]
    table = write_table(
        folder / "table", [["a", "p", 3, "sharp", "fits", "good"], ["b", "p", 3, "dull", "fits", ""]], columns
    )
    found = load_data_set(table, variant="full:quality+correspondence", images=False, on_bad_item="skip")
    assert contents(found.items[0])[1::2] == ["sharp", "fits", "good"]
    (problem,) = found.skipped
    assert problem.startswith("b (data.csv, line 3): no rating word")


def test_the_order_is_the_one_given_whatever_that_of_the_files(folder):
    files = [folder / f"{aspect}.json" for aspect in ("authenticity", "quality", "correspondence")]
    turned = load(folder, "id:correspondence+authenticity+quality", *files, aspect="correspondence").items[0]
    assert contents(turned)[::2] == [
        "Describe correspondence?",
        "Describe authenticity?",
        "Describe quality?",
        "Rate correspondence?",
    ]


def test_aspect_and_split_before_a_file_whose_name_does_not_tell(folder):
    paths = [
        write(folder, aspect, NAMES, name=f"answers{i}.json") for i, aspect in enumerate(("quality", "correspondence"))
    ]
    data = load(folder, BOTH, f"quality:train={paths[0]}", f"correspondence:{paths[1]}", on_bad_item="skip")
    assert contents(data.items[0])[:4:2] == ["Describe quality?", "Describe correspondence?"]
    assert [item.split for item in data.items] == ["train"] * 3  # the fourth is in split test by the table
    with pytest.raises(ConfigError, match=r"which aspect do these describe\? Write quality:.*answers1\.json or corr"):
        load(folder, BOTH, f"quality:{paths[0]}", paths[1])


def test_the_data_file_itself_is_on_the_rated_aspect(folder):
    data = load_data_set(
        write(folder, "quality", NAMES, name="answers.json"),
        conversations=[str(folder / "correspondence.json")],
        labels=folder / "data.csv",
        variant=BOTH,
        images=False,
    )
    assert contents(data.items[0])[-1] == "Rate quality?"


def test_every_missing_description_is_named_and_counted(folder):
    write(folder, "correspondence", NAMES[:2])
    write(folder, "quality", NAMES[1:])
    with pytest.raises(DataError) as caught:
        load(folder)
    message = str(caught.value)
    assert "3 problems" in message
    assert "000.png (data.csv, line 2): no description of quality (correspondence.json, id '000.png' has it)" in message
    assert "003.png (data.csv, line 5): no description of correspondence (quality.json, id '003.png' has it)" in message
    data = load(folder, on_bad_item="skip")
    assert [item.name for item in data.items] == ["001.png"]
    assert len(data.skipped) == 3
    assert data.notes == (
        "1 of 4 images have no description of quality.",
        "2 of 4 images have no description of correspondence.",
    )


def test_an_aspect_without_any_file_or_any_of_these_images(folder):
    with pytest.raises(DataError, match=r"No descriptions of correspondence; .*--conversations correspondence:FILE"):
        load(folder, BOTH, folder / "quality.json")
    with pytest.raises(ConfigError, match=r"authenticity\.json has descriptions of authenticity; .*quality and corr"):
        load(folder, BOTH, folder / "quality.json", f"authenticity:{folder / 'authenticity.json'}")
    write(folder, "correspondence", ["x.png"])
    with pytest.raises(DataError, match=r"no image in common: the conversations speak of 'set/images/x\.png'"):
        load(folder)


def test_splits_that_two_aspects_disagree_on(folder):
    files = [f"train={folder / 'quality.json'}", f"test={folder / 'correspondence.json'}"]
    with pytest.raises(DataError, match=r"000\.png \(data\.csv, line 2\): in the splits \['test', 'train'\] at once"):
        load(folder, BOTH, *files)


def table_of(folder, columns, *rows):
    return write_table(folder, [[f"{k}.png", f"p{k}", 3.0, *row] for k, row in enumerate(rows)], columns)


COLUMNS = ["name", "prompt", "mos_quality", "description_correspondence", "description"]


def test_descriptions_of_a_table_in_the_words_of_the_templates(tmp_path):
    """`description` belongs to the aspect asked for; columns of other aspects are ignored."""
    data = table_of(tmp_path, [*COLUMNS, "description_authenticity"], ["fits", "sharp", ""], ["off", "blurry", "odd"])
    quality, correspondence = template_of("quality"), template_of("correspondence")
    first = load_data_set(data, variant=BOTH, images=False).items[0]
    assert contents(first) == [
        fill(quality.describe, "p0"),
        "sharp",
        fill(correspondence.describe, "p0"),
        "fits",
        quality.rate,
    ]
    assert first.description == "sharp"
    plain = load_data_set(data, variant="id", images=False).items[1]
    assert contents(plain) == [fill(quality.describe, "p1"), "blurry", quality.rate]
    named = table_of(
        tmp_path / "named", ["description_quality" if c == COLUMNS[-1] else c for c in COLUMNS], ["a", "b"]
    )
    other = load_data_set(named, variant="id", aspect="correspondence", images=False).items[0]
    assert contents(other) == [fill(correspondence.describe, "p0"), "a", correspondence.rate]
    turned = load_data_set(named, variant="id:correspondence+quality", aspect="correspondence", images=False).items[0]
    assert contents(turned)[1::2] == ["a", "b"]


def test_descriptions_that_a_table_lacks(tmp_path):
    data = table_of(tmp_path, COLUMNS, ["fits", "sharp"], ["", "blurry"], [" ", ""])
    with pytest.raises(DataError) as caught:
        load_data_set(data, variant=BOTH, images=False)
    assert "2 problems" in str(caught.value)
    assert "1.png (data.csv, line 3): no description of correspondence; give" in str(caught.value)
    assert "2.png (data.csv, line 4): no description of quality and correspondence; give" in str(caught.value)
    assert len(load_data_set(data, variant=BOTH, images=False, on_bad_item="skip").items) == 1
    with pytest.raises(
        DataError, match=r"descriptions of authenticity, and there are none.*'description_authenticity'"
    ):
        load_data_set(data, variant="id:quality+authenticity", images=False)
    with pytest.raises(DataError, match="two columns mean the same"):
        load_data_set(data, variant="id", aspect="correspondence", images=False)


def test_plain_variants_take_files_of_one_aspect(folder):
    with pytest.raises(ConfigError, match="has descriptions of correspondence; the conversation holds quality"):
        load(folder, "id", f"correspondence:{folder / 'correspondence.json'}")
    named_otherwise = load(folder, "id", folder / "correspondence.json")
    assert contents(named_otherwise.items[0])[-1] == "Rate correspondence?"


@pytest.mark.parametrize(
    ("variant", "error", "expected"),
    [
        ("id:quality", ConfigError, "lists one aspect; that is the variant id"),
        ("id:quality+quality", ConfigError, "repeats an aspect"),
        ("id:quality+colour", UnknownName, "No aspect is called 'colour'"),
        ("id:", UnknownName, "No conversation variant is called 'id:'"),
        ("both:quality+correspondence", UnknownName, "No conversation variant"),
        ("full:quality", ConfigError, "lists one aspect; that is the variant full"),
        ("id:correspondence+quality", ConfigError, "rates its first aspect, correspondence, and --aspect is quality"),
    ],
)
def test_lists_that_mean_nothing(variant, error, expected):
    with pytest.raises(error, match=expected):
        aspects_of(variant, "quality")


def test_prefixes_that_are_no_aspects(folder):
    with pytest.raises(UnknownName, match="Did you mean 'quality'"):
        load(folder, BOTH, f"qualty:{folder / 'quality.json'}")
    odd = folder / "a:b=c.json"
    odd.write_text((folder / "quality.json").read_text())
    assert len(load(folder, "id", odd).items) == 4
