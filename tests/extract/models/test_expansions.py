"""Expansions are used where they were seen twice, and never again once they differ."""

import numpy as np

from agiqa.extract.models.expansions import Expansions

MARK, IMAGE, SIZE = 9, 7, (64, 48)


def text(*words):
    """A text of these words with an image before them."""
    ids = np.array([1, 2, MARK, *words], np.int32)
    return ids, np.array([0, 0, 0, *[2] * len(words)], np.uint8)


def whole(count, *words):
    """The same text with `count` image tokens."""
    ids = np.array([1, 2, 5, *[IMAGE] * count, 6, *words], np.int32)
    return ids, np.array([0, 0, 0, *[1] * count, 0, *[2] * len(words)], np.uint8)


BEGINNING = tuple(range(20, 30))
"""As many words as must be the same."""


def same(found, expected):
    return found is not None and all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_third_conversation_is_expanded():
    known = Expansions()
    for last in (3, 4):
        assert known.expanded(SIZE, text(*BEGINNING, last)) is None
        known.learn(SIZE, text(*BEGINNING, last), whole(12, *BEGINNING, last))
    assert same(known.expanded(SIZE, text(*BEGINNING, 5, 6)), whole(12, *BEGINNING, 5, 6))
    assert same(known.expanded(SIZE, text(*BEGINNING)), whole(12, *BEGINNING))
    assert known.expanded((48, 64), text(*BEGINNING)) is None
    assert known.expanded(SIZE, text(30, *BEGINNING)) is None


def test_one_token_in_the_place_of_the_mark_is_found_by_its_role():
    known = Expansions()
    seen = text(*BEGINNING)[1].copy()
    seen[2] = 1
    for _ in range(2):
        known.learn(SIZE, text(*BEGINNING), (text(*BEGINNING)[0], seen))
    found = known.expanded(SIZE, text(*BEGINNING, 5))
    assert same(found, (text(*BEGINNING, 5)[0], np.append(seen, np.uint8(2))))


def test_expansions_that_differ_once_are_never_used_again():
    known = Expansions()
    for count in (12, 13, 13, 13):
        known.learn(SIZE, text(*BEGINNING), whole(count, *BEGINNING))
        assert known.expanded(SIZE, text(*BEGINNING)) is None
    assert not known.repeat
