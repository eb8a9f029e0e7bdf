"""No answer goes to another image: joining results of batches by the ids that the answers repeat."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agiqa.extract.teaching.batch_apis import BatchResult
from agiqa.extract.teaching.chats import Fault, Reply
from agiqa.extract.teaching.joining import MIXED_UP, join

IDS = ("a1", "b2", "c3", "d4")


def answer(text, *, refusal=None):
    known = {"finish_reason": "stop", "cut": False, "model": None, "input_tokens": 1, "output_tokens": 1}
    return Reply(text=text, refusal=refusal, **known)


def echoed(text):
    """The id before the colon; an answer without one cannot be read."""
    return text.partition(":")[0] if ":" in text else None


def line(key, about):
    return BatchResult(key=key, reply=answer(f"{about}: a text about {about}"))


REFUSED = answer("", refusal="SAFETY")
BROKEN = answer("{ broken")


def texts(joined):
    return {name: reply.text for name, reply in joined.replies.items() if isinstance(reply, Reply)}


def test_out_of_order_and_swapped_answers_find_their_items():
    keys = ["b2", "a1", "d4", "c3"]
    joined = join(IDS, [line(key, about) for key, about in zip(keys, IDS, strict=True)], echoed)
    assert texts(joined) == {name: f"{name}: a text about {name}" for name in IDS}
    assert joined.misplaced == 4
    assert joined.doubts == {}


def test_refusals_and_faults_go_by_the_key_while_no_key_is_wrong():
    fault = Fault(kind="item", reason="a bad image")
    results = [line("a1", "a1"), BatchResult(key="b2", reply=REFUSED), BatchResult(key="c3", reply=fault)]
    joined = join(IDS, results, echoed)
    assert joined.replies["b2"] is REFUSED
    assert joined.replies["c3"] is fault
    assert "d4" not in joined.replies.keys() | joined.doubts.keys()


@pytest.mark.parametrize("unsigned", [REFUSED, BROKEN, Fault(kind="item", reason="a bad image")])
@pytest.mark.parametrize(
    "other",
    [[line("a1", "b2"), line("b2", "a1")], [line("zz", "zz:")], [line("a1", "a1"), line("a1", "a1")]],
    ids=["swapped", "a foreign key", "one key twice"],
)
def test_nothing_without_an_id_is_believed_once_keys_are_wrong(unsigned, other):
    joined = join(IDS, [*other, BatchResult(key="c3", reply=unsigned)], echoed)
    assert "c3" not in joined.replies
    assert joined.doubts["c3"] == MIXED_UP


def test_an_unknown_id_is_nobodys():
    joined = join(IDS, [line("a1", "a7"), line("b2", "b2")], echoed)
    assert texts(joined) == {"b2": "b2: a text about b2"}
    assert joined.doubts == {"a1": "the answer repeats the id 'a7', which no request of the batch has"}
    assert joined.misplaced == 0


def test_a_key_that_agrees_beats_one_that_does_not_and_two_that_do_not_cancel_out():
    joined = join(IDS, [line("a1", "a1"), line("b2", "a1")], echoed)
    assert texts(joined) == {"a1": "a1: a text about a1"}
    assert joined.doubts == {"b2": MIXED_UP}
    joined = join(IDS, [line("b2", "a1"), line("c3", "a1")], echoed)
    assert joined.replies == {}
    assert joined.doubts == {"b2": MIXED_UP, "c3": MIXED_UP}


def test_requests_that_expired_are_neither_answered_nor_doubtful():
    joined = join(IDS, [line("a1", "a1"), BatchResult(key="b2", reply=None)], echoed)
    assert set(joined.replies) == {"a1"}
    assert joined.doubts == {}


@given(
    keys=st.permutations(IDS),
    missing=st.sets(st.sampled_from(range(4))),
    unsigned=st.sets(st.sampled_from(range(4))),
    seed=st.integers(0, 99),
)
def test_whatever_the_provider_does_with_keys_no_text_goes_to_another_item(keys, missing, unsigned, seed):
    results = [
        BatchResult(key=key, reply=REFUSED if number in unsigned else answer(f"{about}: a text about {about}"))
        for number, (key, about) in enumerate(zip(keys, IDS, strict=True))
        if number not in missing
    ]
    random.Random(seed).shuffle(results)
    joined = join(IDS, results, echoed)
    written = {IDS[number] for number in range(4) if number not in missing | unsigned}
    assert texts(joined) == {name: f"{name}: a text about {name}" for name in written} | {
        name: "" for name, reply in joined.replies.items() if reply is REFUSED
    }
    pairs = itertools.chain(joined.replies, joined.doubts)
    assert len(set(joined.replies) & set(joined.doubts)) == 0
    assert set(pairs) <= set(IDS)
