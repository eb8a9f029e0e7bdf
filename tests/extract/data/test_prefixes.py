"""Every conversation begins with those that `prefixes_of` names, message by message, from tables and from files."""

import json

import pytest

from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.data.templates import VARIANTS, aspects_of, prefixes_of
from tests.extract.data.test_several_aspects import NAMES, talks_of
from tests.extract.small_sets import COLUMNS, write_set, write_table

BOTH, ALL = "quality+correspondence", "quality+correspondence+authenticity"
WHOLE = [*VARIANTS, *(f"{kind}:{aspects}" for kind in ("described", "id", "full") for aspects in (BOTH, ALL))]
ASPECTS = ALL.split("+")


@pytest.fixture(params=["table", "files"])
def load(request, tmp_path):
    """Loads the set of four rows as a variant; the descriptions are in its table, or in three files."""
    write_set(tmp_path, 4)
    if request.param == "table":
        header = [*COLUMNS[:-1], *(f"description_{aspect}" for aspect in ASPECTS), "rating"]
        rows = [[name, "a picture", 2.0, "train", *(f"{one} of {name}" for one in ASPECTS), "fair"] for name in NAMES]
        write_table(tmp_path, rows, columns=header)
    for aspect in ASPECTS:
        (tmp_path / f"{aspect}.json").write_text(json.dumps(talks_of(aspect, NAMES)))

    def loaded(variant):
        files = [str(tmp_path / f"{aspect}.json") for aspect in aspects_of(variant, "quality")]
        given = files if request.param == "files" else ()
        return load_data_set(tmp_path, conversations=given, variant=variant, images=False).items

    return loaded


@pytest.mark.parametrize("whole", WHOLE)
def test_a_conversation_begins_with_each_of_its_prefixes(whole, load):
    items, ends = load(whole), prefixes_of(whole, "quality")
    assert list(ends.values()) == sorted(ends.values())
    for name, count in ends.items():
        for long, short in zip(items, load(name), strict=True):
            assert long.conversation[:count] == short.conversation
            assert len(long.conversation) > count
            assert long.prefix_authors[name] == short.text_author
            assert long.prefix_authors.keys() == ends.keys()


def test_what_has_no_shorter_conversation():
    assert prefixes_of("no_id", "quality") == prefixes_of("question", "quality") == {}
    assert "id" not in prefixes_of(f"full:{BOTH}", "quality")
    assert list(prefixes_of(f"full:{ALL}", "quality")) == [
        *("question", "described", f"described:{BOTH}", f"described:{ALL}", f"id:{ALL}")
    ]
