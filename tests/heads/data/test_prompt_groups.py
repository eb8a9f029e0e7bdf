"""One rule for which prompts are the same, in splits, leak counts, run folders and transfers."""

import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agiqa.bench.transfer.sides import Side, shared
from agiqa.heads import HeadConfig, TrainConfig, evaluate, train_head
from agiqa.heads.data.prompt_groups import KnownPrompts, PromptOverlap, normalise_prompt, prompt_groups
from agiqa.heads.data.splits import make_partition
from tests.store.conftest import make_content
from tests.store.conftest import make_store as make_real_store

ALIKE = {
    "a full stop": ("a cat.", "a cat"),
    "space before a comma": ("a cat , sitting", "a cat, sitting"),
    "no space after a comma": ("a cat,sitting", "a cat, sitting"),
    "case and space": ("A cat", " a  CAT\n"),
    "case that lengthens": ("STRASSE", "straße"),
    "composition": ("café\u2019s door", "cafe\u0301's door"),
    "ligature and full width": ("ﬁne \uff23\uff21\uff34\uff01", "fine cat"),
    "curly quotes": ("\u201ca cat\u201d it\u2019s", '"a cat" it\'s'),
    "backticks": ("`a cat` don`t", "a cat don't"),
    "accents as apostrophes": ("don\u00b4t", "dont"),
    "apostrophe after a number": ("the 1980\u2019s", "the 1980s"),
    "dashes": ("sci-fi \u2013 city", "sci fi \u2014 city"),
    "underscores and brackets": ("<a_cat>", "a cat"),
    "zero-width space": ("a cat\u200b", "a cat"),
    "byte-order mark and soft hyphen": ("\ufeffa ca\u00adt", "a cat"),
    "variation selector": ("a \u2764\ufe0f", "a \u2764"),
    "Chinese punctuation": ("一只猫\uff0c在草地上。", "一只猫 在草地上"),
    "emoji beside a word": ("a cat🐱", "a cat 🐱!"),
}
DIFFERENT = [
    ("1.5 m", "15 m"),
    ("a man of 6'2", "a man of 62"),
    ("5\u20324 tall", "54 tall"),
    ("a cat", "acat"),
    ("c++", "c"),
    ("$5", "5"),
    ("🐱", "🐶"),
    ("!!!", "???"),
    ("!!!", ""),
    ("🐱", ""),
    ("über", "uber"),
    ("一只猫", "一只狗"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE.values(), ids=ALIKE.keys())
def test_prompts_that_look_alike_are_one_group(one, other):
    assert normalise_prompt(one) == normalise_prompt(other)
    assert prompt_groups([one, "b", other]).tolist() in ([0, 1, 0], [1, 0, 1])


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=lambda prompt: ascii(prompt))
def test_prompts_that_say_something_else_stay_apart(one, other):
    assert normalise_prompt(one) != normalise_prompt(other)


@given(
    st.text(
        alphabet=st.one_of(st.characters(), st.sampled_from("aé'\u2019\u00b4`.,- \u0301\u200b\u115f½…猫")), max_size=12
    )
)
@example(":\u00b8")  # folded, its cedilla is a mark, which is no punctuation
def test_how_unicode_writes_a_prompt_does_not_matter(prompt):
    normal = normalise_prompt(prompt)
    assert normalise_prompt(normal) == normal
    for form in ("NFC", "NFD"):
        assert normalise_prompt(unicodedata.normalize(form, prompt)) == normal
    assert normal or not any(character.isalnum() and character.isascii() for character in prompt)


def test_known_prompts_are_counted_as_verbatim_and_as_nearly_the_same():
    known = KnownPrompts(["a cat.", "a dog"])
    found = known.count(["a cat", "a cat.", "A dog!", "a dog", "a bird"])
    assert found == PromptOverlap(same=4, verbatim=2)
    assert found.note() == " (2 verbatim, 2 nearly)"
    assert PromptOverlap(same=3, verbatim=3).note() == ""


def nearly(store):
    """`store` with two images of each prompt, of which the second of every other pair has a full stop more."""
    prompts = [f"a cat no {k // 2}{'.' if k % 4 == 1 else ''}" for k in range(len(store.items.names))]
    return replace(store, items=replace(store.items, prompts=prompts))


def test_grouped_and_folds_do_not_tear_near_identical_prompts(make_store):
    store = nearly(make_store(80))
    for settings in ({"split": "grouped"}, {"split": "folds", "folds": 4, "fold": 1}):
        partition = make_partition(store, TrainConfig(**settings))
        for items in (partition.validation, partition.test):
            assert sorted({int(k) ^ 1 for k in items}) == sorted(items.tolist())
        assert partition.leak == PromptOverlap(same=0, verbatim=0)


def test_the_record_of_a_published_split_counts_both_kinds_of_leak(make_store):
    store = nearly(make_store(40))
    store = replace(store, items=replace(store.items, splits=["train", "test"] * 20))
    partition = make_partition(store, TrainConfig(validation=0.0))
    assert partition.record()["leak"] == {
        "test_items_with_a_training_prompt": 20,
        "test_items_with_a_training_prompt_verbatim": 10,
        "share": 1.0,
    }
    assert (
        "20 of 20 test items have a prompt that also occurs in training (10 verbatim, 10 nearly)"
        in (partition.warnings()[0])
    )


def test_evaluate_tells_how_many_prompts_are_known_nearly(make_store, tmp_path):
    store = nearly(make_store(60))
    head = HeadConfig(projection="sketch", encoder="none", width=4)
    run = train_head(store, tmp_path / "run", head=head, train=TrainConfig(split="grouped", epochs=1))
    trained = sorted(k for part in ("train", "validation") for k in _numbers(run, store, part))
    others = [f"x{k}.png" for k in range(60)]
    spelled = [prompt.replace("cat", "CAT") if k % 4 == 0 else prompt for k, prompt in enumerate(store.items.prompts)]
    items = replace(store.items, names=others, prompts=spelled, splits=["test"] * 60)
    told = evaluate(run, replace(store, id="other", items=items))["warnings"]
    verbatim = sum(k % 4 != 0 for k in trained)
    assert told == [
        f"{len(trained)} of 60 items have a prompt that occurs in its training "
        f"({verbatim} verbatim, {len(trained) - verbatim} nearly)."
    ]


def _numbers(run, store, part):
    """The items of a part, whose names are their own in `store`."""
    names = {name for name, _ in run.parts().pairs[part]}
    return [k for k, name in enumerate(store.items.names) if name in names]


def test_a_transfer_counts_both_kinds_of_shared_prompts(tmp_path):
    def side(name, prompts):
        content = make_content([4] * 8)
        items = replace(content.items, names=[f"{name}{k}" for k in range(8)], prompts=prompts)
        store = make_real_store(tmp_path / f"{name}.agiqa", replace(content, items=items))
        partition = make_partition(store, TrainConfig(split="grouped", validation=0.2, test_share=0.3))
        return Side(name=name, store=store, partition=replace(partition, test=np.arange(8)))

    source = side("a", [f"a cat no {k}" for k in range(8)])
    target = side("b", [f"A cat, no {k}!" for k in range(8)])
    expected = len(source.partition.train) + len(source.partition.validation)
    found = shared(source, target)
    assert found["with_a_prompt_of_the_source"] == expected
    assert found["with_a_prompt_of_the_source_verbatim"] == 0
    same = shared(source, replace(target, store=source.store))
    assert same["with_a_prompt_of_the_source"] == same["with_a_prompt_of_the_source_verbatim"] == expected
